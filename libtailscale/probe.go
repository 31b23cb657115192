package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	// Mozilla's roots, for a machine that has none: an empty container.
	_ "golang.org/x/crypto/x509roots/fallback"
	"tailscale.com/control/controlbase"
	"tailscale.com/control/controlhttp/controlhttpcommon"
	"tailscale.com/ipn"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

const (
	// probeLimit bounds the check of a control server that did not answer. It is part of
	// the time for joining, at most a quarter of it.
	probeLimit = 2 * time.Second
	// clockTolerance is how far the clocks of two machines may be apart. If a clock is
	// wrong, a certificate is off by days or years.
	clockTolerance = 10 * time.Minute
	// maxAnswerBytes bounds what is read of an answer.
	maxAnswerBytes = 1 << 16
)

// clockError is a machine whose clock is wrong.
type clockError struct{ ours, theirs time.Time }

func (e clockError) Error() string {
	return fmt.Sprintf("this machine's clock says %s, but the control server's says %s, so its certificate is not accepted",
		e.ours.UTC().Format(time.RFC3339), e.theirs.UTC().Format(time.RFC3339))
}

// upgradeError is a control server that answers, but not with the connection that
// its protocol runs over.
type upgradeError struct{ url, status string }

func (e upgradeError) Error() string {
	return fmt.Sprintf("it answers, but POST %s with an Upgrade header was answered with %s, not with 101 Switching Protocols: a proxy in front of it does not pass the upgrade on",
		e.url, e.status)
}

// adviceOn is what to do about an error of probeControl; empty if the cause is not
// known.
func adviceOn(err error) string {
	switch {
	case errors.As(err, new(clockError)):
		return "set the clock of this machine (timedatectl set-ntp true)"
	case errors.As(err, new(upgradeError)):
		return "make the proxy pass the headers Upgrade and Connection on for /ts2021 (WebSocket support; Cloudflare's proxy cannot), or set control_url to an address that bypasses the proxy"
	default:
		return ""
	}
}

// withAdvice adds what to do.
func withAdvice(err error) error {
	if advice := adviceOn(err); advice != "" {
		return fmt.Errorf("%w; %s", err, advice)
	}
	return err
}

// newTransport is for requests of our own: each has its own connection, through the
// proxy of the environment if there is one.
func newTransport() *http.Transport {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.DisableKeepAlives = true
	return transport
}

// controlURL is where the node's control server is.
func (n *node) controlURL() string {
	if n.server.ControlURL == "" {
		return ipn.DefaultControlURL
	}
	return strings.TrimSuffix(n.server.ControlURL, "/")
}

// probeControl does what every client does first: it asks the control server for
// its public key, and for a connection of the control protocol. It returns why
// that failed.
func (n *node) probeControl(ctx context.Context) error {
	url := n.controlURL()
	serverKey, err := askForKey(ctx, url)
	if err != nil {
		return err
	}
	return probeUpgrade(ctx, url+"/ts2021", serverKey)
}

// askForKey asks a control server for its public key, which identifies it whatever its
// URL.
func askForKey(ctx context.Context, url string) (serverKey key.MachinePublic, err error) {
	keyURL := fmt.Sprintf("%s/key?v=%d", url, tailcfg.CurrentCapabilityVersion)
	response, body, err := get(ctx, newTransport(), keyURL)
	var certificate x509.CertificateInvalidError
	switch {
	case errors.As(err, &certificate) && certificate.Reason == x509.Expired:
		return serverKey, judgeClock(ctx, url, err)
	case err != nil:
		return serverKey, err
	case response.StatusCode != http.StatusOK:
		return serverKey, fmt.Errorf("%s answered %s", keyURL, response.Status)
	}
	var answer tailcfg.OverTLSPublicKeyResponse
	if json.Unmarshal(body, &answer) != nil || answer.PublicKey.IsZero() {
		return serverKey, fmt.Errorf("%s did not answer with a key, so it is not a control server; check control_url", keyURL)
	}
	return answer.PublicKey, nil
}

// probeUpgrade asks for a connection of the control protocol, as
// control/controlhttp does, and gives it up.
func probeUpgrade(ctx context.Context, url string, serverKey key.MachinePublic) error {
	// A new key: a handshake alone registers no node.
	hello, _, err := controlbase.ClientDeferred(key.NewMachine(), serverKey, uint16(tailcfg.CurrentCapabilityVersion))
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, url, nil)
	if err != nil {
		return err
	}
	request.Header.Set("Upgrade", controlhttpcommon.UpgradeHeaderValue)
	request.Header.Set("Connection", "upgrade")
	request.Header.Set(controlhttpcommon.HandshakeHeaderName, base64.StdEncoding.EncodeToString(hello))
	transport := newTransport()
	transport.Protocols = new(http.Protocols)
	transport.Protocols.SetHTTP1(true) // HTTP/2 has no upgrade
	response, err := transport.RoundTrip(request)
	if err != nil {
		return fmt.Errorf("%s: %w", url, err)
	}
	defer response.Body.Close()
	switch code := response.StatusCode; {
	case code == http.StatusSwitchingProtocols:
		return nil
	case code/100 == 3, code == http.StatusTooManyRequests, code == http.StatusBadGateway,
		code == http.StatusServiceUnavailable, code == http.StatusGatewayTimeout:
		return fmt.Errorf("%s answered %s", url, response.Status) // that says nothing about upgrades
	default:
		return upgradeError{url, response.Status}
	}
}

// judgeClock uses the server's clock to distinguish a wrong clock of this machine from
// an expired certificate. The certificate cannot be checked for that; nothing secret is
// sent and only the date is read.
func judgeClock(ctx context.Context, url string, expired error) error {
	transport := newTransport()
	transport.TLSClientConfig = &tls.Config{InsecureSkipVerify: true}
	response, _, err := get(ctx, transport, url)
	if err != nil {
		return expired
	}
	theirs, err := http.ParseTime(response.Header.Get("Date"))
	ours := time.Now()
	if err != nil || ours.Sub(theirs).Abs() < clockTolerance {
		return expired
	}
	return clockError{ours, theirs}
}

// get returns the head of the answer, and as much of its body as is looked at.
func get(ctx context.Context, transport *http.Transport, url string) (*http.Response, []byte, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, nil, err
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", url, err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswerBytes))
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", url, err)
	}
	return response, body, nil
}
