package relay

import (
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nlb/balancer"
)

// A fakeKernel has sockets with a peer at the other end that follows a script.
// It reports events as an edge-triggered epoll does: when something changed,
// and after EAGAIN or a short write when it is over. It fails the test when a
// descriptor is used after it was closed.
type fakeKernel struct {
	t       testing.TB
	random  *rand.Rand
	sockets map[int32]*fakeSocket
	pipes   map[int32]*fakePipe
	next    int32
	calls   int

	dialing func(to netip.AddrPort, source netip.Addr) (*fakeSocket, unix.Errno)
	noPipes bool
	noWatch bool
}

// A fakeSocket is one of the machine's sockets, and what its peer does.
type fakeSocket struct {
	fd     int32
	token  token
	closed bool
	posted bool // an event is to be delivered

	connecting bool
	failure    unix.Errno // of the connection, or a reset

	script []byte // what the peer will send
	hangUp bool   // and a FIN behind it
	in     []byte
	fin    bool

	room   int // of the send buffer
	got    []byte
	gotFIN bool
	gotRST bool
	urgent bool // reads stop short
	inline bool
	prompt bool // acknowledges at once
}

type fakePipe struct {
	r, w  int32
	bytes []byte
	ends  int // open ones
}

const fakePipeSize = 96 << 10

func newFakeKernel(t testing.TB, seed uint64) *fakeKernel {
	return &fakeKernel{
		t: t, random: rand.New(rand.NewPCG(seed, 1)), next: 3,
		sockets: make(map[int32]*fakeSocket), pipes: make(map[int32]*fakePipe),
	}
}

func (k *fakeKernel) add(s *fakeSocket) *fakeSocket {
	s.fd = k.next
	k.next++
	k.sockets[s.fd] = s
	return s
}

func (k *fakeKernel) socket(fd int32) *fakeSocket {
	k.calls++
	s := k.sockets[fd]
	if s == nil || s.closed {
		k.t.Fatalf("descriptor %d is used, and is not open", fd)
	}
	return s
}

func (k *fakeKernel) watch(fd int32, t token) unix.Errno {
	s := k.socket(fd)
	if k.noWatch {
		return unix.ENOSPC
	}
	s.token, s.posted = t, true
	return 0
}

func (k *fakeKernel) dial(to netip.AddrPort, source netip.Addr, t token) (int32, unix.Errno) {
	s, err := k.dialing(to, source)
	if err != 0 {
		return -1, err
	}
	k.add(s)
	s.token, s.posted = t, true
	return s.fd, 0
}

func (k *fakeKernel) outcome(fd int32) unix.Errno { return k.socket(fd).failure }

// sometimes is true once in n.
func (k *fakeKernel) sometimes(n int) bool { return k.random.IntN(n) == 0 }

func (k *fakeKernel) read(fd int32, p []byte) (int, unix.Errno) {
	s := k.socket(fd)
	if s.connecting {
		k.t.Fatal("read before the connection is there")
	}
	if k.sometimes(10) {
		s.posted = true // it comes right after
		return 0, unix.EAGAIN
	}
	n := min(len(p), len(s.in))
	switch {
	case n == 0 && s.failure != 0:
		return 0, s.failure
	case n == 0 && s.fin:
		return 0, 0
	case n == 0:
		return 0, unix.EAGAIN
	case s.urgent && n > 1:
		n = 1 + k.random.IntN(n)
	}
	copy(p, s.in[:n])
	s.in = s.in[n:]
	return n, 0
}

func (k *fakeKernel) write(fd int32, p []byte) (int, unix.Errno) {
	s := k.socket(fd)
	if s.connecting || s.gotFIN {
		k.t.Fatal("write before the connection is there, or behind a FIN")
	}
	if s.failure != 0 {
		return 0, s.failure
	}
	n := min(len(p), s.room)
	if n == 0 {
		return 0, unix.EAGAIN
	}
	s.got = append(s.got, p[:n]...)
	s.room -= n
	return n, 0
}

func (k *fakeKernel) splice(from, to int32, n int) (int, unix.Errno) {
	if p := k.pipes[to]; p != nil {
		if len(p.bytes) > 0 {
			k.t.Fatal("a pipe is filled before it is empty")
		}
		buf := make([]byte, 1+k.random.IntN(min(n, fakePipeSize)))
		if s := k.socket(from); s.urgent && !s.inline {
			return 0, 0 // as tcp_splice_read at the urgent byte, once a FIN came
		}
		n, err := k.read(from, buf)
		p.bytes = append(p.bytes, buf[:n]...)
		return n, err
	}
	p := k.pipes[from]
	moved, err := k.write(to, p.bytes[:min(len(p.bytes), 1+k.random.IntN(n))])
	p.bytes = p.bytes[moved:]
	return moved, err
}

func (k *fakeKernel) inline(fd int32) { k.socket(fd).inline = true }

func (k *fakeKernel) acknowledge(fd int32) {
	s := k.socket(fd)
	if s.connecting {
		k.t.Fatal("a handshake's ACK that goes out alone")
	}
	s.prompt = true
}

func (k *fakeKernel) finish(fd int32) unix.Errno {
	s := k.socket(fd)
	if s.gotFIN {
		k.t.Fatal("a second FIN")
	}
	if s.failure != 0 {
		return unix.ENOTCONN
	}
	s.gotFIN = true
	return 0
}

func (k *fakeKernel) close(fd int32) {
	s := k.socket(fd)
	s.closed, s.gotFIN = true, true
	if len(s.in) > 0 {
		s.gotRST = true
	}
}

func (k *fakeKernel) reset(fd int32) {
	s := k.socket(fd)
	s.closed, s.gotRST = true, true
}

func (k *fakeKernel) openPipe() (r, w int32, size int, err unix.Errno) {
	if k.noPipes || k.sometimes(8) {
		return -1, -1, 0, unix.EMFILE
	}
	p := &fakePipe{r: k.next, w: k.next + 1, ends: 2}
	k.next += 2
	k.pipes[p.r], k.pipes[p.w] = p, p
	return p.r, p.w, fakePipeSize, 0
}

func (k *fakeKernel) closePipe(r, w int32) {
	if k.pipes[r] == nil || k.pipes[w] == nil {
		k.t.Fatal("a pipe is closed twice")
	}
	delete(k.pipes, r)
	delete(k.pipes, w)
}

// events are what epoll would say of the socket now.
func (s *fakeSocket) events() (e uint32) {
	if s.connecting {
		return 0
	}
	if s.failure != 0 {
		return unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLERR | unix.EPOLLHUP
	}
	if len(s.in) > 0 || s.fin {
		e |= unix.EPOLLIN
	}
	if s.fin {
		e |= unix.EPOLLRDHUP
	}
	if s.fin && s.gotFIN {
		e |= unix.EPOLLHUP
	}
	if s.room > 0 {
		e |= unix.EPOLLOUT
	}
	if s.urgent {
		e |= unix.EPOLLPRI
	}
	return e
}

// act lets the peer do something, at random: connect, send, take, hang up.
func (k *fakeKernel) act(s *fakeSocket) {
	switch {
	case s.closed || s.failure != 0:
	case s.connecting:
		s.connecting = false
		s.posted = true
	case len(s.script) > 0 && k.sometimes(2):
		n := 1 + k.random.IntN(min(len(s.script), 70<<10))
		s.in = append(s.in, s.script[:n]...)
		s.script = s.script[n:]
		s.posted = true
	case len(s.script) == 0 && s.hangUp && !s.fin:
		s.fin, s.posted = true, true
	case s.room < 100<<10:
		s.room += 1 + k.random.IntN(100<<10)
		s.posted = true
	}
}

// deliver notes the events of some sockets, in any order.
func (k *fakeKernel) deliver(m *machine) {
	for _, s := range k.shuffled() {
		if s.posted && !s.closed && s.events() != 0 && !k.sometimes(4) {
			s.posted = false
			m.note(s.token, s.events())
		}
	}
}

func (k *fakeKernel) shuffled() []*fakeSocket {
	all := make([]*fakeSocket, 0, len(k.sockets))
	for fd := range k.next {
		if s := k.sockets[fd]; s != nil {
			all = append(all, s)
		}
	}
	k.random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all
}

// wantNoneOpen fails the test if the machine leaves a descriptor open.
func (k *fakeKernel) wantNoneOpen(m *machine) {
	k.t.Helper()
	m.pipes.closeSpare(k)
	for fd, s := range k.sockets {
		if !s.closed {
			k.t.Errorf("descriptor %d was left open", fd)
		}
	}
	if len(k.pipes) > 0 || m.pipes.open != 0 {
		k.t.Errorf("%d pipe ends were left open, %d counted", len(k.pipes), m.pipes.open)
	}
	if m.size() != 0 || m.wheel.armed != 0 {
		k.t.Errorf("%d connections and %d timers are left", m.size(), m.wheel.armed)
	}
}

// dealt has the slots of the last machine's plan.
var dealt plan

// newMachine has a plan for a table and counts the connections that left.
func newMachine(t testing.TB, k *fakeKernel, table *balancer.Table) (m *machine, s *service, left *int) {
	t.Helper()
	// Slots that were dealt for an earlier machine serve again.
	p, err := compile(table, &dealt, 1)
	if err != nil {
		t.Fatal(err)
	}
	dealt = plan{key: p.key, base: p.base, pools: p.pools}
	for _, in := range p.pools {
		in.manners = make([]manners, 1)
	}
	left = new(int)
	m = &machine{kernel: k, left: func() { *left++ }, random: rand.NewChaCha8([32]byte{})}
	m.pipes.most = 3
	m.adopt(p)
	return m, p.services[vip4], left
}

// pattern are bytes that say whose they are and where they belong.
func pattern(name string, n int) []byte {
	b := make([]byte, n)
	random := rand.NewChaCha8([32]byte(append([]byte(name), make([]byte, 32)...)[:32]))
	_, _ = random.Read(b)
	return b
}

const second = int64(time.Second)
