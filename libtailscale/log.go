package main

import (
	"fmt"
	"strings"
	"sync"
	"syscall"
)

// logWriter turns the output of Go's own logger into log lines.
type logWriter struct{ *node }

func (w logWriter) Write(line []byte) (int, error) {
	w.log("%s", line)
	return len(line), nil
}

// logPipe writes log lines to a descriptor and drops them while it is full:
// Tailscale logs under its own locks, so a log line must never wait.
type logPipe struct {
	mu sync.Mutex
	fd int // -1 = none
}

// open takes fd over, which does not block, in place of an earlier one; -1 is none.
func (l *logPipe) open(fd int) {
	l.close()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fd = max(fd, -1)
}

func (l *logPipe) printf(format string, args ...any) {
	line := strings.TrimRight(fmt.Sprintf(format, args...), "\n") + "\n"
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fd >= 0 {
		syscall.Write(l.fd, []byte(line)) // a full or closed pipe drops it
	}
}

func (l *logPipe) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fd >= 0 {
		syscall.Close(l.fd)
		l.fd = -1
	}
}
