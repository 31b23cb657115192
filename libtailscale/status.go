package main

import (
	"cmp"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"tailscale.com/health"
	"tailscale.com/ipn"
	"tailscale.com/ipn/ipnstate"
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

	// ControlMovedFrom is the control server's URL before it changed.
	ControlMovedFrom string `json:"control_moved_from"`
}

func (n *node) statusOf(current *ipnstate.Status) status {
	health := n.server.Sys().HealthTracker.Get()
	if health.GetInPollNetMap() {
		n.removed.Store(false) // the node is known again, or enrolled as a new one
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

// webAddress is a URL that may be shown to a person, or empty.
func webAddress(text string) string {
	parsed, err := url.Parse(text)
	ascii := strings.IndexFunc(text, func(r rune) bool { return r <= ' ' || r > '~' }) < 0
	if err != nil || !ascii || parsed.Scheme != "https" && parsed.Scheme != "http" {
		return ""
	}
	return text
}

// warnings is complaints, but without "logged out" for a node that only waits for its
// control server: people would look for a new key.
func (n *node) warnings(current *ipnstate.Status) []string {
	complaints := n.complaints(current)
	login, ok := n.server.Sys().HealthTracker.Get().CurrentState().Warnings[tsconst.HealthWarnableLoginState]
	if !ok || current.BackendState == ipn.NeedsLogin.String() {
		return complaints
	}
	loggedOut := n.harmless(strings.TrimRight(login.Text, "."))
	return slices.DeleteFunc(complaints, func(text string) bool { return text == loggedOut })
}

// complaints are Tailscale's own health warnings, in a stable order. Some come from the
// control server, so their number is bounded.
func (n *node) complaints(current *ipnstate.Status) []string {
	const most = 20
	var parts []string
	for _, sentence := range current.Health[:min(len(current.Health), most)] {
		parts = append(parts, n.harmless(strings.TrimRight(sentence, ".")))
	}
	slices.Sort(parts)
	return parts
}

// relayTrouble names the first of the warnings that mean that no relay can be used
// (health/warnings.go); empty when there is none. It does not use the warning's text,
// which may count minutes.
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

func trimDot(name string) string { return strings.TrimSuffix(name, ".") }
