// Package main is libtailscale: a tailnet node and its TCP connections behind a C
// interface, for programs that are not written in Go. tailscale.h is the contract;
// README.md says what matches upstream libtailscale and what does not.
//
// The C side: export.go and export_conn.go, with tailscale.c; the codes are in
// codes.go, the handles in handle.go. A node's life: environment.go (which variables
// Tailscale finds), node.go, inside.go (unexported parts of tsnet), state.go (its
// identity on disk), join.go and refusal.go (getting onto the tailnet, and why not),
// credential.go, control.go (which server it is), deleted.go (whether the server still
// knows the node), probe.go (why the server is not heard), watch.go and status.go
// (reporting the state), ping.go, figures.go, log.go, closing.go. Its connections:
// dial.go, reject.go, listen.go, conn.go, abort.go; budget.go bounds the memory of all
// of them. No connection ever uses the host's resolver or network.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"tailscale.com/ipn/ipnlocal"
	"tailscale.com/ipn/store/mem"
	"tailscale.com/net/netns"
	"tailscale.com/tsnet"
	"tailscale.com/types/key"
)

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
	// movedFrom is the control server's URL when the state was written, if it has another
	// URL now. Set by start.
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

	// What the backend knows but does not report; see watch.go.
	removed        atomic.Bool                    // the control server no longer knows this node
	rejections     atomic.Int64                   // how often the control server said so
	staysListed    atomic.Bool                    // this ephemeral node could not be logged out
	needsLogUpload atomic.Bool                    // the tailnet refuses nodes without it
	controlSaid    atomic.Pointer[controlProblem] // the backend's last error with the control server
	controlProbed  atomic.Pointer[controlProblem] // why probeControl failed the last time
	deleted        atomic.Pointer[key.NodePublic] // the control server has no node of this key (deleted.go)
	updateRejected atomic.Bool                    // it has answered an update with notFound
	askTurn        sync.Mutex                     // held while the control server is asked
	askedLast      time.Time                      // guarded by askTurn
	loginRefused   atomic.Bool                    // since the node last had a place
	remembered     atomic.Bool                    // the control server's key is stored
	asking         atomic.Bool                    // while askWhy or rememberControl is at work
	networkChanges atomic.Int64                   // major ones of this machine's network
	wakeUps        atomic.Int64                   // of this machine, from sleep

	// self is set while the node is running.
	selfMu    sync.Mutex // held to change self and held
	self      atomic.Pointer[addresses]
	held      addresses // the addresses that connections may have been made from
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

// configure changes a setting of a node before its start.
func (n *node) configure(set func()) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.started || n.closed {
		return n.report(codeBadState, errors.New("settings cannot change after start"))
	}
	set()
	return nil
}

// takeDescriptor is configure for a descriptor. The library owns the descriptor from
// the call on, so it is closed if it is refused. -1 is none.
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

// closeRefused closes a descriptor that was given to the library and cannot be used.
func closeRefused(fd int) {
	if fd >= 0 {
		syscall.Close(fd) // fails if there is no such descriptor; that is then why it was refused
	}
}

// report keeps err's text for tailscale_errmsg and returns c. The text may come from
// elsewhere, so it is made harmless.
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
	// Open files stay usable. The archive is built without the parts that would use the
	// directory later (build-tags), so a crash leaves nothing behind.
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

// openStore opens the store of the node's identity: a file in its directory, or memory
// for an ephemeral node.
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

// openScratch keeps an ephemeral node's identity in memory. tsnet still needs a
// directory, for the log buffer that it opens at start.
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
