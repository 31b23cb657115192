package main

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
	"libtailscale/testnet"
)

func random(size int) []byte {
	b := make([]byte, size)
	rand.Read(b)
	return b
}

func TestHalfCloseByUsThenTheWholeReply(t *testing.T) {
	const size = 8 << 20
	sent, reply := random(size), random(size)
	got := make(chan []byte, 1)
	e := startEdge(t, func(c *net.TCPConn) {
		defer c.Close()
		all, _ := io.ReadAll(c)
		got <- all
		c.Write(reply)
	})
	b, err := dial(t, e.node, "mailbox", 25)
	check(t, err)
	defer b.close()
	_, err = b.Write(sent)
	check(t, err)
	b.shutdown()
	all, err := io.ReadAll(b)
	check(t, err)
	if !bytes.Equal(all, reply) || !bytes.Equal(<-got, sent) {
		t.Fatal("bytes differ")
	}
	_, err = conns.get(b.handle).write([]byte("x"))
	wantCode(t, err, codeClosed)
}

func TestHalfCloseByThePeerThenTheWholeUpload(t *testing.T) {
	const size = 8 << 20
	greeting, sent := random(size), random(size)
	got := make(chan []byte, 1)
	e := startEdge(t, func(c *net.TCPConn) {
		defer c.Close()
		c.Write(greeting)
		c.CloseWrite()
		all, _ := io.ReadAll(c)
		got <- all
	})
	b, err := dial(t, e.node, "mailbox", 25)
	check(t, err)
	defer b.close()
	all, err := io.ReadAll(b)
	check(t, err)
	_, err = b.Write(sent)
	check(t, err)
	b.shutdown()
	if !bytes.Equal(all, greeting) || !bytes.Equal(<-got, sent) {
		t.Fatal("bytes differ")
	}
}

// A reset is an error, at every later call too, and never the end of a stream.
func TestResetByThePeer(t *testing.T) {
	reset := make(chan struct{})
	e := startEdge(t, func(c *net.TCPConn) {
		c.Write([]byte("before"))
		<-reset
		c.SetLinger(0)
		c.Close()
	})
	b, err := dial(t, e.node, "mailbox", 25)
	check(t, err)
	defer b.close()
	buf := make([]byte, 6)
	_, err = io.ReadFull(b, buf)
	check(t, err)
	close(reset)
	for range 3 {
		_, err = b.Read(buf)
		wantCode(t, err, codeReset)
	}
	_, err = b.Write(buf)
	wantCode(t, err, codeReset)
	wantCode(t, conns.get(b.handle).state(), codeReset)
}

// A reset that comes after the peer's FIN is still seen by the writer.
func TestResetAfterThePeersFIN(t *testing.T) {
	reset := make(chan struct{})
	e := startEdge(t, func(c *net.TCPConn) {
		c.Write([]byte("bye"))
		c.CloseWrite()
		<-reset
		c.SetLinger(0)
		c.Close()
	})
	b, err := dial(t, e.node, "mailbox", 25)
	check(t, err)
	defer b.close()
	all, err := io.ReadAll(b)
	check(t, err)
	if string(all) != "bye" {
		t.Fatalf("got %q", all)
	}
	close(reset)
	eventually(t, "the reset is known", func() bool { return errors.Is(conns.get(b.handle).state(), codeReset) })
	_, err = b.Write([]byte("x"))
	wantCode(t, err, codeReset)
}

// What arrived before a reset is delivered before the error.
func TestBytesBeforeAResetAreDelivered(t *testing.T) {
	written := make(chan struct{})
	finish := make(chan struct{})
	e := startEdge(t, func(c *net.TCPConn) {
		c.Write([]byte("last words"))
		close(written)
		<-finish
		c.SetLinger(0)
		c.Close()
	})
	b, err := dial(t, e.node, "mailbox", 25)
	check(t, err)
	defer b.close()
	<-written
	ep := conns.get(b.handle).ep.(*tcp.Endpoint)
	eventually(t, "the bytes have arrived", func() bool { return ep.Stats().(*tcp.Stats).SegmentsReceived.Value() > 1 })
	close(finish)
	eventually(t, "the reset has arrived", func() bool { return ep.EndpointState() == tcp.StateError })
	all, err := io.ReadAll(b)
	wantCode(t, err, codeReset)
	if string(all) != "last words" {
		t.Fatalf("got %q", all)
	}
}

func TestOurAbortReachesThePeer(t *testing.T) {
	failure := make(chan error, 1)
	e := startEdge(t, func(c *net.TCPConn) {
		defer c.Close()
		c.Write([]byte("220"))
		_, err := io.ReadAll(c)
		failure <- err
	})
	b, err := dial(t, e.node, "mailbox", 25)
	check(t, err)
	_, err = io.ReadFull(b, make([]byte, 3))
	check(t, err)
	conns.get(b.handle).abort()
	_, err = b.Read(make([]byte, 1))
	wantCode(t, err, codeReset)
	b.close()
	if err := <-failure; err == nil {
		t.Fatal("the peer saw an orderly end")
	}
}

// An idle connection survives as many rounds of keepalive as 35 minutes have, and ends
// soon after its peer is gone without a FIN.
func TestKeepalive(t *testing.T) {
	idle, interval, count := keepaliveIdle, keepaliveInterval, keepaliveCount
	keepaliveIdle, keepaliveInterval, keepaliveCount = 100*time.Millisecond, 500*time.Millisecond, 4
	t.Cleanup(func() { keepaliveIdle, keepaliveInterval, keepaliveCount = idle, interval, count })
	e := startEdge(t, echo)
	b, err := dial(t, e.node, "mailbox", 25)
	check(t, err)
	defer b.close()
	time.Sleep(35 * keepaliveIdle)
	_, err = b.Write([]byte("x"))
	check(t, err)
	_, err = io.ReadFull(b, make([]byte, 1))
	check(t, err)

	check(t, e.net.IsolateNode("mailbox"))
	_, err = b.Read(make([]byte, 1))
	wantCode(t, err, codeTimedOut)
}

// Owners of the peer's connections are woken, whoever the caller is; connections to
// other peers stay.
func TestAbortPeer(t *testing.T) {
	e := startEdge(t, echo)
	_, err := e.net.AddNode(testnet.NodeConfig{Name: "other", Tags: []string{"tag:mailbox"},
		Forward: map[uint16]string{25: listen(t, echo)}})
	check(t, err)
	gone, err := dial(t, e.node, "mailbox", 25)
	check(t, err)
	defer gone.close()
	kept, err := dial(t, e.node, "other", 25)
	check(t, err)
	defer kept.close()
	failed := make(chan error, 1)
	go func() {
		_, err := gone.Read(make([]byte, 1))
		failed <- err
	}()
	peer, err := e.node.resolve("mailbox")
	check(t, err)
	e.node.abortPeer(peer.ip)
	wantCode(t, <-failed, codeReset)
	_, err = kept.Write([]byte("x"))
	check(t, err)
	_, err = io.ReadFull(kept, make([]byte, 1))
	check(t, err)
}

// What was written before close is delivered although the handle is closed.
func TestCloseDeliversWhatWasWritten(t *testing.T) {
	sent := random(1 << 20)
	got := make(chan []byte, 1)
	e := startEdge(t, func(c *net.TCPConn) {
		defer c.Close()
		c.Write([]byte("220"))
		all, _ := io.ReadAll(c)
		got <- all
	})
	b, err := dial(t, e.node, "mailbox", 25)
	check(t, err)
	_, err = io.ReadFull(b, make([]byte, 3))
	check(t, err)
	_, err = b.Write(sent)
	check(t, err)
	b.close()
	e.node.close() // and the node waits for it too
	if !bytes.Equal(<-got, sent) {
		t.Fatal("bytes differ")
	}
}

// closedOnAShutWindow is the mailbox's end of a connection that we have closed. The
// mailbox said its last word first and read nothing; size bytes are on the way to it.
func closedOnAShutWindow(t *testing.T, e *edge) (mailbox *gonet.TCPConn, size int) {
	t.Helper()
	ln, err := e.net.Server("mailbox").Listen("tcp", ":2525")
	check(t, err)
	b, err := dial(t, e.node, "mailbox", 2525)
	check(t, err)
	accepted, err := ln.Accept()
	check(t, err)
	t.Cleanup(func() { accepted.Close() })
	mailbox = accepted.(*gonet.TCPConn)
	check(t, mailbox.CloseWrite())
	_, err = io.ReadAll(b)
	check(t, err)
	c, chunk := conns.get(b.handle), make([]byte, 64<<10)
	eventually(t, "the window is shut", func() bool {
		for {
			n, err := c.write(chunk)
			if errors.Is(err, codeWouldBlock) {
				break
			}
			check(t, err)
			size += n
		}
		probes := c.ep.Stats().(*tcp.Stats).SendErrors.Timeouts.Value()
		return probes > 0
	})
	b.shutdown()
	b.close()
	return mailbox, size
}

func shortOrphanTimeout(t *testing.T) {
	usual := orphanTimeout
	orphanTimeout = 2 * time.Second
	t.Cleanup(func() { orphanTimeout = usual })
}

// A live peer that has sent its FIN and keeps its window shut cannot keep our end of
// the connection open, nor the bytes left to deliver.
func TestAShutWindowDoesNotKeepAClosedConnection(t *testing.T) {
	shortOrphanTimeout(t)
	e := startEdge(t, echo)
	closedOnAShutWindow(t, e)
	eventually(t, "the stack has forgotten the connection", func() bool { return len(e.stack.RegisteredEndpoints()) == 0 })
}

// A slow peer that has all bytes only long after the time-out is not cut off as long as
// it accepts some.
func TestASlowPeerGetsAllOfAClosedConnection(t *testing.T) {
	shortOrphanTimeout(t)
	e := startEdge(t, echo)
	mailbox, size := closedOnAShutWindow(t, e)
	got, chunk, began := 0, make([]byte, size/20), time.Now()
	for {
		n, err := io.ReadFull(mailbox, chunk)
		got += n
		if err != nil {
			break
		}
		time.Sleep(orphanTimeout / 5)
	}
	if took := time.Since(began); got != size || took < 2*orphanTimeout {
		t.Fatalf("%d bytes of %d arrived in %v", got, size, took)
	}
}

func TestCancelDuringDial(t *testing.T) {
	e := startEdge(t, echo)
	check(t, e.net.DropPort("mailbox", 25))
	for range 50 {
		b, err := begin(t, e.node, "mailbox", 25)
		check(t, err)
		wantCode(t, conns.get(b.handle).state(), codeWouldBlock)
		b.close()
	}
	if n := conns.count(); n != 0 {
		t.Fatalf("%d handles left", n)
	}
	eventually(t, "the stack has forgotten the attempts", func() bool { return len(e.stack.RegisteredEndpoints()) == 0 })
}

// After close returns, a token is never used again, whatever still arrives.
func TestNoWakeAfterClose(t *testing.T) {
	e := startEdge(t, func(c *net.TCPConn) {
		defer c.Close()
		for {
			if _, err := c.Write(make([]byte, 1<<10)); err != nil {
				return
			}
		}
	})
	var late atomic.Int64
	var freed sync.Map
	plain := wake
	wake = func(token uintptr, ready uint32) {
		if _, gone := freed.Load(token); gone {
			late.Add(1)
		}
		plain(token, ready)
	}
	defer func() { wake = plain }()
	for range 200 {
		b, err := dial(t, e.node, "mailbox", 25)
		check(t, err)
		_, err = b.Read(make([]byte, 100))
		check(t, err)
		conns.remove(b.handle).close()
		freed.Store(b.token, true)
	}
	e.node.close()
	if n := late.Load(); n != 0 {
		t.Fatalf("%d wakes came after close", n)
	}
}

// Many short connections leave nothing behind and never run out of ports,
// although we close first and every one ends in TIME_WAIT.
//
// The mailbox's stack is gVisor too. On a busy machine an endpoint that it
// accepted can stay in FIN_WAIT2 after both sides have ended, and then answers
// no new connection from the same port for a minute. A dial that hits one is
// given up after the edge's five seconds and tried again, from another port;
// more than a few of them would be a fault of ours.
func TestChurn(t *testing.T) {
	const total, parallel, unansweredLimit = 20_000, 32, 200
	e := startEdge(t, echo)
	acceptAndDiscard(t, e, 2525)
	goroutines, fds := runtime.NumGoroutine(), descriptors(t)
	var started, unanswered atomic.Int64
	var group sync.WaitGroup
	for range parallel {
		group.Go(func() {
			for started.Add(1) <= total && !t.Failed() {
				for !oneSession(t, e, 2525) {
					if unanswered.Add(1) > unansweredLimit {
						t.Errorf("more than %d dials of %d were not answered", unansweredLimit, total)
						return
					}
				}
			}
		})
	}
	group.Wait()
	t.Logf("%d dials of %d were not answered", unanswered.Load(), total)
	if n := conns.count(); n != 0 {
		t.Errorf("%d handles left", n)
	}
	eventually(t, "the stack has forgotten every connection", func() bool { return len(e.stack.RegisteredEndpoints()) == 0 })
	noGoroutinesLeft(t, goroutines+5) // the mailbox's own timers come and go
	eventually(t, fmt.Sprintf("the descriptors are %d as before", fds), func() bool { return descriptors(t) <= fds+5 })
}

// acceptAndDiscard listens on the mailbox's tailnet side itself: a forward to
// loopback would use up the host's ports.
func acceptAndDiscard(t *testing.T, e *edge, port int) {
	t.Helper()
	ln, err := e.net.Server("mailbox").Listen("tcp", fmt.Sprintf(":%d", port))
	check(t, err)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				c.Write([]byte("220"))
				io.Copy(io.Discard, c)
			}()
		}
	}()
}

// oneSession hears the greeting, says a line and ends; false if nobody answered.
func oneSession(t *testing.T, e *edge, port uint16) bool {
	b, err := dialWithin(t, e.node, "mailbox", port, 5*time.Second)
	if err != nil {
		return false
	}
	defer b.close()
	if _, err := io.ReadFull(b, make([]byte, 3)); err != nil {
		t.Errorf("greeting: %v", err)
	}
	if _, err := b.Write([]byte("EHLO\r\n")); err != nil {
		t.Errorf("write: %v", err)
	}
	b.shutdown()
	if _, err := io.ReadAll(b); err != nil {
		t.Errorf("read: %v", err)
	}
	return true
}

// An idle connection costs no goroutine and no descriptor.
func TestIdleConnectionsCostNoGoroutine(t *testing.T) {
	e := startEdge(t, echo)
	ln, err := e.net.Server("mailbox").Listen("tcp", ":2525")
	check(t, err)
	var accepted []net.Conn
	var mu sync.Mutex
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			accepted = append(accepted, c)
			mu.Unlock()
		}
	}()
	goroutines, fds := runtime.NumGoroutine(), descriptors(t)
	var open []*blocking
	for range 1000 {
		b, err := dial(t, e.node, "mailbox", 2525)
		check(t, err)
		open = append(open, b)
	}
	noGoroutinesLeft(t, goroutines+10)
	eventually(t, fmt.Sprintf("the descriptors are %d as before", fds), func() bool { return descriptors(t) <= fds+5 })
	mu.Lock()
	for _, c := range accepted {
		defer c.Close()
	}
	mu.Unlock()
	// A node with more endpoints than its sender's queue holds can be closed,
	// and each of them hears of it.
	e.node.close()
	for _, b := range open {
		_, err := b.Read(make([]byte, 1))
		wantCode(t, err, codeReset)
		b.close()
	}
	if n := conns.count(); n != 0 {
		t.Errorf("%d handles left", n)
	}
}

func TestStaleHandlesAreHarmless(t *testing.T) {
	var handles table[int]
	one, two := 1, 2
	first := handles.add(&one)
	if first == 0 || handles.get(0) != nil {
		t.Fatal("the zero handle is in use")
	}
	if handles.remove(first) != &one || handles.remove(first) != nil || handles.get(first) != nil {
		t.Fatal("a removed handle is alive")
	}
	second := handles.add(&two) // takes the same slot
	if second == first || handles.get(first) != nil || handles.get(second) != &two {
		t.Fatal("a stale handle reaches the slot's next object")
	}
	if handles.count() != 1 || handles.get(1<<40|99) != nil {
		t.Fatal("unknown handles are not refused")
	}
}

func TestDialErrors(t *testing.T) {
	e := startEdge(t, echo)
	for _, name := range []string{"mailbox", "MAILBOX", "mailbox.", e.mailbox.DNSName, e.mailbox.DNSName + ".",
		e.mailbox.IPs[0].String(), e.mailbox.IPs[1].String()} {
		b, err := dial(t, e.node, name, 25)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		b.close()
	}
	for _, test := range []struct {
		host string
		port uint16
		want code
	}{
		{"mailbox", 26, codeRefused},
		{"mailbox", 0, codeBadArgument},
		{"nobody", 25, codeNoSuchPeer},
		{"", 25, codeNoSuchPeer},
		{"mailbox.example.com", 25, codeNoSuchPeer},
		{"localhost", 25, codeNoSuchPeer},
		{"127.0.0.1", 25, codeNoSuchPeer},
		{"1.1.1.1", 25, codeNoSuchPeer},
		{"100.64.200.200", 25, codeNoSuchPeer},
		{"fe80::1%eth0", 25, codeBadArgument},
		{"edge", 25, codeIsSelf},
		{e.ips()[0], 25, codeIsSelf},
		{"::ffff:" + e.ips()[0], 25, codeIsSelf},
	} {
		_, err := dial(t, e.node, test.host, test.port)
		if !errors.Is(err, test.want) {
			t.Errorf("%s:%d: got %v, want %v", test.host, test.port, err, test.want)
		}
	}
}

// A peer that leaves the map is unknown at once, and known again after.
func TestAPeerThatLeftTheMap(t *testing.T) {
	e := startEdge(t, echo)
	b, err := dial(t, e.node, "mailbox", 25)
	check(t, err)
	b.close()
	check(t, e.net.HideNode("mailbox"))
	for _, host := range []string{"mailbox", e.mailbox.IPs[0].String()} {
		eventually(t, host+" is unknown", func() bool {
			_, err := e.resolve(host)
			return errors.Is(err, codeNoSuchPeer)
		})
		_, err = dial(t, e.node, host, 25)
		wantCode(t, err, codeNoSuchPeer)
	}
	check(t, e.net.ShowNode("mailbox"))
	eventually(t, "the mailbox is back", func() bool {
		b, err := dial(t, e.node, "mailbox", 25)
		if err == nil {
			b.close()
		}
		return err == nil
	})
}

// panicking is an endpoint that panics, as a stack with a bug would.
type panicking struct {
	tcpip.Endpoint
	closed bool
}

func (p *panicking) Connect(tcpip.FullAddress) tcpip.Error { panic("a bug") }
func (p *panicking) Close()                                { p.closed = true }

// After a panic C frees the token's object, so nothing may use the token.
func TestAPanicInConnectLeavesNoToken(t *testing.T) {
	e := startEdge(t, echo)
	queue := new(waiter.Queue)
	real, terr := e.stack.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, queue)
	if terr != nil {
		t.Fatal(terr)
	}
	defer real.Close()
	ep := &panicking{Endpoint: real}
	c := &conn{ep: ep, queue: queue}
	to := netip.AddrPortFrom(e.mailbox.IPs[0], 25)
	func() {
		defer func() { recover() }()
		e.startHandshake(c, e.mailbox.IPs[0], to)
		t.Error("no panic")
	}()
	if !queue.IsEmpty() || !ep.closed {
		t.Errorf("still registered: %v, closed: %v", !queue.IsEmpty(), ep.closed)
	}
}
