package main

import (
	"fmt"
	"net/netip"
	"sync"

	"tailscale.com/net/connreject"
	"tailscale.com/types/ipproto"
)

// rejects informs connections that are being made when their peer has dropped the SYN.
// TCP does not notice it: Tailscale's packet filter drops the packet and reports that
// in a message of its own (TSMP). Peers send it for IPv4 only, and it may be turned
// off, so silence does not prove that the port is allowed.
//
// The message counts for the addresses of its own packet, which WireGuard has
// authenticated (net/packet/tsmp.go, AsTailscaleRejectedHeader): only the peer that is
// dialled can send one. It can end an attempt, never an established connection.
type rejects struct {
	mu      sync.Mutex // also held during a wake: no connection is closed meanwhile
	awaited map[tuple]*conn
}

// tuple is a connection, seen from here.
type tuple struct{ local, remote netip.AddrPort }

// attempt identifies a connection that is being made.
type attempt struct {
	rejects *rejects
	tuple   tuple
}

// rejectCallbacker delivers the messages: Tailscale's engine (wgengine/connreject.go,
// built without ts_omit_connreject and ts_omit_debug).
type rejectCallbacker interface {
	SetConnRejectCallback(func(connreject.Event))
}

// hearRejects begins to pass the peers' messages on.
func (n *node) hearRejects() error {
	engine := n.server.Sys().Engine.Get()
	source, ok := engine.(rejectCallbacker)
	if !ok {
		return fmt.Errorf("%T does not report rejected connections: this version of tailscale.com is not supported", engine)
	}
	source.SetConnRejectCallback(n.rejects.take)
	return nil
}

// take runs while a packet is received, so it waits for locks only.
func (r *rejects) take(event connreject.Event) {
	reason, final := codeOfReject(event)
	if !final {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.awaited[tuple{event.Src, event.Dst}]; c != nil && c.reject(reason) {
		wake(c.token, readable|writable)
	}
}

// codeOfReject is the code that a message means for an attempt; final: the message ends
// the attempt.
func codeOfReject(event connreject.Event) (reason code, final bool) {
	if event.Source != connreject.SourceTSMPRecv || event.Proto != ipproto.TCP || event.MaybeBroken {
		return 0, false
	}
	switch event.Reason {
	case connreject.ReasonACL:
		return codeDenied, true
	case connreject.ReasonShields:
		return codeShieldsUp, true
	default:
		return 0, false
	}
}

// await registers a connection for messages. If one came before, another follows when
// the SYN is repeated, after a second.
func (r *rejects) await(c *conn, local, remote netip.AddrPort) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c.attempt.Store(&attempt{r, tuple{local, remote}})
	r.awaited[tuple{local, remote}] = c
}

// settle ends await, once the connection is made, has failed or is closed. c.mu must
// not be held.
func (c *conn) settle() {
	a := c.attempt.Swap(nil)
	if a == nil {
		return
	}
	a.rejects.mu.Lock()
	defer a.rejects.mu.Unlock()
	// By now another connection may have the same addresses.
	if a.rejects.awaited[a.tuple] == c {
		delete(a.rejects.awaited, a.tuple)
	}
}

// reject ends a connection that is being made; false if it is not.
func (c *conn) reject(reason code) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stateLocked() != codeWouldBlock {
		return false
	}
	c.failed = reason
	return true
}
