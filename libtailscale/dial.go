package main

import (
	"net/netip"
	"strings"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
	"tailscale.com/tailcfg"
	"tailscale.com/types/netmap"
)

// nicID is the one network interface of tsnet's stack
// (wgengine/netstack/netstack.go, nicID).
const nicID = 1

// peer is where a name leads on the tailnet.
type peer struct {
	node tailcfg.NodeView
	ip   netip.Addr
}

// open begins to connect to a peer of the tailnet. Look-up and connection stay inside
// the tailnet: the name is looked up in the network map only, and the SYN goes through
// the node's own stack, which sends through WireGuard only. tsnet's Dial would fall
// back to the host's resolver and network.
func (n *node) open(host string, port uint16, token uintptr) (*conn, error) {
	if port == 0 {
		return nil, codeBadArgument
	}
	self := n.self.Load()
	if self == nil {
		return nil, codeNotRunning
	}
	p, err := n.resolve(host)
	if err != nil {
		return nil, err
	}
	return n.connect(self.sourceFor(p.ip), netip.AddrPortFrom(p.ip, port), token)
}

// connect starts a TCP connection on the stack.
//
// The endpoint is not bound first: binding takes the port from the whole stack, so that
// 16,000 connections within a TIME_WAIT use up all ports, while an unbound connect
// shares ports between destinations and may take one over from TIME_WAIT. The source
// address is checked instead.
func (n *node) connect(source netip.Addr, to netip.AddrPort, token uintptr) (*conn, error) {
	if !source.IsValid() {
		return nil, codeUnreachable // no address of that family on this node
	}
	protocol := tcpip.NetworkProtocolNumber(ipv4.ProtocolNumber)
	if to.Addr().Is6() {
		protocol = ipv6.ProtocolNumber
	}
	c := &conn{queue: new(waiter.Queue), token: token}
	ep, terr := n.stack.NewEndpoint(tcp.ProtocolNumber, protocol, c.queue)
	if terr != nil {
		return nil, codeOf(terr)
	}
	c.ep = ep
	if err := n.startHandshake(c, source, to); err != nil {
		return nil, err
	}
	return c, nil
}

// startHandshake sends the SYN. After a failure, or a panic in the stack, the
// connection is closed, since C then frees the token's object.
func (n *node) startHandshake(c *conn, source netip.Addr, to netip.AddrPort) error {
	begun := false
	defer func() {
		if !begun {
			c.close()
		}
	}()
	if terr := c.prepare(); terr != nil {
		return codeOf(terr)
	}
	c.subscribe()
	terr := c.ep.Connect(tcpip.FullAddress{
		NIC:  nicID,
		Addr: tcpip.AddrFromSlice(to.Addr().AsSlice()),
		Port: to.Port(),
	})
	if _, started := terr.(*tcpip.ErrConnectStarted); terr != nil && !started {
		return codeOf(terr)
	}
	local, terr := c.ep.GetLocalAddress()
	if terr != nil || local.Addr != tcpip.AddrFromSlice(source.AsSlice()) {
		return codeNotRunning // the node's address changed under us
	}
	n.rejects.await(c, netip.AddrPortFrom(source, local.Port), to)
	begun = true
	return nil
}

// resolve finds a peer by MagicDNS name, by its first label, or by tailnet address. It
// uses the network map only.
func (n *node) resolve(host string) (peer, error) {
	name := strings.ToLower(strings.TrimSuffix(host, "."))
	if ip, err := netip.ParseAddr(name); err == nil {
		return n.peerByAddress(ip.Unmap())
	}
	// A name seen before is checked against the map rather than searched in
	// it, so that a dial does not cost a walk over a large tailnet.
	if known, ok := n.known.Load(name); ok {
		p, err := n.peerByAddress(known.(netip.Addr))
		if err == nil && matches(p.node, name, n.suffix()) {
			return p, nil
		}
		n.known.Delete(name)
	}
	return n.peerByName(name)
}

func (n *node) peerByAddress(ip netip.Addr) (peer, error) {
	if ip.Zone() != "" {
		return peer{}, codeBadArgument
	}
	found, ok := n.backend.PeerForIP(ip)
	if !ok || !owns(found.Node, ip) {
		return peer{}, codeNoSuchPeer
	}
	if found.IsSelf {
		return peer{}, codeIsSelf
	}
	return peer{found.Node, ip}, nil
}

func (n *node) peerByName(name string) (peer, error) {
	nm := n.backend.NetMapWithPeers()
	if nm == nil {
		return peer{}, codeNotRunning
	}
	suffix := nm.MagicDNSSuffix()
	if matches(nm.SelfNode, name, suffix) {
		return peer{}, codeIsSelf
	}
	for _, candidate := range nm.Peers {
		if !matches(candidate, name, suffix) {
			continue
		}
		ip := preferredAddress(candidate, nm)
		if !ip.IsValid() {
			return peer{}, codeUnreachable
		}
		n.known.Store(name, ip)
		return peer{candidate, ip}, nil
	}
	return peer{}, codeNoSuchPeer
}

func (n *node) suffix() string {
	if nm := n.backend.NetMapNoPeers(); nm != nil {
		return nm.MagicDNSSuffix()
	}
	return ""
}

// matches reports whether name is the node's MagicDNS name or, for a node of
// our own tailnet, its first label. name is lower case without a final dot.
func matches(node tailcfg.NodeView, name, suffix string) bool {
	fqdn := strings.ToLower(strings.TrimSuffix(node.Name(), "."))
	if fqdn == "" || name == "" {
		return false
	}
	return fqdn == name || (suffix != "" && fqdn == name+"."+strings.ToLower(suffix))
}

// owns reports whether ip is one of the node's own addresses, as opposed to a
// subnet it routes: a mailbox is a node, and a route could be withdrawn or
// taken over by another.
func owns(node tailcfg.NodeView, ip netip.Addr) bool {
	for _, prefix := range node.Addresses().All() {
		if prefix.IsSingleIP() && prefix.Addr() == ip {
			return true
		}
	}
	return false
}

// preferredAddress chooses the peer's IPv4 address when both sides have one,
// else IPv6.
func preferredAddress(node tailcfg.NodeView, nm *netmap.NetworkMap) netip.Addr {
	self := addressesOf(nm.SelfNode)
	other := addressesOf(node)
	if self.v4.IsValid() && other.v4.IsValid() {
		return other.v4
	}
	if self.v6.IsValid() {
		return other.v6
	}
	return netip.Addr{}
}

// addresses are a node's own tailnet addresses; either may be invalid.
type addresses struct{ v4, v6 netip.Addr }

func addressesOf(node tailcfg.NodeView) addresses {
	var a addresses
	if !node.Valid() {
		return a
	}
	for _, prefix := range node.Addresses().All() {
		if ip := prefix.Addr(); ip.Is4() {
			a.v4 = ip
		} else {
			a.v6 = ip
		}
	}
	return a
}

func (a *addresses) sourceFor(to netip.Addr) netip.Addr {
	if to.Is4() {
		return a.v4
	}
	return a.v6
}
