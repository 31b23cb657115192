package testnet

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"tailscale.com/net/tsaddr"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// record is what control knows about one node. Guarded by registry.mu.
type record struct {
	node      *tailcfg.Node // never handed out, only clones of it
	ephemeral bool
	local     bool // a node of this process

	loggedOut bool // by the node itself
	removed   bool // see removeLocked; kept in the table so that ids stay unique
	hidden    bool // peers are not told about it
	isolated  bool // it is not told about peers
	denied    map[uint16]bool
	health    []string // the health problems it is told to have

	// online is whether it was last seen with a map stream open; override, if
	// set, is what peers are told instead.
	online   bool
	override *bool
	lastSeen time.Time

	session *session // its map stream, if one is open
}

// name is the first label of the node's DNS name, by which commands call it.
func (r *record) name() string {
	label, _, _ := strings.Cut(r.node.Name, ".")
	return label
}

func (r *record) isOnline() bool {
	if r.override != nil {
		return *r.override
	}
	return r.online
}

func (r *record) isExpired() bool {
	return !r.node.KeyExpiry.IsZero() && r.node.KeyExpiry.Before(time.Now())
}

// isMember is whether the node counts as part of the tailnet.
func (r *record) isMember() bool {
	return !r.removed && !r.loggedOut && r.node.MachineAuthorized
}

// registry is control's table of nodes and its policy. Map streams watch it:
// each change has a number (gen) and wakes them.
type registry struct {
	domain string

	mu        sync.Mutex
	gen       uint64
	changed   broadcast // on every change
	progress  broadcast // whenever a map stream has caught up, or ended
	suspended bool      // control is stopped
	records   []*record // in order of registration; the index is the node ID - 1
	logins    map[string]*login
	policy    policy

	headscale bool // as Headscale does, towards the nodes of other processes

	flowLogs bool // nodes of other processes are told to upload flow logs
	derpOnly bool // nodes are told to send nothing but TCP
}

// policy is who may join, and as what.
type policy struct {
	anyKey       bool // a key that is not in authKeys, or none, will do
	authKeys     map[string]*AuthKey
	needApproval bool
	// permittedTags are the tags a node may ask for; nil permits all.
	permittedTags []string
}

func newRegistry(domain string, authKeys []string) *registry {
	return &registry{
		domain:   domain,
		changed:  newBroadcast(),
		progress: newBroadcast(),
		logins:   make(map[string]*login),
		policy:   policy{anyKey: authKeys == nil, authKeys: keyTable(reusableKeys(authKeys))},
	}
}

// broadcast wakes everybody who waits on the channel of the moment.
type broadcast struct{ ch chan struct{} }

func newBroadcast() broadcast { return broadcast{make(chan struct{})} }

func (b *broadcast) wake() {
	close(b.ch)
	b.ch = make(chan struct{})
}

// change applies f and wakes the map streams. It returns the change's number,
// for waitPushed.
func (r *registry) change(f func()) uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
	return r.bumpLocked()
}

func (r *registry) bumpLocked() uint64 {
	r.gen++
	r.changed.wake()
	return r.gen
}

// changeNode is change for the node called name.
func (r *registry) changeNode(name string, f func(*record)) (uint64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec := r.byNameLocked(name)
	if rec == nil {
		return 0, fmt.Errorf("control knows no node called %q", name)
	}
	f(rec)
	return r.bumpLocked(), nil
}

func (r *registry) findLocked(match func(*record) bool) *record {
	for _, rec := range r.records {
		if !rec.removed && match(rec) {
			return rec
		}
	}
	return nil
}

func (r *registry) byNameLocked(name string) *record {
	return r.findLocked(func(rec *record) bool { return rec.name() == name })
}

func (r *registry) byKeyLocked(nodeKey key.NodePublic) *record {
	return r.findLocked(func(rec *record) bool { return rec.node.Key == nodeKey })
}

func (r *registry) byMachineLocked(machine key.MachinePublic) *record {
	return r.findLocked(func(rec *record) bool { return rec.node.Machine == machine })
}

// peersLocked are the nodes that rec is told about.
func (r *registry) peersLocked(rec *record) (peers []*record) {
	if !rec.isMember() || rec.isolated {
		return nil
	}
	for _, other := range r.records {
		if other != rec && other.isMember() && !other.hidden {
			peers = append(peers, other)
		}
	}
	return peers
}

// onlinePeersLocked are the v4 addresses of peers that should answer: they have a map
// stream and are told about rec.
func (r *registry) onlinePeersLocked(rec *record) (addrs []netip.Addr) {
	for _, p := range r.peersLocked(rec) {
		if p.session != nil && slices.Contains(r.peersLocked(p), rec) {
			addrs = append(addrs, p.node.Addresses[0].Addr())
		}
	}
	return addrs
}

// addLocked makes a new node: the next address, and the host name it asks for,
// with -1, -2 … appended if that is taken, as real control does.
func (r *registry) addLocked(machine key.MachinePublic, hi *tailcfg.Hostinfo) *record {
	id := len(r.records) + 1
	base := strings.ToLower(hi.Hostname)
	label := base
	for i := 1; r.byNameLocked(label) != nil; i++ {
		label = fmt.Sprintf("%s-%d", base, i)
	}
	rec := &record{
		node: &tailcfg.Node{
			ID:       tailcfg.NodeID(id),
			StableID: tailcfg.StableNodeID(fmt.Sprintf("nTESTNET%06dCNTRL", id)),
			Name:     label + "." + r.domain + ".",
			User:     theUser.ID,
			Machine:  machine,
			Hostinfo: hi.View(),
			Created:  time.Now(),
		},
		denied: make(map[uint16]bool),
	}
	rec.setIP(netip.AddrFrom4([4]byte{100, 64, byte(id >> 8), byte(id)}))
	r.records = append(r.records, rec)
	return rec
}

// setIP gives the node a v4 address and the v6 address that goes with it.
func (r *record) setIP(v4 netip.Addr) {
	r.node.Addresses = []netip.Prefix{
		netip.PrefixFrom(v4, 32),
		netip.PrefixFrom(tsaddr.Tailscale4To6(v4), 128),
	}
	r.node.AllowedIPs = r.node.Addresses
}

// removeLocked forgets the node's key and ends its map stream, which Headscale
// leaves open and uses no more.
func (r *registry) removeLocked(rec *record) {
	if rec.session != nil && (rec.local || !r.headscale) {
		close(rec.session.replaced)
	}
	rec.goOffline()
	rec.removed = true
	r.progress.wake()
}

// isRemoved is whether the node was removed.
func (r *registry) isRemoved(rec *record) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return rec.removed
}

// isLocal is whether the machine is a node of this process.
func (r *registry) isLocal(machine key.MachinePublic) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec := r.byMachineLocked(machine)
	return rec != nil && rec.local
}

// restore takes the removal of a node back.
func (r *registry) restore(name string) (uint64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, rec := range r.records {
		if rec.removed && rec.name() == name {
			rec.removed = false
			return r.bumpLocked(), nil
		}
	}
	return 0, fmt.Errorf("no node called %q was removed", name)
}

// suspend is called before control stops: open map streams no longer count, and the
// nodes that are online stay listed as online.
func (r *registry) suspend() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.suspended = true
	for _, rec := range r.records {
		rec.session = nil
	}
	r.progress.wake()
}

func (r *registry) resume() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.suspended = false
}

// isReached is whether the node has a map stream that tells it about its peers.
func (r *registry) isReached(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec := r.byNameLocked(name)
	return rec != nil && rec.session != nil && rec.isMember() && !rec.isolated
}

// NodeStatus is a node as control sees it.
type NodeStatus struct {
	Name      string       `json:"name"`
	DNSName   string       `json:"dns_name"`
	IPs       []netip.Addr `json:"ips"`
	Tags      []string     `json:"tags"`
	Ephemeral bool         `json:"ephemeral"`
	Online    bool         `json:"online"`     // what peers are told
	KeyExpiry *time.Time   `json:"key_expiry"` // nil: never
	LoggedOut bool         `json:"logged_out"`
	Approved  bool         `json:"approved"`
	Hidden    bool         `json:"hidden"`
}

// nodeStatuses lists the nodes in order of registration, logged out ones
// included, removed ones not.
func (r *registry) nodeStatuses() []NodeStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := []NodeStatus{}
	for _, rec := range r.records {
		if !rec.removed {
			out = append(out, rec.status())
		}
	}
	return out
}

func (r *record) status() NodeStatus {
	st := NodeStatus{
		Name:      r.name(),
		DNSName:   strings.TrimSuffix(r.node.Name, "."),
		Tags:      append([]string{}, r.node.Tags...),
		Ephemeral: r.ephemeral,
		Online:    r.isOnline(),
		LoggedOut: r.loggedOut,
		Approved:  r.node.MachineAuthorized,
		Hidden:    r.hidden,
	}
	for _, p := range r.node.Addresses {
		st.IPs = append(st.IPs, p.Addr())
	}
	if t := r.node.KeyExpiry; !t.IsZero() {
		st.KeyExpiry = &t
	}
	return st
}

// refusedTags returns those of tags that a node may not ask for.
func (p *policy) refusedTags(tags []string) []string {
	if p.permittedTags == nil {
		return nil
	}
	return tagsBeyond(tags, p.permittedTags)
}

// tagsBeyond returns those of tags that are not permitted.
func tagsBeyond(tags, permitted []string) []string {
	return slices.DeleteFunc(slices.Clone(tags), func(tag string) bool {
		return slices.Contains(permitted, tag)
	})
}
