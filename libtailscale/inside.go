package main

import (
	"fmt"
	"reflect"
	"time"
	"unsafe"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"tailscale.com/ipn/ipnlocal"
	"tailscale.com/wgengine/netstack"
)

// timeWait is how long the stack remembers a connection that we closed
// first. TCP's 60 s would keep 120,000 endpoints at 2,000 sessions a
// second; inside WireGuard, which drops replays, and with random initial
// sequence numbers, old duplicates are no concern.
const timeWait = 5 * time.Second

// reachInside takes two parts that tsnet does not export: the TCP/IP stack, for
// connections without goroutines, and the backend, which knows the network map. Both
// are unexported fields; a test pins their names and types.
func (n *node) reachInside() error {
	impl, ok := n.server.Sys().Netstack.Get().(*netstack.Impl)
	if !ok {
		return fmt.Errorf("tsnet's netstack is a %T", n.server.Sys().Netstack.Get())
	}
	var err error
	if n.stack, err = field[*stack.Stack](impl, "ipstack"); err != nil {
		return err
	}
	if n.backend, err = field[*ipnlocal.LocalBackend](n.server, "lb"); err != nil {
		return err
	}
	if err := n.lowerBuffers(); err != nil {
		return err
	}
	wait := tcpip.TCPTimeWaitTimeoutOption(timeWait)
	if err := n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &wait); err != nil {
		return fmt.Errorf("setting TIME_WAIT: %v", err)
	}
	reuse := tcpip.TCPTimeWaitReuseGlobal
	if err := n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &reuse); err != nil {
		return fmt.Errorf("allowing reuse of TIME_WAIT: %v", err)
	}
	return n.hearRejects()
}

// lowerBuffers lets every connection begin with the floor; see budget.go. The maxima
// stay, since they decide the window's scale, which never changes.
func (n *node) lowerBuffers() error {
	var send tcpip.TCPSendBufferSizeRangeOption
	var recv tcpip.TCPReceiveBufferSizeRangeOption
	err := n.stack.TransportProtocolOption(tcp.ProtocolNumber, &send)
	if err == nil {
		err = n.stack.TransportProtocolOption(tcp.ProtocolNumber, &recv)
	}
	send.Min, send.Default, recv.Default = leastNarrow, mostFloor, 2*mostFloor
	if err == nil {
		err = n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &send)
	}
	if err == nil {
		err = n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &recv)
	}
	if err != nil {
		return fmt.Errorf("setting the size of buffers: %v", err)
	}
	return nil
}

// field reads an unexported field of the struct that object points to.
func field[T any](object any, name string) (T, error) {
	var none T
	v := reflect.ValueOf(object).Elem().FieldByName(name)
	if !v.IsValid() {
		return none, fmt.Errorf("%T has no field %s: this version of tailscale.com is not supported", object, name)
	}
	if v.Type() != reflect.TypeFor[T]() {
		return none, fmt.Errorf("%T.%s is a %v, not a %v: this version of tailscale.com is not supported",
			object, name, v.Type(), reflect.TypeFor[T]())
	}
	// The field is addressable, of type T and initialised: server.Start
	// returned after writing it.
	return *(*T)(unsafe.Pointer(v.UnsafeAddr())), nil
}
