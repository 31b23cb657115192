package testnet

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"sync"
	"time"

	"tailscale.com/derp/derpserver"
	"tailscale.com/net/stunserver"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
)

// derpAndSTUN is the relay and the address discovery of the test tailnet: the
// same pieces as tstest/integration.RunDERPAndSTUN, which needs a testing.TB.
type derpAndSTUN struct {
	host     string
	logf     logger.Logf
	derpKey  key.NodePrivate
	cert     tls.Certificate
	port     *keptPort // fixed, since nodes are told once
	stunAddr *net.UDPAddr
	stopSTUN context.CancelFunc

	mu      sync.Mutex
	derp    *derpserver.Server // nil while stopped
	http    *http.Server
	tracker *trackingListener
}

func newDERPAndSTUN(host string, logf logger.Logf) (*derpAndSTUN, error) {
	cert, err := selfSignedCert()
	if err != nil {
		return nil, fmt.Errorf("making the DERP certificate: %w", err)
	}
	port, err := keepPort(host)
	if err != nil {
		return nil, fmt.Errorf("a port for DERP: %w", err)
	}
	ln, err := net.Listen("tcp", port.addr.String())
	if err != nil {
		port.close()
		return nil, fmt.Errorf("listening for DERP: %w", err)
	}
	ctx, stopSTUN := context.WithCancel(context.Background())
	stun := stunserver.New(ctx)
	if err := stun.Listen(net.JoinHostPort(host, "0")); err != nil {
		stopSTUN()
		ln.Close()
		port.close()
		return nil, fmt.Errorf("listening for STUN: %w", err)
	}
	go stun.Serve()

	d := &derpAndSTUN{
		host:     host,
		logf:     logf,
		derpKey:  key.NewNode(),
		cert:     cert,
		port:     port,
		stunAddr: stun.LocalAddr().(*net.UDPAddr),
		stopSTUN: stopSTUN,
	}
	d.serve(ln)
	return d, nil
}

func (d *derpAndSTUN) serve(ln net.Listener) {
	d.tracker = &trackingListener{Listener: ln, conns: make(map[net.Conn]struct{})}
	d.derp = derpserver.New(d.derpKey, d.logf)
	d.http = &http.Server{
		Handler:  derpserver.Handler(d.derp),
		ErrorLog: logger.StdLogger(d.logf),
		// DERP takes over the connection, which HTTP/2 does not allow.
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
	}
	go d.http.Serve(tls.NewListener(d.tracker, &tls.Config{Certificates: []tls.Certificate{d.cert}}))
}

// start makes the relay listen again after stop.
func (d *derpAndSTUN) start() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.derp != nil {
		return nil
	}
	ln, err := net.Listen("tcp", d.port.addr.String())
	if err != nil {
		return fmt.Errorf("listening for DERP again: %w", err)
	}
	d.serve(ln)
	return nil
}

// stop ends the relay and its connections, and leaves STUN alone. While the relay takes
// a connection over, neither of the two servers knows it.
func (d *derpAndSTUN) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.derp == nil {
		return
	}
	d.http.Close()
	d.tracker.closeConns()
	d.derp.Close()
	d.derp, d.http, d.tracker = nil, nil, nil
}

// derpMap is what control tells the nodes: one region with one server.
func (d *derpAndSTUN) derpMap() *tailcfg.DERPMap {
	const region = 1
	return &tailcfg.DERPMap{
		OmitDefaultRegions: true,
		Regions: map[tailcfg.DERPRegionID]*tailcfg.DERPRegion{region: {
			RegionID:   region,
			RegionCode: "test",
			RegionName: "testnet",
			Nodes: []*tailcfg.DERPNode{{
				Name:             "t1",
				RegionID:         region,
				HostName:         d.host,
				IPv4:             d.host,
				IPv6:             "none",
				STUNPort:         d.stunAddr.Port,
				STUNTestIP:       d.host,
				DERPPort:         int(d.port.addr.Port()),
				InsecureForTests: true,
			}},
		}},
	}
}

func (d *derpAndSTUN) close() {
	d.stop()
	d.stopSTUN()
	d.port.close()
}

// selfSignedCert makes the DERP server's certificate. Nodes do not check it
// (InsecureForTests), so it carries no names.
func selfSignedCert() (tls.Certificate, error) {
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(30 * 24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &priv.PublicKey, priv)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: priv}, nil
}
