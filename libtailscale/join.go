package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"tailscale.com/ipn"
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

	ctx, cancel := n.ctx, context.CancelFunc(func() {})
	if limit := n.upTimeout.Load(); limit > 0 {
		ctx, cancel = context.WithTimeout(n.ctx, time.Duration(limit)*time.Millisecond)
	}
	defer cancel()

	var outcome error
	decided := false
	n.backend.WatchNotifications(ctx, ipn.NotifyInitialState, nil, func(notify *ipn.Notify) bool {
		outcome, decided = n.decide(ctx, notify)
		return !decided
	})
	switch {
	case decided:
		return outcome
	case n.ctx.Err() != nil:
		return n.report(codeCancelled, errors.New("the node was closed while joining"))
	default:
		return n.explainTimeout()
	}
}

// decide says whether a notification settles the joining, and how.
func (n *node) decide(ctx context.Context, notify *ipn.Notify) (outcome error, decided bool) {
	if notify.ErrMessage != nil {
		return n.report(codeAuthRefused, errors.New(*notify.ErrMessage)), true
	}
	if notify.State == nil {
		return nil, false
	}
	switch *notify.State {
	case ipn.Running:
		n.refreshSelf(ipn.Running.String())
		return nil, true
	case ipn.NeedsLogin:
		return n.login(ctx)
	default:
		return nil, false
	}
}

// login hands the auth key over, now that the control server wants one. A
// second demand after that is answered by the error message that comes with
// it, or by the time limit.
func (n *node) login(ctx context.Context) (outcome error, decided bool) {
	if n.authKey == "" {
		return n.report(codeNeedsLogin, errors.New("the node is not enrolled and there is no auth key")), true
	}
	if !n.keyUsed.CompareAndSwap(false, true) {
		return nil, false
	}
	// Not from this callback: Start sends notifications itself and would
	// wait for this watcher if its queue filled up.
	n.pending.Add(1) // begin has counted up already, so close is waiting
	go func() {
		defer n.pending.Done()
		if err := n.backend.Start(ipn.Options{AuthKey: n.authKey}); err != nil {
			n.logs.printf("login: %v", err)
			return
		}
		if err := n.backend.StartLoginInteractive(ctx); err != nil {
			n.logs.printf("login: %v", err)
		}
	}()
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
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	io.Copy(io.Discard, io.LimitReader(response.Body, 1<<16))
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answered %s", url, response.Status)
	}
	return nil
}

func trimDot(name string) string { return strings.TrimSuffix(name, ".") }
