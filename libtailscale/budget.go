package main

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// What one direction of a connection may hold. Each has its floor; more comes from the
// budget. A receive buffer is twice as large: half of it is window, the other half is
// for the overhead of segments.
const (
	mostFloor  = 64 << 10
	leastFloor = 4 << 10
	// floorParts times the budget, divided by the number of open connections, is the floor
	// of a new one. It keeps this floor when others come, so n connections have at most
	// ln(n) times as much, and each at least the least floor.
	floorParts = 4
	// The most that one connection can use: Tailscale's own maxima
	// (wgengine/netstack/netstack_tcpbuf_default.go).
	sendMost = 6 << 20
	recvMost = 8 << 20
)

const (
	// While writes are small, the send buffer is the floor divided by narrowPart, whatever
	// the limit. A segment costs some 700 bytes beside those that it carries, and the
	// stack does not join waiting segments: with one byte in each, a floor of 64 KiB would
	// cost 45 MB.
	narrowPart  = 256
	leastNarrow = leastFloor / narrowPart
	// smallWrite is a write that costs more than twice its bytes.
	smallWrite = 512
	// manySmall is how many more small writes than large ones make a send buffer narrow.
	// While a write is blocked, the client's next bytes collect into one larger write.
	manySmall = 32
)

const (
	// balanceInterval is how often shares change: often enough to follow a slow start,
	// which doubles within a round trip.
	balanceInterval = 20 * time.Millisecond
	// balancePauseMost bounds the pause that follows a division which took long.
	balancePauseMost = time.Second
	// quietAfter is how long a direction may move nothing before it counts as stalled. A
	// stalled direction keeps what it holds and gets no more.
	quietAfter = time.Second
	// segmentBytes is what a segment carries: an MTU of 1,280 without IPv6 and TCP.
	segmentBytes = 1220
	// forgetting is how fast a direction's wish declines: by half within a second.
	forgetting = 64
	// defaultBudget is used if none is set: with a round trip of 100 ms it allows 1.3 Gb/s
	// to the peers, and half of that from them.
	defaultBudget = 16 << 20
)

// flowBudget is the process's one budget for bytes in flight.
var flowBudget = budget{total: defaultBudget}

// budget is what all connections together may hold beyond their floors, in both
// directions: sent and not acknowledged, received and not read. The stack alone would
// let each hold 14 MiB, and would let buffers grow as long as a peer is slow.
//
// Only connections that ask for more than the floor are in it (join). While there are
// any, a goroutine divides the budget among them: stalled ones keep what they hold, the
// others share the rest evenly.
type budget struct {
	mu      sync.Mutex // comes before any lock of the stack
	total   int64      // bytes
	flows   []*flow
	running bool
	held    atomic.Int64 // held beyond the floors, as of the last division
}

// flow is a connection that has asked for more than the floor.
type flow struct {
	owner      *conn // nil once it is closed: what is left is on its way to the peer
	ep         tcpip.Endpoint
	send, recv direction
}

// direction is one half of a flow. Its fields belong to the budget, except the first
// two, which reads and writes set.
type direction struct {
	moved   atomic.Int64 // bytes since the last division
	blocked atomic.Bool  // the last write was not taken whole

	share
	narrow    bool  // the size for small writes replaces the limit
	applied   int64 // the size that the stack has
	lowered   bool  // since the last division: what moved may have been taken before
	lastMoved time.Time
}

// share is what a direction has, wants and gets, in bytes.
type share struct {
	floor, most int64
	want        int64 // what it could use
	limit       int64 // what it may hold
	held        int64 // what it may still hold from an earlier, higher limit
	stalled     bool  // holds bytes that do not move
}

func (b *budget) setTotal(bytes int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.total = bytes
}

// max is what may be held beyond the floors.
func (b *budget) max() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.total
}

// floor is the send floor of a connection that is made now: the more connections there
// are, the lower it is.
func (b *budget) floor() int64 {
	open := int64(max(conns.count(), 1))
	return max(leastFloor, min(b.max()*floorParts/open/3, mostFloor)) // and twice that to receive
}

// join brings a connection into the budget, with the floor at first. The connection and
// the budget know of each other before the next division, which may end that for both.
func (b *budget) join(c *conn) *flow {
	f := &flow{owner: c, ep: c.ep}
	f.send.share = newShare(c.floor, sendMost)
	f.recv.share = newShare(2*c.floor, recvMost)
	f.send.narrow = c.sizes.areSmall
	f.send.applied, f.recv.applied = f.send.size(), f.recv.size()
	f.send.lastMoved = time.Now()
	f.recv.lastMoved = f.send.lastMoved
	b.mu.Lock()
	defer b.mu.Unlock()
	b.flows = append(b.flows, f)
	c.flow.Store(f)
	if !b.running {
		b.running = true
		go b.run()
	}
	return f
}

// leave is called before a connection is closed. What the connection holds counts until
// the stack has freed it.
func (b *budget) leave(f *flow) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f.owner = nil
}

// run divides the budget as long as any flow is in it. The more flows there are, the
// less often it divides, so it uses at most a fiftieth of a processor.
func (b *budget) run() {
	last := time.Now()
	pause := balanceInterval
	for {
		time.Sleep(pause)
		now := time.Now()
		if !b.balance(now, now.Sub(last)) {
			return
		}
		last, pause = now, min(max(balanceInterval, 50*time.Since(now)), balancePauseMost)
	}
}

// balance is one division; false when no flow is left.
func (b *budget) balance(now time.Time, elapsed time.Duration) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.flows = slices.DeleteFunc(b.flows, (*flow).isOver)
	shares := make([]*share, 0, 2*len(b.flows))
	for _, f := range b.flows {
		f.measure(now, elapsed)
		shares = append(shares, &f.send.share, &f.recv.share)
	}
	b.held.Store(divide(b.total, shares))
	for _, f := range b.flows {
		f.apply()
	}
	b.running = len(b.flows) > 0
	return b.running
}

// apply gives the stack the limits that have changed.
func (f *flow) apply() {
	options := f.ep.SocketOptions()
	if size, changed := f.send.resize(); changed {
		options.SetSendBufferSize(size, true) // wakes a waiting writer
	}
	if size, changed := f.recv.resize(); changed {
		options.SetReceiveBufferSize(size, false) // the next read announces it
	}
}

// size is the size of the stack's buffer.
func (d *direction) size() int64 {
	if d.narrow {
		return narrowSize(d.floor)
	}
	return d.limit
}

// resize returns the wanted size of the stack's buffer, and whether it differs from the
// present one.
func (d *direction) resize() (size int64, changed bool) {
	before := d.applied
	d.applied = d.size()
	d.lowered = d.lowered || d.applied < before
	return d.applied, d.applied != before
}

// isOver is whether a flow needs no more than the floor, and takes it out if so.
func (f *flow) isOver() bool {
	if f.owner == nil {
		switch tcp.EndpointState(f.ep.State()) {
		case tcp.StateClose, tcp.StateError, tcp.StateTimeWait, tcp.StateFinWait2:
			return true // nothing is left to send, or to be acknowledged
		}
		return false
	}
	over := f.send.isAtRest() && f.recv.isAtRest()
	if over {
		f.owner.flow.Store(nil)
	}
	return over
}

// isAtRest is whether a direction holds nothing beyond its floor.
func (d *direction) isAtRest() bool {
	return d.held == d.floor && d.want == d.floor && d.moved.Load() == 0 && !d.blocked.Load()
}

// measure notes what a flow did since the last division, and what it could use.
func (f *flow) measure(now time.Time, elapsed time.Duration) {
	if f.owner == nil {
		f.send.stalled = true // it gets no more, and how much was sent is not known any more
		f.recv.note(now, 0, 0)
		return
	}
	sent, blocked := f.send.moved.Swap(0), f.send.blocked.Load()
	received := f.recv.moved.Swap(0)
	if sent+received > 0 {
		var info tcpip.TCPInfoOption
		f.ep.GetSockOpt(&info) // cannot fail on TCP
		f.send.forget(sent)
		f.recv.forget(received)
		if blocked {
			// As the stack itself does: the bytes in flight, and as many to follow.
			f.send.ask(2 * int64(info.SndCwnd) * segmentBytes)
		}
		// The window is what arrives within a round trip, doubled for growth, and doubled
		// again since half of a buffer is window.
		f.recv.ask(4 * int64(float64(received)*float64(info.RTT)/float64(elapsed)))
	}
	// The stack does not report how much is unsent. The bytes that it took under this
	// limit are an upper bound.
	var unsent int64
	if f.send.lowered || sent == 0 && blocked {
		unsent = f.send.held
	}
	f.send.lowered = false
	f.send.note(now, sent, unsent)
	unread, _ := f.ep.GetSockOptInt(tcpip.ReceiveQueueSizeOption) // cannot fail on TCP
	f.recv.note(now, received, 2*int64(unread))
}

// forget lowers the wish of a direction that moves, so that it has to ask again.
func (d *direction) forget(moved int64) {
	if moved > 0 {
		d.want -= (d.want - d.floor) / forgetting
	}
}

func newShare(floor, most int64) share {
	return share{floor: floor, most: most, want: floor, limit: floor, held: floor}
}

// ask raises the wish of a direction.
func (s *share) ask(bytes int64) { s.want = max(s.want, min(bytes, s.most)) }

// note takes the number of bytes that have moved, and an upper bound of the memory of
// those that wait.
func (d *direction) note(now time.Time, moved, waiting int64) {
	switch {
	case moved > 0:
		d.lastMoved, d.stalled = now, false
		d.held = max(d.limit, min(d.held, waiting))
	case now.Sub(d.lastMoved) < quietAfter:
	case waiting > 0:
		d.stalled = true
	default:
		d.stalled = false
		d.want, d.limit, d.held = d.floor, d.floor, d.floor
	}
}

// divide sets the limits of shares: stalled ones keep theirs, the others share the rest
// of total evenly, none getting more than it wants. Nothing is given away that another
// share still holds. Returns what all hold beyond their floors.
func divide(total int64, shares []*share) (held int64) {
	moving := make([]*share, 0, len(shares))
	left := total
	for _, s := range shares {
		if s.stalled {
			left -= s.held - s.floor
		} else {
			moving = append(moving, s)
		}
	}
	slices.SortFunc(moving, func(a, b *share) int { return cmp.Compare(a.want-a.floor, b.want-b.floor) })
	due := make([]int64, len(moving))
	for i, s := range moving {
		// A share that wants less than an even part leaves the rest to the next ones.
		extra := min(s.want-s.floor, max(left, 0)/int64(len(moving)-i))
		left -= extra
		due[i] = s.floor + extra
		s.limit = min(s.limit, due[i])
	}
	free := total
	for _, s := range shares {
		free -= max(s.limit, s.held) - s.floor
	}
	for i, s := range moving {
		more := min(due[i]-max(s.limit, s.held), free)
		if more > 0 {
			s.limit = max(s.limit, s.held) + more
			free -= more
		}
		s.held = max(s.limit, s.held)
	}
	return total - free
}

// writeSizes finds connections with many small writes, which cost more than their
// bytes.
type writeSizes struct {
	small    int // small writes minus large writes, 0 to manySmall
	areSmall bool
}

// note takes the size of a write; changed is whether areSmall has changed. A write
// counts as one large write for each smallWrite bytes in it.
func (s *writeSizes) note(bytes int) (changed bool) {
	s.small = max(0, min(s.small+1-bytes/smallWrite, manySmall))
	switch s.small {
	case 0:
		changed, s.areSmall = s.areSmall, false
	case manySmall:
		changed, s.areSmall = !s.areSmall, true
	}
	return changed
}

// narrow lowers the send buffer to narrowSize, or ends that.
func (c *conn) narrow(on bool) {
	f := c.flow.Load()
	if f == nil {
		size := c.floor
		if on {
			size = narrowSize(c.floor)
		}
		c.ep.SocketOptions().SetSendBufferSize(size, true)
		return
	}
	flowBudget.mu.Lock()
	defer flowBudget.mu.Unlock()
	f.send.narrow = on
	f.apply()
}

// narrowSize is the size of a send buffer while writes are small.
func narrowSize(floor int64) int64 { return max(leastNarrow, floor/narrowPart) }
