package relay

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// pipeSize is asked for each pipe: a large one takes all that a receive
	// buffer has at once.
	pipeSize = 512 << 10
	// leastPipe is below what a pipe has by default. An unprivileged user with
	// many pipes gets them of two pages (fs.pipe-user-pages-soft, pipe(7)): a
	// buffer is better than that.
	leastPipe = 64 << 10
)

// A linuxKernel is the real one. Its calls do not tell the Go scheduler that
// they begin and end (RawSyscall): none of them waits, and each would pay about
// 50 ns for it, ten to twenty times in a short connection.
type linuxKernel struct {
	epoll int32
	// Room for arguments, so that none is allocated.
	name   [unix.SizeofSockaddrInet6]byte
	length uint32
	value  int32
	event  unix.EpollEvent
}

// sys repeats what a signal interrupted. With an error it returns 0. What its
// arguments point to stays alive, and off the stack, which may move.
//
//go:uintptrescapes
func sys(number, a, b, c uintptr) (int, unix.Errno) { return sys6(number, a, b, c, 0, 0, 0) }

//go:uintptrescapes
func sys6(number, a, b, c, d, e, f uintptr) (int, unix.Errno) {
	for {
		n, _, err := unix.RawSyscall6(number, a, b, c, d, e, f)
		switch err {
		case 0:
			return int(n), 0
		case unix.EINTR:
		default:
			return 0, err
		}
	}
}

func (k *linuxKernel) watch(fd int32, t token) unix.Errno {
	return k.add(fd, watched, t)
}

func (k *linuxKernel) add(fd int32, events uint32, t token) unix.Errno {
	k.event = unix.EpollEvent{Events: events, Fd: t.id, Pad: t.generation}
	_, _, err := unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(k.epoll), unix.EPOLL_CTL_ADD, uintptr(fd), uintptr(unsafe.Pointer(&k.event)), 0, 0)
	return err
}

func (k *linuxKernel) remove(fd int32) {
	_, _, _ = unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(k.epoll), unix.EPOLL_CTL_DEL, uintptr(fd), 0, 0, 0)
}

// poll returns the events that are there.
func (k *linuxKernel) poll(events []unix.EpollEvent) int {
	n, _, err := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(k.epoll), uintptr(unsafe.Pointer(&events[0])), uintptr(len(events)), 0, 0, 0)
	if err != 0 {
		return 0
	}
	return int(n)
}

// wait waits for events, milliseconds at most.
func (k *linuxKernel) wait(events []unix.EpollEvent, milliseconds int) int {
	n, err := unix.EpollWait(int(k.epoll), events, milliseconds)
	if err != nil {
		return 0 // EINTR, the only one for arguments that are right
	}
	return n
}

func (k *linuxKernel) accept(listener int32) (int32, netip.AddrPort, unix.Errno) {
	k.length = uint32(len(k.name))
	n, err := sys6(unix.SYS_ACCEPT4, uintptr(listener), uintptr(unsafe.Pointer(&k.name)),
		uintptr(unsafe.Pointer(&k.length)), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	if err != 0 {
		return -1, netip.AddrPort{}, err
	}
	return int32(n), k.addrPort(), 0
}

// addrPort is what the kernel wrote to name (struct sockaddr_in or _in6).
func (k *linuxKernel) addrPort() netip.AddrPort {
	port := binary.BigEndian.Uint16(k.name[2:])
	if binary.NativeEndian.Uint16(k.name[:]) == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(k.name[4:])), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte(k.name[8:])).Unmap(), port)
}

// setName writes an address for the kernel and returns its length.
func (k *linuxKernel) setName(a netip.AddrPort) uintptr {
	k.name = [len(k.name)]byte{}
	binary.BigEndian.PutUint16(k.name[2:], a.Port())
	if a.Addr().Is4() {
		binary.NativeEndian.PutUint16(k.name[:], unix.AF_INET)
		*(*[4]byte)(k.name[4:]) = a.Addr().As4()
		return unix.SizeofSockaddrInet4
	}
	binary.NativeEndian.PutUint16(k.name[:], unix.AF_INET6)
	*(*[16]byte)(k.name[8:]) = a.Addr().As16()
	return unix.SizeofSockaddrInet6
}

func (k *linuxKernel) dial(to netip.AddrPort, source netip.Addr, t token) (int32, unix.Errno) {
	af := uintptr(unix.AF_INET6)
	if to.Addr().Is4() {
		af = unix.AF_INET
	}
	n, err := sys(unix.SYS_SOCKET, af, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != 0 {
		return -1, err
	}
	fd := int32(n)
	if err = k.connect(fd, to, source); err == 0 {
		// Not before: a socket that was never connected hangs up.
		err = k.watch(fd, t)
	}
	if err != 0 {
		k.close(fd)
		return -1, err
	}
	return fd, 0
}

func (k *linuxKernel) connect(fd int32, to netip.AddrPort, source netip.Addr) unix.Errno {
	k.set(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	k.set(fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK, 0)
	if source.IsValid() {
		// The port is chosen by connect, which knows the other end: a port then is
		// free for a target even if it is taken for another. The option has the
		// level of IPv4 in both families.
		k.set(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
		length := k.setName(netip.AddrPortFrom(source, 0))
		if _, err := sys(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(&k.name)), length); err != 0 {
			return err
		}
	}
	length := k.setName(to)
	_, err := sys(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&k.name)), length)
	if err == unix.EINPROGRESS {
		return 0
	}
	return err
}

func (k *linuxKernel) set(fd int32, level, option uintptr, value int32) {
	k.value = value
	_, _, _ = unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), level, option, uintptr(unsafe.Pointer(&k.value)), 4, 0)
}

func (k *linuxKernel) inline(fd int32) { k.set(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) }

// acknowledge leaves the interactive mode, which a write begins while an ACK is put
// off (tcp_event_data_sent in net/ipv4/tcp_output.c). In that mode a target whose
// answer is two small writes, by Nagle's rule, would wait 40 ms with the second.
func (k *linuxKernel) acknowledge(fd int32) { k.set(fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK, 1) }

func (k *linuxKernel) outcome(fd int32) unix.Errno {
	var value int32
	k.length = 4
	_, _, err := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_ERROR,
		uintptr(unsafe.Pointer(&value)), uintptr(unsafe.Pointer(&k.length)), 0)
	if err != 0 {
		return err
	}
	return unix.Errno(value)
}

// local is the address of a socket's own end; the zero AddrPort if it has none.
func (k *linuxKernel) local(fd int32) netip.AddrPort {
	k.length = uint32(len(k.name))
	if _, err := sys(unix.SYS_GETSOCKNAME, uintptr(fd), uintptr(unsafe.Pointer(&k.name)), uintptr(unsafe.Pointer(&k.length))); err != 0 {
		return netip.AddrPort{}
	}
	return k.addrPort()
}

func (k *linuxKernel) read(fd int32, p []byte) (int, unix.Errno) {
	return sys(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)))
}

func (k *linuxKernel) write(fd int32, p []byte) (int, unix.Errno) {
	return sys6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)), unix.MSG_NOSIGNAL, 0, 0)
}

func (k *linuxKernel) splice(from, to int32, n int) (int, unix.Errno) {
	return sys6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(n), unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
}

func (k *linuxKernel) finish(fd int32) unix.Errno {
	_, err := sys(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_WR, 0)
	return err
}

// close does not repeat what a signal interrupted: the descriptor is gone by
// then (close(2)).
func (k *linuxKernel) close(fd int32) {
	_, _, _ = unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
}

func (k *linuxKernel) reset(fd int32) {
	linger := unix.Linger{Onoff: 1}
	_, _, _ = unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_LINGER, uintptr(unsafe.Pointer(&linger)), unix.SizeofLinger, 0)
	k.close(fd)
}

func (k *linuxKernel) openPipe() (r, w int32, size int, err unix.Errno) {
	var ends [2]int32
	if _, err = sys(unix.SYS_PIPE2, uintptr(unsafe.Pointer(&ends)), unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err != 0 {
		return -1, -1, 0, err
	}
	size, err = sys(unix.SYS_FCNTL, uintptr(ends[0]), unix.F_SETPIPE_SZ, pipeSize)
	if err != 0 {
		size, err = sys(unix.SYS_FCNTL, uintptr(ends[0]), unix.F_GETPIPE_SZ, 0)
	}
	if err == 0 && size < leastPipe {
		err = unix.ENOMEM
	}
	if err != 0 {
		k.closePipe(ends[0], ends[1])
		return -1, -1, 0, err
	}
	return ends[0], ends[1], size, 0
}

func (k *linuxKernel) closePipe(r, w int32) {
	k.close(r)
	k.close(w)
}
