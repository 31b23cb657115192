package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"tailscale.com/ipn"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// This file finds out whether the control server still knows this node. Tailscale's
// ends the long poll of a node that is deleted, and answers the next one with 404
// (tailscale/tailscale#12032). Headscale leaves the poll open and says nothing on it
// any more (hscontrol/mapper/batcher.go, addToBatch), so that the backend believes that
// it is running while every peer has forgotten it.

// notFound is how both servers answer the map request of an unknown node
// (control/controlclient/direct.go, sendMapRequest, has the words before it).
const notFound = "initial fetch failed 404: node not found"

// askAgainAfter is the least time between two questions whether this node is known.
const askAgainAfter = 5 * time.Second

// noteUpdateError learns from a failed update about this node, which the backend
// retries without reporting it.
func (n *node) noteUpdateError(err error) {
	if strings.Contains(err.Error(), notFound) {
		n.updateRejected.Store(true)
	}
}

// isDeleted asks a control server that is heard whether it knows this node, and notes
// it if not; heard is whether it answered. Call it only when a peer is silent, since it
// costs a request to the control server, though at most one per askAgainAfter.
func (n *node) isDeleted(ctx context.Context) (deleted, heard bool) {
	polls := n.server.Sys().HealthTracker.Get().GetInPollNetMap()
	if !polls || canonicalControl(n.server.ControlURL) == ipn.DefaultControlURL || n.removed.Load() {
		return false, false // Tailscale's own ends the poll of a deleted node, so nothing has to be asked
	}
	if !n.askTurn.TryLock() {
		return false, false
	}
	defer n.askTurn.Unlock()
	if time.Since(n.askedLast) < askAgainAfter {
		return false, false
	}
	n.askedLast = time.Now()
	self, ok := n.selfKey()
	if !ok {
		return false, false
	}
	answer, err := n.registerAgain(ctx, self)
	if err != nil || answer.AuthURL == "" {
		return false, err == nil
	}
	n.deleted.Store(&self)
	return true, true
}

// selfKey is the node key of the network map.
func (n *node) selfKey() (self key.NodePublic, ok bool) {
	current := n.backend.NetMapNoPeers()
	if current == nil || !current.SelfNode.Valid() {
		return self, false
	}
	return current.SelfNode.Key(), true
}

// isExpired asks the control server whether the key of the stored identity has expired.
// Headscale keeps the expiry of a tagged node. So an auth key would be spent for
// nothing, and Tailscale's client would lose the node key: it takes the answer that the
// key has expired for a demand to make another (hscontrol/state/state.go,
// HandleNodeFromPreAuthKey; control/controlclient/direct.go, doLogin).
func (n *node) isExpired(ctx context.Context) bool {
	persist := storedPrefs(n.server.Store).Persist
	if persist == nil || persist.PrivateNodeKey.IsZero() {
		return false
	}
	answer, err := n.registerAgain(ctx, persist.PublicNodeKey())
	return err == nil && answer.NodeKeyExpired
}

// registerAgain sends the node's key to the control server, like a client that starts
// again: a known node is let in as it is, an unknown one is asked to log in.
func (n *node) registerAgain(ctx context.Context, self key.NodePublic) (answer tailcfg.RegisterResponse, err error) {
	request := tailcfg.RegisterRequest{
		Version: tailcfg.CurrentCapabilityVersion,
		NodeKey: self,
		Hostinfo: &tailcfg.Hostinfo{
			Hostname:    n.server.Hostname,
			RequestTags: n.server.AdvertiseTags,
		},
	}
	body, err := json.Marshal(request)
	if err != nil {
		return answer, err
	}
	// The host does not matter: the request goes over the control connection.
	post, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://unused/machine/register", bytes.NewReader(body))
	if err != nil {
		return answer, err
	}
	response, err := n.backend.DoNoiseRequest(post)
	if err != nil {
		return answer, err
	}
	defer response.Body.Close()
	return answer, json.NewDecoder(http.MaxBytesReader(nil, response.Body, maxAnswerBytes)).Decode(&answer)
}

// leaveControl stops asking a control server that has removed this node; up asks it
// again. Otherwise the control client would ask at ever longer intervals, and could be
// neither replaced nor closed between: it waits with its lock held, for up to 45
// seconds (control/controlclient/auto.go, mapRoutine).
func (n *node) leaveControl() {
	if !n.removed.Load() && !n.updateRejected.Load() && n.deleted.Load() == nil {
		return
	}
	select {
	case n.joining <- struct{}{}:
		defer func() { <-n.joining }()
	default:
		return // up waits for the answer
	}
	// An answer about another key is about an earlier node.
	self, _ := n.selfKey()
	deleted := n.deleted.Swap(nil)
	isDeleted := n.updateRejected.Swap(false) || deleted != nil && *deleted == self
	if n.removed.Load() || isDeleted {
		n.backend.DisconnectControl()
	}
	if isDeleted {
		n.removed.Store(true) // only now: while there is a poll, the node counts as known
	}
}

// errorIn returns the error among the arguments of a log line of the backend.
func errorIn(args []any) error {
	if len(args) == 0 {
		return nil
	}
	err, _ := args[len(args)-1].(error)
	return err
}
