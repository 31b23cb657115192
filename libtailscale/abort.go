package main

import (
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// abortOthers ends the connections from addresses that the node no longer has: nothing
// more can arrive on them, and their clients would wait for ever.
func (n *node) abortOthers(self addresses) {
	n.abortWhere((*tcp.Endpoint).GetLocalAddress, func(local netip.Addr) bool {
		return local != self.v4 && local != self.v6
	})
}

// abortPeer ends the connections to a peer that is gone without closing them.
func (n *node) abortPeer(peer netip.Addr) {
	n.abortWhere((*tcp.Endpoint).GetRemoteAddress, func(remote netip.Addr) bool { return remote == peer })
}

// abortWhere resets the connections whose address at that end is unwanted.
func (n *node) abortWhere(end func(*tcp.Endpoint) (tcpip.FullAddress, tcpip.Error), unwanted func(netip.Addr) bool) {
	for _, registered := range n.stack.RegisteredEndpoints() {
		ep, ok := registered.(*tcp.Endpoint)
		if !ok {
			continue
		}
		address, err := end(ep)
		if ip, valid := netip.AddrFromSlice(address.Addr.AsSlice()); err == nil && valid && unwanted(ip) {
			ep.Abort()
		}
	}
}
