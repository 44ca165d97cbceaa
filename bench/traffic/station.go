package traffic

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/bench/measure"
)

const (
	// message is the size of requests and of responses.
	message = 64
	// patience is how long nothing may happen where something must.
	patience = 2 * time.Second
)

// The first byte of a request says what the target shall do.
const (
	askEcho = 'e'
	askBulk = 'b' // send until the client closes
	// askCheck is askEcho, and six bytes follow with the client's own address:
	// the header must have just this one.
	askCheck = 'c'
)

// edge is unix.EPOLLET, which is negative.
const edge = 1 << 31

// A station is both ends of a site's traffic: the client and the targets. One
// thread does all of it, so that on one core nothing is measured but what is
// done: no wake-ups between threads. It runs in the client's namespace; the
// targets' sockets come from their listeners, which are in the targets'.
type station struct {
	version version
	client  netip.Addr
	peer    netip.Addr // whom the targets must see
	keeps   bool       // that is the client, with its port
	// to is where the client connects to: the VIP, or the targets in turns.
	to    []netip.AddrPort
	names []*unix.RawSockaddrInet4
	next  int // of names

	epoll   int32
	doors   []int32 // the targets' listeners
	arrived []int   // connections, by target
	idle    []int32 // listeners for health checks, which the kernel answers alone
	caller  caller
	events  [256]unix.EpollEvent
	ends    []end // by descriptor
	open    int   // how many ends there are
	checked int   // connections that were right to the client's port
	buf     []byte

	// ready is what the load does with a client that has events.
	ready func(*end, uint32) error
}

// An end is a socket of the client or the target.
type end struct {
	fd   int32
	role role
	got  int // bytes of messages that are not dealt with yet

	// Of clients.
	asked bool
	check bool // its header, to the port
	// due are the intended starts of requests without a response, in order.
	due []time.Time

	// Of targets.
	peer    netip.AddrPort
	header  [256]byte // and the request's beginning, until both are there
	filled  int
	greeted bool
}

type role uint8

const (
	nobody role = iota
	client
	target
	door
)

func newStation(s *site) (*station, error) {
	st := &station{
		version: s.version, client: s.Clients[0].Addr4, peer: s.LB.Addr4, keeps: s.keepsClient(),
		arrived: make([]int, len(s.Targets)), buf: make([]byte, 256<<10), epoll: -1,
	}
	if st.keeps {
		st.peer = st.client
	}
	st.goesTo(s)
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	st.epoll = int32(epoll)
	for _, t := range s.Targets {
		if err := t.Do(func() error { return st.listen(t.Addr4) }); err != nil {
			st.close()
			return nil, fmt.Errorf("%s: %w", t.Name, err)
		}
	}
	return st, nil
}

// goesTo finds out where the client connects to.
func (s *station) goesTo(at *site) {
	s.to = []netip.AddrPort{netip.AddrPortFrom(lab.VIP4, measure.Port)}
	if !at.balanced() {
		s.to = s.to[:0]
		for _, t := range at.Targets {
			s.to = append(s.to, netip.AddrPortFrom(t.Addr4, measure.Port))
		}
	}
	for _, a := range s.to {
		s.names = append(s.names, name(a))
	}
}

// listen opens the listeners of one more target, in its namespace.
func (s *station) listen(at netip.Addr) error {
	probe, err := listening(netip.AddrPortFrom(at, measure.ProbePort))
	if err != nil {
		return err
	}
	s.idle = append(s.idle, probe)
	fd, err := listening(netip.AddrPortFrom(at, measure.Port))
	if err != nil {
		return err
	}
	s.doors = append(s.doors, fd)
	return s.watch(fd, door, unix.EPOLLIN)
}

func (s *station) close() {
	s.drop()
	for _, fd := range slices.Concat(s.doors, s.idle) {
		closeFD(fd)
	}
	if s.epoll >= 0 {
		closeFD(s.epoll)
	}
	s.doors, s.idle, s.epoll = nil, nil, -1
}

func (s *station) watch(fd int32, r role, events uint32) error {
	e := unix.EpollEvent{Events: events, Fd: fd, Pad: int32(r)}
	if err := unix.EpollCtl(int(s.epoll), unix.EPOLL_CTL_ADD, int(fd), &e); err != nil {
		return fmt.Errorf("watch a socket: %w", err)
	}
	return nil
}

// enter adds an end.
func (s *station) enter(fd int32, r role, events uint32) (*end, error) {
	for int(fd) >= len(s.ends) {
		s.ends = append(s.ends, make([]end, 64)...)
	}
	e := &s.ends[fd]
	e.fd, e.role, e.got, e.filled, e.greeted = fd, r, 0, 0, false
	e.asked, e.check, e.due = false, false, e.due[:0]
	s.open++
	return e, s.watch(fd, r, events)
}

func (s *station) leave(e *end) {
	closeFD(e.fd)
	e.role = nobody
	s.open--
}

// drop closes all ends.
func (s *station) drop() {
	for i := range s.ends {
		if s.ends[i].role != nobody {
			s.leave(&s.ends[i])
		}
	}
}

// dial begins a client's connection. Call it in the client's namespace.
func (s *station) dial() (*end, error) {
	s.next = (s.next + 1) % len(s.names)
	fd, err := dial(s.names[s.next])
	if err != nil {
		return nil, err
	}
	return s.enter(fd, client, unix.EPOLLIN|unix.EPOLLOUT|edge)
}

// turn waits for events and deals with them.
func (s *station) turn(wait time.Duration) (n int, err error) {
	n = s.sleep(wait)
	for i := range s.events[:n] {
		ev := &s.events[i]
		switch role(ev.Pad) {
		case door:
			err = s.answerDoor(slices.Index(s.doors, ev.Fd))
		case target:
			if e := &s.ends[ev.Fd]; e.role == target {
				err = s.serve(e, ev.Events)
			}
		case client:
			if e := &s.ends[ev.Fd]; e.role == client {
				err = s.ready(e, ev.Events)
			}
		}
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// errSilence is when nothing happened within patience.
var errSilence = errors.New("nothing happens any more")

// turns goes on until a time, or until done says so. It is an error if nothing
// happens for patience.
func (s *station) turns(until time.Time, done func() bool) error {
	quiet := time.Now().Add(patience)
	for !done() {
		now := time.Now()
		if !now.Before(until) {
			return nil
		}
		if now.After(quiet) {
			return errSilence
		}
		n, err := s.turn(min(until.Sub(now), quiet.Sub(now)))
		if err != nil {
			return err
		}
		if n > 0 {
			quiet = now.Add(patience)
		}
	}
	return nil
}

// quiesce waits until the last end is closed.
func (s *station) quiesce() error {
	limit := time.Now().Add(patience)
	if err := s.turns(limit, func() bool { return s.open == 0 }); err != nil {
		return err
	}
	if s.open > 0 {
		return fmt.Errorf("%d connections did not end", s.open)
	}
	return nil
}

// --- the target ----------------------------------------------------------------

// answerDoor lets in who calls at a target, if it is who should.
func (s *station) answerDoor(at int) error {
	for range 16 {
		fd, err := accept(s.doors[at], &s.caller)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case err != nil:
			return fmt.Errorf("accept: %w", err)
		}
		e, err := s.enter(fd, target, unix.EPOLLIN)
		if err != nil {
			return err
		}
		s.arrived[at]++
		e.peer = s.caller.address()
		if e.peer.Addr() != s.peer {
			return fmt.Errorf("the target sees %s, not %s", e.peer.Addr(), s.peer)
		}
	}
	return nil
}

func (s *station) serve(e *end, events uint32) error {
	if events&unix.EPOLLIN == 0 {
		if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
			s.leave(e)
			return nil
		}
		return s.pour(e)
	}
	n, err := read(e.fd, s.buf)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return nil
	case err != nil || n == 0: // a RST, if the client had its fill
		s.leave(e)
		return nil
	}
	p := s.buf[:n]
	if !e.greeted {
		if p, err = s.greet(e, p); err != nil || !e.greeted {
			return err
		}
	}
	return s.answer(e, p)
}

// greet takes in the header and the first request, and returns what can be
// answered once both are there.
func (s *station) greet(e *end, p []byte) ([]byte, error) {
	if e.filled > 0 {
		e.filled += copy(e.header[e.filled:], p)
		p = e.header[:e.filled]
	}
	g, n, err := parse(s.version, p)
	switch {
	case err != nil && !errors.Is(err, errShort):
		return nil, err
	case err == nil && len(p) >= n+message:
		e.greeted = true
		return p[n:], s.check(e.peer, g, p[n:])
	case e.filled == 0:
		e.filled = copy(e.header[:], p)
	case e.filled == len(e.header):
		return nil, errors.New("there is no end to the header")
	}
	return nil, nil
}

// check compares what the target sees, or is told by the header, with what is
// true. A balancer that hides the client says nothing of its port.
func (s *station) check(peer netip.AddrPort, g greeting, request []byte) error {
	if s.version != plain && (g.source.Addr() != s.client || g.destination != s.to[0]) {
		return fmt.Errorf("the header says from %s to %s, it was from %s to %s", g.source, g.destination, s.client, s.to[0])
	}
	if request[0] != askCheck {
		return nil
	}
	said := netip.AddrPortFrom(netip.AddrFrom4([4]byte(request[1:])), binary.BigEndian.Uint16(request[5:]))
	switch {
	case s.version != plain && g.source != said:
		return fmt.Errorf("the header says from %s, it was from %s", g.source, said)
	case s.keeps && peer != said:
		return fmt.Errorf("the target sees %s, it was %s", peer, said)
	}
	s.checked++
	return nil
}

// answer echoes requests, or starts to pour.
func (s *station) answer(e *end, p []byte) error {
	if p[0] == askBulk {
		ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLOUT, Fd: e.fd, Pad: int32(target)}
		return unix.EpollCtl(int(s.epoll), unix.EPOLL_CTL_MOD, int(e.fd), &ev)
	}
	e.got += len(p)
	for ; e.got >= message; e.got -= message {
		if _, err := write(e.fd, s.buf[:message]); err != nil {
			return fmt.Errorf("respond: %w", err)
		}
	}
	return nil
}

// pour sends as much as goes.
func (s *station) pour(e *end) error {
	_, err := write(e.fd, s.buf)
	switch {
	case err == nil || errors.Is(err, unix.EAGAIN):
	case errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE): // the client has its fill
		s.leave(e)
	default:
		return fmt.Errorf("send: %w", err)
	}
	return nil
}

// --- the client ----------------------------------------------------------------

// ask sends a request. One that is to be checked has the client's address.
func (s *station) ask(e *end, what byte) error {
	var request [message]byte
	request[0] = what
	if what == askCheck {
		own, err := local(e.fd)
		if err != nil {
			return err
		}
		a := own.Addr().As4()
		copy(request[1:], a[:])
		binary.BigEndian.PutUint16(request[5:], own.Port())
	}
	copy(s.buf, request[:])
	if n, err := write(e.fd, s.buf[:message]); err != nil || n != message {
		return fmt.Errorf("request: %d bytes went: %w", n, err)
	}
	return nil
}

// hear reads responses and returns how many are complete now.
func (s *station) hear(e *end) (n int, err error) {
	for {
		more, err := read(e.fd, s.buf)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return n, nil
		case err != nil:
			return n, fmt.Errorf("response: %w", err)
		case more == 0:
			return n, errors.New("the connection ended before the response")
		}
		e.got += more
		n += e.got / message
		e.got %= message
		if more < len(s.buf) {
			return n, nil // that was all, epoll(7) says
		}
	}
}

// failed is why a client's socket failed, or nil.
func failed(e *end, events uint32) error {
	if events&unix.EPOLLERR == 0 {
		return nil
	}
	code, err := unix.GetsockoptInt(int(e.fd), unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && code != 0 {
		err = unix.Errno(code)
	}
	return fmt.Errorf("connection: %w", err)
}

// begin is for a client's first events: once it is connected it asks. It
// reports whether the client has asked.
func (s *station) begin(e *end, events uint32, what byte) (bool, error) {
	if err := failed(e, events); err != nil || e.asked || events&unix.EPOLLOUT == 0 {
		return e.asked, err
	}
	e.asked = true
	return true, s.ask(e, what)
}

// try makes one connection and has its header checked.
func (s *station) try() error {
	defer s.drop()
	before, answered := s.checked, false
	s.ready = func(e *end, events uint32) error {
		if asked, err := s.begin(e, events, askCheck); err != nil || !asked {
			return err
		}
		n, err := s.hear(e)
		if n > 0 {
			answered = true
			s.leave(e)
		}
		return err
	}
	if _, err := s.dial(); err != nil {
		return err
	}
	if err := s.turns(time.Now().Add(patience/10), func() bool { return answered }); err != nil {
		return err
	}
	if !answered || s.checked != before+1 {
		return errors.New("no response")
	}
	return s.quiesce()
}
