package testnet

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// tailnetLeg is a connection of the node's netstack. gonet cannot reset it, nor
// wait without a buffer, nor see a RST after end of file, so it works on the
// endpoint, which gonet hides.
type tailnetLeg struct {
	*gonet.TCPConn
	ep tcpip.Endpoint
	wq *waiter.Queue

	stopOnce sync.Once
	stopped  chan struct{}
}

func newTailnetLeg(c net.Conn) (*tailnetLeg, error) {
	gc, ok := c.(*gonet.TCPConn)
	if !ok {
		return nil, fmt.Errorf("testnet: tailnet connection is a %T, want *gonet.TCPConn", c)
	}
	l := &tailnetLeg{TCPConn: gc, stopped: make(chan struct{})}
	if err := readField(gc, "ep", &l.ep); err != nil {
		return nil, err
	}
	if err := readField(gc, "wq", &l.wq); err != nil {
		return nil, err
	}
	return l, nil
}

func (l *tailnetLeg) copyTo(dst io.Writer) error {
	for {
		l.awaitReadable()
		buf := bufferPool.Get().(*[64 << 10]byte)
		n, err := l.Read(buf[:])
		if n > 0 {
			_, err = dst.Write(buf[:n])
		}
		bufferPool.Put(buf)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// awaitReadable waits until Read would not block.
func (l *tailnetLeg) awaitReadable() {
	const events = waiter.ReadableEvents | waiter.EventHUp | waiter.EventErr
	entry, ready := waiter.NewChannelEntry(events)
	l.wq.EventRegister(&entry)
	defer l.wq.EventUnregister(&entry)
	for l.ep.Readiness(events) == 0 {
		<-ready
	}
}

func (l *tailnetLeg) closeWrite() error { return l.CloseWrite() }

func (l *tailnetLeg) awaitReset() error {
	const events = waiter.EventHUp | waiter.EventErr
	entry, ready := waiter.NewChannelEntry(events)
	l.wq.EventRegister(&entry)
	defer l.wq.EventUnregister(&entry)
	for {
		switch tcp.EndpointState(l.ep.State()) {
		case tcp.StateError:
			return errReset
		case tcp.StateClose:
			// Ended in order, or by a RST in CLOSE-WAIT: only the error shows which. If a Write
			// has taken the error, that Write resets the relay.
			if l.ep.LastError() != nil {
				return errReset
			}
			return nil
		}
		select {
		case <-ready:
		case <-l.stopped:
			return nil
		}
	}
}

func (l *tailnetLeg) stopWaiting() { l.stopOnce.Do(func() { close(l.stopped) }) }

func (l *tailnetLeg) reset() { l.ep.Abort() }

func (l *tailnetLeg) close() { l.Close() }

// serverLeg is a kernel connection to a server on this host.
type serverLeg struct {
	*net.TCPConn
	raw syscall.RawConn
}

func newServerLeg(c *net.TCPConn) (*serverLeg, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("testnet: %w", err)
	}
	return &serverLeg{TCPConn: c, raw: raw}, nil
}

func (l *serverLeg) copyTo(dst io.Writer) error {
	for {
		buf, n, err := l.readWhenReady()
		if n > 0 {
			_, err = dst.Write(buf[:n])
		}
		if buf != nil {
			bufferPool.Put(buf)
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
	}
}

// readWhenReady is Read that takes its buffer only when there is something to
// read. 0 bytes without an error is end of file.
func (l *serverLeg) readWhenReady() (buf *[64 << 10]byte, n int, err error) {
	var readErr error
	err = l.raw.Read(func(fd uintptr) bool {
		buf = bufferPool.Get().(*[64 << 10]byte)
		for {
			n, readErr = unix.Read(int(fd), buf[:])
			if readErr != unix.EINTR {
				break
			}
		}
		if readErr == unix.EAGAIN {
			bufferPool.Put(buf)
			buf = nil
			return false
		}
		return true
	})
	return buf, max(n, 0), errors.Join(err, readErr)
}

func (l *serverLeg) closeWrite() error { return l.CloseWrite() }

// awaitReset relies on the poller being edge-triggered: after end of file it
// wakes again only for an error or the end of the connection.
func (l *serverLeg) awaitReset() error {
	var result error
	l.raw.Read(func(fd uintptr) bool {
		if errno, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); err != nil || errno != 0 {
			result = errReset
			return true
		}
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		return err != nil || info.State == unix.BPF_TCP_CLOSE
	})
	return result
}

func (l *serverLeg) stopWaiting() { l.SetReadDeadline(time.Unix(1, 0)) }

// reset closes at once: with no lingering the kernel sends a RST.
func (l *serverLeg) reset() {
	l.SetLinger(0)
	l.Close()
}

func (l *serverLeg) close() { l.Close() }
