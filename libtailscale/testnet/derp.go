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
	derp     *derpserver.Server
	http     *http.Server
	derpAddr *net.TCPAddr
	stunAddr *net.UDPAddr
	stopSTUN context.CancelFunc
}

func startDERPAndSTUN(host string, logf logger.Logf) (*derpAndSTUN, error) {
	cert, err := selfSignedCert()
	if err != nil {
		return nil, fmt.Errorf("making the DERP certificate: %w", err)
	}
	ln, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return nil, fmt.Errorf("listening for DERP: %w", err)
	}
	ctx, stopSTUN := context.WithCancel(context.Background())
	stun := stunserver.New(ctx)
	if err := stun.Listen(net.JoinHostPort(host, "0")); err != nil {
		stopSTUN()
		ln.Close()
		return nil, fmt.Errorf("listening for STUN: %w", err)
	}
	go stun.Serve()

	d := &derpAndSTUN{
		host:     host,
		derp:     derpserver.New(key.NewNode(), logf),
		derpAddr: ln.Addr().(*net.TCPAddr),
		stunAddr: stun.LocalAddr().(*net.UDPAddr),
		stopSTUN: stopSTUN,
	}
	d.http = &http.Server{
		Handler:  derpserver.Handler(d.derp),
		ErrorLog: logger.StdLogger(logf),
		// DERP takes over the connection, which HTTP/2 does not allow.
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
	}
	go d.http.Serve(tls.NewListener(ln, &tls.Config{Certificates: []tls.Certificate{cert}}))
	return d, nil
}

// derpMap is what control tells the nodes: one region with one server.
func (d *derpAndSTUN) derpMap() *tailcfg.DERPMap {
	const region = 1
	return &tailcfg.DERPMap{
		OmitDefaultRegions: true,
		Regions: map[int]*tailcfg.DERPRegion{region: {
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
				DERPPort:         d.derpAddr.Port,
				InsecureForTests: true,
			}},
		}},
	}
}

func (d *derpAndSTUN) close() {
	d.http.Close()
	d.derp.Close() // also ends the connections it has taken over from d.http
	d.stopSTUN()
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
