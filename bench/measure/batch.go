package measure

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mmsghdr is struct mmsghdr of sendmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
}

// A Batch is messages of equal size for one system call.
type Batch struct {
	hdrs []mmsghdr
	iovs []unix.Iovec
	data []byte
	size int
}

// NewBatch makes a batch of n messages with size bytes each; neither is 0.
func NewBatch(n, size int) *Batch {
	b := &Batch{make([]mmsghdr, n), make([]unix.Iovec, n), make([]byte, n*size), size}
	for i := range b.hdrs {
		b.iovs[i].Base = &b.data[i*size]
		b.iovs[i].SetLen(size)
		b.hdrs[i].hdr.Iov = &b.iovs[i]
		b.hdrs[i].hdr.SetIovlen(1)
	}
	return b
}

// Message is where the bytes of message i are.
func (b *Batch) Message(i int) []byte { return b.data[i*b.size : (i+1)*b.size] }

// First is the first n messages of the batch, as a batch of their own.
func (b *Batch) First(n int) *Batch {
	return &Batch{b.hdrs[:n], b.iovs[:n], b.data[:n*b.size], b.size}
}

// Send sends the batch on a socket and returns how many messages went; 0, if
// there is no room for any. RawSyscall: the call does not sleep, and the
// scheduler need not hear of it.
func (b *Batch) Send(fd int) (int, error) { return b.do(unix.SYS_SENDMMSG, fd) }

// Receive reads at most the batch from a socket and returns how many messages
// came; 0, if there are none. It does not sleep either.
func (b *Batch) Receive(fd int) (int, error) { return b.do(unix.SYS_RECVMMSG, fd) }

func (b *Batch) do(call uintptr, fd int) (int, error) {
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
