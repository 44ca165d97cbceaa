package conntrack

import (
	"encoding/binary"
	"errors"
	"hash/maphash"
	"net/netip"
	"time"
)

// A volume is what one direction, one flow or one target has carried.
type volume struct{ bytes, packets uint64 }

func (v volume) plus(w volume) volume { return volume{v.bytes + w.bytes, v.packets + w.packets} }

// A record is a ctnetlink message about one flow, cut into its attributes. The
// slices are the datagram's: they last until the next one is read.
type record struct {
	family          uint8
	mark, status    uint32
	timeout         uint32
	original, reply []byte // CTA_TUPLE_ORIG, CTA_TUPLE_REPLY
	protoinfo       []byte
	id, zone        []byte
	sent, received  volume
	accounted       bool
}

var errMalformed = errors.New("malformed conntrack message")

// parse reads m. What is in r before does not matter.
func (r *record) parse(m message) error {
	*r = record{family: m.family}
	b := m.body
	for a, rest, ok := next(b); ok; a, rest, ok = next(rest) {
		b = rest
		switch a.typ {
		case ctaTupleOrig:
			r.original = a.data
		case ctaTupleReply:
			r.reply = a.data
		case ctaStatus:
			r.status = be32(a.data)
		case ctaProtoinfo:
			r.protoinfo = a.data
		case ctaTimeout:
			r.timeout = be32(a.data)
		case ctaMark:
			r.mark = be32(a.data)
		case ctaCountersOrig:
			r.sent, r.accounted = counters(a.data), true
		case ctaCountersReply:
			r.received = counters(a.data)
		case ctaID:
			r.id = a.data
		case ctaZone:
			r.zone = a.data
		}
	}
	if len(b) != 0 || r.original == nil || len(r.id) != 4 {
		return errMalformed
	}
	return nil
}

func (r *record) volume() volume { return r.sent.plus(r.received) }

func counters(b []byte) (v volume) {
	for a, rest, ok := next(b); ok; a, rest, ok = next(rest) {
		switch a.typ {
		case ctaCountersPackets:
			v.packets = be64(a.data)
		case ctaCountersBytes:
			v.bytes = be64(a.data)
		}
	}
	return v
}

// A flowID tells flows apart. CTA_ID alone does not: it has 32 bits, which two
// of 77,000 flows share with even odds. The tuple alone does not either: a flow
// that ended may begin again.
type flowID uint64

var seed = maphash.MakeSeed()

func (r *record) flowID() flowID {
	return flowID(maphash.Bytes(seed, r.original) ^ uint64(be32(r.id))*0x9e3779b97f4a7c15)
}

// A flowName is what a request about one flow has to say: the tuple to find it
// by, and the id so that a successor with the same tuple is not ended in its place.
type flowName struct {
	family uint8
	attrs  attrs
}

func (r *record) name() flowName {
	n := flowName{family: r.family, attrs: make(attrs, 0, len(r.original)+20)}
	n.attrs.put(ctaTupleOrig|nested, r.original)
	n.attrs.put(ctaID, r.id)
	if r.zone != nil {
		n.attrs.put(ctaZone, r.zone)
	}
	return n
}

// flow reads all the rest of the record.
func (r *record) flow() Flow {
	f := Flow{
		Mark: r.mark, Status: Status(r.status), Timeout: time.Duration(r.timeout) * time.Second,
		TCPState: tcpState(r.protoinfo), Accounted: r.accounted,
	}
	f.Protocol, f.Original.Src, f.Original.Dst = tuple(r.original)
	_, f.Reply.Src, f.Reply.Dst = tuple(r.reply)
	if f.Protocol == TCP && f.Status.Offloaded() {
		f.TCPState = Established
	}
	f.Original.Bytes, f.Original.Packets = r.sent.bytes, r.sent.packets
	f.Reply.Bytes, f.Reply.Packets = r.received.bytes, r.received.packets
	return f
}

func tuple(b []byte) (proto Protocol, src, dst netip.AddrPort) {
	var from, to netip.Addr
	var sport, dport uint16
	for a, rest, ok := next(b); ok; a, rest, ok = next(rest) {
		switch a.typ {
		case ctaTupleIP:
			from, to = addresses(a.data)
		case ctaTupleProto:
			proto, sport, dport = ports(a.data)
		}
	}
	return proto, netip.AddrPortFrom(from, sport), netip.AddrPortFrom(to, dport)
}

func addresses(b []byte) (src, dst netip.Addr) {
	for a, rest, ok := next(b); ok; a, rest, ok = next(rest) {
		// Anything but 4 or 16 bytes leaves the zero Addr.
		switch a.typ {
		case ctaIPv4Src, ctaIPv6Src:
			src, _ = netip.AddrFromSlice(a.data)
		case ctaIPv4Dst, ctaIPv6Dst:
			dst, _ = netip.AddrFromSlice(a.data)
		}
	}
	return src, dst
}

func ports(b []byte) (proto Protocol, src, dst uint16) {
	for a, rest, ok := next(b); ok; a, rest, ok = next(rest) {
		switch a.typ {
		case ctaProtoNum:
			if len(a.data) == 1 {
				proto = Protocol(a.data[0])
			}
		case ctaProtoSrcPort:
			src = be16(a.data)
		case ctaProtoDstPort:
			dst = be16(a.data)
		}
	}
	return proto, src, dst
}

func tcpState(protoinfo []byte) TCPState {
	for a, rest, ok := next(protoinfo); ok; a, rest, ok = next(rest) {
		if a.typ != ctaProtoinfoTCP {
			continue
		}
		for s, rest, ok := next(a.data); ok; s, rest, ok = next(rest) {
			if s.typ == ctaProtoinfoTCPState && len(s.data) == 1 {
				return TCPState(s.data[0])
			}
		}
	}
	return 0
}

func be16(b []byte) uint16 {
	if len(b) < 2 {
		return 0
	}
	return binary.BigEndian.Uint16(b)
}

func be32(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

func be64(b []byte) uint64 {
	if len(b) < 8 {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}
