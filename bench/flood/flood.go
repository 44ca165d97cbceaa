// Package flood sends what an attack does: TCP SYNs from clients that do not exist, as
// frames on the link of a client of a lab, past that client's own TCP and routes.
package flood

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/bench/measure"
)

// Sources are whom SYNs come from, with all ports from 1024 on: eight million flows.
// No node has them.
var Sources = netip.MustParsePrefix("203.0.113.128/25")

const (
	vnetHeader = 10 // struct virtio_net_hdr: all zero, since the frames are complete
	ethernet   = 14
	ipv4       = 20
	tcp        = 24 // with one option, the MSS
	frameSize  = vnetHeader + ethernet + ipv4 + tcp

	batchSize = 64
	lowPort   = 1024
)

// A Flood is a link that SYNs are sent on. It is not safe for concurrent use.
type Flood struct {
	fd       int
	from, to net.HardwareAddr
	batch    *measure.Batch
	random   *rand.Rand
}

// Open makes a Flood of the link between a client of a routed lab and its balancer, and
// has the balancer send its answers back to that client, which ignores them. The same
// seed makes the same flood. Close it.
func Open(client, balancer *lab.Node, seed uint64) (*Flood, error) {
	f := &Flood{batch: measure.NewBatch(batchSize, frameSize), random: rand.New(rand.NewPCG(seed, 0))}
	err := balancer.Do(func() error {
		link, err := net.InterfaceByName(client.Name)
		if err == nil {
			f.to = link.HardwareAddr
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("flood: link of %s to %s: %w", balancer.Name, client.Name, err)
	}
	if err := balancer.Route(Sources, client.Addr4, client.Name); err != nil {
		return nil, fmt.Errorf("flood: %w", err)
	}
	err = client.Do(func() error {
		link, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		f.from = link.HardwareAddr
		f.fd, err = measure.PacketSocket(link.Index)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("flood: link of %s: %w", client.Name, err)
	}
	return f, nil
}

// Close gives the link back.
func (f *Flood) Close() error { return unix.Close(f.fd) }

// Source is a client that does not exist: one of Sources, with a port.
func (f *Flood) Source() netip.AddrPort {
	a := Sources.Addr().As4()
	a[3] += byte(f.random.IntN(1 << (32 - Sources.Bits())))
	return netip.AddrPortFrom(netip.AddrFrom4(a), uint16(lowPort+f.random.IntN(1<<16-lowPort)))
}

// Send sends n SYNs, each from a random source, as fast as they go.
func (f *Flood) Send(to netip.AddrPort, n int) error {
	for sent := 0; sent < n; {
		for i := range batchSize {
			f.put(f.batch.Message(i), f.Source(), to)
		}
		// Of a larger batch the rest is not missed: all are alike.
		now, err := f.send(f.batch.First(min(batchSize, n-sent)))
		if err != nil {
			return err
		}
		sent += now
	}
	return nil
}

// SendFrom sends one SYN.
func (f *Flood) SendFrom(from, to netip.AddrPort) error {
	f.put(f.batch.Message(0), from, to)
	_, err := f.send(f.batch.First(1))
	return err
}

func (f *Flood) send(b *measure.Batch) (sent int, err error) {
	sent, err = b.Send(f.fd)
	if err == nil && sent == 0 {
		err = errors.New("the link takes no more")
	}
	if err != nil {
		return sent, fmt.Errorf("flood: %w", err)
	}
	return sent, nil
}

// tick is how often Run sends: a rate is an average of that.
const tick = time.Millisecond

// Run sends SYNs at a rate, in packets per second, until ctx ends or so many are sent,
// and returns how many were. What it cannot send in time it leaves out, so that the rate
// comes out lower.
func (f *Flood) Run(ctx context.Context, to netip.AddrPort, rate, most int) (sent int, err error) {
	clock := time.NewTicker(tick)
	defer clock.Stop()
	last, owed := time.Now(), 0.0
	for sent < most {
		select {
		case <-ctx.Done():
			return sent, nil
		case now := <-clock.C:
			owed = min(owed+now.Sub(last).Seconds()*float64(rate), float64(rate)/10)
			last = now
		}
		n := min(int(owed), most-sent)
		if err := f.Send(to, n); err != nil {
			return sent, err
		}
		sent, owed = sent+n, owed-float64(n)
	}
	return sent, nil
}

// put writes a whole frame: a client's SYN with an MSS (RFC 9293, 3.7.1) and nothing
// else that a server could want.
func (f *Flood) put(b []byte, from, to netip.AddrPort) {
	clear(b)
	b = b[vnetHeader:]
	copy(b, f.to)
	copy(b[6:], f.from)
	binary.BigEndian.PutUint16(b[12:], unix.ETH_P_IP)

	ip := b[ethernet:]
	ip[0] = 4<<4 | ipv4/4
	binary.BigEndian.PutUint16(ip[2:], ipv4+tcp)
	ip[8], ip[9] = 64, unix.IPPROTO_TCP
	s, d := from.Addr().As4(), to.Addr().As4()
	copy(ip[12:], s[:])
	copy(ip[16:], d[:])
	binary.BigEndian.PutUint16(ip[10:], checksum(ip[:ipv4], 0))

	t := ip[ipv4:]
	binary.BigEndian.PutUint16(t, from.Port())
	binary.BigEndian.PutUint16(t[2:], to.Port())
	binary.BigEndian.PutUint32(t[4:], f.random.Uint32())
	t[12], t[13] = tcp/4<<4, byte(lab.SYN)
	binary.BigEndian.PutUint16(t[14:], 0xffff)
	copy(t[20:], []byte{2, 4, 1460 >> 8, 1460 & 0xff})
	pseudo := uint32(unix.IPPROTO_TCP + tcp)
	for _, a := range [][4]byte{s, d} {
		pseudo += uint32(binary.BigEndian.Uint16(a[:])) + uint32(binary.BigEndian.Uint16(a[2:]))
	}
	binary.BigEndian.PutUint16(t[16:], checksum(t[:tcp], pseudo))
}

// checksum is the Internet's (RFC 1071) of an even number of bytes, on top of a sum.
func checksum(b []byte, sum uint32) uint16 {
	for ; len(b) > 0; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
