package traffic

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The system calls of the generator. They do not wait, but for sleep, and the Go
// scheduler need not hear of them (RawSyscall).

// call repeats what a signal interrupted.
//
//go:uintptrescapes
func call(number, a, b, c, d, e, f uintptr) (int, error) {
	for {
		n, _, errno := unix.RawSyscall6(number, a, b, c, d, e, f)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

func read(fd int32, p []byte) (int, error) {
	return call(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)), 0, 0, 0)
}

// discard takes bytes from a TCP socket without copying them (tcp(7), MSG_TRUNC).
func discard(fd int32, p []byte) (int, error) {
	return call(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)), unix.MSG_TRUNC, 0, 0)
}

func write(fd int32, p []byte) (int, error) {
	return call(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)), unix.MSG_NOSIGNAL, 0, 0)
}

// A caller is where accept leaves the address of whom it accepts.
type caller struct {
	name unix.RawSockaddrInet4
	size uint32
}

func (c *caller) address() netip.AddrPort {
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&c.name.Port))[:])
	return netip.AddrPortFrom(netip.AddrFrom4(c.name.Addr), port)
}

func accept(listener int32, from *caller) (int32, error) {
	from.size = unix.SizeofSockaddrInet4
	n, err := call(unix.SYS_ACCEPT4, uintptr(listener), uintptr(unsafe.Pointer(&from.name)), uintptr(unsafe.Pointer(&from.size)),
		unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	return int32(n), err
}

func closeFD(fd int32) { _, _, _ = unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

// dial begins a connection from the thread's namespace.
func dial(to *unix.RawSockaddrInet4) (int32, error) {
	n, err := call(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0, 0, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	fd := int32(n)
	_, err = call(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(to)), unix.SizeofSockaddrInet4, 0, 0, 0)
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		closeFD(fd)
		return -1, os.NewSyscallError("connect", err)
	}
	return fd, nil
}

// name is an address for dial.
func name(a netip.AddrPort) *unix.RawSockaddrInet4 {
	n := &unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: a.Addr().As4()}
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&n.Port))[:], a.Port())
	return n
}

// local is the address of a socket's own end.
func local(fd int32) (netip.AddrPort, error) {
	sa, err := unix.Getsockname(int(fd))
	if err != nil {
		return netip.AddrPort{}, os.NewSyscallError("getsockname", err)
	}
	in, ok := sa.(*unix.SockaddrInet4)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("a socket of %T", sa)
	}
	return netip.AddrPortFrom(netip.AddrFrom4(in.Addr), uint16(in.Port)), nil
}

// undelayed sends small messages at once.
func undelayed(fd int32) error {
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
}

// listening makes a listening socket in the thread's namespace.
func listening(at netip.AddrPort) (int32, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	err = unix.Bind(fd, &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())})
	if err == nil {
		err = unix.Listen(fd, 4096)
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("listen on %s: %w", at, err)
	}
	return int32(fd), nil
}

// sleep waits for events, to the nanosecond. It asks without waiting first:
// under load there are always some.
func (s *station) sleep(d time.Duration) int {
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(s.epoll), uintptr(unsafe.Pointer(&s.events[0])), uintptr(len(s.events)), 0, 0, 0)
	switch {
	case errno != 0:
		return 0 // EINTR, the only one for arguments that are right
	case n > 0 || d <= 0:
		return int(n)
	}
	ts := unix.NsecToTimespec(int64(d))
	n, _, errno = unix.Syscall6(unix.SYS_EPOLL_PWAIT2, uintptr(s.epoll), uintptr(unsafe.Pointer(&s.events[0])), uintptr(len(s.events)),
		uintptr(unsafe.Pointer(&ts)), 0, 0)
	if errno != 0 {
		return 0
	}
	return int(n)
}

// drain discards all that a socket has and returns how much that was.
func drain(fd int32, p []byte) (n int, err error) {
	for {
		more, err := discard(fd, p)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return n, nil
		case err != nil:
			return n, fmt.Errorf("receive: %w", err)
		case more == 0:
			return n, errors.New("the connection ended early")
		}
		n += more
		if more < len(p) {
			return n, nil // that was all, epoll(7) says
		}
	}
}
