package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// A Scan asks every port from First to Last of one address.
type Scan struct {
	Network string // "tcp" or "udp"
	Dst     netip.Addr
	First   uint16 // default 1
	Last    uint16 // default 65535
	// Timeout is how long a port has to answer. The default is 1.5 s for TCP,
	// long enough for the kernel to repeat a lost SYN after 1 s (RFC 6298), and
	// 0.5 s for UDP, where unanswered ports are asked a second time.
	Timeout time.Duration
	// Window is the number of TCP ports asked at a time; default 16384. A silent
	// host takes ports / Window × Timeout: 6 s for all with the defaults.
	Window int
}

// Ports is what a scan found, each list ascending.
type Ports struct {
	Open []uint16 `json:"open"` // accepted (TCP) or answered (UDP)
	// Refused by RST (TCP) or ICMP port unreachable (UDP). Hosts limit the rate
	// of ICMP errors, so that of UDP is not complete.
	Refused     []uint16      `json:"refused"`
	Unreachable []uint16      `json:"unreachable"` // any other error
	Silent      int           `json:"silent"`      // how many gave no sign
	Elapsed     time.Duration `json:"elapsed"`
}

// Scan asks the ports of an address.
func (a *Agent) Scan(ctx context.Context, o Scan) (*Ports, error) {
	var found Ports
	if _, err := a.ask(ctx, "scan", o, &found); err != nil {
		return nil, err
	}
	return &found, nil
}

func (s *server) scan(ctx context.Context, _ uint64, o Scan) (*Ports, error) {
	if o.First == 0 {
		o.First = 1
	}
	if o.Last == 0 {
		o.Last = 65535
	}
	begin := time.Now()
	found := &Ports{}
	var err error
	switch o.Network {
	case "tcp":
		err = o.tcp(ctx, found)
	case "udp":
		err = o.udp(ctx, found)
	default:
		err = fmt.Errorf("%q is neither tcp nor udp", o.Network)
	}
	if err != nil {
		return nil, err
	}
	for _, list := range [][]uint16{found.Open, found.Refused, found.Unreachable} {
		slices.Sort(list)
	}
	found.Silent = o.size() - len(found.Open) - len(found.Refused) - len(found.Unreachable)
	found.Elapsed = time.Since(begin)
	return found, nil
}

func (o Scan) size() int { return max(0, int(o.Last)-int(o.First)+1) }

func (o Scan) family() int {
	if o.Dst.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func (o Scan) sockaddr(port uint16) unix.Sockaddr {
	if o.Dst.Is4() {
		return &unix.SockaddrInet4{Port: int(port), Addr: o.Dst.As4()}
	}
	return &unix.SockaddrInet6{Port: int(port), Addr: o.Dst.As16()}
}

// note files a port under what its socket said.
func (p *Ports) note(port uint16, errno error) {
	switch {
	case errno == nil:
		p.Open = append(p.Open, port)
	case errors.Is(errno, unix.ECONNREFUSED):
		p.Refused = append(p.Refused, port)
	default:
		p.Unreachable = append(p.Unreachable, port)
	}
}

// A probe is a connection attempt.
type probe struct {
	fd       int
	port     uint16
	deadline time.Time
	done     bool
}

// A tcpScan keeps a window of attempts going. Bare non-blocking sockets, since
// tens of thousands of goroutines and timers cost more than the packets.
type tcpScan struct {
	Scan
	epoll   int
	found   *Ports
	queue   []*probe // in the order of their deadlines
	waiting map[int]*probe
	events  []unix.EpollEvent
}

func (o Scan) tcp(ctx context.Context, found *Ports) error {
	if o.Timeout == 0 {
		o.Timeout = 1500 * time.Millisecond
	}
	if o.Window == 0 {
		o.Window = 16384
	}
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return err
	}
	t := &tcpScan{Scan: o, epoll: epoll, found: found, waiting: map[int]*probe{}, events: make([]unix.EpollEvent, 1024)}
	defer t.close()
	// Few sockets at a time between looks at the answers, so that their
	// deadlines measure the network and not this loop.
	const batch = 256
	for next := int(o.First); next <= int(o.Last) || len(t.waiting) > 0; {
		for n := 0; n < batch && next <= int(o.Last) && len(t.waiting) < o.Window; n++ {
			if err := t.ask(uint16(next)); err != nil {
				return err
			}
			next++
		}
		full := next > int(o.Last) || len(t.waiting) >= o.Window
		if err := t.collect(full); err != nil {
			return err
		}
		t.expire()
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

func (t *tcpScan) close() {
	for fd := range t.waiting {
		_ = unix.Close(fd)
	}
	_ = unix.Close(t.epoll)
}

// ask starts one attempt. The error is this host's, such as too many files.
func (t *tcpScan) ask(port uint16) error {
	fd, err := unix.Socket(t.family(), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	// A reset ends an accepted connection without leaving a TIME-WAIT behind.
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	if err := unix.Connect(fd, t.sockaddr(port)); !errors.Is(err, unix.EINPROGRESS) {
		_ = unix.Close(fd)
		t.found.note(port, err)
		return nil
	}
	event := unix.EpollEvent{Events: unix.EPOLLOUT, Fd: int32(fd)}
	if err := unix.EpollCtl(t.epoll, unix.EPOLL_CTL_ADD, fd, &event); err != nil {
		_ = unix.Close(fd)
		return fmt.Errorf("epoll: %w", err)
	}
	p := &probe{fd: fd, port: port, deadline: time.Now().Add(t.Timeout)}
	t.waiting[fd] = p
	t.queue = append(t.queue, p)
	return nil
}

// collect takes the answers there are, and waits for one if it should.
func (t *tcpScan) collect(wait bool) error {
	millis := 0
	if wait {
		millis = 10
	}
	n, err := unix.EpollWait(t.epoll, t.events, millis)
	if err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("epoll: %w", err)
	}
	for _, e := range t.events[:max(n, 0)] {
		p := t.waiting[int(e.Fd)]
		errno, err := unix.GetsockoptInt(p.fd, unix.SOL_SOCKET, unix.SO_ERROR)
		switch {
		case err != nil:
			return fmt.Errorf("SO_ERROR: %w", err)
		case errno == 0:
			t.found.note(p.port, nil)
		default:
			t.found.note(p.port, unix.Errno(errno))
		}
		t.end(p)
	}
	return nil
}

// expire gives up attempts that had their time.
func (t *tcpScan) expire() {
	now := time.Now()
	for len(t.queue) > 0 && (t.queue[0].done || now.After(t.queue[0].deadline)) {
		if p := t.queue[0]; !p.done {
			t.end(p)
		}
		t.queue = t.queue[1:]
	}
}

func (t *tcpScan) end(p *probe) {
	p.done = true
	delete(t.waiting, p.fd)
	_ = unix.Close(p.fd)
}

// A udpScan asks all ports from one socket; the answers tell theirs.
type udpScan struct {
	Scan
	fd     int
	heard  map[uint16]bool
	found  *Ports
	buffer []byte
	ctl    []byte
}

func (o Scan) udp(ctx context.Context, found *Ports) error {
	if o.Timeout == 0 {
		o.Timeout = 500 * time.Millisecond
	}
	fd, err := unix.Socket(o.family(), unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	u := &udpScan{Scan: o, fd: fd, heard: map[uint16]bool{}, found: found, buffer: make([]byte, 2048), ctl: make([]byte, 512)}
	if err := u.configure(); err != nil {
		return err
	}
	// A lost datagram must not hide an open port, so there are two rounds.
	for range 2 {
		if err := u.round(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (u *udpScan) configure() error {
	// Room for an answer from every port; the kernel's limit applies to SO_RCVBUF only.
	if err := unix.SetsockoptInt(u.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20); err != nil {
		return fmt.Errorf("SO_RCVBUFFORCE: %w", err)
	}
	level, opt := unix.IPPROTO_IP, unix.IP_RECVERR
	if !u.Dst.Is4() {
		level, opt = unix.IPPROTO_IPV6, unix.IPV6_RECVERR
	}
	if err := unix.SetsockoptInt(u.fd, level, opt, 1); err != nil {
		return fmt.Errorf("IP_RECVERR: %w", err)
	}
	return nil
}

// round asks the ports that were not heard of yet and waits for the last one's time.
func (u *udpScan) round(ctx context.Context) error {
	for port := int(u.First); port <= int(u.Last); port++ {
		if u.heard[uint16(port)] {
			continue
		}
		if err := u.ask(uint16(port)); err != nil {
			return err
		}
		if port%64 == 0 {
			if err := errors.Join(u.collect(), ctx.Err()); err != nil {
				return err
			}
		}
	}
	for end := time.Now().Add(u.Timeout); ; {
		if err := errors.Join(u.collect(), ctx.Err()); err != nil {
			return err
		}
		left := time.Until(end)
		if left <= 0 || len(u.heard) == u.size() {
			return nil
		}
		poll := []unix.PollFd{{Fd: int32(u.fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(poll, int(min(left, 50*time.Millisecond).Milliseconds())+1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("poll: %w", err)
		}
	}
}

func (u *udpScan) ask(port uint16) error {
	const attempts = 100
	var err error
	for range attempts {
		switch err = unix.Sendto(u.fd, []byte("who\n"), 0, u.sockaddr(port)); {
		case err == nil:
			return nil
		case errors.Is(err, unix.EAGAIN):
			// The send buffer is full, of datagrams waiting for a neighbour's address.
			poll := []unix.PollFd{{Fd: int32(u.fd), Events: unix.POLLOUT}}
			_, _ = unix.Poll(poll, 10)
		case errors.Is(err, unix.ENOBUFS):
			_, _ = unix.Poll(nil, 1)
		case u.pending():
			// The error was an earlier datagram's, reported here once; the queue names it.
			if err := u.errors(); err != nil {
				return err
			}
		default:
			u.hear(port, err) // this datagram's own, such as no route
			return nil
		}
	}
	return fmt.Errorf("send to port %d: %w", port, err)
}

// pending reports whether the error queue has anything.
func (u *udpScan) pending() bool {
	poll := []unix.PollFd{{Fd: int32(u.fd)}}
	_, err := unix.Poll(poll, 0)
	return err == nil && poll[0].Revents&unix.POLLERR != 0
}

func (u *udpScan) hear(port uint16, err error) {
	if !u.heard[port] && port >= u.First && port <= u.Last {
		u.heard[port] = true
		u.found.note(port, err)
	}
}

func (u *udpScan) collect() error { return errors.Join(u.answers(), u.errors()) }

// answers takes the datagrams that arrived, of the address that was asked.
func (u *udpScan) answers() error {
	for {
		_, from, err := unix.Recvfrom(u.fd, u.buffer, 0)
		switch {
		case err == nil:
			if a := addrPort(from); a.Addr() == u.Dst {
				u.hear(a.Port(), nil)
			}
		case errors.Is(err, unix.EAGAIN):
			return nil
		case !errors.Is(err, unix.EINTR) && !u.pending():
			// With IP_RECVERR, an ICMP error is reported here too; it is no error of ours.
			return nil
		default:
			if err := u.errors(); err != nil {
				return err
			}
		}
	}
}

// errors takes the ICMP errors that arrived: the message's name is the address
// the lost datagram was sent to, its control message the error (ip(7), IP_RECVERR).
func (u *udpScan) errors() error {
	for {
		_, n, _, to, err := unix.Recvmsg(u.fd, u.buffer, u.ctl, unix.MSG_ERRQUEUE)
		if errors.Is(err, unix.EAGAIN) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("error queue: %w", err)
		}
		msgs, err := unix.ParseSocketControlMessage(u.ctl[:n])
		if err != nil {
			return fmt.Errorf("error queue: %w", err)
		}
		for _, m := range msgs {
			recverr := m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_RECVERR ||
				m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_RECVERR
			if recverr && len(m.Data) >= 4 {
				// ee_errno is the first member of struct sock_extended_err.
				u.hear(addrPort(to).Port(), unix.Errno(binary.NativeEndian.Uint32(m.Data)))
			}
		}
	}
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
	}
	return netip.AddrPort{}
}
