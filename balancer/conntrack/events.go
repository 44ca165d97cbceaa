package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"
	"unsafe"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"nlb/balancer/events"
)

// eventBuffer takes the ends of some 20,000 flows, at about 800 bytes each as
// the kernel charges them: a second of them while a large dump is being read.
const eventBuffer = 16 << 20

// eventBatch is how many events are taken in before others get at the ledger.
const eventBatch = 64

// eventRest is for how long nobody waits for events after some were taken in. The
// kernel may send one in the path of a packet, which to wake us for it would delay by
// more than to send it. Whoever asks for counts takes in what is there first.
const eventRest = 20 * time.Millisecond

// A listener is a socket that gets the end of every flow of ours. Go's poller does
// not know it, as that would be woken for each event whether somebody waits or not.
type listener struct {
	fd     int
	wake   *os.File // an eventfd that ends a wait
	buf    []byte
	drops  uint64 // events the kernel had dropped when it was last asked
	member bool   // of those whom the kernel tells
}

// listen opens a listener, which is told of nothing before it has joined. The kernel
// drops events of flows that are not counted before they take room in it.
func listen(mask, uncounted uint32, buffer int) (*listener, error) {
	fd, err := open(unix.SOCK_NONBLOCK)
	if err != nil {
		return nil, err
	}
	setReceiveBuffer(fd, buffer)
	wake := -1
	if err = attachFilter(fd, onlyMarked(mask, uncounted)); err == nil {
		wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &listener{fd: fd, wake: os.NewFile(uintptr(wake), "conntrack wake"), buf: make([]byte, 16<<10)}, nil
}

func (l *listener) close() {
	unix.Close(l.fd)
	_ = l.wake.Close()
}

// interrupt ends the wait that is under way, and every later one.
func (l *listener) interrupt() {
	_, _ = l.wake.Write(binary.NativeEndian.AppendUint64(nil, 1)) // it may be closed
}

// await waits for an event, or an interrupt.
func (l *listener) await() error {
	fds := []unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLIN}, {Fd: int32(l.wake.Fd()), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(fds, -1)
		if err != unix.EINTR {
			return err
		}
	}
}

// join has the kernel tell. A listener that is nil cannot.
func (l *listener) join() error { return l.setMember(true, unix.NETLINK_ADD_MEMBERSHIP) }

// leave has it say nothing more.
func (l *listener) leave() error { return l.setMember(false, unix.NETLINK_DROP_MEMBERSHIP) }

func (l *listener) setMember(member bool, option int) error {
	if l == nil || l.member == member {
		return nil
	}
	if err := unix.SetsockoptInt(l.fd, unix.SOL_NETLINK, option, unix.NFNLGRP_CONNTRACK_DESTROY); err != nil {
		return fmt.Errorf("subscribe to conntrack events: %w", err)
	}
	l.member = member
	return nil
}

func attachFilter(fd int, filter []unix.SockFilter) error {
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog); err != nil {
		return fmt.Errorf("filter conntrack events: %w", err)
	}
	return nil
}

// onlyMarked is a filter (bpf(4) in the BSDs, linux/filter.h) that passes
// messages whose CTA_MARK has a bit of mask, and not just those of uncounted. The
// kernel leaves the attribute out when the mark is 0.
func onlyMarked(mask, uncounted uint32) []unix.SockFilter {
	// A load from here searches, from offset A, for an attribute of type X.
	// Its offset goes to A; 0 says there is none.
	const findAttribute = 0x100000000 - 0x1000 + 12 // SKF_AD_OFF + SKF_AD_NLATTR
	return []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_IMM, K: nlHeader + nfHeader},
		{Code: unix.BPF_LDX | unix.BPF_IMM, K: ctaMark},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: findAttribute},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: 0, Jt: 5},
		{Code: unix.BPF_MISC | unix.BPF_TAX},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_IND, K: unix.SizeofNlAttr},
		{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: mask},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: 0, Jt: 1},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uncounted, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff},
	}
}

// lost returns how many events were dropped since the last call.
func (l *listener) lost() uint64 {
	var info [unix.SK_MEMINFO_DROPS + 1]uint32
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(l.fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	now := uint64(info[unix.SK_MEMINFO_DROPS])
	if errno != 0 || now == l.drops {
		// The kernel had no memory for an event, and dropped it before it got
		// to a socket.
		return 1
	}
	n := now - l.drops
	l.drops = now
	return n
}

// Run listens for the ends of flows until ctx ends, which is no error. Ready
// tells when it does; flows that begin before it may not be heard when they
// end. It starts no goroutine, and may be called again when it has returned.
func (t *Tracker) Run(ctx context.Context) error {
	l, err := listen(t.mask, t.uncounted, eventBuffer)
	if err != nil {
		return fmt.Errorf("conntrack: %w", err)
	}
	defer l.close()
	if err := t.attach(l); err != nil {
		return err
	}
	defer t.detach()
	defer context.AfterFunc(ctx, l.interrupt)()

	if err := t.hear(ctx, l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("conntrack: %w", err)
	}
	return nil
}

// Ready is closed once Run listens and knows the flows that were there before.
func (t *Tracker) Ready() <-chan struct{} { return t.ready }

func (t *Tracker) attach(l *listener) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.events != nil {
		return errors.New("conntrack: the tracker runs already")
	}
	t.events = l
	return l.join() // the baseline shows whether there is a flow, if none is expected
}

// ExpectNone says that no flow to count will begin. Once none is left, Run does not
// listen: for whoever does, the kernel makes a message of each flow's end, also of
// those that are not counted.
func (t *Tracker) ExpectNone() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.idle = true // the next survey shows whether one is left
}

// Expect says that flows to count may begin, as they may from the start. Call it before
// the first can, after an ExpectNone. It fails if the kernel does not tell of flows'
// ends.
func (t *Tracker) Expect() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.idle = false
	return t.events.join()
}

func (t *Tracker) detach() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.events = nil
}

func (t *Tracker) hear(ctx context.Context, l *listener) error {
	// A dump that is older than the subscription would miss the flows that
	// came in between, so it is not reused.
	if err := t.baseline(ctx); err != nil {
		return err
	}
	t.readyOnce.Do(func() { close(t.ready) })

	for ctx.Err() == nil {
		if err := l.await(); err != nil {
			return fmt.Errorf("wait for conntrack events: %w", err)
		}
		for more := true; more; {
			t.mu.Lock()
			var err error
			more, err = t.take(eventBatch)
			t.mu.Unlock()
			if err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(eventRest):
		}
	}
	return nil
}

func (t *Tracker) baseline(ctx context.Context) error {
	select {
	case t.dumping <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-t.dumping }()
	return t.survey(ctx)
}

// drain takes all events in that were sent so far. The caller holds mu.
func (t *Tracker) drain() error {
	if t.events == nil {
		return nil
	}
	for more := true; more; {
		var err error
		if more, err = t.take(eventBatch); err != nil {
			return err
		}
	}
	return nil
}

// take takes in up to n events, and reports whether there may be more. The
// caller holds mu.
func (t *Tracker) take(n int) (more bool, err error) {
	for range n {
		size, err := unix.Read(t.events.fd, t.events.buf)
		switch {
		case err == unix.EAGAIN:
			return false, nil
		case err == unix.EINTR:
			continue
		case err == unix.ENOBUFS:
			t.overrun()
			continue
		case err != nil:
			return false, fmt.Errorf("read conntrack events: %w", err)
		}
		t.note(t.events.buf[:size])
	}
	return true, nil
}

// note enters the events of one datagram into the ledger.
func (t *Tracker) note(b []byte) {
	var r record
	for m, rest, ok := nextMessage(b); ok; m, rest, ok = nextMessage(rest) {
		if m.typ != msgDelete || r.parse(m) != nil {
			continue
		}
		if key := t.key(&r); key != 0 {
			t.ledger.end(key, &r)
		}
	}
}

// overrun counts events that were lost. There is nothing to repair: the next
// dump finds the flows gone.
func (t *Tracker) overrun() {
	n := t.events.lost()
	t.stats.LostEvents += n
	if !t.warned {
		t.warned = true
		t.log.Warn("conntrack events were lost: the bytes that those flows carried at last are not counted",
			events.FlowEventsLost.Field(), zap.Uint64("lost", n), zap.Uint64("lost_total", t.stats.LostEvents))
	}
}
