package testnet

import (
	"context"
	"flag"
	"io"
	"net"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"tailscale.com/tsnet"
	"tailscale.com/types/logger"
)

var verbose = flag.Bool("verbose-tailnet", false, "log what the tailnet logs")

// testTimeout bounds whatever a test waits for.
const testTimeout = 20 * time.Second

func testLogf(t *testing.T) logger.Logf {
	if *verbose {
		return t.Logf
	}
	return logger.Discard
}

func startNet(t *testing.T, opts Options) *Net {
	t.Helper()
	opts.Logf = testLogf(t)
	n, err := Start(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { check(t, n.Close()) })
	return n
}

// mailbox starts a tailnet with two nodes, "mailbox" and "client", where the
// first forwards port 25 to serve. It returns the mailbox's addresses.
func mailbox(t *testing.T, serve func(*net.TCPConn)) (n *Net, client *tsnet.Server, ips []netip.Addr) {
	t.Helper()
	n = startNet(t, Options{})
	info, err := n.AddNode(NodeConfig{Name: "mailbox", Tags: []string{"tag:mailbox"},
		Forward: map[uint16]string{25: listen(t, serve)}})
	check(t, err)
	_, err = n.AddNode(NodeConfig{Name: "client"})
	check(t, err)
	return n, n.Server("client"), info.IPs
}

// listen starts a server on loopback that hands each connection to serve.
func listen(t *testing.T, serve func(*net.TCPConn)) (addr string) {
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
			c.SetDeadline(time.Now().Add(testTimeout))
			go serve(c.(*net.TCPConn))
		}
	}()
	return ln.Addr().String()
}

// echo answers with what it hears.
func echo(c *net.TCPConn) {
	defer c.Close()
	io.Copy(c, c)
}

func dial(t *testing.T, from *tsnet.Server, ip netip.Addr, port int) (net.Conn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	defer cancel()
	return from.Dial(ctx, "tcp", net.JoinHostPort(ip.String(), strconv.Itoa(port)))
}

func mustDial(t *testing.T, from *tsnet.Server, ip netip.Addr, port int) net.Conn {
	t.Helper()
	c, err := dial(t, from, ip, port)
	check(t, err)
	c.SetDeadline(time.Now().Add(testTimeout))
	t.Cleanup(func() { c.Close() })
	return c
}

// mustEcho checks that c still leads to an echo server.
func mustEcho(t *testing.T, c net.Conn) {
	t.Helper()
	const hello = "hello"
	if _, err := io.WriteString(c, hello); err != nil {
		t.Fatalf("writing: %v", err)
	}
	buf := make([]byte, len(hello))
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != hello {
		t.Fatalf("got %q, %v; want %q", buf, err, hello)
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until cond holds.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	check(t, await(ctx, what, cond))
}

func statusOf(t *testing.T, n *Net, name string) NodeStatus {
	t.Helper()
	for _, st := range n.Nodes() {
		if st.Name == name {
			return st
		}
	}
	t.Fatalf("control knows no node %q", name)
	panic("unreachable")
}
