package main

import (
	"context"
	"fmt"
	"net/url"
	"strings"
	"time"

	"tailscale.com/ipn"
)

// This file ties a node's identity to its control server. The server is known by its
// key, not by its URL: a server with a new name, or with https in front, is the same
// server and knows the same nodes. Another server does not know this node: the node
// would lose its identity there, and with it the address that the mailbox trusts.

// controlKeyID is the entry of the state file with the control server's public key.
// Tailscale's own programs keep entries that they do not know.
const controlKeyID = ipn.StateKey("_control-server-key")

// sameServerLimit bounds the check at the start whether a new URL leads to the same
// control server.
const sameServerLimit = 5 * time.Second

// checkControl makes sure that the identity in state belongs to the node's control
// server.
func (n *node) checkControl(state *stateFile) error {
	before, wanted := storedPrefs(state).ControlURL, canonicalControl(n.server.ControlURL)
	if before == "" || canonicalControl(before) == wanted {
		return nil
	}
	known, err := state.ReadState(controlKeyID)
	if err != nil {
		return n.report(codeOtherControl, otherControl(state.path, before, wanted, "the first server's key was never stored, so the edge cannot check that both URLs lead to the same server: set control_url back and start once, then change it"))
	}
	ctx, cancel := context.WithTimeout(n.ctx, sameServerLimit)
	defer cancel()
	serverKey, err := askForKey(ctx, wanted)
	if err != nil {
		return n.report(codeControlUnreachable, fmt.Errorf("%w (the identity in %s belongs to a node of %s, so the edge has to ask whether this is the same server)", err, state.path, before))
	}
	if serverKey.String() != string(known) {
		return n.report(codeOtherControl, otherControl(state.path, before, wanted, "that is another server, with another key: set control_url back"))
	}
	n.movedFrom = before
	return nil
}

func otherControl(path, before, wanted, why string) error {
	return fmt.Errorf("the identity in %s belongs to a node of %s, but control_url is %s now; %s", path, before, wanted, why)
}

// rememberControl stores the key of the control server that this node has joined, in
// the background; tries again until that has worked.
func (n *node) rememberControl() {
	if n.state == nil || n.remembered.Load() || !n.asking.CompareAndSwap(false, true) {
		return
	}
	n.pending.Go(func() { // the caller is counted in pending, so close still waits
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
