package change

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A wire tells which flows are sent to a node, by the SYNs that arrive there,
// whether or not anybody takes them: a packet socket gets them before the
// addresses and rules of the node matter.
type wire struct {
	fd   int
	seen map[syn]bool
	// flows counts all of them, and sent is by target.
	flows int
	sent  map[netip.Addr]*arrivals
}

// A syn is what distinguishes the first SYN of a flow from those of others. One
// that is repeated has the same number (RFC 9293, 3.8.1).
type syn struct {
	from, to netip.AddrPort
	number   uint32
}

// arrivals are the flows that were sent to a target.
type arrivals struct {
	n           int
	first, last time.Time // the kernel's, since forget
	// at is how many flows there were in all, when the last one came.
	at int
}

// filter passes the first 64 bytes of SYNs without ACK to a TCP port, and nothing
// else. Offsets are from the IP header (packet(7), SOCK_DGRAM).
func filter(port uint16) []unix.SockFilter {
	const drop, pass = 10, 9 // places below
	jump := func(at int, code uint16, k uint32, yes, no int) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_K | code, K: k, Jt: uint8(yes - at - 1), Jf: uint8(no - at - 1)}
	}
	return []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 9}, // protocol
		jump(1, unix.BPF_JEQ, unix.IPPROTO_TCP, 2, drop),
		{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, K: 6}, // fragment offset
		jump(3, unix.BPF_JSET, 0x1fff, drop, 4),
		{Code: unix.BPF_LDX | unix.BPF_B | unix.BPF_MSH, K: 0}, // length of the IP header
		{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_IND, K: 2},  // destination port
		jump(6, unix.BPF_JEQ, uint32(port), 7, drop),
		{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_IND, K: 12}, // offset and flags
		jump(8, unix.BPF_JSET, 0x10, drop, pass),               // ACK
		jump(9, unix.BPF_JSET, 0x02, 11, drop),                 // SYN
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
		{Code: unix.BPF_RET | unix.BPF_K, K: 64},
	}
}

// openWire listens in the thread's namespace. The filter is there before the
// socket gets packets.
func openWire(port uint16) (*wire, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	program := filter(port)
	err = errors.Join(
		os.NewSyscallError("attach filter", unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
			&unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})),
		os.NewSyscallError("timestamps", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1)),
		os.NewSyscallError("receive buffer", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20)),
		os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_IP)})),
	)
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return &wire{fd: fd, seen: make(map[syn]bool), sent: make(map[netip.Addr]*arrivals)}, nil
}

func networkOrder(n uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, n))
}

// read takes in all that has arrived. It is an error if the kernel has thrown
// some away.
func (w *wire) read() error {
	var packet, control [64]byte
	for {
		n, oob, _, _, err := unix.Recvmsg(w.fd, packet[:], control[:], unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return w.lost()
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return os.NewSyscallError("recvmsg", err)
		}
		if s, ok := decode(packet[:n]); ok {
			w.note(s, stamp(control[:oob]))
		}
	}
}

func (w *wire) lost() error {
	stats, err := unix.GetsockoptTpacketStats(w.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		return os.NewSyscallError("packet statistics", err)
	}
	if stats.Drops > 0 {
		return errors.New("the kernel lost packets that were to be counted")
	}
	return nil
}

// decode reads what filter has passed; it reports false if the TCP header is
// beyond the end.
func decode(b []byte) (syn, bool) {
	if len(b) < 20 {
		return syn{}, false
	}
	tcp := int(b[0]&0x0f) * 4
	if tcp < 20 || len(b) < tcp+8 {
		return syn{}, false
	}
	at := func(addr, port int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[addr:addr+4])), binary.BigEndian.Uint16(b[port:]))
	}
	return syn{at(12, tcp), at(16, tcp+2), binary.BigEndian.Uint32(b[tcp+4:])}, true
}

// stamp is the time in a packet's only control message, a struct timespec of two
// words (socket(7), SO_TIMESTAMPNS).
func stamp(control []byte) time.Time {
	header := unix.CmsgLen(0)
	if len(control) < header+16 {
		return time.Now() // the kernel had no room for it
	}
	word := func(at int) int64 { return int64(binary.NativeEndian.Uint64(control[header+at:])) }
	return time.Unix(word(0), word(8))
}

func (w *wire) note(s syn, when time.Time) {
	if w.seen[s] {
		return
	}
	w.seen[s] = true
	w.flows++
	a := w.of(s.to.Addr())
	if a.n == 0 {
		a.first = when
	}
	a.n++
	a.last, a.at = when, w.flows
}

// of is the arrivals of a target.
func (w *wire) of(target netip.Addr) *arrivals {
	if w.sent[target] == nil {
		w.sent[target] = &arrivals{}
	}
	return w.sent[target]
}

// forget begins to count a target's flows anew.
func (w *wire) forget(target netip.Addr) { w.sent[target] = &arrivals{at: w.flows} }

// others is how many flows have gone elsewhere since the target's last one.
func (w *wire) others(target netip.Addr) int { return w.flows - w.of(target).at }
