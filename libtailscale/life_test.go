package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"libtailscale/testnet"

	"tailscale.com/ipn"
)

// statusNow is what the next status line would say.
func statusNow(n *node) status { return n.statusOf(n.backend.StatusWithoutPeers()) }

// online is whether the control server sees a node of ours.
func online(tailnet *testnet.Net, name string) bool {
	for _, node := range tailnet.Nodes() {
		if node.Name == name {
			return node.Online
		}
	}
	return false
}

// The control server's 404 is the only sign, and it is in a log line.
func TestARemovedNodeIsNoticedAndEnrolsAgain(t *testing.T) {
	e := startEdge(t, echo)
	before := e.node.ips()
	check(t, e.net.RemoveNode("edge"))
	eventually(t, "the removal is noticed", func() bool { return statusNow(e.node).Removed })

	giveKey(e.node, "")
	wantCode(t, e.node.up(), codeNeedsLogin)
	if !statusNow(e.node).Removed {
		t.Error("the removal is forgotten though nothing has changed")
	}
	giveKey(e.node, "tskey-auth-test")
	check(t, e.node.up())
	now := statusNow(e.node)
	if now.Removed || !now.InMapPoll || !online(e.net, "edge") {
		t.Errorf("after enrolling again: %+v", now)
	}
	if after := e.node.ips(); after[0] == before[0] {
		t.Errorf("a new node has the removed one's address %v", after)
	}
	c, err := dial(t, e.node, "mailbox", 25)
	check(t, err)
	c.close()
}

func TestAnOutageIsNotTakenForARemoval(t *testing.T) {
	e := startEdge(t, echo)
	e.net.StopControl()
	eventually(t, "the outage is noticed", func() bool { return !statusNow(e.node).InMapPoll })
	check(t, e.net.StartControl())
	eventually(t, "control is back", func() bool { return statusNow(e.node).InMapPoll })
	if statusNow(e.node).Removed {
		t.Error("the node believes to be removed")
	}
}

func TestAnExpiredKeyIsRenewedOrExtended(t *testing.T) {
	e := startEdge(t, echo)
	before := e.node.ips()
	needsLogin := func() bool { return statusNow(e.node).State == ipn.NeedsLogin.String() }
	running := func() bool { return statusNow(e.node).State == ipn.Running.String() }

	check(t, e.net.SetKeyExpiry("edge", time.Now().Add(-time.Minute)))
	eventually(t, "the expiry is noticed", needsLogin)
	giveKey(e.node, "")
	wantCode(t, e.node.up(), codeNeedsLogin)
	// tailscale/tailscale#19326 says that this does not always recover.
	check(t, e.net.SetKeyExpiry("edge", time.Time{}))
	eventually(t, "an extended key is good again", running)

	check(t, e.net.SetKeyExpiry("edge", time.Now().Add(-time.Minute)))
	eventually(t, "the expiry is noticed again", needsLogin)
	giveKey(e.node, "tskey-auth-test")
	check(t, e.node.up())
	if after := e.node.ips(); after[0] != before[0] {
		t.Errorf("the address was %v and is %v", before, after)
	}
	c, err := dial(t, e.node, "mailbox", 25)
	check(t, err)
	c.close()
}

func TestAnEphemeralNodeLeavesNothing(t *testing.T) {
	tailnet := startNet(t, testnet.Options{})
	n := unstarted(t, tailnet)
	n.server.Ephemeral = true
	ignored, temporary := n.server.Dir, t.TempDir()
	t.Setenv("TMPDIR", temporary)
	check(t, n.up())
	if !online(tailnet, "edge") {
		t.Error("the node is not online")
	}
	check(t, n.close())
	for _, node := range tailnet.Nodes() {
		t.Errorf("%s is still on the tailnet", node.Name)
	}
	for _, dir := range []string{ignored, temporary} {
		left, err := os.ReadDir(dir)
		check(t, err)
		if len(left) > 0 {
			t.Errorf("%s holds %v", dir, left)
		}
	}
}

func TestAnEphemeralNodeThatCannotSayGoodbye(t *testing.T) {
	tailnet := startNet(t, testnet.Options{})
	n := unstarted(t, tailnet)
	n.server.Ephemeral = true
	check(t, n.up())
	tailnet.StopControl()
	began := time.Now()
	wantCode(t, n.close(), codeControlUnreachable)
	if took := time.Since(began); took > testTimeout/2 {
		t.Errorf("closing took %v", took)
	}
}

func TestAStateFileThatIsNoStateFile(t *testing.T) {
	n := unstarted(t, startNet(t, testnet.Options{}))
	check(t, os.WriteFile(filepath.Join(n.server.Dir, "tailscaled.state"), []byte(`{"_machinekey": 1`), 0o600))
	wantCode(t, n.up(), codeBadStateFile)
	if text := errorText(n); !strings.Contains(text, n.server.Dir) {
		t.Errorf("%q does not name the file", text)
	}
}
