package testnet

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// untaggedKeyLife is how long an untagged node's key lasts: real control's
// default. Keys of tagged nodes do not expire.
const untaggedKeyLife = 180 * 24 * time.Hour

// theUser owns every node.
var (
	theUser  = tailcfg.User{ID: 1, DisplayName: "Test User"}
	theLogin = tailcfg.Login{ID: 1, Provider: "testnet", LoginName: "user@example.com", DisplayName: "Test User"}
)

// login is a login URL that somebody has yet to visit.
type login struct {
	hostname string
	done     chan struct{} // closed by the visit
}

// serveRegister lets a node in, or tells it why not.
func (c *control) serveRegister(w http.ResponseWriter, r *http.Request, machine key.MachinePublic) {
	var req tailcfg.RegisterRequest
	if !readJSON(w, r, &req) {
		return
	}
	if req.Hostinfo == nil {
		req.Hostinfo = new(tailcfg.Hostinfo)
	}
	if req.Followup != "" && !c.awaitLogin(r, req.Followup) {
		return // the node has gone
	}
	decide := c.register
	if c.headscale && (req.Auth == nil || req.Auth.AuthKey != c.masterKey) && !c.reg.isLocal(machine) {
		decide = c.registerAsHeadscale
	}
	res := decide(&req, machine)
	res.User, res.Login = theUser, theLogin
	c.logf("control: register %q: error=%q authURL=%q expired=%v", req.Hostinfo.Hostname, res.Error, res.AuthURL, res.NodeKeyExpired)
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(res)
}

// register decides, in real control's order: a logout; a node key it knows,
// which needs no credentials; a visited login URL or an auth key; else a login
// URL.
func (c *control) register(req *tailcfg.RegisterRequest, machine key.MachinePublic) *tailcfg.RegisterResponse {
	r := c.reg
	r.mu.Lock()
	defer r.mu.Unlock()

	known := r.byKeyLocked(req.NodeKey)
	if known != nil && known.node.Machine != machine {
		return &tailcfg.RegisterResponse{Error: "node key belongs to another machine"}
	}
	if !req.Expiry.IsZero() && req.Expiry.Before(time.Now()) {
		return r.logoutLocked(known, req.Expiry)
	}
	// A key that comes along is checked even when it is not needed, as real
	// control does (tailscale/tailscale#16987): the edge must not send one.
	authKey, err := r.policy.findKey(req.Auth, c.masterKey)
	if err != "" {
		return &tailcfg.RegisterResponse{Error: err}
	}
	if known != nil && !known.loggedOut {
		if known.isExpired() {
			return &tailcfg.RegisterResponse{NodeKeyExpired: true}
		}
		return &tailcfg.RegisterResponse{MachineAuthorized: known.node.MachineAuthorized}
	}
	if req.Auth == nil && req.Followup == "" && !r.policy.anyKey {
		return &tailcfg.RegisterResponse{AuthURL: c.newLoginLocked(req.Hostinfo.Hostname)}
	}
	if bad := r.policy.refusedTags(req.Hostinfo.RequestTags); len(bad) > 0 {
		return &tailcfg.RegisterResponse{Error: refusedTagsText(bad)}
	}
	rec := r.admitLocked(req, machine, authKey)
	rec.local = req.Auth != nil && req.Auth.AuthKey == c.masterKey
	return &tailcfg.RegisterResponse{MachineAuthorized: rec.node.MachineAuthorized}
}

// refusedTagsText is real control's text: hassio-addons/app-tailscale#642.
func refusedTagsText(tags []string) string {
	return fmt.Sprintf("requested tags [%s] are invalid or not permitted", strings.Join(tags, " "))
}

// findKey returns the key of the request (a key without properties if there is none or
// it is not in the table), or real control's text for a key that it does not accept:
// tailscale/tailscale#9715 and #13005 for one that is spent, revoked or expired, where
// the id stands for the key, and #6215 for one that is no key.
func (p *policy) findKey(auth *tailcfg.RegisterResponseAuth, masterKey string) (_ *AuthKey, err string) {
	if auth == nil || auth.AuthKey == "" || auth.AuthKey == masterKey {
		return new(AuthKey), ""
	}
	k, listed := p.authKeys[auth.AuthKey]
	if listed && !k.Expired && !k.spent {
		return k, ""
	}
	if !listed && p.anyKey {
		return new(AuthKey), ""
	}
	if rest, ok := strings.CutPrefix(auth.AuthKey, "tskey-auth-"); ok {
		id, _, _ := strings.Cut(rest, "-")
		return nil, fmt.Sprintf("invalid key: API key %s not valid", id)
	}
	return nil, "invalid key: unable to validate API key"
}

// admitLocked adds the node, or gives the machine's present node its new key. It
// spends authKey.
func (r *registry) admitLocked(req *tailcfg.RegisterRequest, machine key.MachinePublic, authKey *AuthKey) *record {
	return r.admitWithLocked(req, machine, authKey, req.Hostinfo.RequestTags)
}

// admitWithLocked is admitLocked with the tags that the node gets.
func (r *registry) admitWithLocked(req *tailcfg.RegisterRequest, machine key.MachinePublic, authKey *AuthKey, tags []string) *record {
	authKey.spent = authKey.SingleUse
	authKey.uses++
	rec := r.byMachineLocked(machine)
	if rec == nil {
		rec = r.addLocked(machine, req.Hostinfo)
		rec.node.MachineAuthorized = !r.policy.needApproval
	}
	rec.node.Key = req.NodeKey
	rec.node.Hostinfo = req.Hostinfo.View()
	rec.node.Cap = req.Version
	if authKey.Preauthorized {
		rec.node.MachineAuthorized = true
	}
	rec.ephemeral = req.Ephemeral || authKey.Ephemeral
	rec.loggedOut = false
	rec.setTags(tags)
	r.bumpLocked()
	return rec
}

// setTags changes the tags, and with them whether the key expires.
func (r *record) setTags(tags []string) {
	r.node.Tags = slices.Clone(tags)
	if len(tags) > 0 {
		r.node.KeyExpiry = time.Time{}
	} else {
		r.node.KeyExpiry = time.Now().Add(untaggedKeyLife)
	}
}

// logoutLocked notes that the node has ended its own registration. An ephemeral
// one is removed at once, as real control does
// (https://tailscale.com/blog/ephemeral-logout); another one stays listed.
func (r *registry) logoutLocked(rec *record, expiry time.Time) *tailcfg.RegisterResponse {
	if rec != nil {
		rec.loggedOut = true
		rec.node.KeyExpiry = expiry
		if rec.ephemeral {
			r.removeLocked(rec)
		}
		r.bumpLocked()
	}
	return &tailcfg.RegisterResponse{}
}

// newLoginLocked makes a login URL.
func (c *control) newLoginLocked(hostname string) string {
	id := strings.ToLower(rand.Text())
	c.reg.logins[id] = &login{hostname: hostname, done: make(chan struct{})}
	return c.baseURL() + "/auth/" + id
}

// awaitLogin waits until the login URL has been visited. It is false if the
// node gave up first, or the URL is none of ours.
func (c *control) awaitLogin(r *http.Request, loginURL string) bool {
	id := loginURL[strings.LastIndex(loginURL, "/")+1:]
	c.reg.mu.Lock()
	l := c.reg.logins[id]
	c.reg.mu.Unlock()
	if l == nil {
		return false
	}
	select {
	case <-l.done:
		return true
	case <-r.Context().Done():
		return false
	}
}

// serveLogin is the page of a login URL; to visit it is to log the node in.
func (c *control) serveLogin(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	if !c.reg.completeLogins(func(got string, _ *login) bool { return got == id }) {
		http.Error(w, "no such login", http.StatusNotFound)
		return
	}
	io.WriteString(w, "login complete\n")
}

// completeLogins completes the logins that match and reports whether any did.
func (r *registry) completeLogins(match func(id string, l *login) bool) (found bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, l := range r.logins {
		if !match(id, l) {
			continue
		}
		found = true
		select {
		case <-l.done: // visited twice
		default:
			close(l.done)
		}
	}
	return found
}
