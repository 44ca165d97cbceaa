package nft

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/bits"
	"time"

	"golang.org/x/sys/unix"
)

// Watch implements balancer.Watcher: it tells of each transaction of somebody
// else that touches our table, or may have.
func (d *Dataplane) Watch(ctx context.Context, changed func()) error {
	// What went on before is seen by looking once more.
	changed()
	for ctx.Err() == nil {
		// An others that is being read by a plan meanwhile is found empty, and
		// what the plan heard shows in meddled.
		d.others.wait(100 * time.Millisecond)
		meddled, err := d.takeMeddled()
		if err != nil {
			return err
		}
		if meddled {
			changed()
		}
	}
	return nil
}

func (d *Dataplane) takeMeddled() (bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := d.catchUp()
	meddled := d.meddled
	d.meddled = false
	return meddled, err
}

// catchUp takes in what others have done so far. A transaction that left our
// table alone only moves the generation on.
func (d *Dataplane) catchUp() error {
	for {
		n, err := d.others.recv(unix.MSG_DONTWAIT)
		switch {
		case err == unix.EAGAIN:
			return nil
		case err == unix.ENOBUFS:
			d.known, d.meddled = false, true
			continue
		case err != nil:
			return fmt.Errorf("follow ruleset changes: %w", err)
		}
		walk(d.others.buf[:n], func(m message) bool {
			if m.typ == nftSubsys|unix.NFT_MSG_NEWGEN {
				d.passed(be32(find(m.body, unix.NFTA_GEN_ID)))
				return true
			}
			// The first attribute of every message names the table.
			d.touched = d.touched || m.family == unix.NFPROTO_INET && text(find(m.body, 1)) == TableName
			return true
		})
	}
}

// passed notes the end of somebody's transaction.
func (d *Dataplane) passed(generation uint32) {
	switch {
	case d.touched:
		d.touched = false
		d.meddled = true
		// One that was there before the table was read is in what was read.
		if int32(generation-d.generation) > 0 {
			d.known = false
		}
	case generation == nextGeneration(d.generation):
		d.generation = generation
	}
}

// follow opens a socket that hears of every transaction except those of port:
// our own may be a million elements long.
func follow(port uint32) (*socket, error) {
	s, err := dial()
	if err != nil {
		return nil, err
	}
	if err = s.ignore(port); err == nil {
		err = s.join()
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

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

// wait reports whether there is something to read, within the given time.
func (s *socket) wait(d time.Duration) bool {
	fds := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, int(d.Milliseconds()))
	return err == nil && n > 0
}
