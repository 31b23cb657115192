package testnet

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
)

// errReset is a leg's error for a connection that the other side has reset.
var errReset = errors.New("connection reset")

// bufferPool lends buffers to the directions that move data at the moment; an
// idle connection holds none.
var bufferPool = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// leg is one of the two connections of a relay.
type leg interface {
	// copyTo writes to dst what comes in, until end of file (nil).
	copyTo(dst io.Writer) error
	io.Writer
	closeWrite() error
	// awaitReset is called after end of file. It returns errReset if the other
	// side resets the connection after all, nil if stopWaiting comes first or the
	// connection ends in order.
	awaitReset() error
	stopWaiting()
	// reset sends a RST and wakes copyTo, Write and awaitReset.
	reset()
	// close frees the connection. It is called once, when no other call is in
	// progress.
	close()
}

// relay copies both ways until both sides have ended in order, or one has reset
// its connection, in which case the other is reset too. It closes both.
func relay(a, b leg) {
	defer a.close()
	defer b.close()
	var ended atomic.Int32 // directions that have seen their end of file
	pump := func(src, dst leg) {
		err := src.copyTo(dst)
		if err == nil {
			err = dst.closeWrite()
		}
		if err == nil {
			if ended.Add(1) == 2 {
				// Nothing more is to come from either side.
				src.stopWaiting()
				dst.stopWaiting()
				return
			}
			err = src.awaitReset()
		}
		if err != nil {
			src.reset()
			dst.reset()
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() { pump(b, a) })
	pump(a, b)
	wg.Wait()
}
