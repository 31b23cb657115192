package testnet

import (
	"fmt"
	"net/http"
	"strconv"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// This file has what a Headscale of 2026 (0.28 and newer) does differently from
// Tailscale's control server, with its own texts. The rules are those of its
// hscontrol/auth.go (handleRegister), hscontrol/state/state.go
// (HandleNodeFromPreAuthKey, createAndSaveNewNode, processReauthTags),
// hscontrol/handlers.go, hscontrol/noise.go and hscontrol/mapper/batcher.go
// (addToBatch), and were seen on a real one.

// noiseCapabilityVersion is the least v of a request for the key that is answered
// with one (hscontrol/handlers.go).
const noiseCapabilityVersion = 39

// registerAsHeadscale lets a node in, or tells it why not.
func (c *control) registerAsHeadscale(req *tailcfg.RegisterRequest, machine key.MachinePublic) *tailcfg.RegisterResponse {
	r := c.reg
	r.mu.Lock()
	defer r.mu.Unlock()

	known := r.byKeyLocked(req.NodeKey)
	if known != nil && known.node.Machine != machine {
		return &tailcfg.RegisterResponse{Error: "node exists with a different machine key"}
	}
	if known != nil && !req.Expiry.IsZero() && req.Expiry.Before(time.Now()) {
		r.logoutLocked(known, time.Now())
		return &tailcfg.RegisterResponse{NodeKeyExpired: true}
	}
	if known != nil && req.Auth == nil {
		if known.isExpired() {
			return &tailcfg.RegisterResponse{NodeKeyExpired: true}
		}
		return &tailcfg.RegisterResponse{MachineAuthorized: true}
	}
	if req.Followup != "" {
		return c.admitByPersonLocked(req, machine)
	}
	if req.Auth == nil || req.Auth.AuthKey == "" {
		return &tailcfg.RegisterResponse{AuthURL: c.newLoginLocked(req.Hostinfo.Hostname)}
	}
	return r.admitByKeyLocked(req, machine)
}

// admitByKeyLocked lets a node in by its pre-auth key, which alone decides the node's
// tags.
func (r *registry) admitByKeyLocked(req *tailcfg.RegisterRequest, machine key.MachinePublic) *tailcfg.RegisterResponse {
	k := r.policy.authKeys[req.Auth.AuthKey]
	if k == nil {
		return &tailcfg.RegisterResponse{Error: "invalid pre auth key"}
	}
	rec := r.byMachineLocked(machine)
	// A node that comes back unchanged needs no valid key.
	isSame := rec != nil && rec.node.Key == req.NodeKey && !rec.isExpired() && (len(k.Tags) == 0 || len(rec.node.Tags) > 0)
	switch {
	case isSame:
	case k.Expired:
		return &tailcfg.RegisterResponse{Error: "authkey expired"}
	case k.spent:
		return &tailcfg.RegisterResponse{Error: "authkey already used"}
	}
	// A new node must not ask for tags, not even for those of the key. An existing node
	// may ask, and keeps the tags it has.
	if asked := req.Hostinfo.RequestTags; rec == nil && len(asked) > 0 {
		return &tailcfg.RegisterResponse{
			Error: "handling register with auth key: creating new node: " + refusedTagsText(asked),
		}
	}
	if rec == nil || len(rec.node.Tags) == 0 {
		r.admitWithLocked(req, machine, k, k.Tags)
		return &tailcfg.RegisterResponse{MachineAuthorized: true}
	}
	// A tagged node keeps its expiry too: a key does not renew an expired one.
	tags, expiry := rec.node.Tags, rec.node.KeyExpiry
	r.admitWithLocked(req, machine, k, tags)
	rec.node.KeyExpiry = expiry
	return &tailcfg.RegisterResponse{MachineAuthorized: true, NodeKeyExpired: rec.isExpired()}
}

// admitByPersonLocked lets a node in whose login URL was visited. It gets the tags that
// it asks for; if it asks for none, an existing node loses its tags.
func (c *control) admitByPersonLocked(req *tailcfg.RegisterRequest, machine key.MachinePublic) *tailcfg.RegisterResponse {
	asked := req.Hostinfo.RequestTags
	if bad := c.reg.policy.refusedTags(asked); len(bad) > 0 {
		return &tailcfg.RegisterResponse{Error: refusedTagsText(bad)}
	}
	c.reg.admitWithLocked(req, machine, new(AuthKey), asked)
	return &tailcfg.RegisterResponse{MachineAuthorized: true}
}

// serveHeadscaleKey answers the request for the key.
func (c *control) serveHeadscaleKey(w http.ResponseWriter, r *http.Request) {
	version, err := strconv.Atoi(r.FormValue("v"))
	switch {
	case err != nil:
		http.Error(w, fmt.Sprintf("capability version must be set: %v", err), http.StatusBadRequest)
	case version >= noiseCapabilityVersion:
		c.serveKey(w, r)
	}
}

// refuseUnupgraded answers a request for the encrypted channel whose Upgrade header was
// removed on the way.
func refuseUnupgraded(w http.ResponseWriter, r *http.Request) bool {
	if r.Header.Get("Upgrade") != "" {
		return false
	}
	http.Error(w, "Internal error", http.StatusInternalServerError)
	return true
}
