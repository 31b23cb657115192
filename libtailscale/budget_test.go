package main

import (
	"io"
	"net"
	"reflect"
	"slices"
	"testing"
	"time"
)

// shareOf is a direction with a floor of 100 bytes.
func shareOf(want, limit, held int64, stalled bool) *share {
	return &share{floor: 100, most: 10_000, want: want, limit: limit, held: held, stalled: stalled}
}

func limits(shares []*share) (all []int64) {
	for _, s := range shares {
		all = append(all, s.limit)
	}
	return all
}

func TestDivide(t *testing.T) {
	for name, c := range map[string]struct {
		shares []*share
		want   []int64 // limits
		held   int64
	}{
		"nobody": {nil, nil, 0},
		"enough for all": {
			[]*share{shareOf(300, 100, 100, false), shareOf(100, 100, 100, false)}, []int64{300, 100}, 200},
		"evenly when it is not": {
			[]*share{shareOf(2000, 100, 100, false), shareOf(2000, 100, 100, false)}, []int64{600, 600}, 1000},
		"who wants less leaves it to the others": {
			[]*share{shareOf(2000, 100, 100, false), shareOf(200, 100, 100, false), shareOf(2000, 100, 100, false)},
			[]int64{550, 200, 550}, 1000},
		"who stands still keeps what it holds and gets no more": {
			[]*share{shareOf(5000, 700, 700, true), shareOf(2000, 100, 100, false)}, []int64{700, 500}, 1000},
		"many who stand still leave the floor": {
			[]*share{shareOf(5000, 700, 700, true), shareOf(5000, 600, 600, true), shareOf(2000, 100, 100, false)},
			[]int64{700, 600, 100}, 1100},
		"a newcomer gets nothing that another still holds": {
			[]*share{shareOf(1100, 1100, 1100, false), shareOf(1100, 100, 100, false)}, []int64{600, 100}, 1000},
		"and its part when it is free": {
			[]*share{shareOf(1100, 600, 600, false), shareOf(1100, 100, 100, false)}, []int64{600, 600}, 1000},
		"what one does not want any more is lowered": {
			[]*share{shareOf(100, 900, 900, false)}, []int64{100}, 800},
	} {
		held := divide(1000, c.shares)
		got := limits(c.shares)
		if held != c.held || len(got) != len(c.want) {
			t.Errorf("%s: %v, %d held; want %v, %d", name, got, held, c.want, c.held)
			continue
		}
		for i := range got {
			if got[i] != c.want[i] {
				t.Errorf("%s: %v, %d held; want %v, %d", name, got, held, c.want, c.held)
				break
			}
		}
	}
}

// Whatever the shares want and hold, repeated divisions stay within the budget, and
// those that move end with even parts.
func TestDivideConverges(t *testing.T) {
	const total = 10_000
	var shares []*share
	for i := range int64(30) {
		shares = append(shares, shareOf(200+400*i, 100, 100, false))
	}
	for range 5 {
		if held := divide(total, shares); held > total {
			t.Fatalf("%d of %d are held", held, total)
		}
		for _, s := range shares {
			s.held = s.limit // all have moved
		}
	}
	var sum int64
	for _, s := range shares {
		sum += s.limit - s.floor
	}
	if sum > total || sum < total-30 {
		t.Errorf("%d of %d are given out", sum, total)
	}
}

func TestADirectionThatIsQuietGivesBack(t *testing.T) {
	began := time.Now()
	d := &direction{share: share{floor: 100, most: 10_000, want: 5000, limit: 900, held: 1200}, lastMoved: began}
	d.note(began.Add(quietAfter/2), 0, 0)
	if d.limit != 900 || d.stalled {
		t.Errorf("after a moment: %+v", d.share)
	}
	d.note(began.Add(quietAfter), 0, 1200)
	if d.limit != 900 || d.held != 1200 || !d.stalled {
		t.Errorf("with bytes that do not move: %+v", d.share)
	}
	d.note(began.Add(2*quietAfter), 10, 1000)
	if d.held != 1000 || d.stalled {
		t.Errorf("moving again, with much left: %+v", d.share)
	}
	d.note(began.Add(2*quietAfter), 10, 500)
	if d.held != 900 {
		t.Errorf("and with less than the limit: %+v", d.share)
	}
	d.note(began.Add(3*quietAfter), 0, 0)
	if !d.isAtRest() || d.limit != d.floor {
		t.Errorf("quiet: %+v", d.share)
	}
}

// A division between joining and the first byte must not leave the connection with a
// flow that is no longer divided.
func TestJoinDuringADivision(t *testing.T) {
	e := startEdge(t, echo)
	b, err := dial(t, e.node, "mailbox", 25)
	check(t, err)
	defer b.close()
	c := conns.get(b.handle)
	isInBothOrNone := func(f *flow) bool {
		flowBudget.mu.Lock()
		defer flowBudget.mu.Unlock()
		return slices.Contains(flowBudget.flows, f) == (c.flow.Load() == f)
	}
	for range 100 {
		f := flowBudget.join(c)
		if !isInBothOrNone(f) {
			t.Fatal("it has joined and does not know, or the other way round")
		}
		flowBudget.balance(time.Now(), balanceInterval)
		if !isInBothOrNone(f) {
			t.Fatal("it is out and does not know, or the other way round")
		}
	}
}

// A mailbox that takes nothing gets no more than the budget and the floors, and gives
// it back when the connections are gone.
func TestStalledConnectionsStayWithinTheBudget(t *testing.T) {
	const total = 1 << 20
	setBudget(t, total)
	stop := make(chan struct{})
	e := startEdge(t, func(c *net.TCPConn) { <-stop; io.Copy(io.Discard, c); c.Close() })
	var open []*blocking
	for range 8 {
		b, err := dial(t, e.node, "mailbox", 25)
		check(t, err)
		open = append(open, b)
	}
	// Each write takes what fits; together they are several times what all may hold.
	eventually(t, "they all stand still", func() bool {
		for _, b := range open {
			conns.get(b.handle).write(make([]byte, 64<<10))
		}
		flowBudget.mu.Lock()
		defer flowBudget.mu.Unlock()
		isMoving := func(f *flow) bool { return !f.send.stalled }
		return len(flowBudget.flows) == len(open) && !slices.ContainsFunc(flowBudget.flows, isMoving)
	})
	flowBudget.mu.Lock()
	held := flowBudget.held.Load()
	for _, f := range flowBudget.flows {
		if size := f.ep.SocketOptions().GetSendBufferSize(); size != f.send.limit {
			t.Errorf("a send buffer of %d, where %d is granted", size, f.send.limit)
		}
	}
	flowBudget.mu.Unlock()
	if held > total {
		t.Errorf("%d bytes are held of %d", held, total)
	}
	close(stop)
	for _, b := range open {
		b.close()
	}
	eventually(t, "nobody holds anything", func() bool {
		flowBudget.mu.Lock()
		defer flowBudget.mu.Unlock()
		return len(flowBudget.flows) == 0 && !flowBudget.running
	})
}

// A connection that is busy and then idle is out of the budget again, and may come back.
func TestABusyConnectionLeavesTheBudgetWhenItIsIdle(t *testing.T) {
	e := startEdge(t, echo)
	b, err := dial(t, e.node, "mailbox", 25)
	check(t, err)
	defer b.close()
	c := conns.get(b.handle)
	buf := make([]byte, 64<<10)
	for range 2 {
		const bytes = 4 << 20
		go io.Copy(writerOf(b), io.LimitReader(zeros{}, bytes))
		joined := false
		for left := bytes; left > 0; {
			n, err := b.Read(buf)
			check(t, err)
			left -= n
			joined = joined || c.flow.Load() != nil
		}
		if !joined {
			t.Fatal("it has asked for nothing")
		}
		eventually(t, "it has left the budget", func() bool { return c.flow.Load() == nil })
		if size := c.ep.SocketOptions().GetReceiveBufferSize(); size != 2*c.floor {
			t.Errorf("its receive buffer has %d bytes", size)
		}
	}
}

// Single bytes cost hundreds each, so only few may wait. A connection that then sends
// much at once gets its whole floor again, and nothing is lost.
func TestManySmallWritesWaitForThePeer(t *testing.T) {
	received := make(chan []byte, 1)
	e := startEdge(t, func(c *net.TCPConn) {
		all, _ := io.ReadAll(c)
		received <- all
		c.Close()
	})
	b, err := dial(t, e.node, "mailbox", 25)
	check(t, err)
	defer b.close()
	check(t, e.net.IsolateNode("mailbox"))
	c := conns.get(b.handle)
	small := 0
	for ; small < mostFloor; small++ {
		if _, err := c.write([]byte{1}); err != nil {
			wantCode(t, err, codeWouldBlock)
			break
		}
	}
	if small > 300 {
		t.Errorf("%d writes of a byte wait", small)
	}
	const large = 256 << 10
	check(t, e.net.RejoinNode("mailbox"))
	_, err = b.Write(make([]byte, large))
	check(t, err)
	b.shutdown()
	if got := len(<-received); got != small+large {
		t.Errorf("%d bytes arrived of %d", got, small+large)
	}
}

func TestWriteSizes(t *testing.T) {
	for name, c := range map[string]struct {
		bytes    []int
		areSmall bool
	}{
		"commands":                     {slices.Repeat([]int{20}, manySmall-1), false},
		"a byte at a time":             {slices.Repeat([]int{1}, manySmall), true},
		"a message ends it":            {append(slices.Repeat([]int{1}, 1000), (manySmall+1)*smallWrite), false},
		"a line does not":              {append(slices.Repeat([]int{1}, 1000), 80), true},
		"a segment for each small one": {slices.Repeat([]int{1, 2 * smallWrite}, 1000), false},
		"too few of them":              {slices.Repeat([]int{1, 1, 1, 2 * smallWrite}, 1000), true},
	} {
		var sizes writeSizes
		for _, bytes := range c.bytes {
			sizes.note(bytes)
		}
		if sizes.areSmall != c.areSmall {
			t.Errorf("%s: small %v", name, sizes.areSmall)
		}
	}
}

// A receiver that takes little from a queue that was filled under a higher limit still
// holds the queue.
func TestWhoTricklesHoldsWhatIsLeft(t *testing.T) {
	d := &direction{share: newShare(100, 10_000)}
	d.want, d.limit, d.held = 8000, 8000, 8000
	d.limit = 1000 // others came
	now := time.Now()
	for unread := int64(3900); unread > 0; unread -= 100 {
		now = now.Add(quietAfter * 9 / 10)
		d.note(now, 100, 2*unread)
		if d.held < 2*unread || d.held > max(2*unread, d.limit) {
			t.Fatalf("%d bytes hold %d", unread, d.held)
		}
	}
}

// Bytes taken before a limit was lowered do not show that they fit now.
func TestALoweredLimitWaitsForAPeriod(t *testing.T) {
	e := startEdge(t, echo)
	b, err := dial(t, e.node, "mailbox", 25)
	check(t, err)
	defer b.close()
	f := flowBudget.join(conns.get(b.handle))
	flowBudget.mu.Lock()
	defer flowBudget.mu.Unlock()
	now := time.Now()
	hold := func(limit int64) int64 {
		f.send.limit = limit
		f.apply()
		f.send.moved.Store(1000)
		now = now.Add(balanceInterval)
		f.measure(now, balanceInterval)
		return f.send.held
	}
	f.send.held = hold(4 << 20)
	if held := hold(1 << 20); held != 4<<20 {
		t.Errorf("%d are held after the limit was lowered", held)
	}
	if held := hold(1 << 20); held != 1<<20 {
		t.Errorf("%d are held a period later", held)
	}
}

// The handshake settles the window's scale, which must fit the most that a connection
// may receive. If the buffer were lowered before, the scale would fit the floor only.
func TestTheHandshakeSettlesTheLargestWindow(t *testing.T) {
	setBudget(t, 1) // the least floor
	e := startEdge(t, echo)
	b, err := dial(t, e.node, "mailbox", 25)
	check(t, err)
	defer b.close()
	ep := reflect.ValueOf(conns.get(b.handle).ep).Elem()
	if scale := ep.FieldByName("rcv").Elem().FieldByName("RcvWndScale").Uint(); scale < 7 {
		t.Errorf("a scale of %d: windows end at %d bytes", scale, 0xffff<<scale)
	}
	if size := conns.get(b.handle).ep.SocketOptions().GetReceiveBufferSize(); size != 2*leastFloor {
		t.Errorf("a receive buffer of %d", size)
	}
}

// The more connections there are, the lower each floor is, but never zero.
func TestFloorsShareTheirPart(t *testing.T) {
	b := budget{total: 16 << 20}
	if floor := b.floor(); floor != mostFloor {
		t.Errorf("the floor of few is %d", floor)
	}
	b.total = 1
	if floor := b.floor(); floor != leastFloor {
		t.Errorf("the floor of many is %d", floor)
	}
	if size := narrowSize(leastFloor); size != leastNarrow {
		t.Errorf("small writes are %d at most", size)
	}
}

func setBudget(t *testing.T, total int64) {
	before := flowBudget.max()
	flowBudget.setTotal(total)
	t.Cleanup(func() { flowBudget.setTotal(before) })
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func writerOf(b *blocking) io.Writer { return struct{ io.Writer }{b} }
