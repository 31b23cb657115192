package main

import (
	"bytes"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// TCP keepalive towards the peer. It notices a server that has dropped an idle
// connection without a FIN while its node lives on. If the whole node is gone, pings
// notice it sooner, and do not take an outage of our own for the peer's. tsnet sets
// keepalive on accepted connections only, and the stack's defaults are two hours. Tests
// make it short.
var (
	keepaliveIdle     = 60 * time.Second
	keepaliveInterval = 15 * time.Second
	keepaliveCount    = 4
)

// orphanTimeout is how long a peer may accept nothing on a connection that we have
// closed with bytes left to deliver. The stack itself has no limit for a live peer that
// keeps its window shut, and its keepalive pauses while bytes are outstanding. Linux
// gives its orphans about as long (tcp_orphan_retries). Tests make it short.
var orphanTimeout = 2 * time.Minute

// conns holds every connection for which C has a handle.
var conns table[conn]

// wake tells C that the connection of a token became ready. It is set once,
// by tailscale_set_wake (or by a test), before the first connection or listener.
var wake = func(token uintptr, ready uint32) {}

// conn is one TCP connection on the node's network stack, offered as
// non-blocking calls and wakes. It has no goroutine and no buffer of its own.
//
// Calls on one conn must not overlap, except that the stack calls notify at
// any time, also from within a call; notify therefore takes no lock of ours.
type conn struct {
	ep    tcpip.Endpoint
	queue *waiter.Queue
	entry waiter.Entry // registered on queue from open or accept to close
	token uintptr

	// attempt is set while the connection is being made; see reject.go.
	attempt atomic.Pointer[attempt]

	// floor is how many sent bytes it may always hold; for received bytes it is twice as
	// much. Set once.
	floor int64

	// flow is set while the connection may hold more than the floor; see budget.go.
	flow atomic.Pointer[flow]

	mu sync.Mutex
	// sizes tells large writes from small ones; see narrow.
	sizes writeSizes
	// received counts the bytes that were read since the connection left the budget, up to
	// the floor.
	received int
	// failed is the first error of the connection. The stack reports an
	// error once and then looks like a clean end, so it must be kept.
	failed code
}

// subscribe registers for wakes. It must come before Connect, so that no event
// is missed.
func (c *conn) subscribe() {
	c.entry = waiter.NewFunctionEntry(
		waiter.ReadableEvents|waiter.WritableEvents|waiter.EventHUp|waiter.EventErr|waiter.EventRdHUp,
		c.notify)
	c.queue.EventRegister(&c.entry)
}

// notify runs under locks of the stack, so it only passes the event on.
func (c *conn) notify(events waiter.EventMask) {
	const ended = waiter.EventHUp | waiter.EventErr
	var ready uint32
	if events&(waiter.ReadableEvents|waiter.EventRdHUp|ended) != 0 {
		ready |= readable
	}
	if events&(waiter.WritableEvents|ended) != 0 {
		ready |= writable
	}
	wake(c.token, ready)
}

// prepare sets what every connection has, dialled or accepted.
func (c *conn) prepare() tcpip.Error {
	// This turns off the stack's own tuning, which lets a buffer grow as long as the peer
	// is slow; see budget.go.
	c.floor = flowBudget.floor()
	c.ep.SocketOptions().SetSendBufferSize(c.floor, true)
	return setKeepalive(c.ep)
}

// lowerReceiveBuffer is called after the handshake: before it, the window's scale,
// which never changes, would fit the floor only.
func (c *conn) lowerReceiveBuffer() {
	if c.floor < mostFloor && c.flow.Load() == nil {
		c.ep.SocketOptions().SetReceiveBufferSize(2*c.floor, false)
	}
}

func setKeepalive(ep tcpip.Endpoint) tcpip.Error {
	idle := tcpip.KeepaliveIdleOption(keepaliveIdle)
	if err := ep.SetSockOpt(&idle); err != nil {
		return err
	}
	interval := tcpip.KeepaliveIntervalOption(keepaliveInterval)
	if err := ep.SetSockOpt(&interval); err != nil {
		return err
	}
	if err := ep.SetSockOptInt(tcpip.KeepaliveCountOption, keepaliveCount); err != nil {
		return err
	}
	ep.SocketOptions().SetKeepAlive(true)
	return nil
}

// state is nil when connected, codeWouldBlock while connecting.
func (c *conn) state() error {
	state := c.look()
	if state != codeWouldBlock {
		c.settle()
	}
	if state == nil {
		c.lowerReceiveBuffer()
	}
	return state
}

func (c *conn) look() error {
	c.mu.Lock()
	defer c.mu.Unlock() // also after a panic in the stack
	return c.stateLocked()
}

func (c *conn) stateLocked() error {
	if c.failed != 0 {
		return c.failed
	}
	switch tcp.EndpointState(c.ep.State()) {
	case tcp.StateInitial, tcp.StateBound, tcp.StateConnecting, tcp.StateSynSent, tcp.StateSynRecv:
		return codeWouldBlock
	case tcp.StateError:
		return c.fail(c.ep.LastError())
	case tcp.StateClose:
		// Both sides have ended, or a reset came after the peer's FIN; only this error shows
		// which.
		if err := c.ep.LastError(); err != nil {
			return c.fail(err)
		}
	}
	return nil
}

// fail keeps the first error and returns it. A failed endpoint whose error
// was already taken counts as reset.
func (c *conn) fail(err tcpip.Error) code {
	if c.failed == 0 {
		c.failed = codeReset
		if err != nil {
			c.failed = codeOf(err)
		}
	}
	return c.failed
}

// read copies received bytes into p; 0 without an error is the end of the
// stream. An error comes after every byte that was received before it.
func (c *conn) read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(p) == 0 {
		return 0, nil
	}
	w := tcpip.SliceWriter(p)
	result, err := c.ep.Read(&w, tcpip.ReadOptions{})
	if err == nil {
		c.noteReceived(result.Count)
		return result.Count, nil
	}
	switch err.(type) {
	case *tcpip.ErrWouldBlock:
		if c.failed != 0 {
			return 0, c.failed
		}
		return 0, codeWouldBlock
	case *tcpip.ErrNotConnected:
		if err := c.stateLocked(); err != nil {
			return 0, err
		}
		return 0, codeBadState
	case *tcpip.ErrClosedForReceive:
		return 0, c.endOfStreamLocked()
	default:
		return 0, c.fail(err)
	}
}

// endOfStreamLocked returns nil for the peer's FIN, or the failure if one was already
// reported and now looks like a FIN.
func (c *conn) endOfStreamLocked() error {
	if err := c.stateLocked(); err != codeWouldBlock {
		return err
	}
	return nil
}

// write queues as many bytes of p as the send buffer takes.
func (c *conn) write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failed != 0 {
		return 0, c.failed
	}
	if len(p) == 0 {
		return 0, nil
	}
	var payload bytes.Reader
	payload.Reset(p)
	n, err := c.ep.Write(&payload, tcpip.WriteOptions{})
	if err == nil {
		if c.sizes.note(len(p)) {
			c.narrow(c.sizes.areSmall)
		}
		c.noteSent(int(n), int(n) < len(p))
		return int(n), nil
	}
	switch err.(type) {
	case *tcpip.ErrWouldBlock:
		c.noteSent(0, true)
		return 0, codeWouldBlock
	case *tcpip.ErrClosedForSend:
		// After our own shutdown, or after a failure that the stack has
		// already reported.
		if err := c.stateLocked(); err != nil {
			return 0, err
		}
		return 0, codeClosed
	default:
		return 0, c.fail(err)
	}
}

// noteSent reports a write to the budget; blocked: not all of it was taken.
func (c *conn) noteSent(n int, blocked bool) {
	f := c.flow.Load()
	if f == nil {
		if !blocked {
			return
		}
		f = c.joinBudget()
	}
	f.send.moved.Add(int64(n))
	f.send.blocked.Store(blocked)
}

// noteReceived reports a read to the budget. A connection that has read little needs no
// larger window.
func (c *conn) noteReceived(n int) {
	f := c.flow.Load()
	if f == nil {
		if c.received += n; int64(c.received) < 2*c.floor {
			return
		}
		f = c.joinBudget()
	}
	f.recv.moved.Add(int64(n))
}

func (c *conn) joinBudget() *flow {
	c.received = 0
	return flowBudget.join(c)
}

// shutdown sends a FIN after what was written.
func (c *conn) shutdown() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.stateLocked(); err != nil {
		return err
	}
	switch err := c.ep.Shutdown(tcpip.ShutdownWrite); err.(type) {
	case nil, *tcpip.ErrNotConnected: // the latter: both sides are done already
		return nil
	default:
		return c.fail(err)
	}
}

// abort sends a RST. The connection counts as reset from here on.
func (c *conn) abort() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failed == 0 {
		c.failed = codeReset
	}
	c.ep.Abort()
}

// close gives the endpoint back to the stack, which still delivers what was written, as
// long as the peer accepts some of it within orphanTimeout. settle and EventUnregister
// wait for a wake in progress, so the token is free when close returns.
func (c *conn) close() {
	c.settle()
	if f := c.flow.Load(); f != nil {
		flowBudget.leave(f)
	}
	c.queue.EventUnregister(&c.entry)
	timeout := tcpip.TCPUserTimeoutOption(orphanTimeout)
	c.ep.SetSockOpt(&timeout) // cannot fail on TCP
	c.ep.Close()
}
