package testnet

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	//lint:ignore SA1019 the types of the API that Tailscale's client for OAuth keys speaks
	tsapi "tailscale.com/client/tailscale"
)

// The stated lifetimes of what the API makes. They are not enforced here.
const (
	tokenLife = time.Hour
	keyLife   = 90 * 24 * time.Hour
)

// OAuthClient is a client of the API. It proves itself by its secret or, as a
// workload identity, by the exact JWT.
type OAuthClient struct {
	ID     string   `json:"id"`
	Secret string   `json:"secret"`
	JWT    string   `json:"jwt"`
	Tags   []string `json:"tags"` // the tags it may give to keys
}

// api is Tailscale's HTTP API, as far as nodes use it to get an auth key.
type api struct {
	reg *registry
	mux *http.ServeMux

	mu       sync.Mutex
	down     bool
	requests int
	clients  []OAuthClient
	tokens   map[string]*OAuthClient // by access token
}

func newAPI(reg *registry) *api {
	a := &api{reg: reg, mux: http.NewServeMux()}
	a.mux.HandleFunc("POST /api/v2/oauth/token", a.serveToken)
	a.mux.HandleFunc("POST /api/v2/oauth/token-exchange", a.serveTokenExchange)
	a.mux.HandleFunc("POST /api/v2/tailnet/{tailnet}/keys", a.serveCreateKey)
	return a
}

// SetOAuthClients replaces the API's clients. The access tokens of the former clients
// are no longer valid; the auth keys that they made still are.
func (n *Net) SetOAuthClients(clients []OAuthClient) {
	a := n.control.api
	a.mu.Lock()
	defer a.mu.Unlock()
	a.clients = slices.Clone(clients)
	a.tokens = make(map[string]*OAuthClient)
}

// SetAPI sets whether the API works, or answers every request with 503.
func (n *Net) SetAPI(up bool) {
	a := n.control.api
	a.mu.Lock()
	defer a.mu.Unlock()
	a.down = !up
}

// APIRequests counts all requests to the API, those that failed included.
func (n *Net) APIRequests() int {
	a := n.control.api
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.requests
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	a.requests++
	down := a.down
	a.mu.Unlock()
	if down {
		apiError(w, http.StatusServiceUnavailable, "service unavailable")
		return
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxRequestBytes)
	a.mux.ServeHTTP(w, r)
}

// serveToken is the OAuth grant for client credentials. Like real control it
// looks at the secret only: tailscale's own clients make up the ID.
func (a *api) serveToken(w http.ResponseWriter, r *http.Request) {
	secret := r.PostFormValue("client_secret")
	if _, password, ok := r.BasicAuth(); ok {
		secret, _ = url.QueryUnescape(password) // RFC 6749, section 2.3.1
	}
	a.grant(w, "API token invalid", func(c *OAuthClient) bool {
		return c.Secret != "" && c.Secret == secret
	})
}

// serveTokenExchange is the grant for workload identities.
func (a *api) serveTokenExchange(w http.ResponseWriter, r *http.Request) {
	id, jwt := r.PostFormValue("client_id"), r.PostFormValue("jwt")
	a.grant(w, "Unauthorized", func(c *OAuthClient) bool {
		return c.JWT != "" && c.JWT == jwt && c.ID == id
	})
}

// grant answers with an access token for the client that matches.
func (a *api) grant(w http.ResponseWriter, refusal string, match func(*OAuthClient) bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.clients {
		if match(&c) {
			token := "tskey-api-k" + rand.Text()
			a.tokens[token] = &c
			apiReply(w, http.StatusOK, map[string]any{
				"access_token": token,
				"token_type":   "Bearer",
				"expires_in":   int(tokenLife.Seconds()),
			})
			return
		}
	}
	apiError(w, http.StatusUnauthorized, refusal)
}

// serveCreateKey makes an auth key and adds it to the table of keys.
func (a *api) serveCreateKey(w http.ResponseWriter, r *http.Request) {
	client := a.clientOf(r)
	if client == nil {
		apiError(w, http.StatusUnauthorized, "API token invalid")
		return
	}
	var req struct{ Capabilities tsapi.KeyCapabilities }
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		apiError(w, http.StatusBadRequest, "reading request: "+err.Error())
		return
	}
	create := req.Capabilities.Devices.Create
	if len(create.Tags) == 0 {
		apiError(w, http.StatusBadRequest, "tags are required for keys of OAuth clients")
		return
	}
	if bad := tagsBeyond(create.Tags, client.Tags); len(bad) > 0 {
		apiError(w, http.StatusBadRequest, refusedTagsText(bad))
		return
	}
	id := "k" + rand.Text()[:11]
	prefix := "tskey-auth"
	if a.reg.headscale {
		prefix = "hskey-auth"
	}
	authKey := &AuthKey{
		Key:           fmt.Sprintf("%s-%s-%s", prefix, id, rand.Text()),
		Tags:          create.Tags,
		SingleUse:     !create.Reusable,
		Ephemeral:     create.Ephemeral,
		Preauthorized: create.Preauthorized,
	}
	a.reg.change(func() { a.reg.policy.authKeys[authKey.Key] = authKey })
	now := time.Now().UTC().Truncate(time.Second)
	apiReply(w, http.StatusOK, struct {
		tsapi.Key
		Secret string `json:"key"`
	}{tsapi.Key{ID: id, Created: now, Expires: now.Add(keyLife), Capabilities: req.Capabilities}, authKey.Key})
}

// clientOf finds the client by its access token; nil if there is none. The token
// comes as a Bearer token or, from tailscale's own client for workload
// identities, as the user name of Basic authentication.
func (a *api) clientOf(r *http.Request) *OAuthClient {
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		token, _, _ = r.BasicAuth()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.tokens[token]
}

func apiReply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v)
}

func apiError(w http.ResponseWriter, status int, message string) {
	apiReply(w, status, map[string]string{"message": message})
}
