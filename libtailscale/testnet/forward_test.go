package testnet

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// bigBytes is more than all buffers on the path together.
const bigBytes = 8 << 20

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

type halfCloser interface{ CloseWrite() error }

func TestForwardOnBothAddresses(t *testing.T) {
	n, client, ips := mailbox(t, echo)
	if len(ips) != 2 || !ips[0].Is4() || !ips[1].Is6() {
		t.Fatalf("addresses %v, want v4 and v6", ips)
	}
	for _, ip := range ips {
		c := mustDial(t, client, ip, 25)
		mustEcho(t, c)
		if st, err := n.Stats("mailbox"); err != nil || st.Open != 1 {
			t.Errorf("stats %+v, %v; want 1 open", st, err)
		}
		c.Close()
		eventually(t, "the connection to end", func() bool {
			st, _ := n.Stats("mailbox")
			return st.Open == 0
		})
	}
}

// The client sends all, ends its direction, and only then gets its reply.
func TestClientHalfClose(t *testing.T) {
	request, reply := randomBytes(bigBytes), randomBytes(bigBytes/2)
	_, client, ips := mailbox(t, func(c *net.TCPConn) {
		defer c.Close()
		got, _ := io.ReadAll(c)
		if !bytes.Equal(got, request) {
			io.WriteString(c, "damaged")
			return
		}
		c.Write(reply)
	})
	c := mustDial(t, client, ips[0], 25)
	if _, err := c.Write(request); err != nil {
		t.Fatal(err)
	}
	check(t, c.(halfCloser).CloseWrite())
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, reply) {
		t.Fatalf("reply of %d bytes, %v; want %d", len(got), err, len(reply))
	}
}

// The server sends all and ends its direction; the client answers after that.
func TestServerHalfClose(t *testing.T) {
	content := randomBytes(bigBytes)
	answer := make(chan [sha256.Size]byte, 1)
	_, client, ips := mailbox(t, func(c *net.TCPConn) {
		defer c.Close()
		c.Write(content)
		c.CloseWrite()
		got, _ := io.ReadAll(c)
		answer <- sha256.Sum256(got)
	})
	c := mustDial(t, client, ips[1], 25)
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, content) {
		t.Fatalf("got %d bytes, %v; want %d", len(got), err, len(content))
	}
	if _, err := c.Write(content); err != nil {
		t.Fatal(err)
	}
	check(t, c.(halfCloser).CloseWrite())
	if <-answer != sha256.Sum256(content) {
		t.Error("the server got something else than was sent after its end of file")
	}
}

func TestServerResetReachesClient(t *testing.T) {
	for _, tt := range []struct {
		name  string
		close func(client halfCloser) error
	}{
		{"open", func(halfCloser) error { return nil }},
		{"after the client's end of file", halfCloser.CloseWrite},
	} {
		t.Run(tt.name, func(t *testing.T) {
			proceed := make(chan struct{})
			n, client, ips := mailbox(t, func(c *net.TCPConn) {
				io.WriteString(c, "bye")
				<-proceed
				c.SetLinger(0)
				c.Close()
			})
			c := mustDial(t, client, ips[0], 25)
			check(t, tt.close(c.(halfCloser)))
			if _, err := io.ReadFull(c, make([]byte, len("bye"))); err != nil {
				t.Fatal(err)
			}
			close(proceed)
			if _, err := c.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "reset") {
				t.Errorf("read: %v, want a reset", err)
			}
			awaitNoneOpen(t, n)
		})
	}
}

// A RST after the sender's own FIN comes when nothing reads any more.
func TestResetAfterOwnEndOfFile(t *testing.T) {
	serverDone := make(chan error, 1)
	proceed := make(chan struct{})
	n, client, ips := mailbox(t, func(c *net.TCPConn) {
		c.CloseWrite()
		<-proceed
		c.SetLinger(0)
		c.Close()
		serverDone <- nil
	})
	c := mustDial(t, client, ips[0], 25)
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("read: %v, want end of file", err)
	}
	close(proceed)
	leg, err := newTailnetLeg(c)
	check(t, err)
	defer time.AfterFunc(testTimeout, leg.stopWaiting).Stop()
	if err := leg.awaitReset(); err != errReset {
		t.Errorf("the client saw %v, want a reset", err)
	}
	<-serverDone
	awaitNoneOpen(t, n)
}

func TestClientResetReachesServer(t *testing.T) {
	for _, tt := range []struct {
		name        string
		serverClose bool // the server ends its direction first
		clientClose bool // the client does
	}{
		{name: "open"},
		{name: "after the server's end of file", serverClose: true},
		{name: "after its own end of file", clientClose: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			result := make(chan error, 1)
			n, client, ips := mailbox(t, func(c *net.TCPConn) {
				defer c.Close()
				io.WriteString(c, "hi")
				if tt.serverClose {
					c.CloseWrite()
				}
				leg, _ := newServerLeg(c)
				_, err := c.Read(make([]byte, 1))
				if tt.clientClose && err == io.EOF {
					io.WriteString(c, "ready")
					err = leg.awaitReset()
				}
				result <- err
			})
			c := mustDial(t, client, ips[0], 25)
			if _, err := io.ReadFull(c, make([]byte, len("hi"))); err != nil {
				t.Fatal(err)
			}
			if tt.clientClose {
				check(t, c.(halfCloser).CloseWrite())
				if _, err := io.ReadFull(c, make([]byte, len("ready"))); err != nil {
					t.Fatal(err)
				}
			}
			leg, err := newTailnetLeg(c)
			check(t, err)
			leg.reset()
			if err := <-result; !errors.Is(err, syscall.ECONNRESET) && err != errReset {
				t.Errorf("the server saw %v, want a reset", err)
			}
			awaitNoneOpen(t, n)
		})
	}
}

func TestRefused(t *testing.T) {
	n, client, ips := mailbox(t, echo)
	refused := func(why string, port int) {
		t.Helper()
		c, err := dial(t, client, ips[0], port)
		if err == nil {
			c.Close()
		}
		if err == nil || !strings.Contains(err.Error(), "refused") {
			t.Errorf("%s: %v, want refused", why, err)
		}
	}
	refused("no forward", 26)

	closed, err := keepPort("127.0.0.1")
	check(t, err)
	defer closed.close()
	check(t, n.Forward("mailbox", 26, closed.addr.String()))
	refused("server down", 26)

	check(t, n.Forward("mailbox", 26, listen(t, echo)))
	mustEcho(t, mustDial(t, client, ips[0], 26))
	check(t, n.Unforward("mailbox", 26))
	refused("no forward any more", 26)
}

// More connections than netstack's outgoing queue holds; for them stop_node looks like
// silence (see runningNode.unplug).
func TestStopNodeWithManyConnections(t *testing.T) {
	const conns = 600
	n, client, ips := mailbox(t, echo)
	var wg sync.WaitGroup
	open := make(chan net.Conn, conns)
	for range conns {
		wg.Go(func() {
			c, err := dial(t, client, ips[0], 25)
			if err != nil {
				t.Error(err)
				return
			}
			open <- c
		})
	}
	wg.Wait()
	close(open)
	eventually(t, "all connections to be open", func() bool {
		st, _ := n.Stats("mailbox")
		return st.Open == conns
	})
	var last net.Conn
	for last = range open {
		mustEcho(t, last)
	}
	check(t, n.StopNode("mailbox"))
	awaitNoneOpen(t, n)
	last.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	var timeout net.Error
	if _, err := last.Read(make([]byte, 1)); !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("reading from a stopped node: %v, want silence", err)
	}
}

func awaitNoneOpen(t *testing.T, n *Net) {
	t.Helper()
	eventually(t, "all connections to end", func() bool {
		st, _ := n.Stats("mailbox")
		return st.Open == 0
	})
}
