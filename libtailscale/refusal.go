package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"tailscale.com/ipn"
)

// passing are messages after which Tailscale goes on by itself: the control
// server's rate limit (control/controlclient/direct.go, tryRegister), and a
// watcher that was cut off (ipn/ipnlocal/local.go,
// watchIPNBusFellBehindMessage).
var passing = []string{"rate limited", "fell behind"}

// codeOfRefusal classifies the known texts. All others are taken to be about the
// credential.
func codeOfRefusal(message string) code {
	switch {
	case strings.Contains(message, "requested tags [") && strings.Contains(message, "invalid or not permitted"):
		// The control server's and the API's: hassio-addons/app-tailscale#642,
		// masterpointio/terraform-aws-tailscale#9.
		return codeTagsRefused
	case strings.Contains(message, demandsLogs):
		return codeNeedsLogUpload
	default:
		return codeAuthRefused
	}
}

// demandsLogs is Tailscale's answer to a tailnet with network flow logs when log
// upload is off (ipn/ipnlocal/local.go, setControlClientStatusLocked).
const demandsLogs = "tailnet requires logging"

// explain names what the node was waiting for when time ran out.
func (j *join) explain(ctx context.Context) error {
	n := j.node
	var failed credentialError
	if errors.As(j.credentialFailure(ctx), &failed) {
		return n.report(failed.code, failed)
	}
	state := n.backend.State()
	if state == ipn.NeedsMachineAuth {
		return n.report(codeNeedsApproval, errors.New("the node waits for an admin's approval"))
	}
	enrolled := n.backend.StatusWithoutPeers().HaveNodeKey && j.uses == 0
	probe := n.probeControl(ctx)
	switch {
	case probe != nil && enrolled:
		return n.report(codeUpTimedOut, withAdvice(probe))
	case errors.As(probe, new(clockError)):
		return n.report(codeClockWrong, withAdvice(probe))
	case errors.As(probe, new(upgradeError)):
		return n.report(codeUpgradeBlocked, withAdvice(probe))
	case probe != nil:
		return n.report(codeControlUnreachable, probe)
	case state == ipn.NeedsLogin && !enrolled:
		// A proxy in front of the control server may pass only the request for its key.
		return n.report(codeControlUnreachable, fmt.Errorf("it answers, but neither refuses this node nor sends it a network map: %s", n.reason()))
	default:
		return n.report(codeUpTimedOut, fmt.Errorf("state %v: %s", state, n.reason()))
	}
}

// credentialFailure is why the credential did not become a key or could not be used;
// the reason may be that time ran out.
func (j *join) credentialFailure(ctx context.Context) error {
	for range j.uses {
		select {
		case err := <-j.used:
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return nil
		}
	}
	return nil
}

// reason is Tailscale's own health warnings, as part of a sentence.
func (n *node) reason() string {
	parts := n.complaints(n.backend.StatusWithoutPeers())
	if len(parts) == 0 {
		return "no reason is known"
	}
	return strings.Join(parts, "; ")
}
