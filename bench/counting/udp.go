package counting

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/measure"
)

const (
	batchSize = 32 // packets sent before they are read
	firstFlow = 10000
	lastFlow  = 60000
)

// udpLoad sends packets onto the client's link, which are at the balancer as
// from a network card, and reads them from the targets' sockets. The sender is
// the same for packets of established and of new flows.
type udpLoad struct {
	site     *site
	from, to net.HardwareAddr
	link     int // packet socket
	out, in  *measure.Batch
	fresh    bool  // whether each packet is of a new flow
	next     int   // port
	flows    []int // the client's sockets
}

// assured is after how long connection tracking takes a UDP flow that both ends
// have spoken in for a stream (nf_conntrack_udp_packet). From then on it stays the
// same for every packet, and a flowtable takes it.
const assured = 2*time.Second + 100*time.Millisecond

// newEstablished sends packets of as many flows as are in a batch, which are
// assured.
func newEstablished(s *site) (load, error) {
	l, err := newUDPLoad(s)
	if err != nil {
		return nil, err
	}
	if err := l.establishAll(); err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

func (l *udpLoad) establishAll() error {
	for i := range batchSize {
		if err := l.establish(firstFlow + i); err != nil {
			return fmt.Errorf("UDP flow from port %d: %w", firstFlow+i, err)
		}
		l.put(i, firstFlow+i)
	}
	time.Sleep(assured)
	if _, err := l.run(); err != nil {
		return err
	}
	return l.site.checkOffloaded(batchSize)
}

// newFresh sends the first packets of flows.
func newFresh(s *site) (load, error) {
	l, err := newUDPLoad(s)
	if err != nil {
		return nil, err
	}
	l.fresh, l.next = true, firstFlow+batchSize
	return l, nil
}

// newUDPLoad is called in the client's namespace.
func newUDPLoad(s *site) (*udpLoad, error) {
	l := &udpLoad{site: s, out: measure.NewBatch(batchSize, measure.FrameSize), in: measure.NewBatch(batchSize, measure.FramePayload)}
	link, err := net.InterfaceByName("eth0")
	if err != nil {
		return nil, err
	}
	l.from = link.HardwareAddr
	err = s.LB.Do(func() error {
		peer, err := net.InterfaceByName(s.Clients[0].Name)
		if err == nil {
			l.to = peer.HardwareAddr
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	l.link, err = measure.PacketSocket(link.Index)
	return l, err
}

func (l *udpLoad) close() {
	_ = unix.Close(l.link)
	for _, fd := range l.flows {
		_ = unix.Close(fd)
	}
}

// pause does nothing: packets leave nothing behind that is freed later.
func (*udpLoad) pause() {}

// put makes the packet from a port the batch's i-th.
func (l *udpLoad) put(i, port int) {
	to := l.site.address(port)
	measure.PutFrame(l.out.Message(i), l.from, l.to,
		netip.AddrPortFrom(l.site.Clients[0].Addr4, uint16(port)),
		netip.AddrPortFrom(netip.AddrFrom4(to.Addr), uint16(to.Port)))
}

// establish sends a packet each way.
func (l *udpLoad) establish(port int) error {
	fd, err := measure.Bind(unix.SOCK_DGRAM, l.site.Clients[0].Addr4, port)
	if err != nil {
		return err
	}
	l.flows = append(l.flows, fd)
	to := l.site.address(port)
	if err := unix.Sendto(fd, []byte{0}, 0, &to); err != nil {
		return os.NewSyscallError("sendto", err)
	}
	i, err := measure.FirstReadable(measure.Readable(l.site.sockets.UDP...))
	if err != nil {
		return fmt.Errorf("to the targets: %w", err)
	}
	_, from, err := unix.Recvfrom(l.site.sockets.UDP[i], make([]byte, 1), 0)
	if err != nil {
		return os.NewSyscallError("recvfrom", err)
	}
	if a, ok := from.(*unix.SockaddrInet4); !ok || netip.AddrFrom4(a.Addr) != l.site.client() {
		return fmt.Errorf("the target sees %v, not %v", from, l.site.client())
	}
	if err := unix.Sendto(l.site.sockets.UDP[i], []byte{0}, 0, from); err != nil {
		return os.NewSyscallError("sendto", err)
	}
	if _, err := measure.FirstReadable(measure.Readable(fd)); err != nil {
		return fmt.Errorf("back to the client: %w", err)
	}
	_, err = unix.Read(fd, make([]byte, 1))
	return os.NewSyscallError("read", err)
}

// prepare makes the packets of the next run, before the clock starts.
func (l *udpLoad) prepare() error {
	if !l.fresh {
		return nil
	}
	for i := range batchSize {
		if l.next > lastFlow {
			return errors.New("no ports left for new flows")
		}
		l.put(i, l.next)
		l.next++
	}
	return nil
}

// run sends the batch and reads it from the targets; all of it must arrive.
func (l *udpLoad) run() (packets int, err error) {
	sent, err := l.out.Send(l.link)
	if err != nil || sent != batchSize {
		return 0, fmt.Errorf("sent %d packets of %d: %w", sent, batchSize, err)
	}
	for received := 0; ; {
		for _, fd := range l.site.sockets.UDP {
			n, err := l.in.Receive(fd)
			if err != nil {
				return 0, os.NewSyscallError("recvmmsg", err)
			}
			received += n
		}
		if received == sent {
			return sent, nil
		}
		if _, err := measure.FirstReadable(measure.Readable(l.site.sockets.UDP...)); err != nil {
			return 0, fmt.Errorf("%d packets arrived of %d: %w", received, sent, err)
		}
	}
}
