package conntrack

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func (b *attrs) nest(typ uint16, fill func(*attrs)) {
	var inner attrs
	fill(&inner)
	b.put(typ|nested, inner)
}

func (b *attrs) u64(typ uint16, v uint64) { b.put(typ, binary.BigEndian.AppendUint64(nil, v)) }

func (b *attrs) tuple(typ uint16, proto Protocol, src, dst netip.AddrPort) {
	from, to := uint16(ctaIPv4Src), uint16(ctaIPv4Dst)
	if src.Addr().Is6() {
		from, to = ctaIPv6Src, ctaIPv6Dst
	}
	b.nest(typ, func(b *attrs) {
		b.nest(ctaTupleIP, func(b *attrs) {
			b.put(from, src.Addr().AsSlice())
			b.put(to, dst.Addr().AsSlice())
		})
		b.nest(ctaTupleProto, func(b *attrs) {
			b.put(ctaProtoNum, []byte{byte(proto)})
			b.put(ctaProtoSrcPort, binary.BigEndian.AppendUint16(nil, src.Port()))
			b.put(ctaProtoDstPort, binary.BigEndian.AppendUint16(nil, dst.Port()))
		})
	})
}

func (b *attrs) counters(typ uint16, v volume) {
	b.nest(typ, func(b *attrs) {
		b.u64(ctaCountersPackets, v.packets)
		b.u64(ctaCountersBytes, v.bytes)
	})
}

var (
	client4 = netip.MustParseAddrPort("203.0.113.9:40112")
	vip4    = netip.MustParseAddrPort("198.51.100.10:80")
	target4 = netip.MustParseAddrPort("10.0.1.11:8080")
	client6 = netip.MustParseAddrPort("[2001:db8:1::9]:5353")
	vip6    = netip.MustParseAddrPort("[2001:db8::10]:53")
)

// example is a message as the kernel writes it.
func example() []byte {
	var b attrs
	b.tuple(ctaTupleOrig, TCP, client4, vip4)
	b.tuple(ctaTupleReply, TCP, target4, client4)
	b.u32(ctaStatus, statusSeenReply|statusAssured|statusConfirmed)
	b.u32(ctaTimeout, 350)
	b.counters(ctaCountersOrig, volume{bytes: 1500, packets: 3})
	b.counters(ctaCountersReply, volume{bytes: 90000, packets: 60})
	b.nest(ctaProtoinfo, func(b *attrs) {
		b.nest(ctaProtoinfoTCP, func(b *attrs) { b.put(ctaProtoinfoTCPState, []byte{byte(Established)}) })
	})
	b.u32(ctaMark, 0xdeadbeef)
	b.u32(ctaID, 0x01020304)
	b.put(ctaZone, []byte{0, 9})
	return appendMessage(nil, msgGet, 0, 1, unix.AF_INET, b)
}

func TestDecode(t *testing.T) {
	m, rest, ok := nextMessage(example())
	if !ok || len(rest) != 0 {
		t.Fatalf("message %t, then %d bytes", ok, len(rest))
	}
	var r record
	if err := r.parse(m); err != nil {
		t.Fatal(err)
	}
	want := Flow{
		Protocol:  TCP,
		Original:  Direction{Src: client4, Dst: vip4, Bytes: 1500, Packets: 3},
		Reply:     Direction{Src: target4, Dst: client4, Bytes: 90000, Packets: 60},
		Mark:      0xdeadbeef,
		Timeout:   350 * time.Second,
		Status:    statusSeenReply | statusAssured | statusConfirmed,
		TCPState:  Established,
		Accounted: true,
	}
	if diff := cmp.Diff(want, r.flow(), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("flow (-want +got):\n%s", diff)
	}
	text := "tcp      6 350 ESTABLISHED src=203.0.113.9 dst=198.51.100.10 sport=40112 dport=80 packets=3 bytes=1500 " +
		"src=10.0.1.11 dst=203.0.113.9 sport=8080 dport=40112 packets=60 bytes=90000 [ASSURED] mark=3735928559"
	if got := r.flow().String(); got != text {
		t.Errorf("text\n%s, want\n%s", got, text)
	}
	if got, want := r.volume(), (volume{91500, 63}); got != want {
		t.Errorf("volume %v, want %v", got, want)
	}
	var again record
	if err := again.parse(message{family: r.family, body: r.name().attrs}); err != nil {
		t.Fatalf("the flow's name is no message: %v", err)
	}
	if again.flowID() != r.flowID() || string(again.zone) != string(r.zone) {
		t.Error("the flow's name names another flow")
	}
}

func TestDecodeRefuses(t *testing.T) {
	m, _, _ := nextMessage(example())
	var tupleOnly, idOnly, shortID attrs
	tupleOnly.tuple(ctaTupleOrig, UDP, client6, vip6)
	idOnly.u32(ctaID, 1)
	shortID.tuple(ctaTupleOrig, UDP, client6, vip6)
	shortID.put(ctaID, []byte{1, 2})
	tests := map[string][]byte{
		"nothing":                nil,
		"half an attribute":      m.body[:len(m.body)-6],
		"trailing bytes":         append(append([]byte{}, m.body...), 1, 2, 3),
		"an attribute too short": {3, 0, 1, 0},
		"no id":                  tupleOnly,
		"no tuple":               idOnly,
		"half an id":             shortID,
	}
	for name, body := range tests {
		t.Run(name, func(t *testing.T) {
			var r record
			if err := r.parse(message{body: body}); !errors.Is(err, errMalformed) {
				t.Errorf("error %v, want %v", err, errMalformed)
			}
		})
	}
}

// Whatever a datagram holds, reading it ends, stays inside it, and allocates
// nothing until a Flow is asked for.
func FuzzDecode(f *testing.F) {
	f.Add(example())
	f.Add(append(example(), example()...))
	var v6 attrs
	v6.tuple(ctaTupleOrig, UDP, client6, vip6)
	v6.tuple(ctaTupleReply, UDP, vip6, client6)
	v6.u32(ctaID, 7)
	f.Add(appendMessage(nil, msgDelete, 0, 0, unix.AF_INET6, v6))
	f.Fuzz(func(t *testing.T, b []byte) {
		left := len(b)
		for m, rest, ok := nextMessage(b); ok; m, rest, ok = nextMessage(rest) {
			if len(rest) >= left {
				t.Fatal("no progress")
			}
			left = len(rest)
			_ = m.errno()
			var r record
			if r.parse(m) != nil {
				continue
			}
			_ = r.flow().String()
			var again record
			if err := again.parse(message{family: r.family, body: r.name().attrs}); err != nil {
				t.Fatalf("the flow's name is no message: %v", err)
			}
			if again.flowID() != r.flowID() {
				t.Fatal("the flow's name names another flow")
			}
		}
	})
}

// What a flowtable has is told without a state and a time.
func TestOffloaded(t *testing.T) {
	f := Flow{Protocol: TCP, TCPState: Established, Status: statusSeenReply | statusAssured | statusOffload}
	if !f.Status.Offloaded() || Status(statusAssured).Offloaded() {
		t.Error("the status does not tell")
	}
	if s := f.String(); !strings.Contains(s, "[OFFLOAD] mark") || strings.Contains(s, "ASSURED") {
		t.Errorf("%q is not in conntrack's words", s)
	}
	r := record{original: tupleOf(unix.IPPROTO_TCP), status: uint32(f.Status)}
	if got := r.flow(); got.TCPState != Established {
		t.Errorf("state %v", got.TCPState)
	}
}

// tupleOf is CTA_TUPLE_ORIG of a protocol alone.
func tupleOf(proto uint8) []byte {
	var in, out attrs
	in.put(ctaProtoNum, []byte{proto})
	out.put(ctaTupleProto|nested, in)
	return out
}
