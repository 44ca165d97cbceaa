package growth

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/bench/measure"
	"nlb/bench/part"
)

const (
	batchSize = 32 // packets sent before they are read
	batches   = 64 // of a turn: all listeners have flows in each turn
	turnFlows = batches * batchSize

	// A flow's source is its port. They come again after many turns, when they
	// have been forgotten.
	firstPort = 10000
	ports     = 50000
)

// A burst is the packets of one turn, room to read as many as are sent at once,
// and how long each batch took.
type burst struct {
	out  [batches]*measure.Batch
	in   *measure.Batch
	took [batches]time.Duration
}

func newBurst() *burst {
	b := &burst{in: measure.NewBatch(batchSize, measure.FramePayload)}
	for i := range b.out {
		b.out[i] = measure.NewBatch(batchSize, measure.FrameSize)
	}
	return b
}

// prepare makes the packets of a turn of the site, each of a flow that has not
// been since the last ones were forgotten.
func (b *burst) prepare(s *site) {
	for _, batch := range b.out {
		for i := range batchSize {
			s.put(batch.Message(i), s.next)
			s.next++
		}
	}
}

// put makes the first packet of flow n.
func (s *site) put(frame []byte, n int) {
	from := netip.AddrPortFrom(s.Clients[0].Addr4, uint16(firstPort+n%ports))
	measure.PutFrame(frame, s.from, s.to, from, s.destination(n))
}

// destination is where flow n goes: to the listeners in turn, or, without a
// balancer, to the targets in turn.
func (s *site) destination(n int) netip.AddrPort {
	if s.contestant == part.Direct {
		return netip.AddrPortFrom(targetAddr(n%s.targets), measure.Port)
	}
	return netip.AddrPortFrom(lab.VIP4, uint16(measure.Port+n%s.listeners))
}

// send sends the packets and reads them; all of them must arrive.
func (b *burst) send(s *site) error {
	for i, batch := range b.out {
		began := time.Now()
		if err := b.pass(s, batch); err != nil {
			return err
		}
		b.took[i] = time.Since(began)
	}
	return nil
}

// pass is send for one batch.
func (b *burst) pass(s *site, batch *measure.Batch) error {
	sent, err := batch.Send(s.link)
	if err != nil || sent != batchSize {
		return fmt.Errorf("sent %d packets of %d: %w", sent, batchSize, err)
	}
	for received := 0; received < sent; {
		n, err := b.in.Receive(s.sockets.UDP[0])
		if err != nil {
			return os.NewSyscallError("recvmmsg", err)
		}
		if received += n; n > 0 {
			continue
		}
		if _, err := measure.FirstReadable(measure.Readable(s.sockets.UDP...)); err != nil {
			return fmt.Errorf("%d packets arrived of %d: %w", received, sent, err)
		}
	}
	return nil
}

// check sends one packet. The target must see whom the contestant's job says.
func (s *site) check() error {
	one := measure.NewBatch(1, measure.FrameSize)
	s.put(one.Message(0), s.next)
	s.next++
	if sent, err := one.Send(s.link); err != nil || sent != 1 {
		return fmt.Errorf("sent %d packets of 1: %w", sent, err)
	}
	fd := s.sockets.UDP[0]
	if _, err := measure.FirstReadable(measure.Readable(fd)); err != nil {
		return err
	}
	_, from, err := unix.Recvfrom(fd, make([]byte, measure.FramePayload), 0)
	if err != nil {
		return os.NewSyscallError("recvfrom", err)
	}
	a, ok := from.(*unix.SockaddrInet4)
	if !ok {
		return errors.New("the packet has no IPv4 source")
	}
	if got, want := netip.AddrFrom4(a.Addr), s.seen(); got != want {
		return fmt.Errorf("the target sees %s, not %s", got, want)
	}
	return nil
}

// seen is whom a target sees.
func (s *site) seen() netip.Addr {
	for _, c := range part.Contestants {
		if c.Name == s.contestant && c.Job == part.HidesClient {
			return s.LB.Addr4
		}
	}
	return s.Clients[0].Addr4
}
