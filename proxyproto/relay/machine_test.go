package relay

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"nlb/proxyproto"
)

// A story is one connection in a random world, and what it must come to.
type story struct {
	client *fakeSocket
	peer   netip.AddrPort
	target *fakeSocket // the last that was dialed
	asked  []byte      // what the client's script was
	told   []byte
	broken bool // something happened that may end it
}

// TestWorlds runs many connections through a machine in random order, with
// short reads and writes, EAGAIN at any call, failing dials, resets, lacking
// pipes and urgent bytes. Whatever happens, bytes arrive in order behind exactly
// one header, complete unless an end was reset, and each descriptor is closed
// once.
func TestWorlds(t *testing.T) {
	for seed := range uint64(300) {
		if world(t, seed); t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

func FuzzWorlds(f *testing.F) {
	f.Add(uint64(0))
	f.Fuzz(func(t *testing.T, seed uint64) { world(t, seed) })
}

func world(t testing.TB, seed uint64) {
	k := newFakeKernel(t, seed)
	k.noPipes = k.sometimes(4)
	rough := !k.sometimes(3) // whether anything may break
	to := destinations(port(target4, 1), port(target4, 2), port(target4, 3), port(target4, 4))
	m, s, left := newMachine(t, k, tableOf(to, vip4))

	var present *story // whose dial it is
	stories := make([]*story, 1+k.random.IntN(5))
	length := func() int { return k.random.IntN([]int{1, 100, 10 << 10, 1 << 20}[k.random.IntN(4)]) }
	byToken := make(map[int32]*story)
	k.dialing = func(netip.AddrPort, netip.Addr) (*fakeSocket, unix.Errno) {
		if rough && k.sometimes(20) {
			present.broken = true
			return nil, []unix.Errno{unix.EMFILE, unix.EADDRNOTAVAIL, unix.ENETUNREACH}[k.random.IntN(3)]
		}
		present.target = &fakeSocket{connecting: true, script: present.told, hangUp: true, urgent: k.sometimes(10), room: k.random.IntN(40)}
		if rough && k.sometimes(5) {
			present.broken = true
			present.target.connecting, present.target.failure = false, unix.ECONNREFUSED
		}
		return present.target, 0
	}
	for i := range stories {
		st := &story{peer: port(client4, uint16(1000+i)), asked: pattern(fmt.Sprint("client ", i), length()), told: pattern(fmt.Sprint("target ", i), length())}
		stories[i] = st
		st.client = k.add(&fakeSocket{script: st.asked, hangUp: true, urgent: k.sometimes(10), room: k.random.IntN(100)})
		present = st
		m.start(st.client.fd, st.peer, s)
		byToken[st.client.fd] = st
	}
	find := func(c *conn) *story { return byToken[c.client.fd] }

	for step := int64(0); *left < len(stories); step++ {
		if step > 200_000 {
			t.Fatalf("%d connections have not ended", len(stories)-*left)
		}
		for _, sock := range k.shuffled() {
			if k.sometimes(2) {
				k.act(sock)
			}
			if rough && k.sometimes(400) && !sock.connecting && !sock.closed {
				sock.failure, sock.posted = unix.ECONNRESET, true
				breakStory(stories, sock)
			}
		}
		k.deliver(m)
		// One at a time, so that a dial is known to be whose it is.
		queue := slices.Clone(m.queue)
		m.queue = m.queue[:0]
		for _, c := range queue {
			present = find(c)
			c.queued = false
			m.step(c)
		}
		m.turn(step * 1_000)
	}
	for i, st := range stories {
		checkStory(t, i, st)
	}
	m.turn(second)
	k.wantNoneOpen(m)
}

func breakStory(stories []*story, s *fakeSocket) {
	for _, st := range stories {
		if st.client == s || st.target == s {
			st.broken = true
		}
	}
}

func checkStory(t testing.TB, i int, st *story) {
	t.Helper()
	header := proxyproto.AppendHeader(nil, st.peer, vip4, proxyproto.Options{})
	want := append(header, st.asked...)
	var sent []byte
	if st.target != nil {
		sent = st.target.got
	}
	if !bytes.HasPrefix(want, sent) || !bytes.HasPrefix(st.told, st.client.got) {
		t.Errorf("connection %d: bytes are wrong or in the wrong order", i)
	}
	if st.client.gotRST && st.target != nil && !st.target.gotRST && st.target.failure == 0 {
		t.Errorf("connection %d: the reset was not passed on to the target", i)
	}
	if st.broken {
		return
	}
	if len(sent) != len(want) || len(st.client.got) != len(st.told) {
		t.Errorf("connection %d: %d of %d and %d of %d bytes arrived", i, len(sent), len(want), len(st.client.got), len(st.told))
	}
	if !st.target.prompt {
		t.Errorf("connection %d: the target's answers are acknowledged late", i)
	}
	if st.client.gotRST || st.target.gotRST || !st.client.gotFIN || !st.target.gotFIN {
		t.Errorf("connection %d did not end with two FINs: %+v", i, st)
	}
}

// --- one step at a time ----------------------------------------------------------

// A bench has one connection and its two ends.
type bench struct {
	k              *fakeKernel
	m              *machine
	s              *service
	left           *int
	client, target *fakeSocket
	dials          []string
}

// newBench dials targets that all do what dial says.
func newBench(t *testing.T, targets int, dial func(n int) (*fakeSocket, unix.Errno)) *bench {
	k := newFakeKernel(t, 0)
	k.random = rand.New(never{})
	var at []netip.AddrPort
	for i := range targets {
		at = append(at, port(target4, uint16(i+1)))
	}
	b := &bench{k: k}
	b.m, b.s, b.left = newMachine(t, k, tableOf(destinations(at...), vip4))
	k.dialing = func(to netip.AddrPort, source netip.Addr) (*fakeSocket, unix.Errno) {
		b.dials = append(b.dials, to.String())
		s, err := dial(len(b.dials))
		b.target = s
		return s, err
	}
	b.client = k.add(&fakeSocket{room: 1 << 30})
	b.m.start(b.client.fd, port(client4, 40000), b.s)
	if targets > 0 {
		b.m.note(b.client.token, b.client.events())
	}
	return b
}

// never is a source of numbers that make nothing happen by chance.
type never struct{}

func (never) Uint64() uint64 { return 1<<64 - 1 }

func connects(int) (*fakeSocket, unix.Errno)   { return &fakeSocket{room: 1 << 30}, 0 }
func keepsQuiet(int) (*fakeSocket, unix.Errno) { return &fakeSocket{connecting: true}, 0 }

// event reports what is new at a socket, and lets the machine run.
func (b *bench) event(s *fakeSocket) {
	b.m.note(s.token, s.events())
	for b.m.turn(b.m.now) {
	}
}

func (b *bench) state() state { return b.m.conns[0].state }

func header() []byte {
	return proxyproto.AppendHeader(nil, port(client4, 40000), vip4, proxyproto.Options{})
}

// Where clients speak first the header waits for what they say, but not for long.
func TestHeaderWaitsForTheFirstBytes(t *testing.T) {
	for _, c := range []struct {
		name string
		// happens while the header waits.
		happens func(b *bench)
		want    string // behind the header
		wait    bool   // nothing is sent
	}{
		{"the client is silent for long", func(b *bench) { b.m.turn(int64(patience)) }, "", false},
		{"the client is silent", func(b *bench) { b.m.turn(int64(patience) - 1) }, "", true},
		{"the client speaks", func(b *bench) { b.client.in = []byte("GET /"); b.event(b.client) }, "GET /", false},
		{"the client ends", func(b *bench) { b.client.fin = true; b.event(b.client) }, "", false},
		{"the server speaks", func(b *bench) { b.target.in = []byte("220 "); b.event(b.target) }, "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, 1, connects)
			b.event(b.target)
			if b.state() != listening || len(b.target.got) > 0 || b.m.wait() != patience {
				t.Fatalf("it is %v, sent %q and waits for %v", b.state(), b.target.got, b.m.wait())
			}
			c.happens(b)
			want := append(header(), c.want...)
			if c.wait {
				want = nil
			}
			if !bytes.Equal(b.target.got, want) {
				t.Errorf("the target got %q, want %q", b.target.got, want)
			}
		})
	}
}

// Where a server spoke first the header goes at once, until clients do again.
func TestHeaderGoesAtOnceWhereServersSpeakFirst(t *testing.T) {
	b := newBench(t, 1, connects)
	connect := func() {
		b.client = b.k.add(&fakeSocket{room: 1 << 30})
		b.m.start(b.client.fd, port(client4, 40000), b.s)
		b.event(b.target)
	}
	b.event(b.target)
	b.m.turn(int64(patience))
	b.target.in = []byte("220 ")
	b.event(b.target)
	connect()
	if !bytes.Equal(b.target.got, header()) {
		t.Errorf("the target got %q before the client said anything", b.target.got)
	}
	b.client.in = []byte("EHLO")
	b.event(b.client)
	for range remember - 1 {
		connect()
		b.client.in = []byte("EHLO")
		b.event(b.client)
	}
	connect()
	if len(b.target.got) > 0 {
		t.Errorf("the target got %q after %d clients that spoke first", b.target.got, remember)
	}
}

// Those who go while the header waits are not kept, and their time is nobody
// else's.
func TestWaitingHeaderIsForgotten(t *testing.T) {
	b := newBench(t, 1, connects)
	b.event(b.target)
	b.client.failure = unix.ECONNRESET
	b.event(b.client)
	if *b.left != 1 || !b.target.gotRST || len(b.target.got) > 0 {
		t.Errorf("%d left, the target got %q", *b.left, b.target.got)
	}
	b.m.turn(int64(patience) / 2)
	b.client = b.k.add(&fakeSocket{room: 1 << 30})
	b.m.start(b.client.fd, port(client4, 40001), b.s)
	b.event(b.target)
	b.m.turn(int64(patience))
	if b.state() != listening {
		t.Errorf("it is %v when the time of the former is over", b.state())
	}
	b.m.turn(int64(patience) * 3 / 2)
	if b.state() != open || b.m.wait() != tick {
		t.Errorf("it is %v, and waits for %v", b.state(), b.m.wait())
	}
}

func TestFirstBytesTravelWithTheHeader(t *testing.T) {
	b := newBench(t, 1, connects)
	b.client.in = []byte("GET /")
	b.m.note(b.target.token, b.target.events())
	b.m.note(b.client.token, b.client.events())
	before := b.k.calls
	b.m.turn(0)
	if want := append(header(), "GET /"...); !bytes.Equal(b.target.got, want) {
		t.Errorf("the target got %q", b.target.got)
	}
	if n := b.k.calls - before; n != 3 { // a read, a write, and that ACKs go out at once
		t.Errorf("%d calls", n)
	}
}

func TestGreetingEndsWithTheHeader(t *testing.T) {
	b := newBench(t, 1, func(int) (*fakeSocket, unix.Errno) { return &fakeSocket{room: 10}, 0 })
	b.client.in = pattern("client", 1000)
	b.m.note(b.client.token, b.client.events())
	b.event(b.target)
	if b.state() != greeting {
		t.Fatalf("with a part of the header out it is %v", b.state())
	}
	b.target.room = len(header())
	b.target.in = []byte("hello")
	b.event(b.target)
	if b.state() != open || string(b.client.got) != "hello" {
		t.Errorf("with the header out it is %v, and the client got %q", b.state(), b.client.got)
	}
}

func TestTries(t *testing.T) {
	refuses := func(int) (*fakeSocket, unix.Errno) { return &fakeSocket{failure: unix.ECONNREFUSED}, 0 }
	unreachable := func(int) (*fakeSocket, unix.Errno) { return nil, unix.ENETUNREACH }
	noPort := func(int) (*fakeSocket, unix.Errno) { return nil, unix.EADDRNOTAVAIL }
	noFile := func(int) (*fakeSocket, unix.Errno) { return nil, unix.EMFILE }
	tests := []struct {
		name    string
		targets int
		dial    func(int) (*fakeSocket, unix.Errno)
		dials   int
		failed  uint64 // of all targets
		want    counts
	}{
		{"refused by all", 5, refuses, 3, 3, counts{accepted: 1, failed: 1}},
		{"refused by the only one", 1, refuses, 1, 1, counts{accepted: 1, failed: 1}},
		{"unreachable", 2, unreachable, 2, 2, counts{accepted: 1, failed: 1}},
		{"no port", 2, noPort, 2, 0, counts{accepted: 1, failed: 1, noPort: 2}},
		{"no descriptor", 2, noFile, 1, 0, counts{accepted: 1, exhausted: 1}},
		{"no target", 0, connects, 0, 0, counts{accepted: 1, noTarget: 1}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t, tt.targets, tt.dial)
			for b.target != nil && !b.target.closed {
				b.event(b.target)
			}
			if diff := cmp.Diff(tt.want, b.m.counts, cmp.AllowUnexported(counts{})); diff != "" {
				t.Error(diff)
			}
			var failed uint64
			for _, to := range b.m.plan.targets {
				failed += to.tallies[0].failed
				if to.tallies[0].active != 0 {
					t.Errorf("%v has active connections", to.key)
				}
			}
			if failed != tt.failed || len(b.dials) != tt.dials || !b.client.gotRST || *b.left != 1 {
				t.Errorf("%d failures, dials %v, client reset %v", failed, b.dials, b.client.gotRST)
			}
			slices.Sort(b.dials)
			if len(slices.Compact(b.dials)) != tt.dials {
				t.Errorf("a target was tried twice: %v", b.dials)
			}
			b.m.turn(0)
			b.k.wantNoneOpen(b.m)
		})
	}
}

func TestSourcesRotate(t *testing.T) {
	k := newFakeKernel(t, 0)
	table := tableOf(destinations(port(target4, 1)), vip4)
	second4 := netip.MustParseAddr("10.0.0.3")
	table.Sources = []netip.Addr{source4, second4, source6}
	m, s, _ := newMachine(t, k, table)
	var from []netip.Addr
	k.dialing = func(_ netip.AddrPort, source netip.Addr) (*fakeSocket, unix.Errno) {
		from = append(from, source)
		if len(from) == 2 {
			return nil, unix.EADDRNOTAVAIL
		}
		return &fakeSocket{}, 0
	}
	for range 3 {
		m.start(k.add(&fakeSocket{}).fd, port(client4, 1), s)
	}
	if want := []netip.Addr{source4, second4, source4, second4}; !slices.Equal(from, want) {
		t.Errorf("dialed from %v, want %v", from, want)
	}
	if m.counts.noPort != 0 {
		t.Error("a source without a port was counted though another had one")
	}
}

func TestDialTimeout(t *testing.T) {
	b := newBench(t, 2, keepsQuiet)
	first := b.target
	b.m.turn(int64(dialTimeout) - 1)
	if first.closed {
		t.Fatal("given up too early")
	}
	b.m.turn(int64(dialTimeout))
	if !first.closed || b.target == first {
		t.Fatal("the second target was not tried")
	}
	b.m.turn(2 * int64(dialTimeout))
	if !b.client.gotRST {
		t.Error("the client was not told")
	}
	b.k.wantNoneOpen(b.m)
}

// TestTargetLeavesWhileDialing: its dial is given up for the next target, the
// client need not know, and nobody has failed.
func TestTargetLeavesWhileDialing(t *testing.T) {
	b := newBench(t, 2, keepsQuiet)
	first, left := b.target, b.m.conns[0].to()
	var stays netip.AddrPort
	for i := range uint16(2) {
		if at := port(target4, i+1); at.String() != b.dials[0] {
			stays = at
		}
	}
	p, err := compile(tableOf(destinations(stays), vip4), b.m.plan, 1)
	if err != nil {
		t.Fatal(err)
	}
	b.m.adopt(p)
	if b.m.adoptConns(0, 100) {
		t.Error("there are no more connections")
	}
	b.m.turn(0)
	if !first.closed || b.client.closed || len(b.dials) != 2 || b.dials[1] != stays.String() {
		t.Errorf("dials %v, client closed %v", b.dials, b.client.closed)
	}
	if got, want := left.tallies[0], (tally{dialed: 1}); got != want {
		t.Errorf("the target that left counts %+v, want %+v", got, want)
	}
	if c := b.m.conns[0]; c.tries != 1 {
		t.Errorf("%d tries are used up", c.tries)
	}
}

func TestClientGoesWhileDialing(t *testing.T) {
	b := newBench(t, 2, keepsQuiet)
	b.client.failure = unix.ECONNRESET
	b.event(b.client)
	if !b.target.gotRST || len(b.dials) != 1 {
		t.Errorf("dials %v, reset %v", b.dials, b.target.gotRST)
	}
	b.k.wantNoneOpen(b.m)
}

func TestIdleTimeout(t *testing.T) {
	for _, half := range []bool{false, true} {
		b := newBench(t, 1, connects)
		idle := int64(b.s.idle)
		b.event(b.target)
		b.m.turn(idle - second)
		b.client.in = []byte("still here")
		b.client.fin = half
		b.event(b.client)
		for now := idle - second; now < 2*idle-second; now += second {
			b.m.turn(now)
		}
		if b.state() != open {
			t.Fatal("timed out too early")
		}
		b.m.turn(2*idle - second)
		if !b.client.gotRST || !b.target.gotRST || b.m.counts.idle != 1 {
			t.Errorf("half-closed %v: not reset: %+v", half, b.m.counts)
		}
		b.m.turn(2 * idle)
		b.k.wantNoneOpen(b.m)
	}
}

// TestBackPressure: a reader that takes nothing stops the sender, and the
// direction holds one buffer or one pipe.
func TestBackPressure(t *testing.T) {
	for _, pipes := range []bool{false, true} {
		b := newBench(t, 1, connects)
		b.k.noPipes = !pipes
		b.event(b.target)
		b.client.room = 1 << 20
		b.target.in = pattern("target", 8<<20)
		b.event(b.target)
		d := &b.m.conns[0].down
		taken := 8<<20 - len(b.target.in)
		if most := 1<<20 + fakePipeSize; taken > most || d.course != blocked {
			t.Errorf("%d bytes were taken, more than %d", taken, most)
		}
		if (d.pipe != nil) != pipes || (d.held != nil) == pipes {
			t.Errorf("with pipes %v it holds buffer %v, pipe %v", pipes, d.held != nil, d.pipe != nil)
		}
		b.client.room = 1 << 30
		b.event(b.client)
		if !bytes.Equal(b.client.got, pattern("target", 8<<20)) {
			t.Error("bytes are missing")
		}
		if d.pipe != nil || d.held != nil {
			t.Error("an idle direction holds memory")
		}
	}
}

// TestUrgentGivesThePipeBack: a direction that may not splice any more keeps no
// pipe.
func TestUrgentGivesThePipeBack(t *testing.T) {
	b := newBench(t, 1, connects)
	b.event(b.target)
	b.client.room = 1 << 20
	b.target.in = pattern("target", 2<<20)
	b.event(b.target)
	d := &b.m.conns[0].down
	if d.pipe == nil {
		t.Fatal("nothing was spliced")
	}
	b.target.urgent = true
	b.event(b.target)
	b.client.room = 1 << 30
	b.event(b.client)
	if d.pipe != nil || !bytes.Equal(b.client.got, pattern("target", 2<<20)) {
		t.Errorf("it keeps a pipe: %v, and %d bytes arrived", d.pipe != nil, len(b.client.got))
	}
}

func TestResetPassesEveryState(t *testing.T) {
	tests := []struct {
		name string
		do   func(b *bench)
	}{
		{"while the target reads slowly", func(b *bench) {
			b.target.room = 0
			b.client.in = pattern("client", 100)
			b.event(b.client)
		}},
		{"after its FIN", func(b *bench) { b.client.fin = true; b.event(b.client) }},
		{"after the other's FIN", func(b *bench) { b.target.fin = true; b.event(b.target) }},
		{"with bytes before it", func(b *bench) { b.client.in = []byte("last words") }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t, 1, connects)
			b.event(b.target)
			tt.do(b)
			words := b.client.in
			b.client.failure = unix.ECONNRESET
			b.event(b.client)
			if !b.target.gotRST || !bytes.HasSuffix(b.target.got, words) {
				t.Errorf("reset %v, got %q", b.target.gotRST, b.target.got)
			}
			b.k.wantNoneOpen(b.m)
		})
	}
}

// TestCallsOfAShortConnection counts: a question, an answer, and two FINs.
func TestCallsOfAShortConnection(t *testing.T) {
	b := newBench(t, 1, connects)
	b.client.in = []byte("question")
	b.m.note(b.client.token, b.client.events())
	b.event(b.target)
	b.k.calls = 0
	b.target.in, b.target.fin = []byte("answer"), true
	b.event(b.target) // read, write, shutdown
	b.client.fin = true
	b.event(b.client) // read, close, close
	if b.k.calls != 6 || string(b.client.got) != "answer" || *b.left != 1 {
		t.Errorf("%d calls, got %q", b.k.calls, b.client.got)
	}
}

func TestWheelWakesInTime(t *testing.T) {
	var w wheel
	random := rand.New(rand.NewPCG(1, 2))
	due := make(map[*conn]int64)
	for range 1000 {
		c := &conn{}
		due[c] = random.Int64N(int64(60 * time.Second))
		w.set(c, due[c])
	}
	var now int64
	for now = 0; now < 61*second; now += int64(tick) / 3 {
		w.advance(now, func(c *conn) {
			if now < due[c] || now > due[c]+2*int64(tick) {
				t.Errorf("due %v, woken %v", due[c], now)
			}
			delete(due, c)
		})
	}
	if len(due) != 0 || w.armed != 0 {
		t.Errorf("%d were not woken, %d are armed", len(due), w.armed)
	}
}
