package main

/*
#include "tailscale.h"
*/
import "C"

import (
	"fmt"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// code is a tailscale_code of tailscale.h: the outcome of a call, for C. It is an error
// so that Go's side of the library can return it as one.
type code int32

// The constants take their numbers from the header, which is their only
// definition.
const (
	codeError              = code(C.TAILSCALE_ERROR)
	codeWouldBlock         = code(C.TAILSCALE_WOULD_BLOCK)
	codeBadHandle          = code(C.TAILSCALE_BAD_HANDLE)
	codeBadArgument        = code(C.TAILSCALE_BAD_ARGUMENT)
	codeBadState           = code(C.TAILSCALE_BAD_STATE)
	codePanic              = code(C.TAILSCALE_PANIC)
	codeNotRunning         = code(C.TAILSCALE_NOT_RUNNING)
	codeNoSuchPeer         = code(C.TAILSCALE_NO_SUCH_PEER)
	codeIsSelf             = code(C.TAILSCALE_IS_SELF)
	codeRefused            = code(C.TAILSCALE_REFUSED)
	codeTimedOut           = code(C.TAILSCALE_TIMED_OUT)
	codeReset              = code(C.TAILSCALE_RESET)
	codeClosed             = code(C.TAILSCALE_CLOSED)
	codeNoPorts            = code(C.TAILSCALE_NO_PORTS)
	codeUnreachable        = code(C.TAILSCALE_UNREACHABLE)
	codeDenied             = code(C.TAILSCALE_DENIED)
	codeShieldsUp          = code(C.TAILSCALE_SHIELDS_UP)
	codeNeedsLogin         = code(C.TAILSCALE_NEEDS_LOGIN)
	codeAuthRefused        = code(C.TAILSCALE_AUTH_REFUSED)
	codeNeedsApproval      = code(C.TAILSCALE_NEEDS_APPROVAL)
	codeControlUnreachable = code(C.TAILSCALE_CONTROL_UNREACHABLE)
	codeUpTimedOut         = code(C.TAILSCALE_UP_TIMED_OUT)
	codeCancelled          = code(C.TAILSCALE_CANCELLED)
	codeTagsRefused        = code(C.TAILSCALE_TAGS_REFUSED)
	codeNeedsLogUpload     = code(C.TAILSCALE_NEEDS_LOG_UPLOAD)
	codeClockWrong         = code(C.TAILSCALE_CLOCK_WRONG)
	codeBadStateFile       = code(C.TAILSCALE_BAD_STATE_FILE)
	codeBadCredential      = code(C.TAILSCALE_BAD_CREDENTIAL)
	codeUpgradeBlocked     = code(C.TAILSCALE_UPGRADE_BLOCKED)
	codeOtherControl       = code(C.TAILSCALE_OTHER_CONTROL)
	codeKeyExpired         = code(C.TAILSCALE_KEY_EXPIRED)
)

const (
	readable = uint32(C.TAILSCALE_READABLE)
	writable = uint32(C.TAILSCALE_WRITABLE)
)

func (c code) Error() string { return fmt.Sprintf("tailscale code %d", int32(c)) }

// codeOf maps an error of the network stack to ours.
func codeOf(err tcpip.Error) code {
	switch err.(type) {
	case *tcpip.ErrWouldBlock, *tcpip.ErrConnectStarted, *tcpip.ErrAlreadyConnecting:
		return codeWouldBlock
	case *tcpip.ErrConnectionRefused:
		return codeRefused
	case *tcpip.ErrTimeout:
		return codeTimedOut
	case *tcpip.ErrConnectionReset, *tcpip.ErrConnectionAborted, *tcpip.ErrAborted:
		return codeReset
	case *tcpip.ErrClosedForSend, *tcpip.ErrClosedForReceive:
		return codeClosed
	case *tcpip.ErrNoPortAvailable:
		return codeNoPorts
	case *tcpip.ErrHostUnreachable, *tcpip.ErrNetworkUnreachable, *tcpip.ErrHostDown:
		return codeUnreachable
	case *tcpip.ErrBadLocalAddress:
		// The node's own address is not on the stack: no network map yet.
		return codeNotRunning
	case *tcpip.ErrNotConnected, *tcpip.ErrInvalidEndpointState:
		return codeBadState
	default:
		return codeError
	}
}
