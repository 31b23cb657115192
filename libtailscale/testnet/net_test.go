package testnet

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"tailscale.com/tstest"
)

func TestCloseLeavesNothing(t *testing.T) {
	tstest.ResourceCheck(t) // goroutines
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	n, err := Start(Options{})
	check(t, err)
	_, err = n.AddNode(NodeConfig{Name: "mailbox", Forward: map[uint16]string{25: listen(t, echo)}})
	check(t, err)
	_, err = n.AddNode(NodeConfig{Name: "client"})
	check(t, err)
	check(t, n.StopNode("client"))
	check(t, n.Close())
	left, err := filepath.Glob(filepath.Join(tmp, "*"))
	check(t, err)
	if len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestGivenDirIsKept(t *testing.T) {
	dir := t.TempDir()
	n := startNet(t, Options{Dir: dir})
	_, err := n.AddNode(NodeConfig{Name: "mailbox"})
	check(t, err)
	check(t, n.Close())
	if _, err := os.Stat(filepath.Join(dir, "mailbox", "tailscaled.state")); err != nil {
		t.Error(err)
	}
}

func TestMisuse(t *testing.T) {
	n := startNet(t, Options{})
	_, err := n.AddNode(NodeConfig{Name: "mailbox"})
	check(t, err)
	for what, err := range map[string]error{
		"adding a node twice":        second(n.AddNode(NodeConfig{Name: "mailbox"})),
		"starting a running node":    second(n.StartNode("mailbox")),
		"stopping an unknown node":   n.StopNode("nobody"),
		"hiding an unknown node":     n.HideNode("nobody"),
		"closing a closed port":      n.Unforward("mailbox", 25),
		"completing no login":        n.CompleteLogin("mailbox"),
		"statistics of unknown node": second(n.Stats("nobody")),
	} {
		if err == nil {
			t.Errorf("%s: no error", what)
		}
	}
	if _, err := Start(Options{Host: "localhost"}); err == nil {
		t.Error("a host name as Host: no error")
	}
}

func second[T any](_ T, err error) error { return err }

// The port of a stopped server is not given to others: its nodes go on asking there,
// and the server comes back there.
func TestStoppedServersKeepTheirPorts(t *testing.T) {
	n := startNet(t, Options{})
	n.StopControl()
	n.StopDERP()
	for _, port := range []*keptPort{n.control.port, n.relay.port} {
		if c, err := net.Dial("tcp", port.addr.String()); err == nil {
			c.Close()
			t.Errorf("%v is served", port.addr)
		}
		// This socket does not share its port, like one for which the kernel looks for a free
		// port.
		another, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		check(t, err)
		defer unix.Close(another)
		address := &unix.SockaddrInet4{Port: int(port.addr.Port()), Addr: port.addr.Addr().As4()}
		if err := unix.Bind(another, address); err != unix.EADDRINUSE {
			t.Errorf("%v goes to somebody else: %v", port.addr, err)
		}
	}
	check(t, n.StartControl())
	check(t, n.StartDERP())
}
