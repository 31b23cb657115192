package testnet

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"tailscale.com/net/packet"
	"tailscale.com/net/tstun"
	"tailscale.com/types/ipproto"
	"tailscale.com/types/logger"
	"tailscale.com/wgengine/filter"
)

// Limits for dialling a forward's target, which is on this host.
const (
	// decideTimeout is how long the answer to a SYN waits for the target to accept or
	// refuse. Both take microseconds on loopback. A target with a full backlog takes
	// longer, and then the SYN is accepted. The time is short because tsnet holds a lock
	// meanwhile.
	decideTimeout = 250 * time.Millisecond
	// targetTimeout is how long the target may take to accept.
	targetTimeout = 10 * time.Second
	// handshakeTimeout is how long an open connection to the target waits for the tailnet
	// side's handshake to finish, before it counts as abandoned.
	handshakeTimeout = 30 * time.Second
)

// forwards is a node's table of forwarded ports.
//
// It is a fallback handler and not a set of listeners: it is asked before a SYN is
// answered. So from the tailnet a server that is down looks as on a real host (the SYN
// is refused), and so does a port without a forward.
type forwards struct {
	logf        logger.Logf
	open, total atomic.Int64 // connections

	// showPeers makes connections come from an address for each peer, as on a real
	// host: from 127.64.0.2 for 100.64.0.2. The target has to be on IPv4 loopback.
	showPeers atomic.Bool

	mu      sync.Mutex
	to      map[uint16]string
	dropped map[uint16]bool // ports that the host's firewall drops
}

func newForwards(to map[uint16]string, logf logger.Logf) *forwards {
	f := &forwards{logf: logf, to: make(map[uint16]string), dropped: make(map[uint16]bool)}
	maps.Copy(f.to, to)
	return f
}

func (f *forwards) set(port uint16, to string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.to[port] = to
}

func (f *forwards) unset(port uint16) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.to[port]; !ok {
		return fmt.Errorf("port %d is not forwarded", port)
	}
	delete(f.to, port)
	return nil
}

func (f *forwards) drop(port uint16, on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dropped[port] = on
}

// firewall is the host's decision about a packet that Tailscale's filter let through.
func (f *forwards) firewall(p *packet.Parsed, _ *tstun.Wrapper) filter.Response {
	f.mu.Lock()
	defer f.mu.Unlock()
	if p.IPProto == ipproto.TCP && f.dropped[p.Dst.Port()] {
		return filter.DropSilently
	}
	return filter.Accept
}

func (f *forwards) target(port uint16) (string, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	to, ok := f.to[port]
	return to, ok
}

// handle decides about a SYN; it is a tsnet.FallbackTCPHandler. A nil handler
// refuses the connection with a RST.
func (f *forwards) handle(src, dst netip.AddrPort) (handler func(net.Conn), intercept bool) {
	to, ok := f.target(dst.Port())
	if !ok {
		return nil, true
	}
	dial := startDial(f.source(src.Addr()), to)
	select {
	case <-dial.done:
		if dial.err != nil {
			f.logf("forward %v -> %v: refused: %v", src, dst, dial.err)
			return nil, true
		}
	case <-time.After(decideTimeout):
	}
	abandoned := time.AfterFunc(handshakeTimeout, dial.abandon)
	return func(c net.Conn) {
		abandoned.Stop()
		f.serve(c, dial)
	}, true
}

// source is the local address of the connection to a target; nil leaves it to the
// kernel.
func (f *forwards) source(peer netip.Addr) net.Addr {
	if !f.showPeers.Load() || !peer.Is4() {
		return nil
	}
	ip := peer.As4()
	return &net.TCPAddr{IP: net.IPv4(127, ip[1], ip[2], ip[3])}
}

// serve relays one tailnet connection until both sides have ended it.
func (f *forwards) serve(c net.Conn, dial *pendingDial) {
	f.open.Add(1)
	f.total.Add(1)
	defer f.open.Add(-1)

	tailnet, err := newTailnetLeg(c)
	if err != nil {
		// gVisor has changed. Without a panic, tests would hang and not show the reason.
		panic(err)
	}
	<-dial.done
	if dial.err != nil {
		f.logf("forward: %v", dial.err)
		tailnet.reset()
		tailnet.close()
		return
	}
	server, err := newServerLeg(dial.conn)
	if err != nil {
		panic(err)
	}
	relay(tailnet, server)
}

// pendingDial is a connection to a target in the making.
type pendingDial struct {
	done chan struct{} // closed when conn or err is set
	conn *net.TCPConn
	err  error
}

func startDial(source net.Addr, to string) *pendingDial {
	d := &pendingDial{done: make(chan struct{})}
	go func() {
		defer close(d.done)
		dialer := net.Dialer{Timeout: targetTimeout, LocalAddr: source}
		c, err := dialer.Dial("tcp", to)
		if err != nil {
			d.err = err
			return
		}
		d.conn = c.(*net.TCPConn)
	}()
	return d
}

// abandon ends a dial that nobody will use.
func (d *pendingDial) abandon() {
	<-d.done
	if d.conn != nil {
		d.conn.Close()
	}
}
