package testnet

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// keptPort is the TCP port of a server that may stop and start again. While it is
// stopped, connections are refused, and the port is not given to others: otherwise this
// tailnet's nodes would ask another test's server, and the start would fail.
type keptPort struct {
	addr   netip.AddrPort
	socket *os.File // closed once, whoever closes it again
}

// Ports that the kernel does not assign by itself: Linux assigns ports from 32,768 on.
const (
	firstPort = 10_000
	portCount = 22_000
)

// nextPort makes each look for a port begin elsewhere.
var nextPort atomic.Uint32

// keepPort takes a free port of this address, by a socket that is bound and does not
// listen. A server may share it, since Go's listeners allow the reuse of addresses.
func keepPort(host string) (*keptPort, error) {
	ip, err := netip.ParseAddr(host)
	if err != nil || !ip.Is4() {
		return nil, fmt.Errorf("%q is no IPv4 address", host)
	}
	offset := uint32(os.Getpid()) * 977
	for range portCount {
		port := uint16(firstPort + (offset+nextPort.Add(1))%portCount)
		p, err := keepThis(netip.AddrPortFrom(ip, port))
		if !errors.Is(err, unix.EADDRINUSE) {
			return p, err
		}
	}
	return nil, fmt.Errorf("no port of %v is free", ip)
}

func keepThis(addr netip.AddrPort) (*keptPort, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("a socket: %w", err)
	}
	p := &keptPort{addr, os.NewFile(uintptr(fd), "port")}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: addr.Addr().As4(), Port: int(addr.Port())}); err != nil {
		p.close()
		return nil, fmt.Errorf("binding %v: %w", addr, err)
	}
	// Only after bind: a port that is in use must not be shared.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		p.close()
		return nil, fmt.Errorf("sharing %v: %w", addr, err)
	}
	return p, nil
}

func (p *keptPort) close() { p.socket.Close() }
