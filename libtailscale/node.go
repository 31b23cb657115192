// Package main is libtailscale: a tailnet node and its TCP connections behind
// a C interface, for hosts that are not written in Go. tailscale.h is the
// contract; README.md says what matches upstream libtailscale and what not.
//
// export.go and tailscale.c are the C side. node.go, join.go, credential.go,
// control.go, deleted.go, probe.go, watch.go, status.go, ping.go and figures.go are a
// node's life; dial.go, reject.go, listen.go, conn.go and abort.go its connections;
// budget.go bounds what all of them hold. Nothing here ever uses the host's resolver or
// network on behalf of a connection.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"tailscale.com/envknob"
	"tailscale.com/ipn/ipnlocal"
	"tailscale.com/ipn/store/mem"
	"tailscale.com/net/netns"
	"tailscale.com/tailcfg"
	"tailscale.com/tsnet"
	"tailscale.com/types/key"
	"tailscale.com/wgengine/netstack"
)

const (
	// timeWait is how long the stack remembers a connection that we closed
	// first. TCP's 60 s would keep 120,000 endpoints at 2,000 sessions a
	// second; inside WireGuard, which drops replays, and with random initial
	// sequence numbers, old duplicates are no concern.
	timeWait = 5 * time.Second
	// flushLimit bounds how long close waits for the peers to acknowledge
	// what was written.
	flushLimit = 2 * time.Second
	// resetLimit bounds how long close waits for resets to reach the peers.
	resetLimit = time.Second
)

// credentialVariables are those that tsnet reads by itself
// (tsnet/tsnet.go, getAuthKey and following), and one more that may hold a key
// by mistake.
var credentialVariables = []string{
	"TS_AUTHKEY", "TS_AUTH_KEY", "TS_CLIENT_SECRET", "TS_CLIENT_ID",
	"TS_ID_TOKEN", "TS_AUDIENCE", "TS_CONTROL_URL", "TS_AUTHKEY_FILE",
}

// supervisorVariables are how systemd talks to the process that it has started,
// which is this one and no child of it.
var supervisorVariables = []string{
	"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC",
	"LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES", "FDSTORE",
}

// forbiddenKnobs are Tailscale's own settings that would break a promise of
// this library: the first logs the auth key (control/controlclient/direct.go),
// the second asks for one although the node is enrolled (tsnet/tsnet.go).
var forbiddenKnobs = []string{"TS_DEBUG_REGISTER", "TSNET_FORCE_LOGIN"}

// forgetEnvironment leaves Tailscale no credentials to find. It also settles,
// while the caller promises that nobody else reads the environment, what every
// node of the process wants settled there.
func forgetEnvironment() {
	for _, name := range slices.Concat(credentialVariables, supervisorVariables) {
		os.Unsetenv(name)
	}
	for _, name := range forbiddenKnobs {
		if os.Getenv(name) != "" {
			envknob.Setenv(name, "") // it may have been read already
		}
		os.Unsetenv(name)
	}
	settleEnvironment()
}

// setLogUpload changes whether Tailscale's logs go to Tailscale. It is a setting
// of the process, read when a node starts.
func setLogUpload(on bool) {
	settleEnvironment()
	envknob.Setenv("TS_NO_LOGS_NO_SUPPORT", strconv.FormatBool(!on))
}

// settleEnvironment keeps Tailscale's log upload off, and its hands off
// /var/lib/tailscale, which is the host's tailscaled's: there it would make a
// directory of logs (logpolicy.LogsDir), and panic where it cannot. Nothing is
// written to it: those logs are of sockstats, which the archive lacks.
var settleEnvironment = sync.OnceFunc(func() {
	envknob.SetNoLogsNoSupport()
	if os.Getenv("TS_LOGS_DIR") == "" {
		os.Setenv("TS_LOGS_DIR", "/")
	}
})

// node is one tailnet node.
type node struct {
	ctx    context.Context // ends at close
	cancel context.CancelFunc

	// mu guards the settings, the start and the close.
	mu      sync.Mutex
	server  *tsnet.Server // its fields are the settings until started
	logs    *logPipe
	events  *os.File
	started bool
	closed  bool
	scratch string     // the directory in which an ephemeral node starts
	state   *stateFile // of a node that is not ephemeral
	// movedFrom is the URL at which the control server was when the state was written,
	// if another one leads to it now. Set by start.
	movedFrom string

	upTimeout   atomic.Int64 // a Duration, 0 = none
	interactive atomic.Bool  // a person may be asked to log in
	lastError   atomic.Pointer[string]

	joining chan struct{} // holds one token while tailscale_up is at work

	// enrolWith is not given to tsnet, which would use it before it is needed.
	credentialMu sync.Mutex
	enrolWith    credential
	registering  sync.Mutex // held while a key is used

	// Set by start, before any connection, and then constant.
	backend *ipnlocal.LocalBackend
	stack   *stack.Stack

	// What the backend knows and does not tell; see watch.go.
	removed        atomic.Bool                    // the control server has no such node
	rejections     atomic.Int64                   // how often it said so
	staysListed    atomic.Bool                    // this ephemeral node could not be logged out
	needsLogUpload atomic.Bool                    // the tailnet refuses nodes without it
	controlSaid    atomic.Pointer[controlProblem] // the backend's last error with the control server
	controlProbed  atomic.Pointer[controlProblem] // why probeControl failed the last time
	deleted        atomic.Pointer[key.NodePublic] // the control server has no node of this key (deleted.go)
	updateRejected atomic.Bool                    // it has answered an update so
	askTurn        sync.Mutex                     // held while it is asked
	askedLast      time.Time                      // guarded by askTurn
	loginRefused   atomic.Bool                    // since the node last had a place
	remembered     atomic.Bool                    // the control server's key is stored
	asking         atomic.Bool                    // while askWhy or rememberControl is at work
	networkChanges atomic.Int64                   // major ones of this machine's network
	wakeUps        atomic.Int64                   // of this machine, from sleep

	// self is set while the node is running.
	selfMu    sync.Mutex // held to change self and held
	self      atomic.Pointer[addresses]
	held      addresses // those that connections may have been made from
	known     sync.Map  // name -> netip.Addr last seen in the map
	listenMu  sync.Mutex
	listening map[uint16]*listener // by port
	rejects   rejects

	// pending counts calls and goroutines in progress that close must wait for.
	pending sync.WaitGroup
}

// controlProblem is why the control server is not heard.
type controlProblem struct {
	said   string
	advice string // what to do about it, where that is known
}

func newNode() *node {
	n := &node{server: new(tsnet.Server), logs: &logPipe{fd: -1}, joining: make(chan struct{}, 1),
		listening: make(map[uint16]*listener), rejects: rejects{awaited: make(map[tuple]*conn)}}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	n.server.Logf = n.log
	n.server.UserLogf = n.log
	return n
}

// setCredential changes what the node may enrol with, also while it is running:
// the next tailscale_up uses it.
func (n *node) setCredential(set func(*credential)) {
	n.credentialMu.Lock()
	defer n.credentialMu.Unlock()
	set(&n.enrolWith)
}

func (n *node) credential() credential {
	n.credentialMu.Lock()
	defer n.credentialMu.Unlock()
	return n.enrolWith
}

// configure changes a setting of a node that is not started.
func (n *node) configure(set func()) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.started || n.closed {
		return n.report(codeBadState, errors.New("settings cannot change after start"))
	}
	set()
	return nil
}

// takeDescriptor is configure for a descriptor, which the library owns from the
// call on: one that is refused is closed. -1 is none.
func (n *node) takeDescriptor(fd int, take func(fd int)) error {
	var refused error
	err := n.configure(func() {
		if fd >= 0 {
			refused = syscall.SetNonblock(fd, true)
		}
		if refused == nil {
			take(fd)
		}
	})
	if refused != nil {
		err = n.report(codeBadArgument, fmt.Errorf("the descriptor cannot be used: %w", refused))
	}
	if err != nil {
		closeRefused(fd)
	}
	return err
}

// closeRefused closes a descriptor that was given to the library and has no place
// in it.
func closeRefused(fd int) {
	if fd >= 0 {
		syscall.Close(fd) // fails if there is no such descriptor, and then it was refused for that
	}
}

// report keeps err's text for tailscale_errmsg and returns c. The text may come
// from anybody.
func (n *node) report(c code, err error) code {
	text := n.harmless(err.Error())
	n.lastError.Store(&text)
	return c
}

// begin counts a call that uses the running node, unless it is closed.
func (n *node) begin() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return false
	}
	n.pending.Add(1)
	return true
}

func (n *node) isStarted() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.started
}

// start brings the node's parts up without waiting for the tailnet.
func (n *node) start() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return n.report(codeCancelled, errors.New("the node is closed"))
	}
	if n.started {
		return nil
	}
	if err := n.openStore(); err != nil {
		return err
	}
	settleEnvironment()
	// The bind to a physical interface that netns does is for a host whose
	// routes a TUN has taken over; there is no TUN here.
	netns.SetEnabled(false)
	log.SetOutput(logWriter{n}) // some of Tailscale's packages log there
	err := n.server.Start()
	// What is open stays usable. The archive is built without what would use
	// the directory later (build-tags), so that a crash leaves nothing.
	os.RemoveAll(n.scratch)
	if err != nil {
		return n.report(codeError, err)
	}
	n.started = true
	if err := n.reachInside(); err != nil {
		n.server.Close()
		n.closed = true
		return n.report(codeError, err)
	}
	n.pending.Go(n.follow)
	return nil
}

// openStore makes the place of the node's identity: a file in its directory,
// or memory for an ephemeral node.
func (n *node) openStore() error {
	if n.server.Ephemeral {
		return n.openScratch()
	}
	if n.server.Dir == "" {
		return n.report(codeBadState, errors.New("no state directory is set"))
	}
	path := filepath.Join(n.server.Dir, "tailscaled.state")
	state, err := openStateFile(path)
	switch {
	case errors.As(err, new(damagedState)):
		return n.report(codeBadStateFile, fmt.Errorf("%s: %w", path, err))
	case err != nil:
		return n.report(codeError, err)
	}
	if err := n.checkControl(state); err != nil {
		return err
	}
	n.state, n.server.Store = state, state
	return nil
}

// openScratch keeps an ephemeral node's identity in memory. tsnet wants a
// directory all the same, for the log buffer that it opens at start.
func (n *node) openScratch() error {
	var failed error
	for _, parent := range []string{os.TempDir(), "/dev/shm"} {
		dir, err := os.MkdirTemp(parent, "tailscale-")
		if err == nil {
			n.scratch, n.server.Dir = dir, dir
			n.server.Store = new(mem.Store)
			return nil
		}
		failed = errors.Join(failed, err)
	}
	return n.report(codeError, fmt.Errorf("no place for temporary files (TMPDIR names one): %w", failed))
}

// reachInside takes the two parts of tsnet that it does not offer: the TCP/IP
// stack, for connections without goroutines, and the backend, which knows the
// network map. Both are unexported fields; a test pins their names and types.
func (n *node) reachInside() error {
	impl, ok := n.server.Sys().Netstack.Get().(*netstack.Impl)
	if !ok {
		return fmt.Errorf("tsnet's netstack is a %T", n.server.Sys().Netstack.Get())
	}
	var err error
	if n.stack, err = field[*stack.Stack](impl, "ipstack"); err != nil {
		return err
	}
	if n.backend, err = field[*ipnlocal.LocalBackend](n.server, "lb"); err != nil {
		return err
	}
	if err := n.lowerBuffers(); err != nil {
		return err
	}
	wait := tcpip.TCPTimeWaitTimeoutOption(timeWait)
	if err := n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &wait); err != nil {
		return fmt.Errorf("setting TIME_WAIT: %v", err)
	}
	reuse := tcpip.TCPTimeWaitReuseGlobal
	if err := n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &reuse); err != nil {
		return fmt.Errorf("allowing reuse of TIME_WAIT: %v", err)
	}
	return n.hearRejects()
}

// lowerBuffers gives every connection the floor at first; see budget.go. The maxima
// stay as they are: the window's scale, which never changes, follows from them.
func (n *node) lowerBuffers() error {
	var send tcpip.TCPSendBufferSizeRangeOption
	var recv tcpip.TCPReceiveBufferSizeRangeOption
	err := n.stack.TransportProtocolOption(tcp.ProtocolNumber, &send)
	if err == nil {
		err = n.stack.TransportProtocolOption(tcp.ProtocolNumber, &recv)
	}
	send.Min, send.Default, recv.Default = leastNarrow, mostFloor, 2*mostFloor
	if err == nil {
		err = n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &send)
	}
	if err == nil {
		err = n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &recv)
	}
	if err != nil {
		return fmt.Errorf("setting the size of buffers: %v", err)
	}
	return nil
}

// field reads an unexported field of the struct that object points to.
func field[T any](object any, name string) (T, error) {
	var none T
	v := reflect.ValueOf(object).Elem().FieldByName(name)
	if !v.IsValid() {
		return none, fmt.Errorf("%T has no field %s: this version of tailscale.com is not supported", object, name)
	}
	if v.Type() != reflect.TypeFor[T]() {
		return none, fmt.Errorf("%T.%s is a %v, not a %v: this version of tailscale.com is not supported",
			object, name, v.Type(), reflect.TypeFor[T]())
	}
	// The field is addressable, of type T and initialised: server.Start
	// returned after writing it.
	return *(*T)(unsafe.Pointer(v.UnsafeAddr())), nil
}

// close stops the node once. Calls in progress are cancelled and awaited
// first, since tsnet must not be closed beneath them. Its error is that an
// ephemeral node could not be logged out.
func (n *node) close() (failed error) {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil
	}
	n.closed = true
	started := n.started
	n.mu.Unlock()

	n.cancel()
	n.pending.Wait() // nobody opens a connection, listens or sets self any more
	n.endListeners()
	n.self.Store(nil)
	if started {
		n.flush()
		n.abortAll()
		n.server.Close()
		os.RemoveAll(n.scratch) // builds without the build-tags cache the network map there
		if n.staysListed.Load() && !n.removed.Load() {
			failed = codeControlUnreachable
		}
	}
	if n.events != nil {
		n.events.Close()
	}
	n.logs.close()
	return failed
}

// flush waits until the connections whose handles are closed are over, within
// flushLimit: closing the stack drops what is still queued, and a reset may
// overtake bytes that the peer has received but not read.
func (n *node) flush() {
	deadline := time.Now().Add(flushLimit)
	for n.ending() > 0 && time.Now().Before(deadline) {
		time.Sleep(5 * time.Millisecond)
	}
}

// abortAll resets what is left while the stack can still send. tsnet does so
// only after its sender has stopped: the resets would be lost and, from the
// 513th on, block for ever on the sender's queue
// (wgengine/netstack/link_endpoint.go, queue.Write).
func (n *node) abortAll() {
	peers := make(map[netip.Addr]bool)
	for _, registered := range n.stack.RegisteredEndpoints() {
		if ep, ok := registered.(*tcp.Endpoint); ok && ep.EndpointState() != tcp.StateTimeWait {
			if remote, err := ep.GetRemoteAddress(); err == nil {
				ip, _ := netip.AddrFromSlice(remote.Addr.AsSlice())
				peers[ip] = true
			}
		}
		registered.Abort()
	}
	n.awaitSent(peers)
}

// awaitSent waits, up to resetLimit, for the resets to have left: what is still
// on its way through WireGuard when the node closes is lost, and the peer would
// keep half a message until its own time-out. A ping inside WireGuard takes the
// same way and is answered. Two of them, since the first may overtake packets
// that the stack has yet to hand over.
func (n *node) awaitSent(peers map[netip.Addr]bool) {
	ctx, cancel := context.WithTimeout(context.Background(), resetLimit)
	defer cancel()
	var pings sync.WaitGroup
	for ip := range peers {
		pings.Go(func() {
			for range 2 {
				n.backend.Ping(ctx, ip, tailcfg.PingTSMP, 0)
			}
		})
	}
	pings.Wait()
}

// ending counts the endpoints that nobody has a handle of and that still have
// bytes or a FIN to deliver or to receive.
func (n *node) ending() int {
	held := make(map[tcpip.Endpoint]bool)
	conns.each(func(c *conn) { held[c.ep] = true })
	count := 0
	for _, registered := range n.stack.RegisteredEndpoints() {
		ep, ok := registered.(*tcp.Endpoint)
		if !ok || held[ep] {
			continue
		}
		switch ep.EndpointState() {
		case tcp.StateEstablished, tcp.StateCloseWait, tcp.StateFinWait1, tcp.StateFinWait2,
			tcp.StateClosing, tcp.StateLastAck:
			count++
		}
	}
	return count
}

// ips returns the node's addresses, IPv4 first.
func (n *node) ips() []string {
	self := n.self.Load()
	if self == nil {
		return nil
	}
	var list []string
	for _, ip := range []netip.Addr{self.v4, self.v6} {
		if ip.IsValid() {
			list = append(list, ip.String())
		}
	}
	return list
}

// logWriter makes log lines of what is written to Go's own logger.
type logWriter struct{ *node }

func (w logWriter) Write(line []byte) (int, error) {
	w.log("%s", line)
	return len(line), nil
}

// logPipe writes log lines to a descriptor and drops them while it is full:
// Tailscale logs under its own locks, so a log line must never wait.
type logPipe struct {
	mu sync.Mutex
	fd int // -1 = none
}

// open takes fd over, which does not block, in place of an earlier one; -1 is none.
func (l *logPipe) open(fd int) {
	l.close()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fd = max(fd, -1)
}

func (l *logPipe) printf(format string, args ...any) {
	line := strings.TrimRight(fmt.Sprintf(format, args...), "\n") + "\n"
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fd >= 0 {
		syscall.Write(l.fd, []byte(line)) // a full or closed pipe drops it
	}
}

func (l *logPipe) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fd >= 0 {
		syscall.Close(l.fd)
		l.fd = -1
	}
}
