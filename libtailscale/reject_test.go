package main

import (
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"tailscale.com/net/connreject"
	"tailscale.com/types/ipproto"
)

// A peer whose policy denies the port reports that, and the dial fails with that code.
func TestDeniedPort(t *testing.T) {
	e := startEdge(t, echo)
	check(t, e.net.DenyPort("mailbox", 25))
	_, err := dial(t, e.node, "mailbox", 25)
	wantCode(t, err, codeDenied)
	nobodyIsAwaited(t, e.node)

	check(t, e.net.AllowPort("mailbox", 25))
	c, err := dial(t, e.node, "mailbox", 25)
	check(t, err)
	defer c.close()
	nobodyIsAwaited(t, e.node)
}

// A message about an established connection changes nothing, whoever sent it.
func TestRejectOfAConnectionThatIsMade(t *testing.T) {
	e := startEdge(t, echo)
	b, err := dial(t, e.node, "mailbox", 25)
	check(t, err)
	defer b.close()
	c := conns.get(b.handle)
	local, remote := ends(t, c)
	e.rejects.await(c, local, remote) // as if nobody had asked for its state yet
	e.rejects.take(connreject.Event{Source: connreject.SourceTSMPRecv, Proto: ipproto.TCP,
		Reason: connreject.ReasonACL, Src: local, Dst: remote})
	check(t, c.state())
	nobodyIsAwaited(t, e.node)
}

// ends are the addresses of a connection.
func ends(t *testing.T, c *conn) (local, remote netip.AddrPort) {
	t.Helper()
	from, terr := c.ep.GetLocalAddress()
	to, rerr := c.ep.GetRemoteAddress()
	if terr != nil || rerr != nil {
		t.Fatal(terr, rerr)
	}
	address := func(a tcpip.FullAddress) netip.AddrPort {
		ip, _ := netip.AddrFromSlice(a.Addr.AsSlice())
		return netip.AddrPortFrom(ip, a.Port)
	}
	return address(from), address(to)
}

func nobodyIsAwaited(t *testing.T, n *node) {
	t.Helper()
	n.rejects.mu.Lock()
	defer n.rejects.mu.Unlock()
	if left := len(n.rejects.awaited); left != 0 {
		t.Fatalf("%d attempts are left", left)
	}
}

func TestOnlyAFinalRejectOfAPeerEndsAnAttempt(t *testing.T) {
	acl := connreject.Event{Source: connreject.SourceTSMPRecv, Proto: ipproto.TCP, Reason: connreject.ReasonACL}
	for name, c := range map[string]struct {
		change func(*connreject.Event)
		want   code
	}{
		"policy":          {func(*connreject.Event) {}, codeDenied},
		"shields":         {func(e *connreject.Event) { e.Reason = connreject.ReasonShields }, codeShieldsUp},
		"host's firewall": {func(e *connreject.Event) { e.Reason = connreject.ReasonHostFirewall }, 0},
		"maybe":           {func(e *connreject.Event) { e.MaybeBroken = true }, 0},
		"UDP":             {func(e *connreject.Event) { e.Proto = ipproto.UDP }, 0},
		"own guess":       {func(e *connreject.Event) { e.Source = connreject.SourcePendOpenTimeout }, 0},
	} {
		event := acl
		c.change(&event)
		if got, final := codeOfReject(event); got != c.want || final != (c.want != 0) {
			t.Errorf("%s: %v, %v", name, got, final)
		}
	}
}
