package nft

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/bits"

	"golang.org/x/sys/unix"
)

// Watch implements balancer.Watcher: it follows the transactions of everybody
// else. One that touches our table is told; one that does not only moves the
// generation on, so that what we know stays known.
func (d *Dataplane) Watch(ctx context.Context, changed func()) error {
	s, err := dial()
	if err != nil {
		return err
	}
	defer s.close()
	own := d.sock.port
	if err := s.ignore(own); err != nil {
		return err
	}
	if err := d.listen(&listener{s, changed}); err != nil {
		return err
	}
	defer d.listen(nil)
	// What changed before the subscription is seen by looking once more.
	changed()
	touched := false
	for ctx.Err() == nil {
		n, err := s.recvUntil(ctx)
		switch {
		case err == unix.EAGAIN:
			continue
		case err == unix.ENOBUFS:
			if d.stale() {
				changed()
			}
			continue
		case err != nil:
			return fmt.Errorf("follow ruleset changes: %w", err)
		}
		walk(s.buf[:n], func(m message) bool {
			if m.typ != nftSubsys|unix.NFT_MSG_NEWGEN {
				touched = touched || m.family == unix.NFPROTO_INET && text(find(m.body, 1)) == TableName
				return true
			}
			if m.port == own {
				return true
			}
			if touched {
				touched = false
				changed()
			} else {
				d.advance(be32(find(m.body, unix.NFTA_GEN_ID)))
			}
			return true
		})
	}
	return nil
}

// advance notes a transaction of somebody else that left our table alone.
func (d *Dataplane) advance(gen uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.known && gen == nextGeneration(d.generation) {
		d.generation = gen
	}
}

// stale reports whether the table may not be what we know.
func (d *Dataplane) stale() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	now, err := d.sock.generation()
	return err != nil || !d.known || now != d.generation
}

// A listener hears of transactions and tells of those that matter.
type listener struct {
	*socket
	changed func()
}

// listen makes l the listener, or nobody.
func (d *Dataplane) listen(l *listener) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.listener = l
	if l == nil {
		return nil
	}
	return l.join()
}

// join and leave subscribe to every transaction of the namespace.
func (s *socket) join() error  { return s.membership(unix.NETLINK_ADD_MEMBERSHIP) }
func (s *socket) leave() error { return s.membership(unix.NETLINK_DROP_MEMBERSHIP) }

func (s *socket) membership(option int) error {
	if err := unix.SetsockoptInt(s.fd, unix.SOL_NETLINK, option, unix.NFNLGRP_NFTABLES); err != nil {
		return fmt.Errorf("subscribe to ruleset changes: %w", err)
	}
	return nil
}

// ignore has the kernel leave out what the socket with that port did.
func (s *socket) ignore(port uint32) error {
	// The sender's port is at byte 12 of each message. It is in host order,
	// and the filter loads in network order.
	if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 {
		port = bits.ReverseBytes32(port)
	}
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 12},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: port, Jt: 0, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.SetsockoptSockFprog(s.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog); err != nil {
		return fmt.Errorf("filter ruleset changes: %w", err)
	}
	return nil
}

// recvUntil waits for a datagram, or for ctx for as long as a tenth of a
// second: EAGAIN.
func (s *socket) recvUntil(ctx context.Context) (int, error) {
	fds := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 100)
	if err != nil && err != unix.EINTR {
		return 0, err
	}
	if n == 0 || ctx.Err() != nil {
		return 0, unix.EAGAIN
	}
	return s.recv(unix.MSG_DONTWAIT)
}
