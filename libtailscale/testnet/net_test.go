package testnet

import (
	"os"
	"path/filepath"
	"testing"

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
