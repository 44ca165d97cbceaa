package prompt

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

const (
	ipv4Header = 20
	ipv6Header = 40
	tcpHeader  = 20
)

// A pair is a direction of a flow.
type pair struct{ from, to netip.AddrPort }

func pairOf(from, to netip.AddrPort) (pair, error) {
	p := pair{unmap(from), unmap(to)}
	if !from.IsValid() || !to.IsValid() || p.from.Addr().Is4() != p.to.Addr().Is4() {
		return p, fmt.Errorf("%v and %v are not of one address family", from, to)
	}
	return p, nil
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// Bits of the TCP header.
const (
	flagSYN uint8 = 1 << 1
	flagACK uint8 = 1 << 4
)

// segment is a packet with a TCP header that has flags and numbers. The IPv4
// header's identification and checksum are zero, for the kernel to fill in
// (raw(7)).
func (p pair) segment(flags uint8, seq, ack uint32) []byte {
	src, dst := p.from.Addr().AsSlice(), p.to.Addr().AsSlice()
	b := make([]byte, 0, ipv6Header+tcpHeader)
	if p.from.Addr().Is4() {
		b = append(b, 4<<4|ipv4Header/4, 0)
		b = binary.BigEndian.AppendUint16(b, ipv4Header+tcpHeader)
		b = append(b, 0, 0, dontFragment, 0, hopLimit, unix.IPPROTO_TCP, 0, 0)
	} else {
		b = append(b, 6<<4, 0, 0, 0)
		b = binary.BigEndian.AppendUint16(b, tcpHeader)
		b = append(b, unix.IPPROTO_TCP, hopLimit)
	}
	b = append(append(b, src...), dst...)
	return append(b, p.tcp(src, dst, flags, seq, ack)...)
}

const (
	dontFragment = 0x40 // in the upper byte of flags and fragment offset
	hopLimit     = 64
)

// tcp is the TCP header. It has no timestamp, which spares it the comparison
// with those of the flow (PAWS, RFC 7323): that would be another answer.
func (p pair) tcp(src, dst []byte, flags uint8, seq, ack uint32) []byte {
	const window, checksumAt = 1024, 16
	b := make([]byte, 0, tcpHeader)
	b = binary.BigEndian.AppendUint16(b, p.from.Port())
	b = binary.BigEndian.AppendUint16(b, p.to.Port())
	b = binary.BigEndian.AppendUint32(b, seq)
	b = binary.BigEndian.AppendUint32(b, ack)
	b = append(b, tcpHeader/4<<4, flags)
	b = binary.BigEndian.AppendUint16(b, window)
	b = append(b, 0, 0, 0, 0) // checksum, urgent pointer
	sum := add(add(add(unix.IPPROTO_TCP+tcpHeader, src), dst), b)
	binary.BigEndian.PutUint16(b[checksumAt:], ^fold(sum))
	return b
}

// add adds 16-bit words for the Internet checksum (RFC 1071). The pseudo-header
// of IPv4 (RFC 9293, section 3.1) and of IPv6 (RFC 8200, section 8.1) come to the
// same sum, as protocol and length fit into 16 bits.
func add(sum uint32, words []byte) uint32 {
	for ; len(words) > 0; words = words[2:] {
		sum += uint32(binary.BigEndian.Uint16(words))
	}
	return sum
}

func fold(sum uint32) uint16 {
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}
