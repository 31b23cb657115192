package testnet

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"tailscale.com/net/tsaddr"
	"tailscale.com/wgengine/filter"
)

// Nodes lists all nodes as control sees them, also those of other processes.
func (n *Net) Nodes() []NodeStatus { return n.control.reg.nodeStatuses() }

// SetAuthKeys is SetAuthKeyTable with reusable keys.
func (n *Net) SetAuthKeys(keys []string) { n.SetAuthKeyTable(reusableKeys(keys)) }

// SetAuthKeyTable replaces the keys control accepts, those made by the API
// included. With nil any key will do, and no key at all; otherwise a node
// without a key gets a login URL.
func (n *Net) SetAuthKeyTable(keys []AuthKey) {
	n.control.reg.change(func() {
		p := &n.control.reg.policy
		p.anyKey, p.authKeys = keys == nil, keyTable(keys)
	})
}

// KeyUses is how many nodes the key has admitted, counted anew with each
// SetAuthKeyTable.
func (n *Net) KeyUses(key string) int {
	r := n.control.reg
	r.mu.Lock()
	defer r.mu.Unlock()
	if k := r.policy.authKeys[key]; k != nil {
		return k.uses
	}
	return 0
}

// PermitTags sets the tags that nodes may ask for; nil permits all. It does not
// affect nodes that have joined.
func (n *Net) PermitTags(tags []string) {
	n.control.reg.change(func() { n.control.reg.policy.permittedTags = slices.Clone(tags) })
}

// RequireApproval sets whether nodes that join from now on need Approve.
func (n *Net) RequireApproval(required bool) {
	n.control.reg.change(func() { n.control.reg.policy.needApproval = required })
}

// Approve lets a node in that is waiting for approval.
func (n *Net) Approve(name string) error {
	return n.changeNode(name, func(rec *record) { rec.node.MachineAuthorized = true })
}

// RevokeApproval makes an approved node wait for Approve again. Its peers lose
// it until then.
func (n *Net) RevokeApproval(name string) error {
	return n.changeNode(name, func(rec *record) { rec.node.MachineAuthorized = false })
}

// HoldMaps makes control leave new requests for a network map unanswered, or ends that
// for later requests.
func (n *Net) HoldMaps(on bool) { n.control.mapsHeld.Store(on) }

// RequireFlowLogs sets whether the tailnet demands the upload of flow logs from
// the nodes of other processes. Those of this process, which upload nothing,
// would stop.
func (n *Net) RequireFlowLogs(required bool) error {
	return n.awaitPushed(n.control.reg.change(func() { n.control.reg.flowLogs = required }))
}

// SetDERPOnly sets whether nodes that join from now on reach each other through
// the relay only. Direct paths that nodes have found already stay.
func (n *Net) SetDERPOnly(enabled bool) error {
	return n.awaitPushed(n.control.reg.change(func() { n.control.reg.derpOnly = enabled }))
}

// CompleteLogin visits the pending login URLs of the node with that host name.
func (n *Net) CompleteLogin(hostname string) error {
	if !n.control.reg.completeLogins(func(_ string, l *login) bool { return l.hostname == hostname }) {
		return fmt.Errorf("no login is pending for host name %q", hostname)
	}
	return nil
}

// SetTags replaces a node's tags, whatever it asked for.
func (n *Net) SetTags(name string, tags []string) error {
	return n.changeNode(name, func(rec *record) { rec.setTags(tags) })
}

// SetIP gives the node another v4 address, which must be free, and the v6
// address that goes with it.
func (n *Net) SetIP(name string, v4 netip.Addr) error {
	if !tsaddr.CGNATRange().Contains(v4) {
		return fmt.Errorf("%v is no v4 address of a tailnet", v4)
	}
	var visible bool
	err := n.changeNode(name, func(rec *record) {
		rec.setIP(v4)
		visible = rec.isMember() && !rec.hidden
	})
	if err != nil {
		return err
	}
	return n.awaitNodes(fmt.Sprintf("%q to have the address %v", name, v4), func(rn *runningNode) bool {
		if rn.name == name {
			own, _ := rn.TailscaleIPs()
			return own == v4
		}
		return rn.knowsPeer(v4) == visible
	})
}

// SetKeyExpiry sets when a node's key expires; zero is never. A time in the past
// expires it now.
func (n *Net) SetKeyExpiry(name string, at time.Time) error {
	return n.changeNode(name, func(rec *record) { rec.node.KeyExpiry = at })
}

// SetHealth sets the health problems that the node is told to have.
func (n *Net) SetHealth(name string, texts []string) error {
	return n.changeNode(name, func(rec *record) { rec.health = slices.Clone(texts) })
}

// SetOnline overrides what peers are told about whether the node is online; nil
// ends that. It does not affect the node itself.
func (n *Net) SetOnline(name string, online *bool) error {
	return n.changeNode(name, func(rec *record) { rec.override = online })
}

// HideNode removes the node from everyone else's network map.
func (n *Net) HideNode(name string) error { return n.setHidden(name, true) }

// ShowNode ends HideNode.
func (n *Net) ShowNode(name string) error { return n.setHidden(name, false) }

func (n *Net) setHidden(name string, hidden bool) error {
	var ip netip.Addr
	var visible bool
	err := n.changeNode(name, func(rec *record) {
		rec.hidden = hidden
		ip = rec.node.Addresses[0].Addr()
		visible = rec.isMember() && !hidden
	})
	if err != nil {
		return err
	}
	return n.awaitNodes(fmt.Sprintf("its peers' maps to change for %q", name), func(rn *runningNode) bool {
		return rn.name == name || rn.knowsPeer(ip) == visible
	})
}

// IsolateNode takes every peer out of the node's own map. It stays online, and
// in its peers' maps, but drops their packets without an answer: a host that has
// silently died, or a broken path.
func (n *Net) IsolateNode(name string) error {
	return n.changeNode(name, func(rec *record) { rec.isolated = true })
}

// RejoinNode ends IsolateNode.
//
// Peers go on using the WireGuard sessions that the node has forgotten, and
// would notice only after 15 seconds of silence. So if the node is one of this
// process, it contacts its peers, and they answer before RejoinNode returns.
func (n *Net) RejoinNode(name string) error {
	var peers []netip.Addr
	err := n.changeNode(name, func(rec *record) {
		rec.isolated = false
		peers = n.control.reg.onlinePeersLocked(rec)
	})
	if err != nil {
		return err
	}
	for _, rn := range n.runningNodes() {
		if rn.name == name {
			return rn.contact(peers)
		}
	}
	return nil
}

// DenyPort makes the node's packet filter drop new connections to the port, as an
// access rule does. The dialler's TCP gets no answer; its Tailscale gets a reject.
func (n *Net) DenyPort(name string, port uint16) error { return n.setDenied(name, port, true) }

// AllowPort ends DenyPort.
func (n *Net) AllowPort(name string, port uint16) error { return n.setDenied(name, port, false) }

func (n *Net) setDenied(name string, port uint16, denied bool) error {
	err := n.changeNode(name, func(rec *record) {
		if denied {
			rec.denied[port] = true
		} else {
			delete(rec.denied, port)
		}
	})
	if err != nil {
		return err
	}
	return n.awaitNodes(fmt.Sprintf("%q to change its packet filter", name), func(rn *runningNode) bool {
		return rn.name != name || (rn.checkPort(port) == filter.Drop) == denied
	})
}

// RemoveNode deletes the node: its map stream ends, and control does not know
// its key any more. It may join again, as a new node with another address.
func (n *Net) RemoveNode(name string) error {
	return n.changeNode(name, n.control.reg.removeLocked)
}

// RestoreNode undoes RemoveNode, like a control server that was restored from a backup.
func (n *Net) RestoreNode(name string) error {
	gen, err := n.control.reg.restore(name)
	if err != nil {
		return err
	}
	return n.awaitPushed(gen)
}

// changeNode changes what control knows about a node and waits until every
// connected node has handled its new map.
func (n *Net) changeNode(name string, f func(*record)) error {
	gen, err := n.control.reg.changeNode(name, f)
	if err != nil {
		return err
	}
	return n.awaitPushed(gen)
}

func (n *Net) awaitPushed(gen uint64) error {
	ctx, cancel := opContext()
	defer cancel()
	return n.control.reg.waitPushed(ctx, gen)
}
