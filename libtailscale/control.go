package main

import (
	"context"
	"fmt"
	"net/url"
	"strings"
	"time"

	"tailscale.com/ipn"
)

// This file ties a node's identity to its control server. A control server is its
// key, not its URL: one that was renamed, or got https in front, is the same server
// and knows the same nodes. Another server does not know this node: its identity
// would be lost there, and with it the address that the mailbox trusts.

// controlKeyID is the entry of the state file that has the control server's public
// key. Tailscale's own programs leave an entry that they do not know where it is.
const controlKeyID = ipn.StateKey("_control-server-key")

// sameServerLimit bounds the question at the start whether another URL leads to the
// same control server.
const sameServerLimit = 5 * time.Second

// checkControl makes sure that the identity in state is of the node's control
// server.
func (n *node) checkControl(state *stateFile) error {
	before, wanted := storedPrefs(state).ControlURL, canonicalControl(n.server.ControlURL)
	if before == "" || canonicalControl(before) == wanted {
		return nil
	}
	known, err := state.ReadState(controlKeyID)
	if err != nil {
		return n.report(codeOtherControl, otherControl(state.path, before, wanted, "the key of the former was never stored, so the edge cannot check that both are one server: set control_url back and start once, then change it"))
	}
	ctx, cancel := context.WithTimeout(n.ctx, sameServerLimit)
	defer cancel()
	serverKey, err := askForKey(ctx, wanted)
	if err != nil {
		return n.report(codeControlUnreachable, fmt.Errorf("%w (the identity in %s is of a node of %s, so it has to be asked whether it is the same server)", err, state.path, before))
	}
	if serverKey.String() != string(known) {
		return n.report(codeOtherControl, otherControl(state.path, before, wanted, "the latter is another server, with another key: set control_url back"))
	}
	n.movedFrom = before
	return nil
}

func otherControl(path, before, wanted, why string) error {
	return fmt.Errorf("the identity in %s is of a node of %s, and control_url is %s now; %s", path, before, wanted, why)
}

// rememberControl stores the key of the control server that this node has joined,
// in the background; again until that has worked.
func (n *node) rememberControl() {
	if n.state == nil || n.remembered.Load() || !n.asking.CompareAndSwap(false, true) {
		return
	}
	n.pending.Go(func() { // who calls is counted in pending, so close is not done waiting
		defer n.asking.Store(false)
		ctx, cancel := context.WithTimeout(n.ctx, probeLimit)
		defer cancel()
		serverKey, err := askForKey(ctx, n.controlURL())
		if err != nil {
			n.log("asking for the control server's key: %v", err)
			return
		}
		n.state.WriteState(controlKeyID, []byte(serverKey.String()))
		n.remembered.Store(true)
	})
}

// storedPrefs is what Tailscale keeps of an identity; empty if there is none.
func storedPrefs(store ipn.StateStore) *ipn.Prefs {
	prefs := new(ipn.Prefs)
	current, _ := store.ReadState(ipn.CurrentProfileStateKey)
	profile, err := store.ReadState(ipn.StateKey(current))
	if err != nil || ipn.PrefsFromBytes(profile, prefs) != nil {
		return new(ipn.Prefs)
	}
	return prefs
}

// canonicalControl is one of the spellings of a control server's URL.
func canonicalControl(text string) string {
	parsed, err := url.Parse(strings.TrimSuffix(text, "/"))
	if err != nil {
		return text
	}
	parsed.Host = strings.ToLower(parsed.Host)
	defaultPort := map[string]string{"http": ":80", "https": ":443"}[parsed.Scheme]
	parsed.Host = strings.TrimSuffix(parsed.Host, defaultPort)
	canonical := parsed.String()
	if canonical == "" || ipn.IsLoginServerSynonym(canonical) {
		return ipn.DefaultControlURL
	}
	return canonical
}
