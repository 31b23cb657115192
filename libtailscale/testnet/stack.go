package testnet

import (
	"context"
	"fmt"
	"reflect"
	"unsafe"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"tailscale.com/wgengine/netstack"
)

// nicID is the only network interface of a node's stack (netstack.nicID).
const nicID = 1

// unplug takes the network interface out of the node's stack, so that nothing
// leaves it any more.
//
// It is to be called before the server is closed, for two reasons. A stopped node
// should be silent, like a host that goes down, and not reset its connections first.
// And netstack.Impl.Close hangs for ever otherwise if there are many connections, those
// in TIME_WAIT included: it stops the reader of the outgoing queue, and then writes a
// RST for each of them into that queue, which takes 512 packets.
func (rn *runningNode) unplug() error {
	impl, ok := rn.Sys().Netstack.Get().(*netstack.Impl)
	if !ok {
		return fmt.Errorf("the node's stack is a %T, want *netstack.Impl", rn.Sys().Netstack.Get())
	}
	var ipstack *stack.Stack
	if err := readField(impl, "ipstack", &ipstack); err != nil {
		return err
	}
	// The reader of the outgoing queues takes it for a bug if they are closed before this.
	var cancel context.CancelFunc
	if err := readField(impl, "ctxCancel", &cancel); err != nil {
		return err
	}
	cancel()
	if err := ipstack.RemoveNIC(nicID); err != nil {
		return fmt.Errorf("removing the network interface of %q: %v", rn.name, err)
	}
	return nil
}

// readField reads the unexported field of *s into out, once its type is as
// expected.
func readField[S, T any](s *S, name string, out *T) error {
	f := reflect.ValueOf(s).Elem().FieldByName(name)
	if !f.IsValid() || f.Type() != reflect.TypeFor[T]() {
		return fmt.Errorf("testnet: %T has no field %q of type %v: a dependency has changed", s, name, reflect.TypeFor[T]())
	}
	*out = *(*T)(unsafe.Pointer(f.UnsafeAddr()))
	return nil
}
