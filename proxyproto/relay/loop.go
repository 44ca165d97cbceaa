package relay

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	mrand "math/rand/v2"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

const (
	// batch is how many events one turn takes.
	batch = 256
	// acceptMost is how many connections of one listener a turn accepts at most.
	acceptMost = 64
	// pause is how long nothing is accepted after descriptors ran out.
	pause = 20 * time.Millisecond
	// idleWait is how long a loop without timers waits, at most: another loop may
	// have given it a connection meanwhile, and with it a timer.
	idleWait = time.Second
)

// Tokens below zero are not connections'.
const (
	wakeID  = -1
	doorsID = -2 // and below: a listener
)

// A door is a listener, which all loops share.
type door struct {
	index int
	fd    int32
	vip   netip.AddrPort
}

// An entrance is a door as one loop sees it.
type entrance struct {
	*door
	service *service
	accepts int // how many to accept in one turn
}

// A loop serves its connections on a thread of its own.
type loop struct {
	relay  *Relay
	kernel linuxKernel
	wake   int32 // an eventfd: whoever writes to it ends the wait
	// load is the number of connections as of the last turn.
	load atomic.Int64

	// Only the loop's thread uses these.
	events [batch]unix.EpollEvent
	more   bool
	wait   time.Duration

	mu sync.Mutex // held by the loop's thread except while it waits
	// Guarded by mu.
	machine   machine
	entrances []entrance // by the door's index; without a door where there is none
	shut      bool       // nothing is accepted, and no listener is watched
	shutUntil int64
	first     int   // whose turn it is to be watched first
	reserve   int32 // a descriptor to give up when there is no other
	stopped   bool
}

func newLoop(r *Relay, number int, b budget) (*loop, error) {
	l := &loop{relay: r, reserve: -1, wake: -1}
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	l.kernel.epoll = int32(epoll)
	wake, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		l.close()
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	l.wake = int32(wake)
	if errno := l.kernel.add(l.wake, unix.EPOLLIN, token{id: wakeID}); errno != 0 {
		l.close()
		return nil, fmt.Errorf("watch an eventfd: %w", errno)
	}
	l.openReserve()
	var seed [32]byte
	_, _ = rand.Read(seed[:]) // never fails
	l.machine = machine{kernel: &l.kernel, number: number, left: r.leave, random: mrand.NewChaCha8(seed)}
	l.machine.pipes.most = b.pipes
	return l, nil
}

func (l *loop) close() {
	for _, fd := range []int32{l.kernel.epoll, l.wake, l.reserve} {
		if fd >= 0 {
			l.kernel.close(fd)
		}
	}
	l.kernel.epoll, l.wake, l.reserve = -1, -1, -1
}

// openReserve opens the reserve if it can: there may be no descriptor left.
func (l *loop) openReserve() {
	if l.reserve >= 0 {
		return
	}
	if fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
		l.reserve = int32(fd)
	}
}

// kick ends the loop's wait. The caller holds mu.
func (l *loop) kick() {
	if l.wake < 0 {
		return
	}
	var count [8]byte
	binary.NativeEndian.PutUint64(count[:], 1)
	_, _ = unix.Write(int(l.wake), count[:]) // EAGAIN: it was kicked already
}

// run serves until stop was called. Then all connections are reset.
func (l *loop) run() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for {
		n := l.await()
		l.mu.Lock()
		if l.stopped {
			l.machine.resetConns(0, len(l.machine.conns))
			l.machine.pipes.closeSpare(&l.kernel)
			l.close()
			l.mu.Unlock()
			return
		}
		l.turn(l.events[:n])
		l.mu.Unlock()
	}
}

// stop ends run.
func (l *loop) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopped = true
	l.kick()
}

// await returns the number of events. It asks before it waits: under load there
// are always some, and a call that may wait costs the Go scheduler's attention.
func (l *loop) await() int {
	if n := l.kernel.poll(l.events[:]); n > 0 || l.more {
		return n
	}
	return l.kernel.wait(l.events[:], int(l.wait/time.Millisecond))
}

func (l *loop) turn(events []unix.EpollEvent) {
	m := &l.machine
	now := l.relay.clock()
	m.now = now
	exhausted := m.counts.exhausted
	for i := range events {
		e := &events[i]
		switch {
		case e.Fd >= 0:
			m.note(token{id: e.Fd, generation: e.Pad}, e.Events)
		case e.Fd == wakeID:
			var count [8]byte
			_, _ = unix.Read(int(l.wake), count[:])
		default:
			l.enter(int(doorsID - e.Fd))
		}
	}
	l.more = m.turn(now)
	if m.counts.exhausted != exhausted {
		l.pause()
	}
	l.reopen()
	l.load.Store(int64(m.size()))
	switch {
	case l.shut:
		l.wait = pause
		if next := m.wait(); next > 0 {
			l.wait = min(next, pause)
		}
	default:
		if l.wait = m.wait(); l.wait == 0 {
			l.wait = idleWait
		}
	}
}

// --- accepting ---------------------------------------------------------------------

// enter accepts connections of a listener. Listeners are watched
// level-triggered, so it need not find out that there are no more: it accepts
// one, and twice as many in the next turn if there were as many as it took.
func (l *loop) enter(index int) {
	if index >= len(l.entrances) || l.entrances[index].door == nil || l.shut {
		return
	}
	e := &l.entrances[index]
	for n := range e.accepts {
		if !l.relay.admit() {
			l.shutDoors(0)
			l.relay.full.complain(l.relay, "as many connections as there may be: new ones wait", zap.Int64("max_connections", l.relay.maxConnections.Load()))
			return
		}
		fd, peer, err := l.kernel.accept(e.fd)
		if err == 0 {
			l.place(fd, peer, e.service)
			continue
		}
		l.relay.leave()
		switch {
		case err == unix.EAGAIN:
			e.accepts = max(1, n)
			return
		case outOfResources(err):
			l.turnOneAway(e.fd)
			return
		}
		// The connection's own end, before it was accepted (accept(2)).
	}
	e.accepts = min(2*e.accepts, acceptMost)
}

// turnOneAway gives up the reserve to reset a connection that there is no
// descriptor for: its client should know, and the listener would report it again
// and again.
func (l *loop) turnOneAway(listener int32) {
	l.machine.counts.exhausted++
	if l.reserve < 0 {
		return
	}
	l.kernel.close(l.reserve)
	l.reserve = -1
	if fd, _, err := l.kernel.accept(listener); err == 0 {
		l.kernel.reset(fd)
	}
	l.openReserve()
}

// pause stops accepting for a moment, after descriptors ran out.
func (l *loop) pause() {
	l.shutDoors(l.machine.now + int64(pause))
	l.relay.short.complain(l.relay, "out of descriptors: connections are reset", zap.Int64("max_connections", l.relay.maxConnections.Load()),
		zap.Int64("connections", l.relay.admitted.Load()))
}

func (l *loop) shutDoors(until int64) {
	l.shutUntil = max(l.shutUntil, until)
	if l.shut {
		return
	}
	l.shut = true
	for _, e := range l.entrances {
		if e.door != nil {
			l.kernel.remove(e.fd)
		}
	}
}

// reopen accepts again when there is room.
func (l *loop) reopen() {
	if !l.shut || l.machine.now < l.shutUntil || !l.relay.hasRoom() {
		return
	}
	l.openReserve()
	l.shut = false
	// The one that is watched first is told of first, and may take all the room
	// there is: they take turns.
	l.first++
	for i := range l.entrances {
		if e := l.entrances[(l.first+i)%len(l.entrances)]; e.door != nil {
			l.watchDoor(e.door)
		}
	}
}

// watchDoor wakes one waiting loop for a connection, not all.
func (l *loop) watchDoor(d *door) {
	err := l.kernel.add(d.fd, unix.EPOLLIN|unix.EPOLLEXCLUSIVE, token{id: int32(doorsID - d.index)})
	if err != 0 {
		l.relay.log.Error("a listener is not served", zap.Stringer("vip", d.vip), zap.Error(err))
	}
}

// place starts a connection here, or in a loop that has clearly fewer: the
// kernel wakes the same loop first while all are idle, and connections that stay
// would all be its own.
func (l *loop) place(fd int32, peer netip.AddrPort, s *service) {
	own := int64(l.machine.size())
	for _, other := range l.relay.loops {
		if load := other.load.Load(); other == l || own < load+load/4+32 || !other.mu.TryLock() {
			continue
		}
		// Its plan must be the one that the service is of.
		taken := !other.stopped && other.machine.plan == l.machine.plan
		if taken {
			other.machine.now = l.machine.now
			other.machine.start(fd, peer, s)
			other.load.Store(int64(other.machine.size()))
		}
		other.mu.Unlock()
		if taken {
			return
		}
	}
	l.machine.start(fd, peer, s)
}

// --- configuration -----------------------------------------------------------------

// adopt goes on with a plan and the doors that belong to it.
func (l *loop) adopt(p *plan, doors []*door) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.machine.adopt(p)
	for len(l.entrances) < len(doors) {
		l.entrances = append(l.entrances, entrance{})
	}
	for i := range l.entrances {
		l.setDoor(i, doors, p)
	}
}

func (l *loop) setDoor(i int, doors []*door, p *plan) {
	var d *door
	if i < len(doors) {
		d = doors[i]
	}
	e := &l.entrances[i]
	if e.door != d {
		if e.door != nil && !l.shut {
			l.kernel.remove(e.fd)
			if p.services[e.vip] != nil {
				l.clearDoor(e)
			}
		}
		*e = entrance{door: d, accepts: 1}
		if d != nil && !l.shut {
			l.watchDoor(d)
		}
	}
	if d != nil {
		e.service = p.services[d.vip]
	}
}

// clearDoor accepts whoever is in the queue of a listener that somebody else goes
// on with. A connection wakes one of those who watch it exclusively: if that was
// this loop, nobody else would be woken for it.
func (l *loop) clearDoor(e *entrance) {
	for l.relay.admit() {
		fd, peer, err := l.kernel.accept(e.fd)
		if err != 0 {
			l.relay.leave()
			return
		}
		l.machine.start(fd, peer, e.service)
	}
}

// sweep brings the loop's connections over to its plan, some at a time so that
// traffic goes on meanwhile.
func (l *loop) sweep() {
	l.inPieces(l.machine.adoptConns)
}

// inPieces calls f, which has the loop to itself, for ranges of connection
// indexes until it returns false. Then the loop looks what became of it.
func (l *loop) inPieces(f func(from, to int) bool) {
	const piece = 256
	for from, more := 0, true; more; from += piece {
		l.mu.Lock()
		if more = f(from, from+piece); !more {
			l.kick()
		}
		l.mu.Unlock()
	}
}
