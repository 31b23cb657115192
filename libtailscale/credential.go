package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strings"

	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
	api "tailscale.com/client/tailscale/v2"
	"tailscale.com/ipn"
)

// defaultAPIURL is Tailscale's HTTP API. Headscale has its own at the control
// server's URL, with the same paths.
const defaultAPIURL = "https://api.tailscale.com"

// keyLifeSeconds is how long a new key is valid. It is used at once; this limits the
// keys of failed attempts.
const keyLifeSeconds = 10 * 60

// credential is what a node may enrol with: an auth key, or the proof that the API may
// make one for it. tsnet has code for the same, but runs it at every start, enrolled or
// not (tsnet/tsnet.go, resolveAuthKey), so that an outage of the API would stop a node
// that does not need it.
type credential struct {
	authKey      string
	clientID     string // of an OAuth client or of a federated identity
	clientSecret string // of an OAuth client
	idToken      string // of a federated identity

	preauthorized bool // keys made by the API go past device approval
}

func (c *credential) isGiven() bool {
	return c.authKey != "" || c.clientSecret != "" || c.idToken != ""
}

// credentialError is why a credential did not become an auth key, with its code.
type credentialError struct {
	code code
	error
}

// obtainKey returns the auth key. If none was given, the API makes one for a single
// use. Its errors are credentialErrors.
func (n *node) obtainKey(ctx context.Context) (string, error) {
	c := n.credential()
	if c.authKey != "" {
		return c.authKey, nil
	}
	if len(n.server.AdvertiseTags) == 0 {
		// The API says so too, but only after a look at the credential.
		return "", credentialError{codeBadCredential, errors.New("a key made by the API needs tags, and none are set")}
	}
	base := n.apiURL()
	if !isPrivate(base) {
		return "", credentialError{codeBadCredential, fmt.Errorf("it would be sent to %s unencrypted; use https", base)}
	}
	client := &http.Client{
		Transport: apiTransport{newTransport()},
		// A secret is for this host alone.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	ctx = context.WithValue(ctx, oauth2.HTTPClient, client)
	token, err := c.accessToken(ctx, base)
	if err != nil {
		return "", classifyAPIError(base, err)
	}
	key, err := n.createKey(ctx, base, client, token, c.preauthorized)
	if err != nil {
		return "", classifyAPIError(base, err)
	}
	return key, nil
}

// apiURL is where the control server's HTTP API is.
func (n *node) apiURL() string {
	control := strings.TrimSuffix(n.server.ControlURL, "/")
	if control == "" || ipn.IsLoginServerSynonym(control) {
		return defaultAPIURL
	}
	return control
}

// isPrivate is whether nobody on the path can read what is sent there. (The control
// protocol itself is encrypted over http too.)
func isPrivate(base string) bool {
	parsed, err := url.Parse(base)
	if err != nil || parsed.Scheme == "https" {
		return err == nil
	}
	ip, err := netip.ParseAddr(parsed.Hostname())
	return parsed.Hostname() == "localhost" || err == nil && ip.IsLoopback()
}

// accessToken proves the right to make keys (tailscale.com/kb/1215 and 1581).
func (c *credential) accessToken(ctx context.Context, base string) (string, error) {
	if c.clientSecret != "" {
		config := clientcredentials.Config{
			ClientID:     cmp.Or(c.clientID, "unnamed"), // Tailscale reads it from the secret
			ClientSecret: c.clientSecret,
			TokenURL:     base + "/api/v2/oauth/token",
		}
		token, err := config.Token(ctx)
		if err != nil {
			return "", err
		}
		return token.AccessToken, nil
	}
	config := oauth2.Config{Endpoint: oauth2.Endpoint{TokenURL: base + "/api/v2/oauth/token-exchange"}}
	token, err := config.Exchange(ctx, "", oauth2.SetAuthURLParam("client_id", c.clientID), oauth2.SetAuthURLParam("jwt", c.idToken))
	if err != nil {
		return "", err
	}
	return token.AccessToken, nil
}

// createKey makes a key that works once, for this node.
func (n *node) createKey(ctx context.Context, base string, client *http.Client, token string, preauthorized bool) (string, error) {
	baseURL, err := url.Parse(base)
	if err != nil {
		return "", err
	}
	var request api.CreateKeyRequest
	request.ExpirySeconds = keyLifeSeconds
	create := &request.Capabilities.Devices.Create
	create.Ephemeral = n.server.Ephemeral
	create.Preauthorized = preauthorized
	create.Tags = n.server.AdvertiseTags
	key, err := (&api.Client{BaseURL: baseURL, APIKey: token, HTTP: client}).Keys().CreateAuthKey(ctx, request)
	if err != nil {
		return "", err
	}
	if key.Key == "" {
		return "", errors.New("it answered without a key")
	}
	return key.Key, nil
}

// apiTransport turns answers that are not from the API into errors: a proxy in between
// answers in HTML, which does not help.
type apiTransport struct{ http.RoundTripper }

func (t apiTransport) RoundTrip(request *http.Request) (*http.Response, error) {
	response, err := t.RoundTripper.RoundTrip(request)
	if err == nil && (response.StatusCode >= http.StatusInternalServerError || response.StatusCode == http.StatusTooManyRequests) {
		response.Body.Close()
		return nil, fmt.Errorf("it answered %s", response.Status)
	}
	return response, err
}

// classifyAPIError distinguishes a refusal, in the API's own words, from an API that
// could not be reached.
func classifyAPIError(base string, err error) error {
	var words string
	var retrieve *oauth2.RetrieveError
	var refused api.APIError
	switch {
	case errors.As(err, new(credentialError)):
		return err
	case errors.As(err, &retrieve):
		words = string(retrieve.Body)
		var answer api.APIError
		if json.Unmarshal(retrieve.Body, &answer) == nil && answer.Message != "" {
			words = answer.Message
		}
	case errors.As(err, &refused):
		words = refused.Message
	default:
		return credentialError{codeControlUnreachable, fmt.Errorf("asking %s for an auth key: %w", base, err)}
	}
	return credentialError{codeOfRefusal(words), fmt.Errorf("its API refused to make an auth key: %s", strings.TrimSpace(words))}
}
