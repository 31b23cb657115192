package testnet

import (
	"fmt"
	"net"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
)

// Reach opens an address of this host. Connections to it go through a node of this
// process to a port of another node, like those of a peer's client. A connection that
// cannot be made within opTimeout, or is refused, is closed without a byte. It ends
// with the Net.
func (n *Net) Reach(name string, to netip.AddrPort) (address string, err error) {
	if n.Server(name) == nil {
		return "", fmt.Errorf("no node %q is running", name)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	n.mu.Lock()
	n.reaching = append(n.reaching, ln)
	n.mu.Unlock()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go n.reach(name, c.(*net.TCPConn), to)
		}
	}()
	return ln.Addr().String(), nil
}

func (n *Net) reach(name string, client *net.TCPConn, to netip.AddrPort) {
	outgoing, err := n.dialFrom(name, to)
	if err != nil {
		n.logf("reach %v from %q: %v", to, name, err)
		client.Close()
		return
	}
	tailnet, err := newTailnetLeg(outgoing)
	if err != nil {
		panic(err) // as in forwards.serve
	}
	local, err := newServerLeg(client)
	if err != nil {
		panic(err)
	}
	relay(local, tailnet)
}

func (n *Net) dialFrom(name string, to netip.AddrPort) (net.Conn, error) {
	server := n.Server(name)
	if server == nil {
		return nil, fmt.Errorf("it does not run")
	}
	ctx, cancel := opContext()
	defer cancel()
	c, err := server.Dial(ctx, "tcp", to.String())
	if err != nil {
		return nil, err
	}
	if _, inside := c.(*gonet.TCPConn); !inside {
		c.Close() // tsnet took the host's network
		return nil, fmt.Errorf("no node has the address")
	}
	return c, nil
}
