package main

import (
	"context"
	"net/netip"
	"os"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"tailscale.com/tailcfg"
)

const (
	// flushLimit bounds how long close waits for the peers to acknowledge
	// what was written.
	flushLimit = 2 * time.Second
	// resetLimit bounds how long close waits for resets to reach the peers.
	resetLimit = time.Second
)

// close stops the node once. Calls in progress are cancelled and awaited first, since
// tsnet must not be closed beneath them. It fails only if an ephemeral node could not
// be logged out.
func (n *node) close() (failed error) {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil
	}
	n.closed = true
	started := n.started
	n.mu.Unlock()

	n.cancel()
	n.pending.Wait() // from here on nothing opens a connection, listens or sets self
	n.endListeners()
	n.self.Store(nil)
	if started {
		n.flush()
		n.abortAll()
		n.server.Close()
		os.RemoveAll(n.scratch) // builds without the build-tags cache the network map there
		if n.staysListed.Load() && !n.removed.Load() {
			failed = codeControlUnreachable
		}
	}
	if n.events != nil {
		n.events.Close()
	}
	n.logs.close()
	return failed
}

// flush waits, up to flushLimit, until connections with closed handles have ended:
// closing the stack drops queued bytes, and a reset may destroy bytes that the peer has
// received but not read.
func (n *node) flush() {
	deadline := time.Now().Add(flushLimit)
	for n.ending() > 0 && time.Now().Before(deadline) {
		time.Sleep(5 * time.Millisecond)
	}
}

// abortAll resets the remaining connections while the stack can still send. tsnet does
// so only after its sender has stopped: the resets would be lost and, from the 513th
// on, block for ever on the sender's queue (wgengine/netstack/link_endpoint.go,
// queue.Write).
func (n *node) abortAll() {
	peers := make(map[netip.Addr]bool)
	for _, registered := range n.stack.RegisteredEndpoints() {
		if ep, ok := registered.(*tcp.Endpoint); ok && ep.EndpointState() != tcp.StateTimeWait {
			if remote, err := ep.GetRemoteAddress(); err == nil {
				ip, _ := netip.AddrFromSlice(remote.Addr.AsSlice())
				peers[ip] = true
			}
		}
		registered.Abort()
	}
	n.awaitSent(peers)
}

// awaitSent waits, up to resetLimit, until the resets have left: packets still on their
// way through WireGuard when the node closes are lost, and the peer would keep half a
// message until its own time-out. A ping inside WireGuard takes the same path and is
// answered. There are two pings, since the first may overtake packets that the stack
// has not handed over yet.
func (n *node) awaitSent(peers map[netip.Addr]bool) {
	ctx, cancel := context.WithTimeout(context.Background(), resetLimit)
	defer cancel()
	var pings sync.WaitGroup
	for ip := range peers {
		pings.Go(func() {
			for range 2 {
				n.backend.Ping(ctx, ip, tailcfg.PingTSMP, 0)
			}
		})
	}
	pings.Wait()
}

// ending counts the endpoints without a handle that still have bytes or a FIN to
// deliver or to receive.
func (n *node) ending() int {
	held := make(map[tcpip.Endpoint]bool)
	conns.each(func(c *conn) { held[c.ep] = true })
	count := 0
	for _, registered := range n.stack.RegisteredEndpoints() {
		ep, ok := registered.(*tcp.Endpoint)
		if !ok || held[ep] {
			continue
		}
		switch ep.EndpointState() {
		case tcp.StateEstablished, tcp.StateCloseWait, tcp.StateFinWait1, tcp.StateFinWait2,
			tcp.StateClosing, tcp.StateLastAck:
			count++
		}
	}
	return count
}
