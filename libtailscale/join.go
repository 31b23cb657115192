package main

import (
	"cmp"
	"context"
	"errors"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"tailscale.com/ipn"
	"tailscale.com/types/netmap"
)

// up joins the tailnet, or joins again if the node was removed: nil once the node is
// running, else a code, with the reason kept for tailscale_errmsg. tsnet's own Up waits
// for ever where a person has to act.
func (n *node) up() error {
	if err := n.start(); err != nil {
		return err
	}
	if !n.begin() {
		return n.report(codeCancelled, errors.New("the node is closed"))
	}
	defer n.pending.Done()

	limit := time.Duration(n.upTimeout.Load())
	ctx, stop := context.WithCancel(n.ctx)
	defer stop()
	j := &join{node: n, ctx: ctx, stop: stop, used: make(chan error, maxUses)}
	if limit > 0 {
		// This part of the limit is for finding out why joining took so long.
		j.explaining = min(probeLimit, limit/4)
		j.waiting = limit - j.explaining
		j.end = time.Now().Add(j.waiting)
	}
	// One at a time: each login starts the backend anew.
	turn, cancel := j.untilEnd()
	defer cancel()
	select {
	case n.joining <- struct{}{}:
		defer func() { <-n.joining }()
		err := j.run()
		if err == nil {
			go debug.FreeOSMemory() // frees the memory that joining used
		}
		return err
	case <-turn.Done():
		if n.ctx.Err() != nil {
			return n.report(codeCancelled, errors.New("the node was closed while joining"))
		}
		return n.report(codeUpTimedOut, errors.New("another attempt to join is still in progress"))
	}
}

// maxUses bounds the uses of a credential in one call of up.
const maxUses = 2

// join is one call of up.
type join struct {
	node *node
	ctx  context.Context // ends with the node, or when the credential failed
	stop context.CancelFunc

	end                 time.Time     // end of the waiting; zero is never
	waiting, explaining time.Duration // parts of the time limit; zero without one

	// uses counts how often the credential was used: with the tags and, where asking for
	// tags is refused, without. If the server demands a login after that, its error
	// message or the time limit decides.
	uses int
	used chan error             // how each use went
	key  atomic.Pointer[string] // what the credential became, once it is offered
	// asked is set once a person was asked to log in.
	asked bool
	// askedAnew is set once a control server that had no place for this node was asked
	// again; there were this many rejections before.
	askedAnew  bool
	rejections int64
	// stale is the network map from before the node lost its place: the backend keeps it,
	// and may report Running with it. Guarded by staleMu.
	staleMu sync.Mutex
	stale   *netmap.NetworkMap
}

func (j *join) run() error {
	n := j.node
	outcome, decided := j.resume()
	for !decided && j.ctx.Err() == nil && !j.isOver() {
		outcome, decided = j.watch()
	}
	if decided {
		if outcome != nil && j.uses > 0 {
			j.stop()
			for range j.uses {
				<-j.used
			}
			// Otherwise the control client would offer the same credential for ever.
			n.loginRefused.Store(true)
			n.restart(ipn.Options{})
		}
		return outcome
	}
	j.stop() // a key that is being made is given up, with its error
	explaining, cancel := context.WithTimeout(n.ctx, cmp.Or(j.explaining, probeLimit))
	defer cancel()
	why := j.explain(explaining)
	if n.ctx.Err() != nil {
		return n.report(codeCancelled, errors.New("the node was closed while joining"))
	}
	return why
}

// isOver is whether the time for joining is over. The time that a person takes does not
// count.
func (j *join) isOver() bool {
	if j.end.IsZero() {
		return false
	}
	if j.node.interactive.Load() && j.node.backend.StatusWithoutPeers().AuthURL != "" {
		j.end = time.Now().Add(j.waiting)
	}
	return time.Now().After(j.end)
}

// untilEnd returns a context that also ends with the time for joining.
func (j *join) untilEnd() (context.Context, context.CancelFunc) {
	if j.end.IsZero() {
		return context.WithCancel(j.ctx)
	}
	return context.WithDeadline(j.ctx, j.end)
}

// resume restarts a node that was stopped for the lack of log upload: the backend has
// stopped, or will soon.
func (j *join) resume() (outcome error, decided bool) {
	n := j.node
	if n.removed.Load() || !n.needsLogUpload.Load() {
		return nil, false
	}
	prefs := n.backend.Prefs().AsStruct()
	prefs.WantRunning = true
	j.leaveStale()
	if err := n.restart(ipn.Options{UpdatePrefs: prefs}); err != nil {
		return n.report(codeError, err), true
	}
	return nil, false
}

// leaveStale makes sure that the network map so far does not count as an answer.
func (j *join) leaveStale() {
	j.staleMu.Lock()
	defer j.staleMu.Unlock()
	j.stale = j.node.backend.NetMapNoPeers()
}

// restart lets the backend ask the control server again, and for the node's tags:
// Headscale removes them from a node that registers without a key and asks for none
// (hscontrol/state/state.go, processReauthTags).
func (n *node) restart(options ipn.Options) error {
	return n.restartAsking(n.server.AdvertiseTags, options)
}

// restartAsking is restart with other tags.
func (n *node) restartAsking(tags []string, options ipn.Options) error {
	if options.UpdatePrefs == nil {
		options.UpdatePrefs = n.backend.Prefs().AsStruct()
	}
	options.UpdatePrefs.AdvertiseTags = tags
	n.server.Sys().HealthTracker.Get().SetOutOfPollNetMap()
	return n.backend.Start(options)
}

// hasJoined is whether the backend runs with a network map of this attempt. It may also
// run with a map that demands logs, but then wants to stop.
func (j *join) hasJoined() bool {
	n := j.node
	j.staleMu.Lock()
	defer j.staleMu.Unlock()
	current := n.backend.NetMapNoPeers()
	return current != nil && current != j.stale && !current.Cached && n.backend.Prefs().WantRunning() &&
		n.server.Sys().HealthTracker.Get().GetInPollNetMap()
}

// watch follows the notifications for a while only: the bus cuts off a slow watcher,
// and some deciding changes are not notified.
func (j *join) watch() (outcome error, decided bool) {
	n := j.node
	isOut := n.removed.Load() || n.loginRefused.Load() && n.backend.StatusWithoutPeers().HaveNodeKey
	if isOut && j.uses == 0 && !j.asked {
		// The backend no longer asks by itself: it does not know of a removal, and after a
		// refused login it waits.
		if outcome, decided = j.askAnew(); decided {
			return outcome, decided
		}
	}
	until, done := j.untilEnd()
	defer done()
	ctx, cancel := context.WithTimeout(until, lookInterval)
	defer cancel()
	n.backend.WatchNotifications(ctx, ipn.NotifyInitialState, nil, func(notify *ipn.Notify) bool {
		outcome, decided = j.decide(notify)
		return !decided
	})
	return outcome, decided
}

// askAnew asks the control server once whether this node still has no place: a server
// that was restored from a backup may know the node again, and the expiry of its key
// may have been disabled. If there is still no place, the answer is another rejection,
// or a login URL.
func (j *join) askAnew() (outcome error, decided bool) {
	n := j.node
	if j.askedAnew {
		if n.rejections.Load() != j.rejections || n.backend.StatusWithoutPeers().AuthURL != "" {
			return j.login()
		}
		return nil, false
	}
	j.askedAnew = true
	j.rejections = n.rejections.Load()
	j.leaveStale()
	if err := n.restart(ipn.Options{}); err != nil {
		return n.report(codeError, err), true
	}
	return nil, false
}

// decide says whether a notification decides the joining, and how.
func (j *join) decide(notify *ipn.Notify) (outcome error, decided bool) {
	n := j.node
	if message := notify.ErrMessage; message != nil {
		if slices.ContainsFunc(passing, func(text string) bool { return strings.Contains(*message, text) }) {
			n.log("joining: %s", n.harmless(*message))
			return nil, false
		}
		refused := codeOfRefusal(*message)
		if refused == codeNeedsLogUpload {
			n.needsLogUpload.Store(true)
		}
		if refused == codeTagsRefused && j.leavesTagsToKey() {
			return nil, false
		}
		return n.report(refused, errors.New(*message)), true
	}
	if notify.State == nil {
		return nil, false
	}
	switch *notify.State {
	case ipn.Running:
		if !j.hasJoined() {
			return nil, false
		}
		n.removed.Store(false)
		n.deleted.Store(nil)
		n.updateRejected.Store(false)
		n.loginRefused.Store(false)
		n.needsLogUpload.Store(false)
		n.refreshSelf()
		n.rememberControl()
		return nil, true
	case ipn.NeedsLogin:
		if j.askedAnew {
			return j.askAnew() // the state may be older than the question
		}
		return j.login()
	default:
		return nil, false
	}
}

// login uses the credential, now that the control server wants one.
func (j *join) login() (outcome error, decided bool) {
	n := j.node
	credential := n.credential()
	if !credential.isGiven() && n.interactive.Load() {
		j.ask()
		return nil, false
	}
	if !credential.isGiven() {
		return n.report(codeNeedsLogin, errors.New("the node is not enrolled and there is no auth key")), true
	}
	if j.uses > 0 {
		return nil, false
	}
	j.use(func(ctx context.Context) error {
		key, err := n.obtainKey(ctx)
		if err != nil || ctx.Err() != nil {
			return err // nil if the time is over: the outcome is decided already
		}
		if !strings.HasPrefix(key, "tskey-") && n.isExpired(ctx) {
			return credentialError{codeKeyExpired, errors.New("the key of this node has expired there, and no credential renews it")}
		}
		j.key.Store(&key)
		return n.register(key, n.server.AdvertiseTags)
	})
	return nil, false
}

// leavesTagsToKey is whether the tags were refused because the node asked for them;
// then it registers again without asking. Headscale since 0.28 gives a node the tags of
// its key, and refuses a node that asks for tags, even for those of the key
// (hscontrol/state/state.go, createAndSaveNewNode); this does not spend the key. With a
// key of Tailscale a node may ask for tags, so there the tags themselves are refused.
func (j *join) leavesTagsToKey() bool {
	key := j.key.Load()
	if key == nil || strings.HasPrefix(*key, "tskey-") {
		return false
	}
	if j.uses < maxUses { // else this is a late answer to the earlier request
		j.node.log("the control server takes the tags from the key: registering again without asking for tags")
		j.use(func(context.Context) error { return j.node.register(*key, nil) })
	}
	return true
}

// register enrols with a key. One at a time: otherwise a late demand for a login would
// use the key a second time.
func (n *node) register(key string, tags []string) error {
	n.registering.Lock()
	defer n.registering.Unlock()
	if err := n.restartAsking(tags, ipn.Options{AuthKey: key}); err != nil {
		return err
	}
	return n.backend.StartLoginInteractive(n.ctx)
}

// use does a step of the enrolment that ends with the time for joining. Not from
// the watcher's callback: Start sends notifications itself and would wait for this
// watcher if its queue filled up.
func (j *join) use(step func(context.Context) error) {
	j.uses++
	j.leaveStale()
	until, done := j.untilEnd()
	j.node.pending.Go(func() { // begin has counted the call of up, so close still waits
		defer done()
		err := step(until)
		if err != nil && !errors.As(err, new(credentialError)) {
			err = credentialError{codeError, err}
		}
		j.used <- err
		if err != nil {
			j.stop()
		}
	})
}

// ask makes the control server send a login URL for a person. At the first start it has
// sent one already.
func (j *join) ask() {
	n := j.node
	if j.asked || n.backend.StatusWithoutPeers().AuthURL != "" {
		return
	}
	j.asked = true
	j.leaveStale()
	n.pending.Go(func() { // as in use
		if err := n.restart(ipn.Options{}); err != nil {
			n.log("starting again: %v", err)
		}
		if err := n.backend.StartLoginInteractive(n.ctx); err != nil {
			n.log("asking for a login: %v", err)
		}
	})
}
