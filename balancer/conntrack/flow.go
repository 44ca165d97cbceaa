package conntrack

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A Flow is one entry of the conntrack table.
type Flow struct {
	Protocol Protocol
	// Original is the direction of the first packet, as the client sent it:
	// Dst is the VIP. Reply is what the kernel expects of the answers: Src is
	// the target, and Dst is whom the target takes for the client.
	Original, Reply Direction
	Mark            uint32
	// Timeout is how long the flow lives on if it stays idle, in whole seconds; 0
	// if it is offloaded, since it then lives for as long as the flowtable has it.
	Timeout time.Duration
	Status  Status
	// TCPState is 0 for other protocols. The kernel does not tell that of offloaded
	// flows, but has taken established ones alone.
	TCPState TCPState
	// Accounted says that the flow has counters: net.netfilter.nf_conntrack_acct
	// was 1 when it began.
	Accounted bool
}

// A Direction is one half of a flow. Bytes are those of IP packets, headers
// included. Ports are 0 where the protocol has none.
type Direction struct {
	Src, Dst       netip.AddrPort
	Bytes, Packets uint64
}

// String is the flow in the words of conntrack(8) -L, without its use count.
func (f Flow) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-8s %d %d ", f.Protocol, uint8(f.Protocol), int(f.Timeout/time.Second))
	if f.Protocol == TCP {
		fmt.Fprintf(&b, "%s ", f.TCPState)
	}
	f.Original.write(&b, f.Accounted)
	if !f.Status.SeenReply() {
		b.WriteString("[UNREPLIED] ")
	}
	f.Reply.write(&b, f.Accounted)
	switch {
	case f.Status.Offloaded():
		b.WriteString("[OFFLOAD] ")
	case f.Status.Assured():
		b.WriteString("[ASSURED] ")
	}
	fmt.Fprintf(&b, "mark=%d", f.Mark)
	return b.String()
}

func (d Direction) write(b *strings.Builder, accounted bool) {
	fmt.Fprintf(b, "src=%s dst=%s sport=%d dport=%d ", d.Src.Addr(), d.Dst.Addr(), d.Src.Port(), d.Dst.Port())
	if accounted {
		fmt.Fprintf(b, "packets=%d bytes=%d ", d.Packets, d.Bytes)
	}
}

// A Protocol is an IP protocol number (IANA).
type Protocol uint8

// The protocols of listeners.
const (
	TCP Protocol = unix.IPPROTO_TCP
	UDP Protocol = unix.IPPROTO_UDP
)

// String is "tcp", "udp", or "unknown" as conntrack(8) has it.
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	}
	return "unknown"
}

// A Status is the set of bits enum ip_conntrack_status
// (linux/netfilter/nf_conntrack_common.h).
type Status uint32

const (
	statusSeenReply = 1 << 1
	statusAssured   = 1 << 2
	statusConfirmed = 1 << 3
	statusDNAT      = 1 << 5
	statusDying     = 1 << 9
	statusOffload   = 1 << 14
)

// SeenReply reports that a packet of the reply direction has passed.
func (s Status) SeenReply() bool { return s&statusSeenReply != 0 }

// Assured reports that the flow survives early drop when the table is full.
func (s Status) Assured() bool { return s&statusAssured != 0 }

// DNATed reports that rules of NAT gave the flow another destination.
func (s Status) DNATed() bool { return s&statusDNAT != 0 }

// Offloaded reports that a flowtable has the flow.
func (s Status) Offloaded() bool { return s&statusOffload != 0 }

// dying says that the event of the flow's end was sent, or is about to be.
func (s Status) dying() bool { return s&statusDying != 0 }

// A TCPState is enum tcp_conntrack (linux/netfilter/nf_conntrack_tcp.h).
type TCPState uint8

var tcpStates = [...]string{
	"NONE", "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT",
	"LAST_ACK", "TIME_WAIT", "CLOSE", "SYN_SENT2",
}

const (
	// SynRecv is the state once the target has answered.
	SynRecv TCPState = 2
	// Established is the state between the handshake and the first FIN.
	Established TCPState = 3
	// LastAck is the state once both ends have sent a FIN.
	LastAck TCPState = 6
	// Close is the state once an end was reset.
	Close TCPState = 8
)

// String is the state's name in conntrack(8).
func (s TCPState) String() string {
	if int(s) < len(tcpStates) {
		return tcpStates[s]
	}
	return "UNKNOWN"
}
