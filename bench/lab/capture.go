package lab

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Packet is an IP packet as an interface of a node saw it.
type Packet struct {
	Time  time.Time  `json:"time"` // the kernel's
	Iface string     `json:"iface"`
	Out   bool       `json:"out"` // sent by the node, not received
	Src   netip.Addr `json:"src"`
	Dst   netip.Addr `json:"dst"`
	Proto uint8      `json:"proto"` // IANA's number: 6 TCP, 17 UDP, 1 ICMP, 58 ICMPv6
	// SrcPort and DstPort are 0 for other protocols and for later fragments.
	SrcPort uint16 `json:"sport,omitempty"`
	DstPort uint16 `json:"dport,omitempty"`
	Flags   Flags  `json:"flags,omitempty"` // of TCP
	// ICMPType and ICMPCode are those of ICMP and ICMPv6.
	ICMPType uint8 `json:"icmp_type,omitempty"`
	ICMPCode uint8 `json:"icmp_code,omitempty"`
	Length   int   `json:"length"` // of the IP packet
	// Data is the packet's beginning, up to SnapLength bytes; only Record keeps it.
	Data []byte `json:"data,omitempty"`
}

// SnapLength is how much of a packet is looked at, in bytes: both headers with
// all their options fit.
const SnapLength = 256

// Flags are the control bits of a TCP header (RFC 9293, 3.1).
type Flags uint8

// The flags that tell how a connection begins and ends.
const (
	FIN Flags = 1 << iota
	SYN
	RST
	PSH
	ACK
)

// String is like "SYN|ACK", or "-" for none.
func (f Flags) String() string {
	var s []string
	for i, name := range []string{"FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"} {
		if f&(1<<i) != 0 {
			s = append(s, name)
		}
	}
	if len(s) == 0 {
		return "-"
	}
	return strings.Join(s, "|")
}

// String is like "eth0 in 203.0.113.9:40112 > 10.0.1.11:8080 tcp SYN".
func (p Packet) String() string {
	way := "in"
	if p.Out {
		way = "out"
	}
	s := p.Iface + " " + way + " "
	switch p.Proto {
	case unix.IPPROTO_TCP:
		return s + fmt.Sprintf("%v > %v tcp %v", p.From(), p.To(), p.Flags)
	case unix.IPPROTO_UDP:
		return s + fmt.Sprintf("%v > %v udp", p.From(), p.To())
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		return s + fmt.Sprintf("%v > %v icmp type %d code %d", p.Src, p.Dst, p.ICMPType, p.ICMPCode)
	}
	return s + fmt.Sprintf("%v > %v protocol %d", p.Src, p.Dst, p.Proto)
}

// From is the source with its port.
func (p Packet) From() netip.AddrPort { return netip.AddrPortFrom(p.Src, p.SrcPort) }

// To is the destination with its port.
func (p Packet) To() netip.AddrPort { return netip.AddrPortFrom(p.Dst, p.DstPort) }

// A Capture records the packets of a node until it is closed.
type Capture struct {
	opened

	mu      sync.Mutex
	fetched []Packet // guarded by mu; those that the agent has handed over
}

// captureLimit bounds what an agent remembers of a capture, in packets. Later
// ones are counted as missed.
const captureLimit = 200_000

// Capture starts recording what an interface of the node receives and sends, or
// all interfaces if iface is empty. Packets sent after it returns are seen.
func (a *Agent) Capture(ctx context.Context, iface string) (*Capture, error) {
	return a.startCapture(ctx, captureArgs{Iface: iface})
}

// Record is Capture on all interfaces that keeps the packets' bytes too.
func (a *Agent) Record(ctx context.Context) (*Capture, error) {
	return a.startCapture(ctx, captureArgs{Data: true})
}

func (a *Agent) startCapture(ctx context.Context, o captureArgs) (*Capture, error) {
	id, err := a.ask(ctx, "capture", o, nil)
	if err != nil {
		return nil, err
	}
	return &Capture{opened: opened{a, id}}, nil
}

type captureArgs struct {
	Iface string `json:"iface"`
	Data  bool   `json:"data,omitempty"`
}

// Packets returns the packets recorded so far that keep holds for (nil: all). It
// fails if some were missed, as nobody could tell anything from the rest.
func (c *Capture) Packets(ctx context.Context, keep func(Packet) bool) ([]Packet, error) {
	packets, err := c.fetch(ctx)
	if err != nil {
		return nil, err
	}
	var kept []Packet
	for _, p := range packets {
		if keep == nil || keep(p) {
			kept = append(kept, p)
		}
	}
	return kept, nil
}

// Wait returns the first recorded packet that match holds for, as soon as there
// is one.
func (c *Capture) Wait(ctx context.Context, match func(Packet) bool) (Packet, error) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for seen := 0; ; {
		packets, err := c.fetch(ctx)
		if err != nil {
			return Packet{}, err
		}
		if i := slices.IndexFunc(packets[seen:], match); i >= 0 {
			return packets[seen+i], nil
		}
		seen = len(packets)
		select {
		case <-ctx.Done():
			return Packet{}, fmt.Errorf("lab: none of %d packets: %w", seen, ctx.Err())
		case <-tick.C:
		}
	}
}

// fetch returns all packets so far. It asks the agent for those alone that are
// new: a test that looks ten times at a busy link would else spend its time on
// the same ones.
func (c *Capture) fetch(ctx context.Context) ([]Packet, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var packets []Packet
	if _, err := c.agent.ask(ctx, "packets", handle{ID: c.id, From: len(c.fetched)}, &packets); err != nil {
		return nil, err
	}
	c.fetched = append(c.fetched, packets...)
	return slices.Clip(c.fetched), nil
}

// A recording is the agent's side of a Capture.
type recording struct {
	file *os.File
	raw  syscall.RawConn
	data bool          // keep the packets' bytes
	done chan struct{} // closed when the reader has ended

	mu      sync.Mutex
	packet  [SnapLength]byte // guarded by mu; the one being read
	control [128]byte        // guarded by mu; its control messages
	names   map[int]string   // guarded by mu; of interfaces, by index
	packets []Packet         // guarded by mu
	missed  int              // guarded by mu
}

// SOCK_DGRAM packets come without their link's header.
func (s *server) capture(_ context.Context, id uint64, o captureArgs) (none, error) {
	index := 0
	if o.Iface != "" {
		i, err := net.InterfaceByName(o.Iface)
		if err != nil {
			return none{}, err
		}
		index = i.Index
	}
	// Protocol 0 receives nothing before it is bound.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return none{}, fmt.Errorf("packet socket: %w", err)
	}
	file := os.NewFile(uintptr(fd), "packet socket")
	r := &recording{file: file, data: o.Data, done: make(chan struct{}), names: map[int]string{}}
	if r.raw, err = file.SyscallConn(); err == nil {
		err = listenPackets(fd, index)
	}
	if err != nil {
		return none{}, errors.Join(err, file.Close())
	}
	go r.read()
	s.keep(id, r)
	return none{}, nil
}

func listenPackets(fd, index int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20); err != nil {
		return fmt.Errorf("SO_RCVBUFFORCE: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS_NEW, 1); err != nil {
		return fmt.Errorf("SO_TIMESTAMPNS: %w", err)
	}
	all := uint16(unix.ETH_P_ALL)
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all<<8 | all>>8, Ifindex: index}); err != nil {
		return fmt.Errorf("bind packet socket: %w", err)
	}
	return nil
}

// read takes packets as they come, until the socket is closed.
func (r *recording) read() {
	defer close(r.done)
	for {
		err := r.raw.Read(func(fd uintptr) bool {
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.take(fd)
		})
		if err != nil {
			return // closed
		}
	}
}

// take records the packet that the socket has, and reports false if there is
// none. It is called with mu held.
func (r *recording) take(fd uintptr) bool {
	// MSG_TRUNC returns the true length of what does not fit.
	n, ctl, _, from, err := unix.Recvmsg(int(fd), r.packet[:], r.control[:], unix.MSG_TRUNC)
	if errors.Is(err, unix.EAGAIN) {
		return false
	}
	link, ok := from.(*unix.SockaddrLinklayer)
	if err != nil || !ok {
		return true // the interface went down
	}
	data := r.packet[:min(n, len(r.packet))]
	p, ok := decodePacket(data)
	if !ok {
		return true
	}
	p.Time, p.Out = timestamp(r.control[:ctl]), link.Pkttype == unix.PACKET_OUTGOING
	if r.data {
		p.Data = bytes.Clone(data)
	}
	r.record(p, link.Ifindex)
	return true
}

// record is called with mu held.
func (r *recording) record(p Packet, index int) {
	if len(r.packets) >= captureLimit {
		r.missed++
		return
	}
	name, ok := r.names[index]
	if !ok {
		if i, err := net.InterfaceByIndex(index); err == nil {
			name = i.Name
		}
		r.names[index] = name
	}
	p.Iface = name
	r.packets = append(r.packets, p)
}

// timestamp finds the kernel's time of reception or sending.
func timestamp(control []byte) time.Time {
	msgs, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return time.Time{}
	}
	for _, m := range msgs {
		if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SO_TIMESTAMPNS_NEW && len(m.Data) >= 16 {
			// struct __kernel_timespec: 64 bits each, everywhere.
			return time.Unix(int64(binary.NativeEndian.Uint64(m.Data)), int64(binary.NativeEndian.Uint64(m.Data[8:])))
		}
	}
	return time.Time{}
}

func (s *server) packets(_ context.Context, _ uint64, h handle) ([]Packet, error) {
	r, err := kept[*recording](s, h.ID)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var drops int
	err = r.raw.Control(func(fd uintptr) {
		// The reader may not have had its turn since the last packet came.
		for r.take(fd) {
		}
		// Reading the statistics resets them.
		if st, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			drops = int(st.Drops)
		}
	})
	if err != nil {
		return nil, err
	}
	if r.missed += drops; r.missed > 0 {
		return nil, fmt.Errorf("the capture missed %d packets", r.missed)
	}
	return slices.Clone(r.packets[min(h.From, len(r.packets)):]), nil
}

func (r *recording) Close() error {
	err := r.file.Close()
	<-r.done
	return err
}
