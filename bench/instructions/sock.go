package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

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

// errLate is a packet that did not arrive within two seconds of the guest's clock.
// It is there when the call that sent it returns, unless the kernel's softirq
// thread has taken it over.
var errLate = errors.New("no packet arrived")

// await waits until one of the sockets can be read and returns its place.
func await(fds ...int) (int, error) {
	p := make([]unix.PollFd, len(fds))
	for i, fd := range fds {
		p[i] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	}
	for {
		n, err := unix.Poll(p, 2000)
		switch {
		case errors.Is(err, unix.EINTR): // the runtime's own signals
			continue
		case err != nil:
			return 0, os.NewSyscallError("poll", err)
		case n == 0:
			return 0, errLate
		}
		for i := range p {
			if p[i].Revents != 0 {
				return i, nil
			}
		}
	}
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
	size int
}

func newBatch(n, size int) *batch {
	b := &batch{make([]mmsghdr, n), make([]unix.Iovec, n), make([]byte, n*size), size}
	for i := range b.hdrs {
		b.iovs[i].Base = &b.data[i*size]
		b.iovs[i].SetLen(size)
		b.hdrs[i].hdr.Iov = &b.iovs[i]
		b.hdrs[i].hdr.SetIovlen(1)
	}
	return b
}

// message is where the bytes of message i are.
func (b *batch) message(i int) []byte { return b.data[i*b.size : (i+1)*b.size] }

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
