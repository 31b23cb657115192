package main

// #include "tailscale.h"
import "C"

import "unsafe"

// The exports of connections and listeners; see export.go.

//export TsConnOpen
func TsConnOpen(sd C.int, host *C.char, port C.uint16_t, token C.uintptr_t, out *C.uint64_t) (ret C.int) {
	defer guard(&ret)
	n := nodeOf(sd)
	if n == nil {
		return C.int(codeBadHandle)
	}
	name, ok := text(host)
	if !ok || out == nil {
		return C.int(codeBadArgument)
	}
	if !n.begin() {
		return C.int(codeNotRunning)
	}
	defer n.pending.Done()
	c, err := n.open(name, uint16(port), uintptr(token))
	if err != nil {
		return result(err)
	}
	*out = C.uint64_t(conns.add(c))
	return 0
}

//export TsListen
func TsListen(sd C.int, port C.uint16_t, backlog C.int, token C.uintptr_t, out *C.uint64_t) (ret C.int) {
	defer guard(&ret)
	n := nodeOf(sd)
	if n == nil {
		return C.int(codeBadHandle)
	}
	if port == 0 || backlog < 1 || out == nil {
		return C.int(codeBadArgument)
	}
	if !n.isStarted() || !n.begin() {
		return C.int(codeNotRunning)
	}
	defer n.pending.Done()
	l, err := n.listen(uint16(port), int(backlog), uintptr(token))
	if err != nil {
		return result(err)
	}
	*out = C.uint64_t(listeners.add(l))
	return 0
}

//export TsAccept
func TsAccept(h C.uint64_t, token C.uintptr_t, out *C.uint64_t) (ret C.int) {
	defer guard(&ret)
	l := listeners.get(uint64(h))
	if l == nil {
		return C.int(codeBadHandle)
	}
	if out == nil {
		return C.int(codeBadArgument)
	}
	c, err := l.accept(uintptr(token))
	if err != nil {
		return result(err)
	}
	*out = C.uint64_t(conns.add(c))
	return 0
}

//export TsListenerClose
func TsListenerClose(h C.uint64_t) (ret C.int) {
	defer guard(&ret)
	l := listeners.remove(uint64(h))
	if l == nil {
		return C.int(codeBadHandle)
	}
	l.end()
	return 0
}

//export TsConnState
func TsConnState(h C.uint64_t) (ret C.int) {
	defer guard(&ret)
	c := conns.get(uint64(h))
	if c == nil {
		return C.int(codeBadHandle)
	}
	return result(c.state())
}

// transfer is a read or a write.
func transfer(h C.uint64_t, buf unsafe.Pointer, buflen C.size_t, move func(*conn, []byte) (int, error)) (ret C.int64_t) {
	defer guard(&ret)
	c := conns.get(uint64(h))
	if c == nil {
		return C.int64_t(codeBadHandle)
	}
	p, ok := slice(buf, buflen)
	if !ok {
		return C.int64_t(codeBadArgument)
	}
	n, err := move(c, p)
	if err != nil {
		return C.int64_t(result(err))
	}
	return C.int64_t(n)
}

//export TsConnRead
func TsConnRead(h C.uint64_t, buf unsafe.Pointer, buflen C.size_t) C.int64_t {
	return transfer(h, buf, buflen, (*conn).read)
}

//export TsConnWrite
func TsConnWrite(h C.uint64_t, buf unsafe.Pointer, buflen C.size_t) C.int64_t {
	return transfer(h, buf, buflen, (*conn).write)
}

//export TsConnShutdown
func TsConnShutdown(h C.uint64_t) (ret C.int) {
	defer guard(&ret)
	c := conns.get(uint64(h))
	if c == nil {
		return C.int(codeBadHandle)
	}
	return result(c.shutdown())
}

//export TsConnAbort
func TsConnAbort(h C.uint64_t) (ret C.int) {
	defer guard(&ret)
	c := conns.get(uint64(h))
	if c == nil {
		return C.int(codeBadHandle)
	}
	c.abort()
	return 0
}

//export TsConnClose
func TsConnClose(h C.uint64_t) (ret C.int) {
	defer guard(&ret)
	c := conns.remove(uint64(h))
	if c == nil {
		return C.int(codeBadHandle)
	}
	c.close()
	return 0
}

//export TsConnCount
func TsConnCount() C.int64_t { return C.int64_t(conns.count()) }
