package main

import (
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"libtailscale/testnet"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"tailscale.com/ipn"
	"tailscale.com/tsnet"
)

// The fields that reachInside takes from tsnet, and unwrap from gonet, must exist, with
// name and type.
func TestUnexportedFields(t *testing.T) {
	_, err := field[int](new(tsnet.Server), "lb")
	if err == nil || !strings.Contains(err.Error(), "ipnlocal.LocalBackend") {
		t.Fatalf("tsnet.Server.lb: %v", err)
	}
	_, err = field[int](new(tsnet.Server), "nothing")
	if err == nil || !strings.Contains(err.Error(), "no field nothing") {
		t.Fatalf("a missing field: %v", err)
	}
	_, err = field[int](new(gonet.TCPConn), "ep")
	if err == nil || !strings.Contains(err.Error(), "tcpip.Endpoint") {
		t.Fatalf("gonet.TCPConn.ep: %v", err)
	}
	_, err = field[int](new(gonet.TCPConn), "wq")
	if err == nil || !strings.Contains(err.Error(), "waiter.Queue") {
		t.Fatalf("gonet.TCPConn.wq: %v", err)
	}
	// Their values are used by other tests.
}

func TestUpWithoutAKey(t *testing.T) {
	n := unstarted(t, startNet(t, testnet.Options{}))
	giveKey(n, "")
	wantCode(t, n.up(), codeNeedsLogin)
}

func TestUpWithAWrongKey(t *testing.T) {
	tailnet := startNet(t, testnet.Options{AuthKeys: []string{"tskey-auth-right"}})
	n := unstarted(t, tailnet)
	giveKey(n, "tskey-auth-wrong")
	wantCode(t, n.up(), codeAuthRefused)
	if text := errorText(n); !strings.Contains(text, "key") || strings.Contains(text, "tskey-auth-wrong") {
		t.Fatalf("text: %q", text)
	}
}

func TestUpWithoutAControlServer(t *testing.T) {
	tailnet := startNet(t, testnet.Options{})
	tailnet.StopControl()
	n := unstarted(t, tailnet)
	n.upTimeout.Store(int64(2 * time.Second)) // a part of it is for finding out why
	wantCode(t, n.up(), codeControlUnreachable)
	if text := errorText(n); !strings.Contains(text, "refused") {
		t.Fatalf("text: %q", text)
	}
}

// An enrolled node starts without a key; when control is away it says so and
// goes on trying.
func TestEnrolledNodeNeedsNoKey(t *testing.T) {
	// The archive is built without this cache (build-tags); a plain `go test`
	// has it, and a node with a cached map runs without its control server.
	t.Setenv("TS_USE_CACHED_NETMAP", "false")
	tailnet := startNet(t, testnet.Options{AuthKeys: []string{"tskey-auth-test"}})
	first := unstarted(t, tailnet)
	check(t, first.up())
	ips := first.ips()
	first.close()

	tailnet.SetAuthKeys([]string{"another"}) // and a node that sends a spent key is refused
	tailnet.StopControl()
	second := unstarted(t, tailnet)
	second.server.Dir = first.server.Dir
	giveKey(second, "spent")
	second.upTimeout.Store(int64(time.Second / 2))
	wantCode(t, second.up(), codeUpTimedOut)
	current := second.backend.StatusWithoutPeers()
	isLoggedOut := func(text string) bool { return strings.Contains(text, "logged out") }
	if !slices.ContainsFunc(second.complaints(current), isLoggedOut) {
		t.Errorf("Tailscale says nothing of a login: %q", second.complaints(current))
	}
	if warnings := second.warnings(current); slices.ContainsFunc(warnings, isLoggedOut) {
		t.Errorf("it is told that it is logged out: %q", warnings)
	}
	check(t, tailnet.StartControl())
	second.upTimeout.Store(int64(testTimeout))
	check(t, second.up())
	if strings.Join(second.ips(), ",") != strings.Join(ips, ",") {
		t.Fatalf("addresses %v, %v before", second.ips(), ips)
	}
}

func TestUpThatNeedsApproval(t *testing.T) {
	tailnet := startNet(t, testnet.Options{})
	tailnet.RequireApproval(true)
	n := unstarted(t, tailnet)
	n.upTimeout.Store(int64(2 * time.Second))
	wantCode(t, n.up(), codeNeedsApproval)
}

// The node cannot know whether the server does not answer the registration or the map.
func TestUpWithoutANetworkMap(t *testing.T) {
	tailnet := startNet(t, testnet.Options{})
	tailnet.HoldMaps(true)
	n := unstarted(t, tailnet)
	n.upTimeout.Store(int64(2 * time.Second))
	wantCode(t, n.up(), codeControlUnreachable)
	if text := errorText(n); !strings.Contains(text, "neither refuses this node nor sends it a network map") {
		t.Errorf("text: %q", text)
	}
	tailnet.HoldMaps(false)
	n.upTimeout.Store(int64(testTimeout))
	check(t, n.up())
}

// The control server's rate limit and a watcher that was cut off pass; any
// other message is a refusal.
func TestWhatAMessageMeans(t *testing.T) {
	const goesOn = code(0)
	n := unstarted(t, startNet(t, testnet.Options{}))
	for message, means := range map[string]code{
		"node registration rate limited; will retry after 5s":                                               goesOn,
		"IPN bus consumer fell behind; closing watch":                                                       goesOn,
		"invalid key: API key kX not valid":                                                                 codeAuthRefused,
		"requested tags [tag:mx] are invalid or not permitted":                                              codeTagsRefused,
		"tailnet requires logging to be enabled. Remove --no-logs-no-support from tailscaled command line.": codeNeedsLogUpload,
	} {
		j := &join{node: n}
		outcome, decided := j.decide(&ipn.Notify{ErrMessage: &message})
		if decided != (means != goesOn) {
			t.Errorf("%q: decided %v", message, decided)
		}
		if decided {
			wantCode(t, outcome, means)
		}
	}
}

func TestCloseCancelsUp(t *testing.T) {
	tailnet := startNet(t, testnet.Options{})
	tailnet.StopControl()
	n := unstarted(t, tailnet)
	n.upTimeout.Store(0)
	outcome := make(chan error, 1)
	check(t, n.start())
	go func() { outcome <- n.up() }()
	n.close()
	select {
	case err := <-outcome:
		wantCode(t, err, codeCancelled)
	case <-time.After(testTimeout):
		t.Fatal("up goes on after close")
	}
	wantCode(t, n.up(), codeCancelled)
	n.close() // again is harmless
}

func TestSettingsAreFixedAfterStart(t *testing.T) {
	n := unstarted(t, startNet(t, testnet.Options{}))
	check(t, n.start())
	wantCode(t, n.configure(func() { t.Error("the setting was applied") }), codeBadState)
}

func TestStartWithoutADirectory(t *testing.T) {
	n := newNode()
	defer n.close()
	wantCode(t, n.start(), codeBadState)
}

func TestADirectoryThatCannotBeWritten(t *testing.T) {
	n := newNode()
	defer n.close()
	n.server.Dir = "/proc/nothing"
	wantCode(t, n.start(), codeError)
	if text := errorText(n); !strings.Contains(text, "/proc/nothing") {
		t.Fatalf("text: %q", text)
	}
}

func TestEventsTellTheState(t *testing.T) {
	tailnet := startNet(t, testnet.Options{})
	n := unstarted(t, tailnet)
	n.server.AdvertiseTags = []string{"tag:reverse-proxy"}
	reader, writer, err := os.Pipe()
	check(t, err)
	defer reader.Close()
	n.events = writer
	check(t, n.up())
	reader.SetReadDeadline(time.Now().Add(testTimeout))
	for decoder := json.NewDecoder(reader); ; {
		var s status
		check(t, decoder.Decode(&s))
		if s.State == "Running" && s.InMapPoll {
			if len(s.IPs) != 2 || s.Tags[0] != "tag:reverse-proxy" || s.Name != "edge.tail-test.ts.net" {
				t.Fatalf("%+v", s)
			}
			return
		}
	}
}

func TestPing(t *testing.T) {
	e := startEdge(t, echo)
	report, err := e.ping("mailbox", testTimeout)
	check(t, err)
	if !report.Answered || report.IP != e.mailbox.IPs[0] || report.Direct == "" && report.Relay == "" || !report.Online {
		t.Fatalf("%+v", report)
	}
	_, err = e.ping("nobody", testTimeout)
	wantCode(t, err, codeNoSuchPeer)

	check(t, e.net.StopNode("mailbox"))
	eventually(t, "the mailbox is offline", func() bool {
		report, err = e.ping("mailbox", 200*time.Millisecond)
		return err == codeTimedOut && !report.Online
	})
}

func TestAClosedNodeLeavesNothingBehind(t *testing.T) {
	tailnet := startNet(t, testnet.Options{})
	_, err := tailnet.AddNode(testnet.NodeConfig{Name: "mailbox", Forward: map[uint16]string{25: listen(t, echo)}})
	check(t, err)
	run := func() {
		n := unstarted(t, tailnet)
		check(t, n.up())
		n.close()
	}
	run() // this creates what the process keeps for good
	goroutines, fds := runtime.NumGoroutine(), descriptors(t)
	for range 5 {
		run()
	}
	noGoroutinesLeft(t, goroutines+2)
	eventually(t, "the descriptors are back", func() bool { return descriptors(t) <= fds+2 })
}

// usage is what a process may run out of, and a state directory fill up with.
type usage struct{ goroutines, descriptors, threads, files int }

func usageNow(t *testing.T, dir string) (u usage) {
	t.Helper()
	u.goroutines, u.descriptors = runtime.NumGoroutine(), descriptors(t)
	threads, err := os.ReadDir("/proc/self/task")
	check(t, err)
	u.threads = len(threads)
	check(t, filepath.WalkDir(dir, func(string, fs.DirEntry, error) error { u.files++; return nil }))
	return u
}

func (u usage) within(limit usage) bool {
	return u.goroutines <= limit.goroutines && u.descriptors <= limit.descriptors &&
		u.threads <= limit.threads && u.files <= limit.files
}

func TestANodeThatStartsAgainAndAgain(t *testing.T) {
	// As in the archive: with a cached map a node runs before it has heard from
	// its control server, and up waits another second for that.
	t.Setenv("TS_USE_CACHED_NETMAP", "false")
	const first, rounds = 20, 200
	tailnet := startNet(t, testnet.Options{})
	dir := t.TempDir()
	var ips []string
	var limit usage
	for round := range rounds {
		n := unstarted(t, tailnet)
		n.server.Dir = dir
		check(t, n.up())
		if ips == nil {
			ips = n.ips()
		}
		if now := n.ips(); len(now) != 2 || !slices.Equal(now, ips) {
			t.Fatalf("addresses %v in round %d, %v before", now, round, ips)
		}
		check(t, n.close())
		if round == first {
			limit = usageNow(t, dir)
			// Threads and the test tailnet's goroutines come and go, as does the
			// cached map, which is five files.
			limit = usage{limit.goroutines + 5, limit.descriptors + 5, limit.threads + 8, limit.files + 5}
		}
	}
	eventually(t, fmt.Sprintf("no more is used than %+v", limit), func() bool { return usageNow(t, dir).within(limit) })
}

func TestForgetEnvironment(t *testing.T) {
	forgotten := slices.Concat(credentialVariables, supervisorVariables)
	for _, name := range forgotten {
		t.Setenv(name, "secret")
	}
	forgetEnvironment()
	for _, name := range forgotten {
		if value, found := os.LookupEnv(name); found {
			t.Errorf("%s=%s is still there", name, value)
		}
	}
}

// The library owns a descriptor from the call on, also when it is refused.
func TestADescriptorThatIsRefusedIsClosed(t *testing.T) {
	n := unstarted(t, startNet(t, testnet.Options{}))
	check(t, n.start())
	for what, take := range map[string]func(int){"logs": n.logs.open, "events": n.openEvents} {
		reader, writer, err := os.Pipe()
		check(t, err)
		fd, err := syscall.Dup(int(writer.Fd()))
		check(t, err)
		writer.Close()
		wantCode(t, n.takeDescriptor(fd, take), codeBadState)
		reader.SetReadDeadline(time.Now().Add(testTimeout))
		if _, err := reader.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("%s: %v", what, err)
		}
		reader.Close()
	}
}
