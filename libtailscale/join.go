package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"tailscale.com/ipn"
	"tailscale.com/net/tlsdial"
)

const (
	defaultControlURL = ipn.DefaultControlURL
	// probeLimit bounds the look at a control server that did not answer.
	probeLimit = 2 * time.Second
)

// up joins the tailnet: nil once the node is running, else a code with the
// reason kept for tailscale_errmsg. tsnet's own Up waits for ever where a
// person would have to act.
func (n *node) up() error {
	if err := n.start(); err != nil {
		return err
	}
	if !n.begin() {
		return n.report(codeCancelled, errors.New("the node is closed"))
	}
	defer n.pending.Done()

	n.keyUsed.Store(false) // a second try may offer it again
	ctx := n.ctx
	if limit := n.upTimeout.Load(); limit > 0 {
		limited, cancel := context.WithTimeout(ctx, time.Duration(limit)*time.Millisecond)
		defer cancel()
		ctx = limited
	}
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)

	outcome, decided := error(nil), false
	for !decided && ctx.Err() == nil { // the bus cuts off a slow watcher
		n.backend.WatchNotifications(ctx, ipn.NotifyInitialState, nil, func(notify *ipn.Notify) bool {
			outcome, decided = n.decide(notify, fail)
			return !decided
		})
	}
	var failed loginError
	switch {
	case decided:
		return outcome
	case n.ctx.Err() != nil:
		return n.report(codeCancelled, errors.New("the node was closed while joining"))
	case errors.As(context.Cause(ctx), &failed):
		return n.report(codeError, failed)
	default:
		return n.explainTimeout()
	}
}

// loginError is a login that failed before the control server was asked.
type loginError struct{ error }

// passing are messages after which Tailscale goes on by itself: the control
// server's rate limit (control/controlclient/direct.go, tryRegister), and a
// watcher that was cut off (ipn/ipnlocal/local.go,
// watchIPNBusFellBehindMessage).
var passing = []string{"rate limited", "fell behind"}

// decide says whether a notification settles the joining, and how.
func (n *node) decide(notify *ipn.Notify, fail context.CancelCauseFunc) (outcome error, decided bool) {
	if message := notify.ErrMessage; message != nil {
		if slices.ContainsFunc(passing, func(text string) bool { return strings.Contains(*message, text) }) {
			n.logs.printf("joining: %s", *message)
			return nil, false
		}
		return n.report(codeAuthRefused, errors.New(*message)), true
	}
	if notify.State == nil {
		return nil, false
	}
	switch *notify.State {
	case ipn.Running:
		n.refreshSelf(ipn.Running.String())
		return nil, true
	case ipn.NeedsLogin:
		return n.login(fail)
	default:
		return nil, false
	}
}

// login hands the auth key over, now that the control server wants one. A
// second demand after that is answered by the error message that comes with
// it, or by the time limit.
func (n *node) login(fail context.CancelCauseFunc) (outcome error, decided bool) {
	if n.authKey == "" {
		return n.report(codeNeedsLogin, errors.New("the node is not enrolled and there is no auth key")), true
	}
	if !n.keyUsed.CompareAndSwap(false, true) {
		return nil, false
	}
	// Not from the watcher's callback: Start sends notifications itself and
	// would wait for this watcher if its queue filled up. begin has counted
	// up's call in pending, so close is not waiting for zero yet.
	n.pending.Go(func() {
		err := n.backend.Start(ipn.Options{AuthKey: n.authKey})
		if err == nil {
			err = n.backend.StartLoginInteractive(n.ctx)
		}
		if err != nil {
			fail(loginError{err})
		}
	})
	return nil, false
}

// explainTimeout names what the node was waiting for when time ran out.
func (n *node) explainTimeout() error {
	state := n.backend.State()
	if state == ipn.NeedsMachineAuth {
		return n.report(codeNeedsApproval, errors.New("the node waits for an admin's approval"))
	}
	enrolled := n.backend.StatusWithoutPeers().HaveNodeKey && !n.keyUsed.Load()
	probe := n.probeControl()
	switch {
	case probe != nil && !enrolled:
		return n.report(codeControlUnreachable, probe)
	case probe != nil:
		return n.report(codeUpTimedOut, probe)
	case state == ipn.NeedsLogin && !enrolled:
		// A proxy in front of the control server may pass the question for
		// its key and nothing else.
		return n.report(codeControlUnreachable, fmt.Errorf("it answers, but registering fails: %s", n.complaints()))
	default:
		return n.report(codeUpTimedOut, fmt.Errorf("state %v: %s", state, n.complaints()))
	}
}

// complaints is what Tailscale itself finds wrong, as one part of a sentence.
func (n *node) complaints() string {
	var parts []string
	for _, sentence := range n.backend.StatusWithoutPeers().Health {
		parts = append(parts, strings.TrimRight(sentence, "."))
	}
	if len(parts) == 0 {
		return "no reason is known"
	}
	return strings.Join(parts, "; ")
}

// probeControl asks the control server for its public key, as every client
// does first, and returns why that failed.
func (n *node) probeControl() error {
	url := n.server.ControlURL
	if url == "" {
		url = defaultControlURL
	}
	ctx, cancel := context.WithTimeout(n.ctx, probeLimit)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(url, "/")+"/key?v=1", nil)
	if err != nil {
		return err
	}
	// As Tailscale's own client: the baked-in roots serve where the machine
	// has none.
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = tlsdial.Config(nil, nil)
	transport.DisableKeepAlives = true
	response, err := transport.RoundTrip(request)
	if err != nil {
		return fmt.Errorf("%s: %w", request.URL, err)
	}
	defer response.Body.Close()
	io.Copy(io.Discard, io.LimitReader(response.Body, 1<<16))
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answered %s", url, response.Status)
	}
	return nil
}

func trimDot(name string) string { return strings.TrimSuffix(name, ".") }
