package main

/*
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "tailscale.h"

typedef void (*tailscale_wake_fn)(uintptr_t token, uint32_t ready);
static inline void tailscale_call_wake(tailscale_wake_fn wake, uintptr_t token, uint32_t ready) {
	wake(token, ready);
}

extern char **environ;

// After exec(2) the values are in the memory that /proc/PID/environ shows. A name may
// be there twice, which getenv(3) does not show.
static inline void tailscale_overwrite_variable(const char *name) {
	size_t length = strlen(name);
	for (char **entry = environ; entry && *entry; entry++)
		if (strncmp(*entry, name, length) == 0 && (*entry)[length] == '=')
			memset(*entry + length + 1, 0, strlen(*entry + length + 1));
}
*/
import "C"

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
	"unsafe"
)

// This file and export_conn.go are the Go half of the C interface and hold nothing else: each
// export finds the object of its handle, calls it and turns the outcome into
// a number. tailscale.c gives the exports their names in tailscale.h.

func main() {} // a c-archive needs one; it never runs

// nodes holds the nodes by handle; handles count up and are never reused.
var nodes struct {
	mu   sync.Mutex
	last C.int
	live map[C.int]*node
}

func nodeOf(sd C.int) *node {
	nodes.mu.Lock()
	defer nodes.mu.Unlock()
	return nodes.live[sd]
}

// guard turns a panic into TAILSCALE_PANIC: it must not reach C's frames.
func guard[T ~int32 | ~int64](result *T) {
	if p := recover(); p != nil {
		fmt.Fprintf(os.Stderr, "libtailscale: panic: %v\n%s", p, debug.Stack())
		*result = T(codePanic)
	}
}

func result(err error) C.int {
	if err == nil {
		return 0
	}
	var c code
	if errors.As(err, &c) {
		return C.int(c)
	}
	return C.int(codeError)
}

// text copies a C string, refusing NULL and what is not UTF-8.
func text(s *C.char) (string, bool) {
	if s == nil {
		return "", false
	}
	str := C.GoString(s)
	return str, utf8.ValidString(str)
}

// slice is C's memory as bytes, unless it is NULL or longer than memory can be.
func slice(buf unsafe.Pointer, buflen C.size_t) ([]byte, bool) {
	if buflen == 0 {
		return nil, true
	}
	if buf == nil || buflen > math.MaxInt {
		return nil, false
	}
	return unsafe.Slice((*byte)(buf), buflen), true
}

// milliseconds converts a time from C; a value too large for a Duration becomes its
// maximum.
func milliseconds(ms C.int64_t) time.Duration {
	return time.Duration(min(int64(ms), math.MaxInt64/int64(time.Millisecond))) * time.Millisecond
}

// fill writes s with a NUL, cut to the buffer; false if it had to be cut.
func fill(s string, buf *C.char, buflen C.size_t) bool {
	if buf == nil || buflen == 0 {
		return false
	}
	dst := unsafe.Slice((*byte)(unsafe.Pointer(buf)), buflen)
	n := copy(dst[:buflen-1], s)
	dst[n] = 0
	return n == len(s)
}

//export TsForgetEnvironment
func TsForgetEnvironment() {
	for _, name := range credentialVariables {
		overwriteVariable(name)
	}
	forgetEnvironment()
}

// overwriteVariable blanks a variable's value where it is.
func overwriteVariable(name string) {
	variable := C.CString(name)
	defer C.free(unsafe.Pointer(variable))
	C.tailscale_overwrite_variable(variable)
}

//export TsSetLogUpload
func TsSetLogUpload(on C.int) { setLogUpload(on != 0) }

//export TsSetMemory
func TsSetMemory(inFlight, heap C.int64_t) {
	if inFlight > 0 {
		flowBudget.setTotal(int64(inFlight))
	}
	if heap > 0 {
		debug.SetMemoryLimit(int64(heap))
	}
}

//export TsSetWake
func TsSetWake(f C.tailscale_wake_fn) {
	wake = func(token uintptr, ready uint32) {
		C.tailscale_call_wake(f, C.uintptr_t(token), C.uint32_t(ready))
	}
}

// linkedVersion is the version of the tailscale.com module, in C's memory for
// the life of the process.
var linkedVersion = sync.OnceValue(func() *C.char {
	version := "unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, dep := range info.Deps {
			if dep.Path == "tailscale.com" {
				version = strings.TrimPrefix(dep.Version, "v")
			}
		}
	}
	return C.CString(version)
})

//export TsVersion
func TsVersion() *C.char { return linkedVersion() }

//export TsNew
func TsNew() C.int {
	nodes.mu.Lock()
	defer nodes.mu.Unlock()
	if nodes.live == nil {
		nodes.live = make(map[C.int]*node)
	}
	nodes.last++
	nodes.live[nodes.last] = newNode()
	return nodes.last
}

// onNode runs an export on the node of a handle.
func onNode(sd C.int, call func(*node) error) (ret C.int) {
	defer guard(&ret)
	n := nodeOf(sd)
	if n == nil {
		return C.int(codeBadHandle)
	}
	return result(call(n))
}

var errNotText = errors.New("the value is NULL or not UTF-8")

// setText applies a string setting.
func setText(sd C.int, value *C.char, set func(*node, string)) C.int {
	return onNode(sd, func(n *node) error {
		s, ok := text(value)
		if !ok {
			return n.report(codeBadArgument, errNotText)
		}
		return n.configure(func() { set(n, s) })
	})
}

//export TsSetDir
func TsSetDir(sd C.int, dir *C.char) C.int {
	return setText(sd, dir, func(n *node, s string) { n.server.Dir = s })
}

//export TsSetHostname
func TsSetHostname(sd C.int, hostname *C.char) C.int {
	return setText(sd, hostname, func(n *node, s string) { n.server.Hostname = s })
}

//export TsSetControlURL
func TsSetControlURL(sd C.int, url *C.char) C.int {
	return setText(sd, url, func(n *node, s string) { n.server.ControlURL = s })
}

//export TsSetTags
func TsSetTags(sd C.int, tags *C.char) C.int {
	return setText(sd, tags, func(n *node, s string) {
		n.server.AdvertiseTags = strings.FieldsFunc(s, func(r rune) bool { return r == ',' })
	})
}

//export TsSetEphemeral
func TsSetEphemeral(sd C.int, ephemeral C.int) C.int {
	return onNode(sd, func(n *node) error {
		return n.configure(func() { n.server.Ephemeral = ephemeral != 0 })
	})
}

// setCredential applies a string of the credential.
func setCredential(sd C.int, value *C.char, set func(*credential, string)) C.int {
	return onNode(sd, func(n *node) error {
		s, ok := text(value)
		if !ok {
			return n.report(codeBadArgument, errNotText)
		}
		n.setCredential(func(c *credential) { set(c, s) })
		return nil
	})
}

//export TsSetAuthkey
func TsSetAuthkey(sd C.int, authkey *C.char) C.int {
	return setCredential(sd, authkey, func(c *credential, s string) { c.authKey = s })
}

//export TsSetClientID
func TsSetClientID(sd C.int, id *C.char) C.int {
	return setCredential(sd, id, func(c *credential, s string) { c.clientID = s })
}

//export TsSetClientSecret
func TsSetClientSecret(sd C.int, secret *C.char) C.int {
	return setCredential(sd, secret, func(c *credential, s string) { c.clientSecret = s })
}

//export TsSetIDToken
func TsSetIDToken(sd C.int, token *C.char) C.int {
	return setCredential(sd, token, func(c *credential, s string) { c.idToken = s })
}

//export TsSetPreauthorized
func TsSetPreauthorized(sd C.int, preauthorized C.int) C.int {
	return onNode(sd, func(n *node) error {
		n.setCredential(func(c *credential) { c.preauthorized = preauthorized != 0 })
		return nil
	})
}

//export TsSetInteractive
func TsSetInteractive(sd C.int, interactive C.int) C.int {
	return onNode(sd, func(n *node) error {
		n.interactive.Store(interactive != 0)
		return nil
	})
}

//export TsSetUpTimeout
func TsSetUpTimeout(sd C.int, timeoutMS C.int64_t) C.int {
	return onNode(sd, func(n *node) error {
		if timeoutMS < 0 {
			return n.report(codeBadArgument, errors.New("the time-out is negative"))
		}
		n.upTimeout.Store(int64(milliseconds(timeoutMS)))
		return nil
	})
}

// setDescriptor gives a descriptor to the part of the node that writes to it.
func setDescriptor(sd, fd C.int, taker func(*node) func(fd int)) (ret C.int) {
	defer guard(&ret)
	n := nodeOf(sd)
	if n == nil {
		closeRefused(int(fd))
		return C.int(codeBadHandle)
	}
	return result(n.takeDescriptor(int(fd), taker(n)))
}

//export TsSetLogFD
func TsSetLogFD(sd, fd C.int) C.int {
	return setDescriptor(sd, fd, func(n *node) func(int) { return n.logs.open })
}

//export TsSetEventFD
func TsSetEventFD(sd, fd C.int) C.int {
	return setDescriptor(sd, fd, func(n *node) func(int) { return n.openEvents })
}

//export TsStart
func TsStart(sd C.int) C.int {
	return onNode(sd, (*node).start)
}

//export TsUp
func TsUp(sd C.int) C.int {
	return onNode(sd, (*node).up)
}

//export TsClose
func TsClose(sd C.int) (ret C.int) {
	defer guard(&ret)
	nodes.mu.Lock()
	n := nodes.live[sd]
	delete(nodes.live, sd)
	nodes.mu.Unlock()
	if n == nil {
		return C.int(codeBadHandle)
	}
	return result(n.close())
}

//export TsGetIPs
func TsGetIPs(sd C.int, buf *C.char, buflen C.size_t) (ret C.int) {
	defer guard(&ret)
	n := nodeOf(sd)
	if n == nil {
		return C.EBADF
	}
	if !fill(strings.Join(n.ips(), ","), buf, buflen) {
		return C.ERANGE
	}
	return 0
}

//export TsStatus
func TsStatus(sd C.int, buf *C.char, buflen C.size_t) C.int {
	return writeJSON(sd, buf, buflen, (*node).statusLine)
}

//export TsFigures
func TsFigures(sd C.int, buf *C.char, buflen C.size_t) C.int {
	return writeJSON(sd, buf, buflen, func(n *node) ([]byte, error) { return json.Marshal(n.figures()) })
}

// writeJSON writes a report of a started node, for C.
func writeJSON(sd C.int, buf *C.char, buflen C.size_t, say func(*node) ([]byte, error)) (ret C.int) {
	defer guard(&ret)
	n := nodeOf(sd)
	if n == nil {
		return C.int(codeBadHandle)
	}
	if !n.isStarted() || !n.begin() {
		return C.int(codeNotRunning)
	}
	defer n.pending.Done()
	line, err := say(n)
	if err != nil {
		return result(n.report(codeError, err))
	}
	if !fill(string(line), buf, buflen) {
		return C.int(codeBadArgument)
	}
	return 0
}

//export TsErrmsg
func TsErrmsg(sd C.int, buf *C.char, buflen C.size_t) (ret C.int) {
	defer guard(&ret)
	n := nodeOf(sd)
	if n == nil {
		return C.EBADF
	}
	message := ""
	if last := n.lastError.Load(); last != nil {
		message = *last
	}
	if !fill(message, buf, buflen) {
		return C.ERANGE
	}
	return 0
}

//export TsPing
func TsPing(sd C.int, host *C.char, timeoutMS C.int64_t, buf *C.char, buflen C.size_t) (ret C.int) {
	defer guard(&ret)
	n := nodeOf(sd)
	if n == nil {
		return C.int(codeBadHandle)
	}
	name, ok := text(host)
	if !ok || timeoutMS <= 0 {
		return C.int(codeBadArgument)
	}
	if !n.begin() {
		return C.int(codeNotRunning)
	}
	defer n.pending.Done()
	report, failed := n.ping(name, milliseconds(timeoutMS))
	if failed != nil && !errors.Is(failed, codeTimedOut) {
		return result(failed)
	}
	line, err := json.Marshal(report)
	if err != nil {
		return C.int(codeError)
	}
	if !fill(string(line), buf, buflen) {
		return C.int(codeBadArgument)
	}
	return result(failed)
}

//export TsAbortPeer
func TsAbortPeer(sd C.int, ip *C.char) (ret C.int) {
	defer guard(&ret)
	n := nodeOf(sd)
	if n == nil {
		return C.int(codeBadHandle)
	}
	address, ok := text(ip)
	peer, err := netip.ParseAddr(address)
	if !ok || err != nil {
		return C.int(codeBadArgument)
	}
	if !n.isStarted() || !n.begin() {
		return C.int(codeNotRunning)
	}
	defer n.pending.Done()
	n.abortPeer(peer)
	return 0
}
