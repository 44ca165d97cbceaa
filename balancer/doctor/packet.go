package doctor

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// A Packet is what is known of one kind of packets. What is zero is not known.
type Packet struct {
	Src, Dst         netip.Addr // of one family; Dst or Src is always known
	SrcPort, DstPort uint16
	Protocol         uint8 // IP protocol number
	// In and Out are the names of interfaces.
	In, Out string
	// Established packets belong to a flow that was answered, and Reply ones go
	// the other way. Translated flows had their destination rewritten by us.
	Established, Reply, Translated bool

	// known has what read found: rulesets ask for few fields, many times.
	known map[Field][]byte
}

// Bits of ct state and ct status, as nf_tables shows them (enum
// nf_ct_info as bits: linux/netfilter/nf_conntrack_common.h).
const (
	stateEstablished = 1 << 1
	stateNew         = 1 << 3
	statusDNAT       = 1 << 5
)

func (p *Packet) ipv6() bool {
	if p.Dst.IsValid() {
		return p.Dst.Is6()
	}
	return p.Src.Is6()
}

func metaField(key uint32) string { return fieldName("meta", key) }
func ctField(key uint32) string   { return fieldName("ct", key) }

// Fields of headers.
const (
	ofNetwork   = "network"
	ofTransport = "transport"
)

// read returns the bytes of a field, and whether they are known. A Packet that
// was read must not be changed.
func (p *Packet) read(f Field) ([]byte, bool) {
	b, again := p.known[f]
	if !again {
		if p.known == nil {
			p.known = map[Field][]byte{}
		}
		if found, ok := p.look(f); ok {
			b = found
		}
		p.known[f] = b
	}
	return b, b != nil
}

func (p *Packet) look(f Field) ([]byte, bool) {
	switch f.Of {
	case ofNetwork:
		if p.ipv6() {
			return part(f, at(8, bytesOf(p.Src)), at(24, bytesOf(p.Dst)), at(6, protocolBytes(p.Protocol)))
		}
		return part(f, at(12, bytesOf(p.Src)), at(16, bytesOf(p.Dst)), at(9, protocolBytes(p.Protocol)))
	case ofTransport:
		return part(f, at(0, portBytes(p.SrcPort)), at(2, portBytes(p.DstPort)))
	case metaField(unix.NFT_META_NFPROTO):
		return []byte{p.family()}, true
	case metaField(unix.NFT_META_PROTOCOL):
		return binary.BigEndian.AppendUint16(nil, p.etherType()), true
	case metaField(unix.NFT_META_L4PROTO):
		return []byte{p.Protocol}, p.Protocol != 0
	case metaField(unix.NFT_META_IIFNAME):
		return nameBytes(p.In, f.Len), p.In != ""
	case metaField(unix.NFT_META_OIFNAME):
		return nameBytes(p.Out, f.Len), p.Out != ""
	case ctField(unix.NFT_CT_STATE):
		return native(p.state()), true
	case ctField(unix.NFT_CT_STATUS):
		// Of its bits only this one is ever asked for in firewalls.
		return native(p.status()), true
	case ctField(unix.NFT_CT_DIRECTION):
		if p.Reply {
			return []byte{1}, true
		}
		return []byte{0}, true
	}
	return nil, false
}

func (p *Packet) family() uint8 {
	if p.ipv6() {
		return unix.NFPROTO_IPV6
	}
	return unix.NFPROTO_IPV4
}

func (p *Packet) etherType() uint16 {
	if p.ipv6() {
		return unix.ETH_P_IPV6
	}
	return unix.ETH_P_IP
}

func (p *Packet) state() uint32 {
	if p.Established || p.Reply {
		return stateEstablished
	}
	return stateNew
}

func (p *Packet) status() uint32 {
	if p.Translated {
		return statusDNAT
	}
	return 0
}

// A span is some known bytes of a header.
type span struct {
	offset uint32
	bytes  []byte
}

func at(offset uint32, b []byte) span { return span{offset, b} }

// part cuts the field out of the span that has all of it.
func part(f Field, spans ...span) ([]byte, bool) {
	for _, s := range spans {
		if f.Offset >= s.offset && uint64(f.Offset)+uint64(f.Len) <= uint64(s.offset)+uint64(len(s.bytes)) {
			return s.bytes[f.Offset-s.offset:][:f.Len], true
		}
	}
	return nil, false
}

func bytesOf(a netip.Addr) []byte {
	if !a.IsValid() {
		return nil
	}
	return a.AsSlice()
}

func portBytes(port uint16) []byte {
	if port == 0 {
		return nil
	}
	return binary.BigEndian.AppendUint16(nil, port)
}

func protocolBytes(p uint8) []byte {
	if p == 0 {
		return nil
	}
	return []byte{p}
}

func native(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

// nameBytes is an interface's name as rules compare it: padded, or a prefix.
func nameBytes(name string, length uint32) []byte {
	b := make([]byte, max(unix.IFNAMSIZ, len(name)))
	copy(b, name)
	return b[:min(int(length), len(b))]
}
