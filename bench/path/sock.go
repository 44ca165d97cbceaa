package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// patience is how long a packet may take that must arrive. On an idle machine
// it is there when the call that sent it returns.
const patience = 2 * time.Second

// sockets are a site's sockets on its targets, by target.
type sockets struct {
	udp, tcp, probes [targets]int
	opened           []int
}

func (s *sockets) close() {
	for _, fd := range s.opened {
		_ = unix.Close(fd)
	}
	s.opened = nil
}

// listen opens the targets' sockets. Health checks have a port to themselves,
// where the kernel answers alone.
func (s *site) listen() error {
	for i, t := range s.Targets {
		err := t.Do(func() error {
			for _, o := range []struct {
				fd   *int
				kind int
				port int
			}{
				{&s.sockets.udp[i], unix.SOCK_DGRAM, port},
				{&s.sockets.tcp[i], unix.SOCK_STREAM, port},
				{&s.sockets.probes[i], unix.SOCK_STREAM, probePort},
			} {
				fd, err := bound(o.kind, t.Addr4, o.port)
				if err != nil {
					return err
				}
				s.sockets.opened = append(s.sockets.opened, fd)
				if o.kind == unix.SOCK_STREAM {
					if err := unix.Listen(fd, 128); err != nil {
						return os.NewSyscallError("listen", err)
					}
				}
				*o.fd = fd
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("%s: %w", t.Name, err)
		}
	}
	return nil
}

// bound makes a non-blocking IPv4 socket in the thread's namespace.
func bound(kind int, a netip.Addr, port int) (fd int, err error) {
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

// errLate is a packet that did not arrive within patience.
var errLate = errors.New("no packet arrived")

// await waits until one of the sockets can be read and returns its place.
func await(fds []unix.PollFd) (int, error) {
	for {
		n, err := unix.Poll(fds, int(patience.Milliseconds()))
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

func readable(fds ...int) []unix.PollFd {
	p := make([]unix.PollFd, len(fds))
	for i, fd := range fds {
		p[i] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	}
	return p
}

// mmsghdr is struct mmsghdr of sendmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
}

// A batch is messages of equal size for one system call.
type batch struct {
	hdrs []mmsghdr
	iovs []unix.Iovec
	data []byte
}

func newBatch(n, size int) *batch {
	b := &batch{make([]mmsghdr, n), make([]unix.Iovec, n), make([]byte, n*size)}
	for i := range b.hdrs {
		b.iovs[i].Base = &b.data[i*size]
		b.iovs[i].SetLen(size)
		b.hdrs[i].hdr.Iov = &b.iovs[i]
		b.hdrs[i].hdr.SetIovlen(1)
	}
	return b
}

// send and receive return how many messages went or came. RawSyscall: the calls
// do not sleep, and the scheduler need not hear of them.

func (b *batch) send(fd int) (int, error) { return b.do(unix.SYS_SENDMMSG, fd) }

func (b *batch) receive(fd int) (int, error) { return b.do(unix.SYS_RECVMMSG, fd) }

func (b *batch) do(call uintptr, fd int) (int, error) {
	n, _, errno := unix.RawSyscall6(call, uintptr(fd), uintptr(unsafe.Pointer(&b.hdrs[0])), uintptr(len(b.hdrs)), unix.MSG_DONTWAIT, 0, 0)
	runtime.KeepAlive(b)
	switch errno {
	case 0:
		return int(n), nil
	case unix.EAGAIN:
		return 0, nil
	}
	return 0, errno
}
