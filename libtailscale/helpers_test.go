package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"libtailscale/testnet"

	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"tailscale.com/types/logger"
)

// testTimeout bounds whatever a test waits for.
const testTimeout = 30 * time.Second

// wakes stands in for the C side: it counts the wakes of each token and lets tests wait
// for more.
var wakes = func() *wakeLog {
	w := &wakeLog{waiting: make(map[uintptr]chan struct{})}
	wake = w.wake
	return w
}()

type wakeLog struct {
	mu      sync.Mutex
	last    uintptr
	waiting map[uintptr]chan struct{}
}

func (w *wakeLog) newToken() (uintptr, chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.last++
	ch := make(chan struct{}, 1)
	w.waiting[w.last] = ch
	return w.last, ch
}

func (w *wakeLog) wake(token uintptr, ready uint32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case w.waiting[token] <- struct{}{}:
	default:
	}
}

func (w *wakeLog) forget(token uintptr) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.waiting, token)
}

// blocking drives a connection the way the C side does, by handle and wakes,
// and waits where that would return.
type blocking struct {
	t      *testing.T
	handle uint64
	token  uintptr
	woken  chan struct{}
}

// dial connects through node n or fails with the code.
func dial(t *testing.T, n *node, host string, port uint16) (*blocking, error) {
	t.Helper()
	return dialWithin(t, n, host, port, testTimeout)
}

func dialWithin(t *testing.T, n *node, host string, port uint16, limit time.Duration) (*blocking, error) {
	t.Helper()
	b, err := begin(t, n, host, port)
	if err != nil {
		return nil, err
	}
	if err := b.waitWithin(limit, func() error { return conns.get(b.handle).state() }); err != nil {
		b.close()
		return nil, err
	}
	return b, nil
}

// begin only starts to connect.
func begin(t *testing.T, n *node, host string, port uint16) (*blocking, error) {
	token, woken := wakes.newToken()
	c, err := n.open(host, port, token)
	if err != nil {
		wakes.forget(token)
		return nil, err
	}
	return &blocking{t, conns.add(c), token, woken}, nil
}

// wait repeats call for as long as it would block.
func (b *blocking) wait(call func() error) error { return b.waitWithin(testTimeout, call) }

func (b *blocking) waitWithin(limit time.Duration, call func() error) error {
	deadline := time.After(limit)
	for {
		err := call()
		if !errors.Is(err, codeWouldBlock) {
			return err
		}
		select {
		case <-b.woken:
		case <-deadline:
			ep := conns.get(b.handle).ep.(*tcp.Endpoint)
			return fmt.Errorf("not woken within %v, endpoint in %v, last error %v", limit, ep.EndpointState(), ep.LastError())
		}
	}
}

func (b *blocking) Read(p []byte) (n int, err error) {
	err = b.wait(func() error {
		n, err = conns.get(b.handle).read(p)
		return err
	})
	if err == nil && n == 0 {
		return 0, io.EOF
	}
	return n, err
}

func (b *blocking) Write(p []byte) (int, error) {
	written := 0
	for written < len(p) {
		var n int
		err := b.wait(func() (err error) {
			n, err = conns.get(b.handle).write(p[written:])
			return err
		})
		if err != nil {
			return written, err
		}
		written += n
	}
	return written, nil
}

func (b *blocking) shutdown() { check(b.t, conns.get(b.handle).shutdown()) }

func (b *blocking) close() {
	conns.remove(b.handle).close()
	wakes.forget(b.token)
}

// edge is a tailnet with a mailbox node and one of our nodes on it.
type edge struct {
	*node
	net     *testnet.Net
	mailbox testnet.NodeInfo
}

func startNet(t *testing.T, opts testnet.Options) *testnet.Net {
	t.Helper()
	opts.Logf = logger.Discard
	net, err := testnet.Start(opts)
	check(t, err)
	t.Cleanup(func() { check(t, net.Close()) })
	return net
}

// unstarted is a node of ours for the tailnet, not started.
func unstarted(t *testing.T, net *testnet.Net) *node {
	t.Helper()
	n := newNode()
	n.server.Dir = t.TempDir()
	n.server.Hostname = "edge"
	n.server.ControlURL = net.ControlURL()
	giveKey(n, "tskey-auth-test")
	n.upTimeout.Store(int64(testTimeout))
	t.Cleanup(func() { n.close() })
	return n
}

// giveKey leaves the node with this auth key and nothing else to enrol with.
func giveKey(n *node, key string) {
	n.setCredential(func(c *credential) { *c = credential{authKey: key} })
}

// startEdge starts a tailnet whose mailbox forwards port 25 to serve, and
// joins it.
func startEdge(t *testing.T, serve func(*net.TCPConn)) *edge {
	t.Helper()
	tailnet := startNet(t, testnet.Options{})
	mailbox, err := tailnet.AddNode(testnet.NodeConfig{Name: "mailbox", Tags: []string{"tag:mailbox"},
		Forward: map[uint16]string{25: listen(t, serve)}})
	check(t, err)
	n := unstarted(t, tailnet)
	check(t, n.up())
	e := &edge{n, tailnet, mailbox}
	eventually(t, "the mailbox shows in the map", func() bool {
		_, err := n.resolve("mailbox")
		return err == nil
	})
	return e
}

// listen serves connections on loopback.
func listen(t *testing.T, serve func(*net.TCPConn)) (address string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go serve(c.(*net.TCPConn))
		}
	}()
	return ln.Addr().String()
}

func echo(c *net.TCPConn) {
	defer c.Close()
	io.Copy(c, c)
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantCode(t *testing.T, err error, want code) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("got %v, want %v", err, want)
	}
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(testTimeout)
	for pause := time.Millisecond; !holds(); pause = min(2*pause, 100*time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", testTimeout, what)
		}
		time.Sleep(pause)
	}
}

// noGoroutinesLeft fails if the test leaves goroutines behind.
func noGoroutinesLeft(t *testing.T, before int) {
	t.Helper()
	deadline := time.Now().Add(testTimeout)
	for runtime.NumGoroutine() > before {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// descriptors counts this process's open descriptors.
func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	check(t, err)
	return len(entries)
}

func errorText(n *node) string {
	if text := n.lastError.Load(); text != nil {
		return strings.TrimSpace(*text)
	}
	return ""
}
