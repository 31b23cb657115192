package testnet

import (
	"encoding/json"
	"fmt"
	"slices"

	"tailscale.com/tailcfg"
)

// nodeView is what a node should know at one moment.
type nodeView struct {
	self   *tailcfg.Node
	peers  []*tailcfg.Node
	filter []tailcfg.FilterRule
	health []string // what is wrong with it
}

// viewFor computes the view of rec, the change it includes, and a channel closed
// at the next change.
func (r *registry) viewFor(rec *record) (*nodeView, uint64, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	v := &nodeView{self: rec.node.Clone(), filter: rec.filter(), health: slices.Clone(rec.health)}
	v.self.CapMap = r.capsLocked(rec)
	for _, p := range r.peersLocked(rec) {
		v.peers = append(v.peers, p.asPeer())
	}
	return v, r.gen, r.changed.ch
}

// capsLocked is what rec is told about itself beside its own data.
func (r *registry) capsLocked(rec *record) tailcfg.NodeCapMap {
	caps := tailcfg.NodeCapMap{
		// Both would try to reach the internet.
		tailcfg.NodeAttrDisableUPnP:                   nil,
		tailcfg.NodeAttrDisableCaptivePortalDetection: nil,
	}
	if r.flowLogs && !rec.local {
		caps[tailcfg.CapabilityDataPlaneAuditLogs] = nil
	}
	if r.derpOnly {
		// It ends UDP; that the relay has another port than 443 does not matter.
		caps[tailcfg.NodeAttrOnlyTCP443] = nil
	}
	return caps
}

// asPeer is the node as others are told about it.
func (rec *record) asPeer() *tailcfg.Node {
	n := rec.node.Clone()
	n.Expired = rec.isExpired()
	online := rec.isOnline()
	n.Online = &online
	if !online && !rec.lastSeen.IsZero() {
		seen := rec.lastSeen
		n.LastSeen = &seen
	}
	return n
}

// filter is the node's packet filter: everything but the denied ports.
func (rec *record) filter() []tailcfg.FilterRule {
	denied := make([]int, 0, len(rec.denied))
	for port := range rec.denied {
		denied = append(denied, int(port))
	}
	slices.Sort(denied)
	rule := tailcfg.FilterRule{SrcIPs: []string{"*"}}
	first := 0
	for _, port := range append(denied, 1<<16) {
		if first < port {
			rule.DstPorts = append(rule.DstPorts, tailcfg.NetPortRange{
				IP:    "*",
				Ports: tailcfg.PortRange{First: uint16(first), Last: uint16(port - 1)},
			})
		}
		first = port + 1
	}
	return []tailcfg.FilterRule{rule}
}

// changesSince is the message that takes a node from old to v; nil if they are
// the same. With no old it is the full map.
func (v *nodeView) changesSince(old *nodeView) *tailcfg.MapResponse {
	if old == nil {
		return &tailcfg.MapResponse{Node: v.self, Peers: v.peers, PacketFilter: v.filter, DisplayMessages: v.messages()}
	}
	msg := new(tailcfg.MapResponse)
	changed := false
	if !sameJSON(v.self, old.self) {
		msg.Node, changed = v.self, true
	}
	if !sameJSON(v.filter, old.filter) {
		msg.PacketFilter, changed = v.filter, true
	}
	if !slices.Equal(v.health, old.health) {
		msg.DisplayMessages, changed = v.messages(), true
	}
	oldPeers := make(map[tailcfg.NodeID]*tailcfg.Node)
	for _, p := range old.peers {
		oldPeers[p.ID] = p
	}
	for _, p := range v.peers {
		if was := oldPeers[p.ID]; was == nil || !sameJSON(p, was) {
			msg.PeersChanged, changed = append(msg.PeersChanged, p), true
		}
		delete(oldPeers, p.ID)
	}
	for id := range oldPeers {
		msg.PeersRemoved, changed = append(msg.PeersRemoved, id), true
	}
	if !changed {
		return nil
	}
	return msg
}

// messages replaces the health problems that the node was told before.
func (v *nodeView) messages() map[tailcfg.DisplayMessageID]*tailcfg.DisplayMessage {
	messages := map[tailcfg.DisplayMessageID]*tailcfg.DisplayMessage{"*": nil}
	for i, text := range v.health {
		id := tailcfg.DisplayMessageID(fmt.Sprintf("test-%d", i))
		messages[id] = &tailcfg.DisplayMessage{Title: "Test", Text: text, Severity: tailcfg.SeverityHigh}
	}
	return messages
}

// sameJSON compares as the wire would. These are plain data: encoding cannot fail.
func sameJSON(a, b any) bool {
	ja, _ := json.Marshal(a)
	jb, _ := json.Marshal(b)
	return string(ja) == string(jb)
}
