package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"time"

	"tailscale.com/ipn"
	"tailscale.com/net/netmon"
)

// lookInterval is how often the state is read, for changes that the bus does not
// report. One is the loss of the control server: it becomes a health warning, and so a
// notification, only after eight minutes (health/warnings.go, notInMapPollWarnable).
const lookInterval = time.Second

// saveInterval is the time between attempts to save an identity that could not be saved
// when it changed.
const saveInterval = 10 * time.Second

// askInterval is the time between checks of a control server that is not heard.
const askInterval = 5 * time.Second

// follow keeps self up to date and passes status lines on until the node
// closes.
func (n *node) follow() {
	changed := make(chan struct{}, 1)
	n.pending.Go(func() { n.watch(changed) })
	defer n.server.Sys().NetMon.Get().RegisterChangeCallback(n.networkChanged)()
	lines := make(chan []byte, 1)
	defer close(lines)
	if n.events != nil {
		go writeLines(n.events, lines)
	}
	look := time.NewTicker(lookInterval)
	defer look.Stop()
	save := time.NewTicker(saveInterval)
	defer save.Stop()
	ask := time.NewTicker(askInterval)
	defer ask.Stop()
	n.askWhy()
	for {
		select {
		case <-changed:
		case <-look.C:
		case <-save.C:
			if n.state != nil {
				n.state.retry()
			}
		case <-ask.C:
			n.askWhy()
		case <-n.ctx.Done():
			return
		}
		n.leaveControl()
		n.publish(lines)
	}
}

// askWhy finds out, in the background, why the control server is not heard: the
// backend's own attempts may take minutes to fail, and then name the last step only.
func (n *node) askWhy() {
	switch n.backend.State() {
	case ipn.NeedsLogin, ipn.NeedsMachineAuth, ipn.Stopped:
		return // it has answered
	}
	heard := n.server.Sys().HealthTracker.Get().GetInPollNetMap
	if heard() && !n.removed.Load() {
		n.rememberControl()
	}
	if n.removed.Load() || heard() || !n.asking.CompareAndSwap(false, true) {
		return
	}
	n.pending.Go(func() { // follow is counted in pending, so close still waits
		defer n.asking.Store(false)
		ctx, cancel := context.WithTimeout(n.ctx, probeLimit)
		defer cancel()
		err := n.probeControl(ctx)
		if err == nil || heard() {
			n.controlProbed.Store(nil)
			return
		}
		n.controlProbed.Store(&controlProblem{n.harmless(err.Error()), adviceOn(err)})
	})
}

// watch signals every change on the bus. The bus cuts off a slow watcher, and health
// changes come on it too, so the watch is renewed whenever it ends.
func (n *node) watch(changed chan<- struct{}) {
	const mask = ipn.NotifyInitialState | ipn.NotifyInitialHealthState | ipn.NotifyPeerChanges
	for n.ctx.Err() == nil {
		n.backend.WatchNotifications(n.ctx, mask, nil, func(notify *ipn.Notify) bool {
			if notify.ErrMessage != nil && strings.Contains(*notify.ErrMessage, demandsLogs) {
				n.needsLogUpload.Store(true)
			}
			select {
			case changed <- struct{}{}:
			default: // one is waiting already
			}
			return n.ctx.Err() == nil
		})
	}
}

// log passes a line on, and learns from it what the backend reports nowhere else.
//
// It learns why the control server cannot be reached or refuses, and that it has
// removed this node, which the backend takes for an outage
// (control/controlclient/direct.go, PollNetMap; ipn/ipnlocal/local.go,
// setControlClientStatusLocked; auto.go, updateRoutine). It also learns that an
// ephemeral node could not be logged out when it was closed (ipn/ipnlocal/local.go,
// Shutdown).
func (n *node) log(format string, args ...any) {
	switch {
	case format == "Received error: %v":
		if err := errorIn(args); err != nil {
			n.noteControlError(err)
		}
	case format == "control: lite map update error after %v: %v":
		if err := errorIn(args); err != nil {
			n.noteUpdateError(err)
		}
	case strings.HasPrefix(format, "failed to log out ephemeral node"):
		n.staysListed.Store(true)
	}
	n.logs.printf("%s", n.redact(fmt.Sprintf(format, args...)))
}

// noteControlError keeps why the control server could not be talked to. The backend
// reports it nowhere else, or only minutes later.
func (n *node) noteControlError(err error) {
	if strings.Contains(err.Error(), notFound) {
		n.removed.Store(true)
		n.rejections.Add(1)
	}
	n.controlSaid.Store(&controlProblem{said: n.harmless(err.Error())})
}

func (n *node) networkChanged(delta *netmon.ChangeDelta) {
	if delta.TimeJumped() {
		n.wakeUps.Add(1)
	}
	if delta.RebindLikelyRequired {
		n.networkChanges.Add(1)
	}
}

// publish refreshes self and puts the newest status line into lines, in place of one
// that still waits for room: the node's own state must not depend on a reader.
func (n *node) publish(lines chan []byte) {
	n.refreshSelf()
	line, err := n.statusLine()
	if err != nil {
		return
	}
	select {
	case <-lines:
	default:
	}
	lines <- append(line, '\n') // never waits: this is the only sender
}

// statusLine is the state as it is now, of a node that is started.
func (n *node) statusLine() ([]byte, error) {
	return json.Marshal(n.statusOf(n.backend.StatusWithoutPeers()))
}

// writeLines writes each line that differs from the one before. It ends when lines is
// closed, or when a write fails because events was closed.
func writeLines(events *os.File, lines <-chan []byte) {
	var last []byte
	for line := range lines {
		if bytes.Equal(line, last) {
			continue
		}
		if _, err := events.Write(line); err != nil {
			return
		}
		last = line
	}
}

// openEvents takes fd over, in place of an earlier one; -1 is none. Being
// non-blocking, it can be closed beneath a write that waits for room.
func (n *node) openEvents(fd int) {
	if n.events != nil {
		n.events.Close()
		n.events = nil
	}
	if fd >= 0 {
		n.events = os.NewFile(uintptr(fd), "events")
	}
}

// refreshSelf makes the node's addresses known while it has a place, and unknown
// otherwise, so that no connection starts without a tailnet. The state is asked
// for under a lock: an older answer must not undo a newer one.
func (n *node) refreshSelf() {
	n.selfMu.Lock()
	defer n.selfMu.Unlock()
	nm := n.backend.NetMapNoPeers()
	thrownOut := n.removed.Load() || n.needsLogUpload.Load()
	if n.backend.State() != ipn.Running || nm == nil || thrownOut || n.ctx.Err() != nil {
		n.self.Store(nil)
		return
	}
	self := addressesOf(nm.SelfNode)
	if self != n.held {
		n.abortOthers(self)
		n.held = self
	}
	n.self.Store(&self)
}
