package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"libtailscale/testnet"
)

const listenPort = 9464

// accepting is a listener driven as the C side does, by handle and wakes.
type accepting struct {
	t      *testing.T
	handle uint64
	woken  chan struct{}
}

func startListening(t *testing.T, n *node, backlog int) *accepting {
	t.Helper()
	token, woken := wakes.newToken()
	l, err := n.listen(listenPort, backlog, token)
	check(t, err)
	return &accepting{t, listeners.add(l), woken}
}

func (a *accepting) accept() (*blocking, error) {
	token, woken := wakes.newToken()
	deadline := time.After(testTimeout)
	for {
		c, err := listeners.get(a.handle).accept(token)
		if err == nil {
			return &blocking{a.t, conns.add(c), token, woken}, nil
		}
		if err != codeWouldBlock {
			wakes.forget(token)
			return nil, err
		}
		select {
		case <-a.woken:
		case <-deadline:
			a.t.Fatal("nobody has come")
		}
	}
}

// waiting counts the connections that were not accepted.
func (a *accepting) waiting() int {
	l := listeners.get(a.handle)
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.waiting)
}

func (a *accepting) close() { listeners.remove(a.handle).end() }

// fromMailbox connects from the mailbox's node to a port of ours.
func (e *edge) fromMailbox(to netip.Addr, port uint16, limit time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	return e.net.Server("mailbox").Dial(ctx, "tcp", netip.AddrPortFrom(to, port).String())
}

func TestAPeersConnectionIsAsGoodAsADialledOne(t *testing.T) {
	e := startEdge(t, echo)
	l := startListening(t, e.node, 4)
	defer l.close()
	for _, ip := range e.node.ips() {
		client, err := e.fromMailbox(netip.MustParseAddr(ip), listenPort, testTimeout)
		check(t, err)
		server, err := l.accept()
		check(t, err)
		sent := random(1 << 20)
		go func() {
			client.Write(sent)
			client.(interface{ CloseWrite() error }).CloseWrite()
		}()
		got, err := io.ReadAll(server)
		check(t, err)
		if !bytes.Equal(got, sent) {
			t.Fatal("bytes differ")
		}
		_, err = server.Write([]byte("reply")) // after the client's end
		check(t, err)
		server.close()
		reply, err := io.ReadAll(client)
		check(t, err)
		if string(reply) != "reply" {
			t.Fatalf("reply %q", reply)
		}
		client.Close()
	}
	if n := conns.count(); n != 0 {
		t.Errorf("%d handles left", n)
	}
	eventually(t, "the stack has forgotten them", func() bool { return e.node.ending() == 0 })
}

func TestWhoMayNotConnectHearsNothing(t *testing.T) {
	e := startEdge(t, echo)
	l := startListening(t, e.node, 4)
	defer l.close()
	self := netip.MustParseAddr(e.node.ips()[0])
	check(t, e.net.DenyPort("edge", listenPort))
	// The node hears of it a moment later; connections before that are let in.
	eventually(t, "nobody is let in", func() bool {
		c, err := e.fromMailbox(self, listenPort, time.Second)
		if err == nil {
			defer c.Close()
			server, err := l.accept()
			check(t, err)
			server.close()
		}
		return err != nil
	})
	_, err := listeners.get(l.handle).accept(1)
	wantCode(t, err, codeWouldBlock)
	check(t, e.net.AllowPort("edge", listenPort))
	client, err := e.fromMailbox(self, listenPort, testTimeout)
	check(t, err)
	defer client.Close()
	server, err := l.accept()
	check(t, err)
	server.close()
}

func TestWhoeverNobodyAcceptsIsRefused(t *testing.T) {
	const backlog = 3
	e := startEdge(t, echo)
	l := startListening(t, e.node, backlog)
	self := netip.MustParseAddr(e.node.ips()[0])
	waiting := make([]net.Conn, backlog)
	for i := range waiting {
		var err error
		waiting[i], err = e.fromMailbox(self, listenPort, testTimeout)
		check(t, err)
		defer waiting[i].Close()
	}
	eventually(t, "all wait", func() bool { return l.waiting() == backlog })
	isRefused := func(port uint16) {
		t.Helper()
		if _, err := e.fromMailbox(self, port, testTimeout); err == nil || !strings.Contains(err.Error(), "refused") {
			t.Errorf("port %d: %v", port, err)
		}
	}
	isRefused(listenPort)
	isRefused(listenPort + 1)
	l.close()
	for _, c := range waiting {
		if _, err := c.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("not reset: %v", err)
		}
	}
	isRefused(listenPort)
	startListening(t, e.node, 1).close() // the port is free again
	if n := listeners.count(); n != 0 {
		t.Errorf("%d handles left", n)
	}
}

func TestAPortIsListenedToOnce(t *testing.T) {
	e := startEdge(t, echo)
	l := startListening(t, e.node, 1)
	defer l.close()
	_, err := e.node.listen(listenPort, 1, 0)
	wantCode(t, err, codeBadState)
}

// The node then has another address, and no connection of the old one.
func TestAListenerOutlivesItsNodesPlace(t *testing.T) {
	e := startEdge(t, echo)
	l := startListening(t, e.node, 4)
	defer l.close()
	before := e.node.ips()[0]
	check(t, e.net.RemoveNode("edge"))
	eventually(t, "the removal is noticed", func() bool { return statusNow(e.node).Removed })
	check(t, e.node.up())
	after := e.node.ips()[0]
	if after == before {
		t.Fatalf("still %v", after)
	}
	client, err := e.fromMailbox(netip.MustParseAddr(after), listenPort, testTimeout)
	check(t, err)
	defer client.Close()
	server, err := l.accept()
	check(t, err)
	server.close()
}

func TestAListenerEndsWithItsNode(t *testing.T) {
	e := startEdge(t, echo)
	l := startListening(t, e.node, 4)
	client, err := e.fromMailbox(netip.MustParseAddr(e.node.ips()[0]), listenPort, testTimeout)
	check(t, err)
	defer client.Close()
	eventually(t, "it waits", func() bool { return l.waiting() == 1 })
	e.node.close()
	_, err = l.accept()
	wantCode(t, err, codeNotRunning)
	if _, err := client.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("not reset: %v", err)
	}
	l.close()
}

func TestReachGoesThroughTheNode(t *testing.T) {
	e := startEdge(t, echo)
	l := startListening(t, e.node, 4)
	defer l.close()
	target := netip.AddrPortFrom(netip.MustParseAddr(e.node.ips()[0]), listenPort)
	address, err := e.net.Reach("mailbox", target)
	check(t, err)
	client, err := net.Dial("tcp", address)
	check(t, err)
	defer client.Close()
	fmt.Fprint(client, "x")
	server, err := l.accept()
	check(t, err)
	defer server.close()
	_, err = io.ReadFull(server, make([]byte, 1))
	check(t, err)
	if _, err := e.net.Reach("nobody", target); err == nil {
		t.Error("a node that is not there reaches something")
	}
}

func TestFigures(t *testing.T) {
	e := startEdge(t, echo)
	c, err := dial(t, e.node, "mailbox", 25)
	check(t, err)
	defer c.close()
	f := e.node.figures()
	if f.Goroutines < 10 || f.HeapInUseBytes < 1<<20 || f.HeapReleasedBytes > f.HeapIdleBytes || f.GOMAXPROCS < 1 ||
		f.GCCount < 1 || f.GCPauseSeconds <= 0 || f.Endpoints < 1 || f.Handles != 1 {
		t.Errorf("%+v", f)
	}
	if took := testing.Benchmark(func(b *testing.B) {
		for b.Loop() {
			e.node.figures()
		}
	}).NsPerOp(); took > int64(5*time.Millisecond) {
		t.Errorf("figures take %d ns", took)
	} else {
		t.Logf("figures take %d ns", took)
	}
}

func TestTheHomeRelayAndTheControlServersLastError(t *testing.T) {
	e := startEdge(t, echo)
	eventually(t, "the home region is told", func() bool {
		now := statusNow(e.node)
		return now.HomeRegion != "" && now.HomeRegionID != 0 && now.ControlError == ""
	})
	e.net.StopControl()
	eventually(t, "why control cannot be reached is told", func() bool {
		return strings.Contains(statusNow(e.node).ControlError, "refused")
	})
	check(t, e.net.StartControl())
	eventually(t, "it is forgotten", func() bool { return statusNow(e.node).ControlError == "" })
}

// An enrolled node that starts without its control server says what it waits for.
func TestAStartWithoutControlSaysWhy(t *testing.T) {
	tailnet := startNet(t, testnet.Options{})
	first := unstarted(t, tailnet)
	check(t, first.up())
	first.close()
	tailnet.StopControl()
	again := unstarted(t, tailnet)
	again.server.Dir = first.server.Dir
	check(t, again.start())
	eventually(t, "the reason is told", func() bool {
		return strings.Contains(statusNow(again).ControlError, "refused")
	})
}
