package testnet

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"

	"golang.org/x/net/http2"
	"tailscale.com/control/controlhttp/controlhttpserver"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
)

// maxRequestBytes bounds a request from a node.
const maxRequestBytes = 1 << 20

// controlConfig is what newControl needs.
type controlConfig struct {
	host      string
	domain    string
	derpMap   *tailcfg.DERPMap
	authKeys  []string // nil: any key, or none, is accepted
	masterKey string   // always accepted; used by the nodes of this process
	headscale bool     // as Headscale does
	logf      logger.Logf
}

// control is the control server: the protocol's outer layer is here, who may
// join in register.go, what nodes are told in mapstream.go, the table of nodes in
// registry.go, and the HTTP API in api.go.
type control struct {
	controlConfig
	noiseKey key.MachinePrivate
	reg      *registry
	api      *api

	port *keptPort // fixed, since nodes keep the URL

	mapsHeld atomic.Bool // see HoldMaps

	mu      sync.Mutex
	server  *http.Server // nil while stopped
	tracker *trackingListener
	aliases []*http.Server
}

// newControl starts a control server on a free port.
func newControl(cfg controlConfig) (*control, error) {
	port, err := keepPort(cfg.host)
	if err != nil {
		return nil, fmt.Errorf("a port for control: %w", err)
	}
	ln, err := net.Listen("tcp", port.addr.String())
	if err != nil {
		port.close()
		return nil, fmt.Errorf("listening for control: %w", err)
	}
	reg := newRegistry(cfg.domain, cfg.authKeys)
	reg.headscale = cfg.headscale
	c := &control{
		controlConfig: cfg,
		noiseKey:      key.NewMachine(),
		reg:           reg,
		api:           newAPI(reg),
		port:          port,
	}
	c.serve(ln)
	return c, nil
}

func (c *control) baseURL() string { return "http://" + c.port.addr.String() }

// start listens again after stop.
func (c *control) start() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.server != nil {
		return nil
	}
	ln, err := net.Listen("tcp", c.port.addr.String())
	if err != nil {
		return fmt.Errorf("listening for control again: %w", err)
	}
	c.reg.resume()
	c.serve(ln)
	return nil
}

func (c *control) serve(ln net.Listener) {
	c.tracker = &trackingListener{Listener: ln, conns: make(map[net.Conn]struct{})}
	c.server = &http.Server{Handler: c.outerMux(), ErrorLog: logger.StdLogger(c.logf)}
	go c.server.Serve(c.tracker)
}

// alias makes control answer at another URL too, until the end.
func (c *control) alias() (url string, err error) {
	ln, err := net.Listen("tcp", net.JoinHostPort(c.host, "0"))
	if err != nil {
		return "", fmt.Errorf("listening for control once more: %w", err)
	}
	server := &http.Server{Handler: c.outerMux(), ErrorLog: logger.StdLogger(c.logf)}
	c.mu.Lock()
	c.aliases = append(c.aliases, server)
	c.mu.Unlock()
	go server.Serve(ln)
	return "http://" + ln.Addr().String(), nil
}

// stop refuses new connections and cuts the present ones. Nodes that were online stay
// listed as online until control starts again.
func (c *control) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.server == nil {
		return
	}
	c.reg.suspend()
	c.server.Close()
	c.tracker.closeConns()
	c.server, c.tracker = nil, nil
}

// close stops it for good.
func (c *control) close() {
	c.stop()
	c.port.close()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, server := range c.aliases {
		server.Close()
	}
}

// outerMux answers requests without encryption.
func (c *control) outerMux() http.Handler {
	mux := http.NewServeMux()
	if c.headscale {
		mux.HandleFunc("GET /key", c.serveHeadscaleKey)
	} else {
		mux.HandleFunc("GET /key", c.serveKey)
	}
	mux.HandleFunc("/ts2021", c.serveNoise)
	mux.HandleFunc("GET /auth/{id}", c.serveLogin)
	mux.HandleFunc("/ack/{session}/{gen}", c.serveAck)
	mux.Handle("/api/", c.api)
	return mux
}

// noiseMux answers requests over the encrypted channel of machine.
func (c *control) noiseMux(machine key.MachinePublic) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /machine/register", func(w http.ResponseWriter, r *http.Request) {
		c.serveRegister(w, r, machine)
	})
	mux.HandleFunc("POST /machine/map", func(w http.ResponseWriter, r *http.Request) {
		c.serveMap(w, r, machine)
	})
	mux.HandleFunc("POST /machine/update-health", func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		if c.headscale {
			http.Error(w, "Not implemented yet", http.StatusNotImplemented)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	return mux
}

func (c *control) serveKey(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(&tailcfg.OverTLSPublicKeyResponse{PublicKey: c.noiseKey.Public()})
}

// serveNoise turns the connection into the control protocol's encrypted channel
// and serves HTTP/2 on it until it ends.
func (c *control) serveNoise(w http.ResponseWriter, r *http.Request) {
	if c.headscale && refuseUnupgraded(w, r) {
		return
	}
	conn, err := controlhttpserver.AcceptHTTP(r.Context(), w, r, c.noiseKey, nil)
	if err != nil {
		c.logf("control: accepting %v: %v", r.RemoteAddr, err)
		return
	}
	defer conn.Close()
	var h2 http2.Server
	h2.ServeConn(conn, &http2.ServeConnOpts{
		Context:    r.Context(),
		BaseConfig: &http.Server{Handler: c.noiseMux(conn.Peer())},
	})
}

// readJSON decodes a node's request. On failure it sends the error response itself.
func readJSON(w http.ResponseWriter, r *http.Request, v any) bool {
	err := json.NewDecoder(io.LimitReader(r.Body, maxRequestBytes)).Decode(v)
	if err != nil {
		http.Error(w, "reading request: "+err.Error(), http.StatusBadRequest)
		return false
	}
	return true
}

// trackingListener remembers its connections, because http.Server.Close leaves
// connections open that a handler has taken over, and here all connections of nodes are
// taken over.
type trackingListener struct {
	net.Listener
	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	closed bool
}

func (l *trackingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		c.Close()
		return nil, net.ErrClosed
	}
	tc := &trackedConn{Conn: c, ln: l}
	l.conns[tc] = struct{}{}
	return tc, nil
}

// closeConns closes every connection accepted and not closed yet.
func (l *trackingListener) closeConns() {
	l.mu.Lock()
	l.closed = true
	conns := l.conns
	l.conns = nil
	l.mu.Unlock()
	for c := range conns {
		c.Close()
	}
}

type trackedConn struct {
	net.Conn
	ln *trackingListener
}

func (c *trackedConn) Close() error {
	c.ln.mu.Lock()
	delete(c.ln.conns, c)
	c.ln.mu.Unlock()
	return c.Conn.Close()
}
