package testnet

import (
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// keptPort is the TCP port of a server that may stop and start again. While it is
// stopped, connections are refused, and nobody else is given the port: this tailnet's
// nodes would ask another test's server, and the start would fail.
type keptPort struct {
	addr   netip.AddrPort
	socket *os.File // closed once, whoever closes it again
}

// keepPort takes a free port of this address, by a socket that is bound and does not
// listen. The kernel chooses no port that is bound, and a server may share this one,
// since Go's listeners allow the reuse of addresses.
func keepPort(host string) (_ *keptPort, err error) {
	ip, err := netip.ParseAddr(host)
	if err != nil || !ip.Is4() {
		return nil, fmt.Errorf("%q is no IPv4 address", host)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("a socket: %w", err)
	}
	p := &keptPort{socket: os.NewFile(uintptr(fd), "port")}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: ip.As4()}); err != nil {
		return nil, fmt.Errorf("binding %v: %w", ip, err)
	}
	// Only now: a port that somebody else has must not be shared.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return nil, fmt.Errorf("sharing the port: %w", err)
	}
	bound, err := unix.Getsockname(fd)
	if err != nil {
		return nil, fmt.Errorf("the port: %w", err)
	}
	p.addr = netip.AddrPortFrom(ip, uint16(bound.(*unix.SockaddrInet4).Port))
	return p, nil
}

func (p *keptPort) close() { p.socket.Close() }
