package prompt

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"

	"golang.org/x/sys/unix"

	"nlb/balancer"
)

// A Flow is a TCP flow through the balancer.
type Flow struct {
	Client, VIP netip.AddrPort
	// Source is whom the target takes for the client: Client itself where its
	// address is preserved.
	Source, Target netip.AddrPort
}

// A Prompter makes the ends of flows speak. Its segments carry
// balancer.PromptMark, by which the packet filter keeps them out of connection
// tracking. It holds four raw sockets and no goroutine. Prompt may be called by
// several goroutines at once, but not during or after Close.
type Prompter struct {
	// Clients and targets have sockets of their own, so that segments to a
	// dead neighbour, which wait for its address to be resolved, do not take
	// the room of those to the living.
	clients, targets sender
}

// New opens the sockets, in the network namespace of the calling thread. It
// needs CAP_NET_RAW and CAP_NET_ADMIN.
func New() (*Prompter, error) {
	clients, err := newSender()
	if err != nil {
		return nil, err
	}
	targets, err := newSender()
	if err != nil {
		return nil, errors.Join(err, clients.close())
	}
	return &Prompter{clients, targets}, nil
}

// Close closes the sockets.
func (p *Prompter) Close() error { return errors.Join(p.clients.close(), p.targets.close()) }

// Prompt sends a segment to each end of each flow. It does not wait for answers.
// An end that has just answered another such segment is silent for a while, on
// Linux half a second (tcp_invalid_ratelimit), so a caller that wants to be sure
// repeats.
//
// What cannot be sent does not keep the rest from being sent; the error names
// some of what could not be, and wraps their errnos.
func (p *Prompter) Prompt(flows []Flow) error {
	var failed failures
	for _, f := range flows {
		failed.note(p.clients.send(f.VIP, f.Client, flagSYN|flagACK))
		failed.note(p.targets.send(f.Source, f.Target, flagSYN))
	}
	return failed.err()
}

// failures keeps the first few errors and counts the others: a route that is gone
// fails for ten thousand flows alike.
type failures struct {
	first []error
	more  int
}

const failuresNamed = 4

func (f *failures) note(err error) {
	switch {
	case err == nil:
	case len(f.first) < failuresNamed:
		f.first = append(f.first, err)
	default:
		f.more++
	}
}

func (f *failures) err() error {
	err := errors.Join(f.first...)
	if f.more > 0 {
		err = fmt.Errorf("%w\nand %d more", err, f.more)
	}
	return err
}

// A sender has a raw socket for each family.
type sender struct{ v4, v6 int }

func newSender() (sender, error) {
	v4, err := rawSocket(unix.AF_INET, nil)
	if err != nil {
		return sender{}, fmt.Errorf("open raw IPv4 socket: %w", err)
	}
	// IPv6 wants to be told that the source may be somebody else's; with IPv4
	// that goes with the header being included.
	v6, err := rawSocket(unix.AF_INET6, func(fd int) error {
		return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1)
	})
	if errors.Is(err, unix.EAFNOSUPPORT) {
		v6, err = -1, nil // a host without IPv6 has no flows of it
	}
	if err != nil {
		return sender{}, errors.Join(fmt.Errorf("open raw IPv6 socket: %w", err), unix.Close(v4))
	}
	return sender{v4, v6}, nil
}

// sendBuffer has room for some 5000 segments that wait to leave. The queue of a
// neighbour that does not answer holds 208 KiB (neigh/*/unres_qlen_bytes), so it
// takes twenty of them to fill it.
const sendBuffer = 4 << 20

// rawSocket opens a socket to which packets are written with their IP header,
// and which receives none (raw(7), IPPROTO_RAW).
func rawSocket(family int, more func(fd int) error) (int, error) {
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return -1, err
	}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(balancer.PromptMark)),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer),
	)
	if err == nil && more != nil {
		err = more(fd)
	}
	if err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

func (s sender) close() error {
	err := unix.Close(s.v4)
	if s.v6 >= 0 {
		err = errors.Join(err, unix.Close(s.v6))
	}
	return err
}

// send sends one segment with random numbers. Its source is also given apart from
// the header, since the route is chosen before that is looked at, and may depend
// on it.
func (s sender) send(from, to netip.AddrPort, tcpFlags uint8) error {
	p, err := pairOf(from, to)
	if err != nil {
		return fmt.Errorf("prompt: %w", err)
	}
	ack := uint32(0)
	if tcpFlags&flagACK != 0 {
		ack = rand.Uint32()
	}
	b := p.segment(tcpFlags, rand.Uint32(), ack)
	// A full buffer is an error like others: nobody waits for a dead neighbour.
	const flags = unix.MSG_DONTWAIT | unix.MSG_NOSIGNAL
	src, dst := p.from.Addr(), p.to.Addr()
	for {
		if dst.Is4() {
			source := unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: src.As4()})
			err = unix.Sendmsg(s.v4, b, source, &unix.SockaddrInet4{Addr: dst.As4()}, flags)
		} else {
			source := unix.PktInfo6(&unix.Inet6Pktinfo{Addr: src.As16()})
			err = unix.Sendmsg(s.v6, b, source, &unix.SockaddrInet6{Addr: dst.As16()}, flags)
		}
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("prompt %v from %v: %w", to, from, err)
	}
	return nil
}
