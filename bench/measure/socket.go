package measure

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long a packet may take that must arrive. On an idle machine
// it is there when the call that sent it returns, unless the kernel's softirq
// thread has taken it over.
const patience = 2 * time.Second

// backlog is the kernel's own limit (net.core.somaxconn). Nobody accepts the probes
// of a run, of which there may be a thousand.
const backlog = 4096

// errLate is a packet that did not arrive within patience.
var errLate = errors.New("no packet arrived")

// Sockets are what the servers of a network listen on, by server. The zero
// Sockets are none.
type Sockets struct {
	UDP, TCP []int // on Port
	opened   []int
}

// Listen opens the sockets of one more server at an address in the thread's
// namespace. Health checks have a port to themselves, where the kernel answers
// alone. What it opened before an error, Close closes.
func (s *Sockets) Listen(at netip.Addr) error {
	udp, err := s.open(unix.SOCK_DGRAM, at, Port)
	if err != nil {
		return err
	}
	tcp, err := s.open(unix.SOCK_STREAM, at, Port)
	if err != nil {
		return err
	}
	s.UDP, s.TCP = append(s.UDP, udp), append(s.TCP, tcp)
	_, err = s.open(unix.SOCK_STREAM, at, ProbePort)
	return err
}

func (s *Sockets) open(kind int, at netip.Addr, port int) (fd int, err error) {
	fd, err = Bind(kind, at, port)
	if err != nil {
		return -1, err
	}
	s.opened = append(s.opened, fd)
	if kind == unix.SOCK_STREAM {
		err = os.NewSyscallError("listen", unix.Listen(fd, backlog))
	}
	return fd, err
}

// Close closes the sockets of all servers.
func (s *Sockets) Close() {
	for _, fd := range s.opened {
		_ = unix.Close(fd)
	}
	*s = Sockets{}
}

// Bind makes a non-blocking IPv4 socket in the thread's namespace, of a kind as
// SOCK_STREAM. The errors are those of socket(2) and bind(2).
func Bind(kind int, a netip.Addr, port int) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_INET, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: a.As4(), Port: port}); err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("bind %s:%d: %w", a, port, err)
	}
	return fd, nil
}

// Readable asks FirstReadable for sockets that can be read. It may be kept, so
// that asking again allocates nothing.
func Readable(fds ...int) []unix.PollFd {
	p := make([]unix.PollFd, len(fds))
	for i, fd := range fds {
		p[i] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	}
	return p
}

// FirstReadable waits until one of the sockets can be read and returns its
// place. After two seconds it is an error that none can.
func FirstReadable(fds []unix.PollFd) (int, error) { return firstReadable(fds, patience) }

func firstReadable(fds []unix.PollFd, limit time.Duration) (int, error) {
	for {
		n, err := unix.Poll(fds, int(limit.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR): // the runtime's own signals
			continue
		case err != nil:
			return 0, os.NewSyscallError("poll", err)
		case n == 0:
			return 0, errLate
		}
		for i := range fds {
			if fds[i].Revents != 0 {
				return i, nil
			}
		}
	}
}

// Pass sends a message on one socket of a connection and reads it, into itself,
// from the other. It is short, and arrives in one piece or not at all: anything
// else is an error.
func Pass(from, to int, message []byte) error {
	if _, err := unix.Write(from, message); err != nil {
		return os.NewSyscallError("write", err)
	}
	for {
		n, err := unix.Read(to, message)
		switch {
		case errors.Is(err, unix.EAGAIN):
			if _, err := FirstReadable(Readable(to)); err != nil {
				return err
			}
			continue
		case err != nil:
			return os.NewSyscallError("read", err)
		case n != len(message):
			return fmt.Errorf("%d bytes arrived of %d", n, len(message))
		}
		return nil
	}
}
