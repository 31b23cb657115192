package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	// Mozilla's roots, for a machine that has none: an empty container.
	_ "golang.org/x/crypto/x509roots/fallback"
	"tailscale.com/ipn"
)

const (
	// probeLimit bounds the look at a control server that did not answer. It is
	// part of the time for joining, and a quarter of that at most.
	probeLimit = 2 * time.Second
	// clockTolerance is how far the clocks of two machines may be apart. A
	// certificate fails by days or years when a clock is to blame.
	clockTolerance = 10 * time.Minute
)

// clockError is a machine whose clock is wrong.
type clockError struct{ ours, theirs time.Time }

func (e clockError) Error() string {
	return fmt.Sprintf("this machine's clock says %s, the control server's %s, so its certificate does not count",
		e.ours.UTC().Format(time.RFC3339), e.theirs.UTC().Format(time.RFC3339))
}

// newTransport is for requests of our own: a connection each, through the
// proxy that the environment may name.
func newTransport() *http.Transport {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.DisableKeepAlives = true
	return transport
}

// probeControl asks the control server for its public key, as every client
// does first, and returns why that failed.
func (n *node) probeControl(ctx context.Context) error {
	url := n.server.ControlURL
	if url == "" {
		url = ipn.DefaultControlURL
	}
	response, err := get(ctx, newTransport(), strings.TrimSuffix(url, "/")+"/key?v=1")
	var certificate x509.CertificateInvalidError
	switch {
	case errors.As(err, &certificate) && certificate.Reason == x509.Expired:
		return judgeClock(ctx, url, err)
	case err != nil:
		return err
	case response.StatusCode != http.StatusOK:
		return fmt.Errorf("%s answered %s", url, response.Status)
	}
	return nil
}

// judgeClock tells a wrong clock of ours from a certificate that has expired: by
// what the server's clock says. For that the certificate cannot be checked;
// nothing is sent and only the date is looked at.
func judgeClock(ctx context.Context, url string, expired error) error {
	transport := newTransport()
	transport.TLSClientConfig = &tls.Config{InsecureSkipVerify: true}
	response, err := get(ctx, transport, url)
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

// get returns the head of the answer.
func get(ctx context.Context, transport *http.Transport, url string) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", url, err)
	}
	io.Copy(io.Discard, io.LimitReader(response.Body, 1<<16))
	return response, response.Body.Close()
}
