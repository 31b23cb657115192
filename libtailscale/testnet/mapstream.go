package testnet

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"strconv"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/util/zstdframe"
)

// keepAliveInterval is well below the two minutes of silence after which a node
// gives the stream up (controlclient.watchdogTimeout).
const keepAliveInterval = 50 * time.Second

// session is one node's map stream. A stream is sent the difference to what it was sent
// before, as real control does; a full list of peers would not work, since an empty
// list means "no change".
//
// After each map the node is asked for a ping over a plain HTTP request. A node
// starts on the ping only when it has handled the map before it, so the answer
// is the acknowledgement that waitPushed waits for.
type session struct {
	id       string
	rec      *record
	replaced chan struct{} // closed when a newer stream of the node takes over

	// Guarded by registry.mu: the last change examined, the last change that concerned
	// this node and so was sent, and the last change acknowledged.
	seen, sent, acked uint64
}

// serveMap answers a node's map request: either an update about the node itself, or the
// long-lived stream of maps.
func (c *control) serveMap(w http.ResponseWriter, r *http.Request, machine key.MachinePublic) {
	var req tailcfg.MapRequest
	if !readJSON(w, r, &req) {
		return
	}
	c.reg.mu.Lock()
	rec := c.reg.byKeyLocked(req.NodeKey)
	known := rec != nil && rec.node.Machine == machine && !rec.loggedOut
	//lint:ignore SA1019 always false in the client that is linked in, not in older ones
	if known && !req.ReadOnly && !req.Stream {
		rec.updateFrom(&req)
		c.reg.bumpLocked()
	}
	c.reg.mu.Unlock()
	if !known {
		http.Error(w, "node not found", http.StatusNotFound)
		return
	}
	if !req.Stream {
		// The node reads only the status of an update's answer.
		w.WriteHeader(http.StatusOK)
		return
	}
	if c.mapsHeld.Load() {
		<-r.Context().Done()
		return
	}
	c.streamMaps(r.Context(), &mapWriter{w: w, compress: req.Compress == "zstd"}, rec)
}

// updateFrom notes what the node says about itself. Streams are not for that
// (tailcfg.MapRequest.Stream).
func (rec *record) updateFrom(req *tailcfg.MapRequest) {
	rec.node.Endpoints = req.Endpoints
	rec.node.DiscoKey = req.DiscoKey
	rec.node.Cap = req.Version
	if req.Hostinfo == nil {
		return
	}
	rec.node.Hostinfo = req.Hostinfo.View()
	if ni := req.Hostinfo.NetInfo; ni != nil && ni.PreferredDERP != 0 {
		rec.node.HomeDERP = ni.PreferredDERP
	}
}

// streamMaps sends maps until the node goes, or opens another stream.
func (c *control) streamMaps(ctx context.Context, w *mapWriter, rec *record) {
	s, ok := c.reg.openSession(rec)
	if !ok {
		return
	}
	defer c.reg.closeSession(s)

	keepAlive := time.NewTicker(keepAliveInterval)
	defer keepAlive.Stop()
	var last *nodeView
	for {
		view, gen, changed := c.reg.viewFor(rec)
		msg := view.changesSince(last)
		if last == nil {
			c.addConstants(msg)
		}
		last = view
		if c.reg.noteSeen(s, gen, msg != nil) {
			ack := fmt.Sprintf("%s/ack/%s/%d", c.baseURL(), s.id, gen)
			if w.send(msg) != nil || w.send(pingRequest(ack)) != nil {
				return
			}
		}
		for waiting := true; waiting; {
			select {
			case <-changed:
				// A stream that outlives its node (Headscale) sends only keep-alives.
				changed, waiting = nil, c.reg.isRemoved(rec)
			case <-keepAlive.C:
				if w.send(&tailcfg.MapResponse{KeepAlive: true}) != nil {
					return
				}
			case <-s.replaced:
				return
			case <-ctx.Done():
				return
			}
		}
	}
}

// addConstants adds the constant parts to the first map of a stream.
func (c *control) addConstants(msg *tailcfg.MapResponse) {
	msg.DERPMap = c.derpMap
	msg.Domain = c.domain
	msg.CollectServices = "false"
	msg.DNSConfig = &tailcfg.DNSConfig{Proxied: true, Domains: []string{c.domain}}
	msg.UserProfiles = []tailcfg.UserProfile{{
		ID: theUser.ID, LoginName: theLogin.LoginName, DisplayName: theUser.DisplayName,
	}}
	now := time.Now()
	msg.ControlTime = &now
	msg.ControlDialPlan = redialPlan(c.host)
}

// redialPlan makes nodes that have lost control try again every quarter of a
// second. Without it a node whose connect is refused does nothing for 10 s:
// having a plain http URL to a private address it has no port 443 to fall back
// to, yet waits for that attempt too (controlhttp.Dialer.dialHostOpt).
func redialPlan(host string) *tailcfg.ControlDialPlan {
	const attempts, interval = 80, 0.25
	plan := new(tailcfg.ControlDialPlan)
	for i := range attempts {
		plan.Candidates = append(plan.Candidates, tailcfg.ControlIPCandidate{
			IP:                netip.MustParseAddr(host),
			DialStartDelaySec: float64(i) * interval,
			DialTimeoutSec:    2 * interval,
		})
	}
	return plan
}

// pingRequest asks the node for a request to url. It is sent as a keep-alive, so it
// changes nothing else.
func pingRequest(url string) *tailcfg.MapResponse {
	return &tailcfg.MapResponse{KeepAlive: true, PingRequest: &tailcfg.PingRequest{URL: url}}
}

// serveAck takes the node's answer to pingRequest.
func (c *control) serveAck(w http.ResponseWriter, r *http.Request) {
	gen, err := strconv.ParseUint(r.PathValue("gen"), 10, 64)
	if err != nil {
		http.Error(w, "bad map number", http.StatusBadRequest)
		return
	}
	c.reg.noteAck(r.PathValue("session"), gen)
}

// openSession makes a session the current one of its node, which makes the node online.
// It is false if control is being stopped.
func (r *registry) openSession(rec *record) (*session, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.suspended || rec.removed {
		return nil, false
	}
	if rec.session != nil {
		close(rec.session.replaced)
	}
	s := &session{id: rand.Text(), rec: rec, replaced: make(chan struct{})}
	rec.session = s
	rec.online = true
	r.bumpLocked()
	return s, true
}

// closeSession notes that the stream has ended and the node is offline, unless a newer
// session has replaced it.
func (r *registry) closeSession(s *session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s.rec.session == s {
		s.rec.goOffline()
		r.bumpLocked()
		r.progress.wake()
	}
}

// goOffline forgets the node's map stream.
func (rec *record) goOffline() {
	rec.session = nil
	rec.online = false
	rec.lastSeen = time.Now().UTC().Truncate(time.Second)
}

// noteSeen notes that s has looked at change gen, and returns send: whether
// there is something to send.
func (r *registry) noteSeen(s *session, gen uint64, send bool) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	s.seen = gen
	if send {
		s.sent = gen
	} else {
		r.progress.wake()
	}
	return send
}

func (r *registry) noteAck(sessionID string, gen uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, rec := range r.records {
		if s := rec.session; s != nil && s.id == sessionID {
			s.acked = max(s.acked, gen)
			r.progress.wake()
		}
	}
}

// waitPushed waits until every node with a map stream has handled change gen.
func (r *registry) waitPushed(ctx context.Context, gen uint64) error {
	for {
		r.mu.Lock()
		behind := r.findLocked(func(rec *record) bool {
			s := rec.session
			return s != nil && (s.seen < gen || s.acked < s.sent)
		})
		progress := r.progress.ch
		r.mu.Unlock()
		if behind == nil {
			return nil
		}
		select {
		case <-progress:
		case <-ctx.Done():
			return fmt.Errorf("waiting for node %q to handle its new map: %w", behind.name(), ctx.Err())
		}
	}
}

// mapWriter frames map messages: a 4-byte length, then JSON, compressed if the
// node asked for it.
type mapWriter struct {
	w        http.ResponseWriter
	compress bool
}

func (m *mapWriter) send(msg *tailcfg.MapResponse) error {
	body, err := json.Marshal(msg)
	if err != nil {
		return fmt.Errorf("encoding a map: %w", err)
	}
	if m.compress {
		body = zstdframe.AppendEncode(nil, body, zstdframe.FastestCompression)
	}
	frame := binary.LittleEndian.AppendUint32(nil, uint32(len(body)))
	if _, err := m.w.Write(append(frame, body...)); err != nil {
		return err
	}
	return http.NewResponseController(m.w).Flush()
}
