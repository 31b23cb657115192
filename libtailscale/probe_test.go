package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/x509roots/fallback/bundle"
	"libtailscale/testnet"
)

const year = 365 * 24 * time.Hour

// serveTLS is a server whose certificate is valid for an hour around this time,
// signed by itself, and whose clock says date; zero is no Date header.
func serveTLS(t *testing.T, valid, date time.Time) (url string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotBefore:    valid.Add(-time.Hour / 2),
		NotAfter:     valid.Add(time.Hour / 2),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	check(t, err)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header()["Date"] = nil
		if !date.IsZero() {
			w.Header().Set("Date", date.UTC().Format(http.TimeFormat))
		}
	}))
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	server.StartTLS()
	t.Cleanup(server.Close)
	return server.URL
}

// probe is probeControl for a control server at url.
func probe(t *testing.T, url string) error {
	t.Helper()
	n := newNode()
	defer n.close()
	n.server.ControlURL = url
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	defer cancel()
	return n.probeControl(ctx)
}

func TestAClockThatIsWrong(t *testing.T) {
	for _, off := range []time.Duration{-year, year, time.Hour} {
		theirs := time.Now().Add(off).Truncate(time.Second)
		err := probe(t, serveTLS(t, theirs, theirs))
		var wrong clockError
		if !errors.As(err, &wrong) {
			t.Fatalf("off by %v: %v", off, err)
		}
		if !wrong.theirs.Equal(theirs) || time.Since(wrong.ours) > testTimeout {
			t.Errorf("off by %v: %v", off, wrong)
		}
		for _, clock := range []time.Time{wrong.ours, theirs} {
			if text := clock.UTC().Format(time.RFC3339); !strings.Contains(err.Error(), text) {
				t.Errorf("%q does not say %s", err, text)
			}
		}
	}
}

func TestACertificateIsNotAlwaysTheClocksFault(t *testing.T) {
	now := time.Now()
	var invalid x509.CertificateInvalidError
	for what, url := range map[string]string{
		"expired":                  serveTLS(t, now.Add(-year), now),
		"of a server without time": serveTLS(t, now.Add(-year), time.Time{}),
		"not yet valid":            serveTLS(t, now.Add(year), now.Add(clockTolerance/2)),
	} {
		err := probe(t, url)
		if errors.As(err, new(clockError)) || !errors.As(err, &invalid) || invalid.Reason != x509.Expired || !strings.Contains(err.Error(), url) {
			t.Errorf("%s: %v", what, err)
		}
	}
	// The authority is unknown, so the date does not matter.
	url := serveTLS(t, now, now.Add(year))
	err := probe(t, url)
	if errors.As(err, new(clockError)) || !errors.As(err, new(x509.UnknownAuthorityError)) || !strings.Contains(err.Error(), url) {
		t.Errorf("unknown authority: %v", err)
	}
}

func TestUpWithAWrongClock(t *testing.T) {
	theirs := time.Now().Add(year)
	n := unstarted(t, startNet(t, testnet.Options{}))
	n.server.ControlURL = serveTLS(t, theirs, theirs)
	n.upTimeout.Store(int64(3 * time.Second)) // a part of it is for a TLS handshake
	wantCode(t, n.up(), codeClockWrong)
	if text := errorText(n); !strings.Contains(text, theirs.UTC().Format("2006-01-02")) {
		t.Errorf("text: %q", text)
	}
}

// proxyTo passes requests on to the control server.
func proxyTo(t *testing.T, tailnet *testnet.Net) *httputil.ReverseProxy {
	t.Helper()
	to, err := url.Parse(tailnet.ControlURL())
	check(t, err)
	proxy := httputil.NewSingleHostReverseProxy(to)
	proxy.ErrorLog = log.New(io.Discard, "", 0)
	return proxy
}

// withoutAPI passes everything on to the control server except requests to the API,
// which are never answered.
func withoutAPI(t *testing.T, tailnet *testnet.Net) string {
	t.Helper()
	proxy := proxyTo(t, tailnet)
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/api/") {
			io.Copy(io.Discard, r.Body) // the end of the request is not noticed otherwise
			<-r.Context().Done()
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(front.Close)
	t.Cleanup(front.CloseClientConnections)
	return front.URL
}

// Finding out why joining took so long is part of the time; this test would show it if
// it were not. A busy machine may need more time once, but not each time.
func TestUpKeepsToItsTime(t *testing.T) {
	const limit, slack, tries = 2 * time.Second, 1500 * time.Millisecond, 3
	silent := listen(t, func(c *net.TCPConn) {
		defer c.Close()
		io.Copy(io.Discard, c)
	})
	tailnet := apiNet(t)
	secret := credential{clientSecret: clientSecret}
	for _, tt := range []struct {
		what, url string
		with      credential
		names     string
	}{
		{"a server that says nothing", "http://" + silent, credential{authKey: "tskey-auth-test"}, silent},
		{"one that says nothing in TLS", "https://" + silent, credential{authKey: "tskey-auth-test"}, silent},
		{"an API that says nothing", withoutAPI(t, tailnet), secret, "for an auth key"},
	} {
		var n *node
		took := time.Hour
		for try := 0; try < tries && took > limit+slack; try++ {
			n = enrolling(t, tailnet, tt.with)
			n.server.ControlURL = tt.url
			n.upTimeout.Store(int64(limit))
			began := time.Now()
			wantCode(t, n.up(), codeControlUnreachable)
			took = time.Since(began)
		}
		if took < limit/2 || took > limit+slack {
			t.Errorf("%s: up took %v", tt.what, took)
		}
		if text := errorText(n); !strings.Contains(text, tt.names) {
			t.Errorf("%s: %q does not name it", tt.what, text)
		}
	}
}

// The variables are read once, at the first use of the roots, so the test needs a
// process of its own.
func TestAMachineWithoutRootsHasMozillas(t *testing.T) {
	const inside = "TEST_WITHOUT_ROOTS"
	if os.Getenv(inside) == "" {
		self, err := os.Executable()
		check(t, err)
		child := exec.Command(self, "-test.run=^"+t.Name()+"$")
		child.Env = append(os.Environ(), inside+"=1", "SSL_CERT_FILE=/nonexistent", "SSL_CERT_DIR=/nonexistent")
		if out, err := child.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return
	}
	count := 0
	for root := range bundle.Roots() {
		certificate, err := x509.ParseCertificate(root.Certificate)
		check(t, err)
		if root.Constraint != nil {
			continue // trusted for some names only
		}
		count++
		usages := []x509.ExtKeyUsage{x509.ExtKeyUsageAny}
		if _, err := certificate.Verify(x509.VerifyOptions{KeyUsages: usages}); err != nil {
			t.Errorf("%v: %v", certificate.Subject, err)
		}
	}
	if count < 50 {
		t.Errorf("%d roots", count)
	}
}
