package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"

	"tailscale.com/ipn"
	"tailscale.com/tailcfg"
)

// This file finds out whether the control server still knows this node. Tailscale's
// ends the long poll of a node that is deleted, and answers the next one with 404
// (tailscale/tailscale#12032). Headscale leaves the poll open and says nothing on it
// any more (hscontrol/mapper/batcher.go, addToBatch), so that the backend believes
// itself to be running while every peer has forgotten it.

// notFound is how both answer the map request of a node that they do not know
// (control/controlclient/direct.go, sendMapRequest, has the words before it).
const notFound = "initial fetch failed 404: node not found"

// noteUpdateError learns from an update about this node that did not get through,
// which the backend tries again and tells nobody.
func (n *node) noteUpdateError(err error) {
	if strings.Contains(err.Error(), notFound) {
		n.forgotten.Store(true)
	}
}

// isForgotten asks a control server that is heard whether it knows this node, and
// notes it if not. Who asks has another reason to doubt it: a peer that is silent.
func (n *node) isForgotten(ctx context.Context) bool {
	control := n.controlURL()
	heard := n.server.Sys().HealthTracker.Get().GetInPollNetMap()
	if !heard || ipn.IsLoginServerSynonym(control) || n.removed.Load() {
		return false // what it has to say comes by itself
	}
	answer, err := n.registerAgain(ctx)
	if err != nil || answer.AuthURL == "" {
		return false
	}
	n.forgotten.Store(true)
	return true
}

// registerAgain tells the control server the node's key, as a client does that
// starts again: one that it knows is let in as it is, and one that it does not is
// asked to log in.
func (n *node) registerAgain(ctx context.Context) (answer tailcfg.RegisterResponse, err error) {
	current := n.backend.NetMapNoPeers()
	if current == nil {
		return answer, errors.New("there is no network map")
	}
	request := tailcfg.RegisterRequest{
		Version: tailcfg.CurrentCapabilityVersion,
		NodeKey: current.SelfNode.Key(),
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

// leaveControl stops asking a control server that has removed this node; up asks
// it anew. Left alone, the control client would ask at ever longer intervals, and
// could be neither replaced nor closed during one: it waits with its lock held,
// for up to 45 seconds (control/controlclient/auto.go, mapRoutine).
func (n *node) leaveControl() {
	if !n.removed.Load() && !n.forgotten.Load() {
		return
	}
	select {
	case n.joining <- struct{}{}:
		defer func() { <-n.joining }()
	default:
		return // up waits for the answer
	}
	switch {
	case n.forgotten.Swap(false):
		// The poll first: while there is one, the node counts as not removed.
		n.backend.DisconnectControl()
		n.removed.Store(true)
	case n.removed.Load():
		n.backend.DisconnectControl()
	}
}

// errorIn is the error in a line of the backend's log that has this format.
func errorIn(args []any) error {
	if len(args) == 0 {
		return nil
	}
	err, _ := args[len(args)-1].(error)
	return err
}
