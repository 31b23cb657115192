package main

import (
	"context"
	"net/netip"
	"time"

	"tailscale.com/tailcfg"
)

// pingReport is what tailscale_ping writes.
type pingReport struct {
	IP        netip.Addr `json:"ip"`
	Answered  bool       `json:"answered"`
	LatencyMS float64    `json:"latency_ms"`
	Direct    string     `json:"direct"`  // the peer's UDP address, when direct
	Relay     string     `json:"relay"`   // the DERP region or peer relay otherwise
	Online    bool       `json:"online"`  // as the control server sees it
	Network   bool       `json:"network"` // whether this node has a network: the peer or control answers
	LastSeen  string     `json:"last_seen"`
}

// ping asks a peer for a sign of life below TCP. That needs neither an open port nor an
// ACL, so it distinguishes a silent port from a silent peer. A disco ping finds the
// path; the first answer may come over a relay although a direct path exists, so a
// relayed answer is asked for again. A TSMP ping, which is answered inside WireGuard,
// shows whether the peer can be reached: with disco alone a lost handshake would look
// like a silent port. If the peer is silent, ping checks within two more seconds
// whether this node itself has no network.
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
	// A lost disco ping must leave time for the TSMP ping.
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
			return pingReport{}, codeNotRunning // peers no longer know this node
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
