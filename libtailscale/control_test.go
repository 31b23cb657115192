package main

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"libtailscale/testnet"
)

// comesBack is a node with the identity of another one, at this control server.
func comesBack(t *testing.T, before *node, controlURL string) *node {
	t.Helper()
	n := newNode()
	t.Cleanup(func() { n.close() })
	n.server.Dir, n.server.Hostname, n.server.ControlURL = before.server.Dir, before.server.Hostname, controlURL
	n.upTimeout.Store(int64(testTimeout))
	return n
}

// joined is a node that has been on the tailnet and knows its control server's key.
func joined(t *testing.T, tailnet *testnet.Net) *node {
	t.Helper()
	n := unstarted(t, tailnet)
	check(t, n.up())
	eventually(t, "the control server's key is stored", n.remembered.Load)
	return n
}

func TestTheSameControlServerAtAnotherURL(t *testing.T) {
	tailnet := startNet(t, testnet.Options{AuthKeys: []string{"tskey-auth-test"}})
	before := joined(t, tailnet)
	ips := strings.Join(before.ips(), ",")
	check(t, before.close())

	alias, err := tailnet.AliasControl()
	check(t, err)
	for _, spelling := range []string{alias + "/", alias} {
		n := comesBack(t, before, spelling)
		check(t, n.up())
		if got := strings.Join(n.ips(), ","); got != ips {
			t.Errorf("at %s: addresses %s, %s before", spelling, got, ips)
		}
		check(t, n.close())
	}
	// The identity now belongs to this URL, and the old URL counts as another one.
	n := comesBack(t, before, tailnet.ControlURL())
	check(t, n.up())
	if now := statusNow(n); now.ControlMovedFrom != alias {
		t.Errorf("moved from %q", now.ControlMovedFrom)
	}
	check(t, n.close())
	n = comesBack(t, before, tailnet.ControlURL())
	check(t, n.up())
	if now := statusNow(n); now.ControlMovedFrom != "" {
		t.Errorf("told again: %q", now.ControlMovedFrom)
	}
}

func TestAnotherControlServer(t *testing.T) {
	before := joined(t, startNet(t, testnet.Options{}))
	check(t, before.close())
	other := startNet(t, testnet.Options{})
	n := comesBack(t, before, other.ControlURL())
	wantCode(t, n.up(), codeOtherControl)
	for _, words := range []string{before.server.ControlURL, other.ControlURL(), "another key", "set control_url back"} {
		if text := errorText(n); !strings.Contains(text, words) {
			t.Errorf("%q is missing from %q", words, text)
		}
	}
	if nodes := other.Nodes(); len(nodes) != 0 {
		t.Errorf("it has registered there: %v", nodes)
	}

	other.StopControl()
	n = comesBack(t, before, other.ControlURL())
	wantCode(t, n.up(), codeControlUnreachable)
	if text := errorText(n); !strings.Contains(text, "refused") || !strings.Contains(text, before.server.ControlURL) {
		t.Errorf("text: %q", text)
	}
}

func TestAnotherURLWhereTheKeyIsNotKnown(t *testing.T) {
	tailnet := startNet(t, testnet.Options{})
	before := joined(t, tailnet)
	check(t, before.state.WriteState(controlKeyID, nil))
	check(t, before.close())
	alias, err := tailnet.AliasControl()
	check(t, err)
	n := comesBack(t, before, alias)
	wantCode(t, n.up(), codeOtherControl)
	if text := errorText(n); !strings.Contains(text, "was never stored") {
		t.Errorf("text: %q", text)
	}
	check(t, comesBack(t, before, tailnet.ControlURL()).up())
}

// withoutUpgrade passes requests on like a proxy that is not configured for upgrades:
// without the hop-by-hop headers.
func withoutUpgrade(t *testing.T, tailnet *testnet.Net) string {
	t.Helper()
	proxy := proxyTo(t, tailnet)
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Header.Del("Connection")
		r.Header.Del("Upgrade")
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(front.Close)
	return front.URL
}

func TestAProxyThatPassesNoUpgradeOn(t *testing.T) {
	for _, headscale := range []bool{false, true} {
		tailnet := startNet(t, testnet.Options{Headscale: headscale})
		front := withoutUpgrade(t, tailnet)
		n := unstarted(t, tailnet)
		n.server.ControlURL = front
		n.upTimeout.Store(int64(2 * time.Second))
		wantCode(t, n.up(), codeUpgradeBlocked)
		for _, words := range []string{front + "/ts2021", "a proxy in front of it", "Upgrade and Connection"} {
			if text := errorText(n); !strings.Contains(text, words) {
				t.Errorf("%q is missing from %q", words, text)
			}
		}
	}
}

// An enrolled node reports the same while it goes on trying.
func TestAProxyThatPassesNoUpgradeOnAnyMore(t *testing.T) {
	t.Setenv("TS_USE_CACHED_NETMAP", "false") // as in the archive
	tailnet := startNet(t, testnet.Options{})
	before := joined(t, tailnet)
	check(t, before.close())
	n := comesBack(t, before, withoutUpgrade(t, tailnet))
	n.upTimeout.Store(int64(2 * time.Second))
	wantCode(t, n.up(), codeUpTimedOut)
	if text := errorText(n); !strings.Contains(text, "does not pass the upgrade on; make the proxy pass") {
		t.Errorf("text: %q", text)
	}
	eventually(t, "the state says what to do", func() bool {
		return strings.Contains(statusNow(n).ControlAdvice, "/ts2021")
	})
}

func TestWhatIsNoControlServer(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "<h1>It works!</h1>")
	}))
	t.Cleanup(server.Close)
	err := probe(t, server.URL)
	if err == nil || !strings.Contains(err.Error(), "did not answer with a key") {
		t.Errorf("got %v", err)
	}
}

func TestAKeyThatNeverExpires(t *testing.T) {
	at := func(text string) *time.Time {
		at, err := time.Parse(time.RFC3339Nano, text)
		check(t, err)
		return &at
	}
	for _, never := range []*time.Time{nil, new(time.Time), at("0001-01-01T00:00:00Z"), at("0001-01-01T01:00:00+01:00"), at("9999-12-31T23:59:59Z"), at("9999-12-31T23:59:59.999999999Z")} {
		if got := expiryOf(never); got != nil {
			t.Errorf("%v: %v", never, got)
		}
	}
	for _, once := range []*time.Time{at("1970-01-01T00:00:00Z"), at("2027-01-01T00:00:00Z"), at("2262-04-11T23:47:16Z")} {
		if got := expiryOf(once); got != once {
			t.Errorf("%v: %v", once, got)
		}
	}
}
