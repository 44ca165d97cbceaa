package lab

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// decodePacket reads an IP packet's headers, of which b may be just the
// beginning. It reports false for what is not IP or ends within the IP header; a
// transport header that is cut short leaves its fields zero.
func decodePacket(b []byte) (Packet, bool) {
	if len(b) == 0 {
		return Packet{}, false
	}
	var p Packet
	var payload []byte
	ok := false
	switch b[0] >> 4 {
	case 4:
		p, payload, ok = decodeIPv4(b)
	case 6:
		p, payload, ok = decodeIPv6(b)
	}
	p.decodeTransport(payload)
	return p, ok
}

// decodeIPv4 returns the payload too, or nil for a later fragment (RFC 791, 3.1).
func decodeIPv4(b []byte) (Packet, []byte, bool) {
	if len(b) < 20 {
		return Packet{}, nil, false
	}
	header := int(b[0]&0x0f) * 4
	if header < 20 || header > len(b) {
		return Packet{}, nil, false
	}
	p := Packet{
		Length: int(binary.BigEndian.Uint16(b[2:])),
		Proto:  b[9],
		Src:    netip.AddrFrom4([4]byte(b[12:16])),
		Dst:    netip.AddrFrom4([4]byte(b[16:20])),
	}
	if binary.BigEndian.Uint16(b[6:])&0x1fff != 0 {
		return p, nil, true
	}
	return p, b[header:], true
}

// decodeIPv6 skips extension headers (RFC 8200, 4).
func decodeIPv6(b []byte) (Packet, []byte, bool) {
	if len(b) < 40 {
		return Packet{}, nil, false
	}
	p := Packet{
		Length: 40 + int(binary.BigEndian.Uint16(b[4:])),
		Proto:  b[6],
		Src:    netip.AddrFrom16([16]byte(b[8:24])),
		Dst:    netip.AddrFrom16([16]byte(b[24:40])),
	}
	b = b[40:]
	for {
		size := 0
		switch p.Proto {
		case unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS:
			if len(b) < 8 {
				return p, nil, true
			}
			size = 8 + int(b[1])*8
		case unix.IPPROTO_FRAGMENT:
			if len(b) < 8 {
				return p, nil, true
			}
			if binary.BigEndian.Uint16(b[2:])&^7 != 0 { // a later fragment
				p.Proto = b[0]
				return p, nil, true
			}
			size = 8
		default:
			return p, b, true
		}
		p.Proto = b[0]
		if size > len(b) {
			return p, nil, true
		}
		b = b[size:]
	}
}

func (p *Packet) decodeTransport(b []byte) {
	switch p.Proto {
	case unix.IPPROTO_TCP:
		if len(b) >= 14 {
			p.SrcPort, p.DstPort = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
			p.Flags = Flags(b[13])
		}
	case unix.IPPROTO_UDP:
		if len(b) >= 8 {
			p.SrcPort, p.DstPort = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
		}
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		if len(b) >= 2 {
			p.ICMPType, p.ICMPCode = b[0], b[1]
		}
	}
}
