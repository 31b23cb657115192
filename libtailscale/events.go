package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"tailscale.com/health"
	"tailscale.com/ipn"
	"tailscale.com/ipn/ipnstate"
	"tailscale.com/net/netmon"
	"tailscale.com/tailcfg"
	"tailscale.com/tsconst"
)

// status is one line on the event descriptor (tailscale_set_eventfd).
type status struct {
	State     string       `json:"state"`
	Name      string       `json:"name"`
	IPs       []netip.Addr `json:"ips"`
	Tags      []string     `json:"tags"`
	InMapPoll bool         `json:"in_map_poll"`
	KeyExpiry *time.Time   `json:"key_expiry,omitempty"`
	LoginURL  string       `json:"login_url"`
	Health    []string     `json:"health"`

	Enrolled       bool                 `json:"enrolled"` // it holds a key, good or not
	Removed        bool                 `json:"removed"`
	NeedsLogUpload bool                 `json:"needs_log_upload"`
	Relay          string               `json:"relay"` // what is wrong with it
	NetworkChanges int64                `json:"network_changes"`
	WakeUps        int64                `json:"wake_ups"`
	Unsaved        string               `json:"unsaved"`
	ControlError   string               `json:"control_error"`  // since it was last heard
	ControlAdvice  string               `json:"control_advice"` // what to do about it, where that is known
	HomeRegion     string               `json:"home_region"`    // the code of the home relay's
	HomeRegionID   tailcfg.DERPRegionID `json:"home_region_id"`

	// ControlMovedFrom is where the control server was at the start before.
	ControlMovedFrom string `json:"control_moved_from"`
}

// lookInterval is how late what the bus does not tell may be. Losing the
// control server is such a thing: it becomes a health warning, and with it a
// notification, only after eight minutes (health/warnings.go,
// notInMapPollWarnable).
const lookInterval = time.Second

// saveInterval is between two attempts to save an identity that could not be
// saved when it changed.
const saveInterval = 10 * time.Second

// askInterval is between two looks at a control server that is not heard.
const askInterval = 5 * time.Second

// follow keeps self up to date and passes status lines on until the node
// closes.
func (n *node) follow() {
	changed := make(chan struct{}, 1)
	n.pending.Go(func() { n.watch(changed) })
	defer n.server.Sys().NetMon.Get().RegisterChangeCallback(n.networkChanged)()
	lines := make(chan []byte, 1)
	defer close(lines)
	if n.events != nil {
		go writeLines(n.events, lines)
	}
	look := time.NewTicker(lookInterval)
	defer look.Stop()
	save := time.NewTicker(saveInterval)
	defer save.Stop()
	ask := time.NewTicker(askInterval)
	defer ask.Stop()
	n.askWhy()
	for {
		select {
		case <-changed:
		case <-look.C:
		case <-save.C:
			if n.state != nil {
				n.state.retry()
			}
		case <-ask.C:
			n.askWhy()
		case <-n.ctx.Done():
			return
		}
		n.leaveControl()
		n.publish(lines)
	}
}

// askWhy finds out, in the background, why the control server is not heard: the
// backend's own attempts may take minutes to fail, and then name the last step only.
func (n *node) askWhy() {
	switch n.backend.State() {
	case ipn.NeedsLogin, ipn.NeedsMachineAuth, ipn.Stopped:
		return // it has answered
	}
	heard := n.server.Sys().HealthTracker.Get().GetInPollNetMap
	if heard() && !n.removed.Load() {
		n.rememberControl()
	}
	if n.removed.Load() || heard() || !n.asking.CompareAndSwap(false, true) {
		return
	}
	n.pending.Go(func() { // follow is counted in pending, so close is not done waiting
		defer n.asking.Store(false)
		ctx, cancel := context.WithTimeout(n.ctx, probeLimit)
		defer cancel()
		err := n.probeControl(ctx)
		if err == nil || heard() {
			n.controlProbed.Store(nil)
			return
		}
		n.controlProbed.Store(&controlProblem{n.harmless(err.Error()), adviceOn(err)})
	})
}

// watch tells about every change on the bus. The bus cuts off a slow watcher,
// and health changes come on it too, so the watch is renewed whenever it ends.
func (n *node) watch(changed chan<- struct{}) {
	const mask = ipn.NotifyInitialState | ipn.NotifyInitialHealthState | ipn.NotifyPeerChanges
	for n.ctx.Err() == nil {
		n.backend.WatchNotifications(n.ctx, mask, nil, func(notify *ipn.Notify) bool {
			if notify.ErrMessage != nil && strings.Contains(*notify.ErrMessage, demandsLogs) {
				n.needsLogUpload.Store(true)
			}
			select {
			case changed <- struct{}{}:
			default: // one is waiting already
			}
			return n.ctx.Err() == nil
		})
	}
}

// log passes a line on and learns from it what the backend tells nobody else.
//
// Why the control server cannot be reached, or refuses, and that it has removed this
// node, which the backend takes for an outage (control/controlclient/direct.go,
// PollNetMap; ipn/ipnlocal/local.go, setControlClientStatusLocked; auto.go,
// updateRoutine). And that this node is ephemeral and could not be logged out when
// it was closed (ipn/ipnlocal/local.go, Shutdown).
func (n *node) log(format string, args ...any) {
	switch {
	case format == "Received error: %v":
		if err := errorIn(args); err != nil {
			n.noteControlError(err)
		}
	case format == "control: lite map update error after %v: %v":
		if err := errorIn(args); err != nil {
			n.noteUpdateError(err)
		}
	case strings.HasPrefix(format, "failed to log out ephemeral node"):
		n.staysListed.Store(true)
	}
	n.logs.printf("%s", n.redact(fmt.Sprintf(format, args...)))
}

// noteControlError keeps why the control server could not be talked to. The
// backend tells it nobody else, or only minutes later.
func (n *node) noteControlError(err error) {
	if strings.Contains(err.Error(), notFound) {
		n.removed.Store(true)
		n.rejections.Add(1)
	}
	n.controlSaid.Store(&controlProblem{said: n.harmless(err.Error())})
}

func (n *node) networkChanged(delta *netmon.ChangeDelta) {
	if delta.TimeJumped() {
		n.wakeUps.Add(1)
	}
	if delta.RebindLikelyRequired {
		n.networkChanges.Add(1)
	}
}

// publish refreshes self and leaves the newest status line in lines, in place
// of one that still waits for room: what the node believes of itself must not
// depend on a reader.
func (n *node) publish(lines chan []byte) {
	n.refreshSelf()
	line, err := n.statusLine()
	if err != nil {
		return
	}
	select {
	case <-lines:
	default:
	}
	lines <- append(line, '\n') // never waits: this is the only sender
}

// statusLine is the state as it is now, of a node that is started.
func (n *node) statusLine() ([]byte, error) {
	return json.Marshal(n.statusOf(n.backend.StatusWithoutPeers()))
}

// writeLines writes each line that differs from the one before. It ends when
// lines is closed, or with the write that fails because events was.
func writeLines(events *os.File, lines <-chan []byte) {
	var last []byte
	for line := range lines {
		if bytes.Equal(line, last) {
			continue
		}
		if _, err := events.Write(line); err != nil {
			return
		}
		last = line
	}
}

// openEvents takes fd over, in place of an earlier one; -1 is none. Being
// non-blocking, it can be closed beneath a write that waits for room.
func (n *node) openEvents(fd int) {
	if n.events != nil {
		n.events.Close()
		n.events = nil
	}
	if fd >= 0 {
		n.events = os.NewFile(uintptr(fd), "events")
	}
}

func (n *node) statusOf(current *ipnstate.Status) status {
	health := n.server.Sys().HealthTracker.Get()
	if health.GetInPollNetMap() {
		n.removed.Store(false) // it is there again, or a new node has its place
		n.controlSaid.Store(nil)
		n.controlProbed.Store(nil)
	}
	s := status{
		State:          current.BackendState,
		LoginURL:       webAddress(current.AuthURL),
		Health:         n.warnings(current),
		Enrolled:       current.HaveNodeKey,
		Removed:        n.removed.Load(),
		NeedsLogUpload: n.needsLogUpload.Load(),
		Relay:          relayTrouble(health.CurrentState()),
		NetworkChanges: n.networkChanges.Load(),
		WakeUps:        n.wakeUps.Load(),
	}
	if problem := cmp.Or(n.controlProbed.Load(), n.controlSaid.Load()); problem != nil {
		s.ControlError, s.ControlAdvice = problem.said, problem.advice
	}
	if moved := n.movedFrom; moved != "" {
		s.ControlMovedFrom = n.harmless(moved)
	}
	if n.state != nil {
		if err := n.state.unsaved(); err != nil {
			s.Unsaved = n.harmless(err.Error())
		}
	}
	if self := current.Self; self != nil {
		s.Name = n.harmless(trimDot(self.DNSName))
		s.IPs = self.TailscaleIPs
		s.InMapPoll = self.Online
		s.HomeRegion, s.HomeRegionID = n.harmless(self.Relay), n.regionID(self.Relay)
		s.KeyExpiry = expiryOf(self.KeyExpiry)
		if self.Tags != nil {
			for _, tag := range self.Tags.All() {
				s.Tags = append(s.Tags, n.harmless(tag))
			}
		}
	}
	return s
}

// expiryOf is when a key expires, nil if never. Control servers have several ways to
// say never: no time, the year 1, and the last moment of the year 9999.
func expiryOf(at *time.Time) *time.Time {
	const never = 9000 // years that no key lives to see
	if at == nil || at.Year() <= 1 || at.Year() >= never {
		return nil
	}
	return at
}

// regionID is the number of a relay region, 0 if there is none of that code.
func (n *node) regionID(code string) tailcfg.DERPRegionID {
	if relays := n.backend.DERPMap(); relays != nil && code != "" {
		for id, region := range relays.Regions {
			if region.RegionCode == code {
				return id
			}
		}
	}
	return 0
}

// webAddress is what may be shown to a person to be opened, or empty.
func webAddress(text string) string {
	parsed, err := url.Parse(text)
	ascii := strings.IndexFunc(text, func(r rune) bool { return r <= ' ' || r > '~' }) < 0
	if err != nil || !ascii || parsed.Scheme != "https" && parsed.Scheme != "http" {
		return ""
	}
	return text
}

// warnings is complaints without the one that a node is logged out which only waits
// for its control server: that would send people after keys.
func (n *node) warnings(current *ipnstate.Status) []string {
	complaints := n.complaints(current)
	login, ok := n.server.Sys().HealthTracker.Get().CurrentState().Warnings[tsconst.HealthWarnableLoginState]
	if !ok || current.BackendState == ipn.NeedsLogin.String() {
		return complaints
	}
	loggedOut := n.harmless(strings.TrimRight(login.Text, "."))
	return slices.DeleteFunc(complaints, func(text string) bool { return text == loggedOut })
}

// complaints is what Tailscale itself finds wrong, in an order that stays. Some of it
// comes from the control server, so it is bounded.
func (n *node) complaints(current *ipnstate.Status) []string {
	const most = 20
	var parts []string
	for _, sentence := range current.Health[:min(len(current.Health), most)] {
		parts = append(parts, n.harmless(strings.TrimRight(sentence, ".")))
	}
	slices.Sort(parts)
	return parts
}

// relayTrouble names the first of the warnings that mean that no relay can be
// used (health/warnings.go); empty when there is none. Not its text, which may
// count the minutes.
func relayTrouble(state *health.State) string {
	for _, code := range []health.WarnableCode{
		tsconst.HealthWarnableNetworkStatus,
		tsconst.HealthWarnableNoDERPHome,
		tsconst.HealthWarnableNoDERPConnection,
		tsconst.HealthWarnableDERPTimedOut,
	} {
		if warning, ok := state.Warnings[code]; ok {
			return strings.ToLower(warning.Title)
		}
	}
	return ""
}

// refreshSelf makes the node's addresses known while it has a place, and unknown
// otherwise, so that no connection starts without a tailnet. The state is asked
// for under a lock: an older answer must not undo a newer one.
func (n *node) refreshSelf() {
	n.selfMu.Lock()
	defer n.selfMu.Unlock()
	nm := n.backend.NetMapNoPeers()
	thrownOut := n.removed.Load() || n.needsLogUpload.Load()
	if n.backend.State() != ipn.Running || nm == nil || thrownOut || n.ctx.Err() != nil {
		n.self.Store(nil)
		return
	}
	self := addressesOf(nm.SelfNode)
	if self != n.held {
		n.abortOthers(self)
		n.held = self
	}
	n.self.Store(&self)
}

// abortOthers ends the connections from addresses that are the node's no more:
// nothing of them will ever arrive, and their clients would wait for it.
func (n *node) abortOthers(self addresses) {
	n.abortWhere((*tcp.Endpoint).GetLocalAddress, func(local netip.Addr) bool {
		return local != self.v4 && local != self.v6
	})
}

// abortPeer ends the connections to a peer that has gone without a word.
func (n *node) abortPeer(peer netip.Addr) {
	n.abortWhere((*tcp.Endpoint).GetRemoteAddress, func(remote netip.Addr) bool { return remote == peer })
}

// abortWhere resets the connections whose address at one end is such a one.
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

// pingReport is what tailscale_ping writes.
type pingReport struct {
	IP        netip.Addr `json:"ip"`
	Answered  bool       `json:"answered"`
	LatencyMS float64    `json:"latency_ms"`
	Direct    string     `json:"direct"`  // the peer's UDP address, when direct
	Relay     string     `json:"relay"`   // the DERP region or peer relay otherwise
	Online    bool       `json:"online"`  // as the control server sees it
	Network   bool       `json:"network"` // whether this node has any: it answers, or control does
	LastSeen  string     `json:"last_seen"`
}

// ping asks a peer for a sign of life beneath TCP, which needs neither an open
// port nor an ACL and so tells a silent port from a silent peer. A disco ping
// finds the path; the first answer may come over a relay although a direct
// path exists, so a relayed answer is asked for again. Whether the peer can be
// reached is told by a TSMP ping, which is answered inside WireGuard: disco
// alone would blame the port for a handshake that was lost. Of a silent peer it is
// found out, within two more seconds, whether the silence may be our own.
func (n *node) ping(host string, limit time.Duration) (pingReport, error) {
	if n.self.Load() == nil {
		return pingReport{}, codeNotRunning
	}
	p, err := n.resolve(host)
	if err != nil {
		return pingReport{}, err
	}
	report := pingReport{IP: p.ip, Online: p.node.Online().Get()}
	if seen, ok := p.node.LastSeen().GetOk(); ok {
		report.LastSeen = seen.UTC().Format(time.RFC3339)
	}
	ctx, cancel := context.WithTimeout(n.ctx, limit)
	defer cancel()
	// A lost one must leave time for the ping that counts.
	disco, cancelDisco := context.WithTimeout(ctx, limit/2)
	defer cancelDisco()
	for range 3 {
		result, err := n.backend.Ping(disco, p.ip, tailcfg.PingDisco, 0)
		if err != nil || result.Err != "" {
			break
		}
		report.LatencyMS = result.LatencySeconds * 1000
		report.Direct, report.Relay = n.harmless(result.Endpoint), n.harmless(result.DERPRegionCode)
		if result.PeerRelay != "" {
			report.Direct, report.Relay = "", n.harmless(result.PeerRelay)
		}
		if report.Direct != "" {
			break
		}
	}
	result, err := n.backend.Ping(ctx, p.ip, tailcfg.PingTSMP, 0)
	if err != nil || result.Err != "" {
		ctx, cancel := context.WithTimeout(n.ctx, probeLimit)
		defer cancel()
		deleted, heard := n.isDeleted(ctx)
		if deleted {
			return pingReport{}, codeNotRunning // no peer knows us any more
		}
		if report.Network = heard; !heard {
			ctx, cancel := context.WithTimeout(n.ctx, probeLimit)
			defer cancel()
			_, err := askForKey(ctx, n.controlURL())
			report.Network = err == nil
		}
		return report, codeTimedOut
	}
	report.Answered, report.Network = true, true
	return report, nil
}

func trimDot(name string) string { return strings.TrimSuffix(name, ".") }
