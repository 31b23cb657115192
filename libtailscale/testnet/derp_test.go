package testnet

import (
	"net"
	"testing"

	"tailscale.com/ipn/ipnstate"
	"tailscale.com/tailcfg"
)

// derpOnlyMailbox is a mailbox whose nodes reach each other over the relay.
func derpOnlyMailbox(t *testing.T) (n *Net, client *runningNode, info NodeInfo) {
	t.Helper()
	n = startNet(t, Options{})
	check(t, n.SetDERPOnly(true))
	info, err := n.AddNode(NodeConfig{Name: "mailbox", Forward: map[uint16]string{25: listen(t, echo)}})
	check(t, err)
	_, err = n.AddNode(NodeConfig{Name: "client"})
	check(t, err)
	return n, &runningNode{name: "client", Server: n.Server("client")}, info
}

func TestDERPOnly(t *testing.T) {
	_, client, info := derpOnlyMailbox(t)
	lc, err := client.LocalClient()
	check(t, err)
	overRelay := func() {
		t.Helper()
		var res *ipnstate.PingResult
		res, err = lc.Ping(t.Context(), info.IPs[0], tailcfg.PingDisco)
		check(t, err)
		if res.DERPRegionCode != "test" || res.Endpoint != "" {
			t.Errorf("the pong came from endpoint %q, region %q; want the relay", res.Endpoint, res.DERPRegionCode)
		}
	}
	overRelay()
	for _, ip := range info.IPs {
		mustEcho(t, mustDial(t, client.Server, ip, 25))
	}
	overRelay() // nodes look for a direct path when there is traffic
}

func TestStopAndStartDERP(t *testing.T) {
	n, client, info := derpOnlyMailbox(t)
	c := mustDial(t, client.Server, info.IPs[0], 25)
	mustEcho(t, c)
	for range 2 { // the second time does nothing
		n.StopDERP()
		if c, err := net.Dial("tcp", n.relay.port.addr.String()); err == nil {
			c.Close()
			t.Error("the relay answers though it is stopped")
		}
	}
	if !dialTimesOut(t, client.Server, info.IPs[0].String()+":25") {
		t.Error("the mailbox has answered without a relay")
	}
	for range 2 {
		check(t, n.StartDERP())
	}
	mustEcho(t, c) // TCP has survived it
}

// Direct paths work without the relay.
func TestStopDERPLeavesDirectPaths(t *testing.T) {
	n, client, ips := mailbox(t, echo)
	mustEcho(t, mustDial(t, client, ips[0], 25)) // makes them look for a path
	lc, err := client.LocalClient()
	check(t, err)
	eventually(t, "a direct path", func() bool {
		st, err := lc.Status(t.Context())
		check(t, err)
		for _, p := range st.Peer {
			return p.CurAddr != ""
		}
		return false
	})
	n.StopDERP()
	mustEcho(t, mustDial(t, client, ips[0], 25))
}
