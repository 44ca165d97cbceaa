package change

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/bench/measure"
)

// patience is how long a client waits for an answer: long enough for a relay that
// has to try a second target, and for the first repetition of a lost SYN, after a
// second (RFC 6298, 2).
const patience = 3 * time.Second

// What a client says, and what a target answers. A PROXY header before it does
// not end like that.
var question, reply = []byte("ask\n"), []byte("yes\n")

// A station is the client and all targets of a site, in one thread that also
// listens on the wire before the targets. Its sockets are in the namespaces of
// two nodes.
type station struct {
	client, host *lab.Node
	epoll        int
	events       [256]unix.EpollEvent
	ends         map[int]*flow        // sockets of connections; nil for those of targets
	servers      map[int]bool         // listening sockets
	targets      map[netip.Addr][]int // those of each target that is alive
	waiting      []*flow              // in the order of their beginnings; some are over
	wire         *wire
	keep         bool // flows that were answered stay open
	// counts is how often flows have been counted anew; what came of those that
	// began since then is below.
	counts                  int
	began, answered, failed int
	reasons                 map[string]int // why flows failed
}

// A flow is a connection of the client's.
type flow struct {
	fd    int
	began time.Time
	count int // the one that it is part of
	asked bool
	over  bool // answered or failed
}

// A load is new connections at a steady rate.
type load struct {
	to    netip.AddrPort
	every time.Duration // 0 for none
	most  int           // flows, since the last count; 0 for no limit
}

// goesOn says whether there are to be more flows than there have been.
func (l *load) goesOn(began int) bool { return l.every > 0 && (l.most == 0 || began < l.most) }

// newStation opens a station without targets. After an error there is nothing to
// close.
func newStation(client, host *lab.Node) (*station, error) {
	s := &station{
		client: client, host: host,
		ends: make(map[int]*flow), servers: make(map[int]bool), targets: make(map[netip.Addr][]int),
	}
	s.count()
	var err error
	if s.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	err = host.Do(func() error {
		s.wire, err = openWire(measure.Port)
		return err
	})
	if err == nil {
		err = s.watch(s.wire.fd, unix.EPOLLIN)
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *station) close() {
	for fd := range s.ends {
		_ = unix.Close(fd)
	}
	for fd := range s.servers {
		_ = unix.Close(fd)
	}
	if s.wire != nil {
		_ = unix.Close(s.wire.fd)
	}
	_ = unix.Close(s.epoll)
}

func (s *station) watch(fd int, events uint32) error {
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(s.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)}))
}

// serve brings a target to life, with a port for clients and one for checks.
func (s *station) serve(at netip.Addr) error {
	return s.host.Do(func() error {
		for _, port := range []int{measure.Port, measure.ProbePort} {
			fd, err := measure.Bind(unix.SOCK_STREAM, at, port)
			if err != nil {
				return err
			}
			s.servers[fd] = true
			s.targets[at] = append(s.targets[at], fd)
			if err := unix.Listen(fd, 4096); err != nil {
				return fmt.Errorf("listen on %s: %w", at, err)
			}
			if err := s.watch(fd, unix.EPOLLIN); err != nil {
				return err
			}
		}
		return nil
	})
}

// refuse ends a target as the end of its process does.
func (s *station) refuse(at netip.Addr) error {
	for _, fd := range s.targets[at] {
		delete(s.servers, fd)
		_ = unix.Close(fd)
	}
	delete(s.targets, at)
	return nil
}

// count begins to count flows anew.
func (s *station) count() {
	s.counts++
	s.began, s.answered, s.failed = 0, 0, 0
	s.reasons = make(map[string]int)
}

// why says how many flows failed for which reason; nothing if none did.
func (s *station) why() string {
	var all []string
	for _, reason := range slices.Sorted(maps.Keys(s.reasons)) {
		all = append(all, fmt.Sprint(reason, ": ", s.reasons[reason]))
	}
	return strings.Join(all, ", ")
}

// pending are the flows that are neither answered nor failed.
func (s *station) pending() int {
	n := 0
	for _, f := range s.waiting {
		if !f.over {
			n++
		}
	}
	return n
}

// errLate is a condition that did not come about in time.
var errLate = errors.New("waited in vain")

// run makes connections and serves them until a condition holds; it is errLate
// if that takes longer than limit.
func (s *station) run(ctx context.Context, l load, limit time.Duration, until func() bool) error {
	return s.client.Do(func() error {
		end := time.Now().Add(limit)
		next := time.Now()
		for !until() {
			now := time.Now()
			switch {
			case ctx.Err() != nil:
				return ctx.Err()
			case now.After(end):
				return errLate
			}
			// What a pause of the whole machine kept from being sent is left out.
			if now.Sub(next) > 20*time.Millisecond {
				next = now
			}
			for ; l.goesOn(s.began) && !next.After(now); next = next.Add(l.every) {
				if err := s.dial(l.to, now); err != nil {
					return err
				}
			}
			s.expire(now)
			if err := s.handle(); err != nil {
				return err
			}
		}
		return nil
	})
}

// pass is run for a time.
func (s *station) pass(ctx context.Context, l load, d time.Duration) error {
	end := time.Now().Add(d)
	return s.run(ctx, l, d+time.Second, func() bool { return !time.Now().Before(end) })
}

// drain waits until all flows are over, which they are after patience.
func (s *station) drain(ctx context.Context) error {
	return s.run(ctx, load{}, 2*patience, func() bool { return s.pending() == 0 })
}

// dial begins a flow. The thread is in the client's namespace.
func (s *station) dial(to netip.AddrPort, now time.Time) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	f := &flow{fd: fd, began: now, count: s.counts}
	s.began++
	s.ends[fd] = f
	s.waiting = append(s.waiting, f)
	err = unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())})
	switch {
	case errors.Is(err, unix.EINPROGRESS), errors.Is(err, unix.EINTR):
	case err != nil: // such as ICMP errors that are remembered
		s.fail(f, err)
		return nil
	}
	return s.watch(fd, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLET)
}

// expire fails the flows that have waited too long.
func (s *station) expire(now time.Time) {
	for len(s.waiting) > 0 {
		f := s.waiting[0]
		if !f.over && now.Sub(f.began) < patience {
			return
		}
		if !f.over {
			s.fail(f, errors.New("no answer"))
		}
		s.waiting = s.waiting[1:]
	}
}

func (s *station) fail(f *flow, why error) {
	f.over = true
	if f.count == s.counts {
		s.failed++
		s.reasons[why.Error()]++
	}
	s.drop(f.fd)
}

// drop closes a socket of a connection.
func (s *station) drop(fd int) {
	delete(s.ends, fd)
	_ = unix.Close(fd)
}

// handle waits for events, for a millisecond at most.
func (s *station) handle() error {
	n, err := unix.EpollWait(s.epoll, s.events[:], 1)
	if err != nil && !errors.Is(err, unix.EINTR) {
		return os.NewSyscallError("epoll_wait", err)
	}
	for _, e := range s.events[:max(n, 0)] {
		fd := int(e.Fd)
		f, open := s.ends[fd]
		switch {
		case fd == s.wire.fd:
			err = s.wire.read()
		case s.servers[fd]:
			err = s.accept(fd)
		case !open: // closed by an event before this one
		case f == nil:
			s.answer(fd)
		default:
			s.ask(f)
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return nil
}

// accept takes the connections of a target's. Those that ended meanwhile are
// nobody's.
func (s *station) accept(listener int) error {
	for {
		fd, _, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.ECONNABORTED), errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return os.NewSyscallError("accept4", err)
		}
		s.ends[fd] = nil
		if err := s.watch(fd, unix.EPOLLIN); err != nil {
			return err
		}
	}
}

// answer answers a question, and closes when the client has.
func (s *station) answer(fd int) {
	var b [256]byte
	n, err := unix.Read(fd, b[:])
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
	case err != nil || n == 0:
		s.drop(fd)
	case bytes.HasSuffix(b[:n], question):
		_, _ = unix.Write(fd, reply) // the client notices if it gets none
	}
}

// ask sends the question as soon as it can, and takes the answer.
func (s *station) ask(f *flow) {
	if f.over { // and kept open
		return
	}
	if !f.asked {
		_, err := unix.Write(f.fd, question)
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOTCONN):
			return // it is not connected yet
		case err != nil:
			s.fail(f, err)
			return
		}
		f.asked = true
	}
	var b [16]byte
	n, err := unix.Read(f.fd, b[:])
	switch {
	case errors.Is(err, unix.EAGAIN):
	case err != nil:
		s.fail(f, err)
	case !bytes.Equal(b[:n], reply):
		s.fail(f, errors.New("closed without an answer"))
	default:
		f.over = true
		if f.count == s.counts {
			s.answered++
		}
		if !s.keep {
			s.drop(f.fd)
		}
	}
}
