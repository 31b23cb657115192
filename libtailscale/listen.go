package main

import (
	"net"
	"net/netip"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/waiter"
)

// listeners holds every listener for which C has a handle.
var listeners table[listener]

// listener takes connections from peers to one port of the node. They wait in it
// until C accepts them, and nothing is read from them before: neither a
// listener nor a connection in it has a goroutine or a buffer of ours.
//
// It stays when the node loses its place on the tailnet, and ends with the node.
type listener struct {
	node       *node
	port       uint16
	backlog    int
	token      uintptr
	unregister func()

	// mu also orders wakes before the end: there are none after it.
	mu      sync.Mutex
	ended   bool
	waiting []*conn
}

// listen begins to take connections to a port of the node's own addresses. If backlog
// connections wait to be accepted, further ones are refused.
func (n *node) listen(port uint16, backlog int, token uintptr) (*listener, error) {
	l := &listener{node: n, port: port, backlog: backlog, token: token}
	n.listenMu.Lock()
	defer n.listenMu.Unlock()
	if n.listening[port] != nil {
		return nil, codeBadState
	}
	l.unregister = n.server.RegisterFallbackTCPHandler(l.offer)
	n.listening[port] = l
	return l, nil
}

// tsnet calls offer, before the handshake, for every connection that the tailnet's
// policy lets through to this node: handler takes the connection, and intercept says
// that no other handler is asked.
func (l *listener) offer(_, to netip.AddrPort) (handler func(net.Conn), intercept bool) {
	self := l.node.self.Load()
	if to.Port() != l.port || self == nil || to.Addr() != self.v4 && to.Addr() != self.v6 {
		return nil, false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.isFull() {
		return nil, true // answered with a reset
	}
	return l.take, true
}

// isFull is whether there is no place for another connection. l.mu is held.
func (l *listener) isFull() bool { return l.ended || len(l.waiting) >= l.backlog }

// take keeps a connection for accept. tsnet wraps the stack's endpoint for Go; the
// endpoint inside serves C like a dialled one.
func (l *listener) take(wrapped net.Conn) {
	c, err := unwrap(wrapped)
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err != nil:
		l.node.log("accepting: %v", err)
		wrapped.Close()
	case l.isFull(): // full only since offer; tsnet limits the number of handshakes
		c.drop()
	default:
		l.waiting = append(l.waiting, c)
		wake(l.token, readable)
	}
}

// unwrap takes the endpoint and its queue out of a gonet.TCPConn, which nobody
// uses afterwards. Both are unexported fields; a test pins their names and types.
func unwrap(wrapped net.Conn) (*conn, error) {
	tcpConn, ok := wrapped.(*gonet.TCPConn)
	if !ok {
		return nil, codeError
	}
	ep, err := field[tcpip.Endpoint](tcpConn, "ep")
	if err != nil {
		return nil, err
	}
	queue, err := field[*waiter.Queue](tcpConn, "wq")
	if err != nil {
		return nil, err
	}
	c := &conn{ep: ep, queue: queue}
	if terr := c.prepare(); terr != nil {
		return nil, codeOf(terr)
	}
	c.lowerReceiveBuffer()
	return c, nil
}

// accept hands over the connection that has waited longest. Wakes with its token begin
// now; earlier events show when its state is asked.
func (l *listener) accept(token uintptr) (*conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.waiting) == 0 {
		if l.ended {
			return nil, codeNotRunning
		}
		return nil, codeWouldBlock
	}
	c := l.waiting[0]
	l.waiting = l.waiting[1:]
	c.token = token
	c.subscribe()
	return c, nil
}

// end stops taking connections and resets those that nobody has accepted. The owner is
// woken once for this, and then never again.
func (l *listener) end() {
	n := l.node
	n.listenMu.Lock()
	if n.listening[l.port] == l {
		delete(n.listening, l.port)
	}
	n.listenMu.Unlock()
	l.unregister()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return
	}
	l.ended = true
	for _, c := range l.waiting {
		c.drop()
	}
	l.waiting = nil
	wake(l.token, readable)
}

// drop resets a connection that has no handle.
func (c *conn) drop() {
	c.ep.Abort()
	c.ep.Close()
}

// endListeners ends the listeners of a node that closes.
func (n *node) endListeners() {
	n.listenMu.Lock()
	var all []*listener
	for _, l := range n.listening {
		all = append(all, l)
	}
	n.listenMu.Unlock()
	for _, l := range all {
		l.end()
	}
}
