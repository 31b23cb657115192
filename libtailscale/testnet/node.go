package testnet

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"tailscale.com/ipn/ipnstate"
	"tailscale.com/tailcfg"
	"tailscale.com/tsnet"
	"tailscale.com/wgengine/filter"
)

// pollInterval is how often a condition is polled that cannot be waited for.
const pollInterval = 5 * time.Millisecond

// NodeConfig describes a node for AddNode.
type NodeConfig struct {
	Name string
	Tags []string
	// Forward relays connections to a tailnet port to an address of this host,
	// such as 127.0.0.1:2525.
	Forward map[uint16]string
}

// NodeInfo is where peers find a node.
type NodeInfo struct {
	IPs     []netip.Addr // v4, v6
	DNSName string
}

// node is a node of this process, running or not.
type node struct {
	name     string
	tags     []string
	dir      string
	forwards *forwards
	running  *runningNode // nil while stopped; guarded by Net.mu
}

// runningNode is a started tsnet server.
type runningNode struct {
	*tsnet.Server
	name string
}

// AddNode adds a node and waits until it is running and reachable.
func (n *Net) AddNode(cfg NodeConfig) (NodeInfo, error) {
	n.mu.Lock()
	if _, ok := n.nodes[cfg.Name]; ok {
		n.mu.Unlock()
		return NodeInfo{}, fmt.Errorf("there is a node %q already", cfg.Name)
	}
	nd := &node{
		name:     cfg.Name,
		tags:     cfg.Tags,
		dir:      filepath.Join(n.dir, cfg.Name),
		forwards: newForwards(cfg.Forward, n.logf),
	}
	n.nodes[cfg.Name] = nd
	n.mu.Unlock()
	info, err := n.startNode(nd)
	if err != nil {
		n.mu.Lock()
		delete(n.nodes, cfg.Name)
		n.mu.Unlock()
	}
	return info, err
}

// StartNode starts a stopped node again, with the same state and forwards.
func (n *Net) StartNode(name string) (NodeInfo, error) {
	nd, err := n.nodeByName(name)
	if err != nil {
		return NodeInfo{}, err
	}
	n.mu.Lock()
	running := nd.running != nil
	n.mu.Unlock()
	if running {
		return NodeInfo{}, fmt.Errorf("node %q is running", name)
	}
	return n.startNode(nd)
}

// StopNode stops the node without logging it out, like a process that ends. Its peers
// see it go offline.
func (n *Net) StopNode(name string) error {
	nd, err := n.nodeByName(name)
	if err != nil {
		return err
	}
	n.mu.Lock()
	running := nd.running
	nd.running = nil
	n.mu.Unlock()
	if running == nil {
		return fmt.Errorf("node %q is not running", name)
	}
	if err := running.shutDown(); err != nil {
		return err
	}
	// Control may not have seen the stream end yet, or may be stopped.
	gen := n.control.reg.change(func() {
		if rec := n.control.reg.byNameLocked(name); rec != nil {
			rec.goOffline()
		}
	})
	return n.awaitPushed(gen)
}

// Server is the tsnet server of a running node, for tests in the same process;
// nil if there is none.
func (n *Net) Server(name string) *tsnet.Server {
	n.mu.Lock()
	defer n.mu.Unlock()
	if nd := n.nodes[name]; nd != nil && nd.running != nil {
		return nd.running.Server
	}
	return nil
}

// Forward relays connections to the node's tailnet port to an address of this
// host, from now on.
func (n *Net) Forward(name string, port uint16, to string) error {
	nd, err := n.nodeByName(name)
	if err != nil {
		return err
	}
	nd.forwards.set(port, to)
	return nil
}

// DropPort makes the node silently drop packets to the port, as a host's firewall does.
func (n *Net) DropPort(name string, port uint16) error { return n.setDropped(name, port, true) }

// PassPort ends DropPort.
func (n *Net) PassPort(name string, port uint16) error { return n.setDropped(name, port, false) }

func (n *Net) setDropped(name string, port uint16, dropped bool) error {
	nd, err := n.nodeByName(name)
	if err != nil {
		return err
	}
	nd.forwards.drop(port, dropped)
	return nil
}

// ShowPeers makes the node's forwarded connections come from 127.x.y.z for a peer
// at 100.x.y.z, so that their target can tell peers apart.
func (n *Net) ShowPeers(name string) error {
	nd, err := n.nodeByName(name)
	if err != nil {
		return err
	}
	nd.forwards.showPeers.Store(true)
	return nil
}

// Unforward closes the node's tailnet port: connecting is refused. Connections
// that are open stay.
func (n *Net) Unforward(name string, port uint16) error {
	nd, err := n.nodeByName(name)
	if err != nil {
		return err
	}
	return nd.forwards.unset(port)
}

// Stats counts a node's forwarded connections.
type Stats struct {
	Open  int64 // now
	Total int64 // since AddNode
}

// Stats counts the node's forwarded connections.
func (n *Net) Stats(name string) (Stats, error) {
	nd, err := n.nodeByName(name)
	if err != nil {
		return Stats{}, err
	}
	return Stats{Open: nd.forwards.open.Load(), Total: nd.forwards.total.Load()}, nil
}

func (n *Net) nodeByName(name string) (*node, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	nd := n.nodes[name]
	if nd == nil {
		return nil, fmt.Errorf("this process runs no node %q", name)
	}
	return nd, nil
}

// startNode starts the tsnet server and waits until its peers can reach it.
func (n *Net) startNode(nd *node) (NodeInfo, error) {
	if err := os.MkdirAll(nd.dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return NodeInfo{}, fmt.Errorf("creating the state directory of %q: %w", nd.name, err)
	}
	rn := &runningNode{name: nd.name, Server: &tsnet.Server{
		Dir:           nd.dir,
		Hostname:      nd.name,
		ControlURL:    n.ControlURL(),
		AuthKey:       n.control.masterKey,
		AdvertiseTags: nd.tags,
		Logf:          n.logf,
		UserLogf:      n.logf,
	}}
	info, err := n.bringUp(rn, nd.forwards)
	if err != nil {
		rn.Close() // it has no connections yet
		return NodeInfo{}, fmt.Errorf("starting node %q: %w", nd.name, err)
	}
	n.mu.Lock()
	nd.running = rn
	n.mu.Unlock()
	return info, nil
}

func (n *Net) bringUp(rn *runningNode, fw *forwards) (NodeInfo, error) {
	ctx, cancel := opContext()
	defer cancel()
	if err := rn.Start(); err != nil {
		return NodeInfo{}, err
	}
	rn.RegisterFallbackTCPHandler(fw.handle)
	// Nothing else uses this hook, and no packet comes before there are peers.
	rn.Sys().Tun.Get().PostFilterPacketInboundFromWireGuardAppConnector = fw.firewall
	st, err := rn.Up(ctx)
	if err != nil {
		return NodeInfo{}, err
	}
	if err := rn.awaitHomeDERP(ctx); err != nil {
		return NodeInfo{}, err
	}
	// By now control knows the node's home DERP, or will soon: the peers' maps must have
	// it before a peer dials.
	if err := n.awaitHomeDERPKnown(ctx, rn.name); err != nil {
		return NodeInfo{}, err
	}
	return NodeInfo{IPs: st.TailscaleIPs, DNSName: strings.TrimSuffix(st.Self.DNSName, ".")}, nil
}

// awaitHomeDERP waits until the node can be reached over its relay.
func (rn *runningNode) awaitHomeDERP(ctx context.Context) error {
	health := rn.Sys().HealthTracker.Get()
	sock := rn.Sys().MagicSock.Get()
	return await(ctx, "its home DERP connection", func() bool {
		r := sock.GetLastNetcheckReport(ctx)
		return r != nil && r.PreferredDERP != 0 && !health.GetDERPRegionReceivedTime(r.PreferredDERP).IsZero()
	})
}

// awaitHomeDERPKnown waits until control, and then every connected node, knows
// the node's home DERP.
func (n *Net) awaitHomeDERPKnown(ctx context.Context, name string) error {
	reg := n.control.reg
	var gen uint64
	err := await(ctx, "control to learn its home DERP", func() bool {
		reg.mu.Lock()
		defer reg.mu.Unlock()
		gen = reg.gen
		rec := reg.byNameLocked(name)
		return rec != nil && rec.node.HomeDERP != 0 && rec.session != nil
	})
	if err != nil {
		return err
	}
	return reg.waitPushed(ctx, gen)
}

// shutDown ends the node without telling its peers.
func (rn *runningNode) shutDown() error {
	unplugErr := rn.unplug()
	return errors.Join(unplugErr, rn.Close())
}

// status is the node's own view of the tailnet; nil while it is shutting down.
func (rn *runningNode) status() *ipnstate.Status {
	lc, err := rn.LocalClient()
	if err != nil {
		return nil
	}
	ctx, cancel := opContext()
	defer cancel()
	st, err := lc.Status(ctx)
	if err != nil {
		return nil
	}
	return st
}

// knowsPeer is whether a peer with that address is in the node's map.
func (rn *runningNode) knowsPeer(ip netip.Addr) bool {
	st := rn.status()
	if st == nil {
		return false
	}
	for _, p := range st.Peer {
		for _, a := range p.TailscaleIPs {
			if a == ip {
				return true
			}
		}
	}
	return false
}

// contact opens a WireGuard session with every one of peers.
func (rn *runningNode) contact(peers []netip.Addr) error {
	lc, err := rn.LocalClient()
	if err != nil {
		return err
	}
	ctx, cancel := opContext()
	defer cancel()
	for _, ip := range peers {
		// Its acknowledged map may still be on its way into the engine.
		what := fmt.Sprintf("%q to know peer %v", rn.name, ip)
		if err := await(ctx, what, func() bool { return rn.knowsPeer(ip) }); err != nil {
			return err
		}
		// TSMP, unlike disco, travels in the session.
		if _, err := lc.Ping(ctx, ip, tailcfg.PingTSMP); err != nil {
			return fmt.Errorf("contacting peer %v from %q: %w", ip, rn.name, err)
		}
	}
	return nil
}

// checkPort is the decision of the node's packet filter about a new connection.
func (rn *runningNode) checkPort(port uint16) filter.Response {
	v4, _ := rn.TailscaleIPs()
	somePeer := netip.AddrFrom4([4]byte{100, 64, 255, 254})
	return rn.Sys().Engine.Get().GetFilter().CheckTCP(somePeer, v4, port)
}

// awaitNodes waits until cond holds for every node of this process that control
// can reach: an acknowledged map may still be on its way into the engine.
func (n *Net) awaitNodes(what string, cond func(*runningNode) bool) error {
	ctx, cancel := opContext()
	defer cancel()
	return await(ctx, what, func() bool {
		for _, rn := range n.runningNodes() {
			if n.control.reg.isReached(rn.name) && !cond(rn) {
				return false
			}
		}
		return true
	})
}

func (n *Net) runningNodes() (out []*runningNode) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, nd := range n.nodes {
		if nd.running != nil {
			out = append(out, nd.running)
		}
	}
	return out
}

// await polls cond until it holds or ctx ends.
func await(ctx context.Context, what string, cond func() bool) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w", what, ctx.Err())
		}
	}
	return nil
}
