package proxyproto

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	oracle "github.com/pires/go-proxyproto"
	"pgregory.net/rapid"
)

var (
	client4 = netip.MustParseAddrPort("203.0.113.7:51324")
	vip4    = netip.MustParseAddrPort("198.51.100.10:443")
	client6 = netip.MustParseAddrPort("[2001:db8:c::7]:51324")
	vip6    = netip.MustParseAddrPort("[2001:db8:f::10]:443")
	id      = [16]byte{0x01, 0x92, 0xf3, 0x5e, 0, 0, 0x70, 0, 0x80, 0, 0, 0, 0, 0, 0, 0x2a}
)

func mapped(ap netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(ap.Addr().As16()), ap.Port())
}

// TestAppendHeader spells headers out, field by field in the order of section
// 2.2, the checksums reckoned by another implementation.
func TestAppendHeader(t *testing.T) {
	const (
		sig        = "0d0a0d0a000d0a515549540a"
		addresses4 = "cb007107 c633640a c87c 01bb"
		addresses6 = "20010db8000c00000000000000000007 20010db8000f00000000000000000010 c87c 01bb"
		uniqueID   = "05 0010 0192f35e00007000800000000000002a"
	)
	tests := map[string]struct {
		src, dst netip.AddrPort
		options  Options
		want     string
	}{
		"IPv4":                {client4, vip4, Options{}, sig + "21 11 000c" + addresses4},
		"IPv6":                {client6, vip6, Options{}, sig + "21 21 0024" + addresses6},
		"IPv4 in IPv6":        {mapped(client4), mapped(vip4), Options{}, sig + "21 11 000c" + addresses4},
		"IPv4 and IPv4 in 6":  {client4, mapped(vip4), Options{}, sig + "21 11 000c" + addresses4},
		"IPv4 to IPv6":        {client4, vip6, Options{}, sig + "21 21 0024 00000000000000000000ffffcb007107 20010db8000f00000000000000000010 c87c 01bb"},
		"IPv6 to IPv4":        {client6, vip4, Options{}, sig + "21 21 0024 20010db8000c00000000000000000007 00000000000000000000ffffc633640a c87c 01bb"},
		"a zone":              {netip.MustParseAddrPort("[fe80::1%eth0]:1"), vip6, Options{}, sig + "21 21 0024 fe800000000000000000000000000001 20010db8000f00000000000000000010 0001 01bb"},
		"no addresses":        {netip.AddrPort{}, netip.AddrPort{}, Options{}, sig + "21 21 0024" + strings.Repeat("00", 36)},
		"IPv4 to no address":  {client4, netip.AddrPort{}, Options{}, sig + "21 21 0024 00000000000000000000ffffcb007107" + strings.Repeat("00", 16) + "c87c 0000"},
		"a unique id":         {client4, vip4, Options{UniqueID: id, HasUniqueID: true}, sig + "21 11 001f" + addresses4 + uniqueID},
		"an id that is unset": {client4, vip4, Options{UniqueID: id}, sig + "21 11 000c" + addresses4},
		"an id of zeroes":     {client4, vip4, Options{HasUniqueID: true}, sig + "21 11 001f" + addresses4 + "05 0010" + strings.Repeat("00", 16)},
		"a checksum":          {client4, vip4, Options{CRC32C: true}, sig + "21 11 0013" + addresses4 + "03 0004 10b4a495"},
		"all, IPv4":           {client4, vip4, Options{UniqueID: id, HasUniqueID: true, CRC32C: true}, sig + "21 11 0026" + addresses4 + "03 0004 cc0fe339" + uniqueID},
		"all, IPv6":           {client6, vip6, Options{UniqueID: id, HasUniqueID: true, CRC32C: true}, sig + "21 21 003e" + addresses6 + "03 0004 1ff0912b" + uniqueID},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			want, err := hex.DecodeString(strings.ReplaceAll(tt.want, " ", ""))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, AppendHeader(nil, tt.src, tt.dst, tt.options)); diff != "" {
				t.Errorf("header (-want +got):\n%s", diff)
			}
			if len(want) > MaxHeader {
				t.Errorf("%d bytes, but MaxHeader is %d", len(want), MaxHeader)
			}
		})
	}
}

func TestAppendLocal(t *testing.T) {
	want := []byte{0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a, 0x20, 0x00, 0x00, 0x00}
	got := AppendLocal([]byte("before"))
	if diff := cmp.Diff(append([]byte("before"), want...), got); diff != "" {
		t.Errorf("header (-want +got):\n%s", diff)
	}
	if len(want) != LocalHeader {
		t.Errorf("LocalHeader is %d", LocalHeader)
	}
	if theirs, err := (&oracle.Header{Version: 2, Command: oracle.LOCAL}).Format(); err != nil || !bytes.Equal(theirs, want) {
		t.Errorf("the oracle writes %x, %v", theirs, err)
	}
}

// TestChecksumOfSample verifies the checksum of a header that a Network Load
// Balancer sent, so that the reckoning below is known to be AWS's own.
// (github.com/aws/elastic-load-balancing-tools, Compatibility_AwsNetworkLoadBalancerTest)
func TestChecksumOfSample(t *testing.T) {
	sample, err := hex.DecodeString("0d0a0d0a000d0a515549540a" + "21110054" + "ac1f0771ac1f0a1fc8f20050" + "030004e8d6892d" +
		"ea001701" + hex.EncodeToString([]byte("vpce-08d2bf15fac5001c9")) + "040024" + strings.Repeat("00", 36))
	if err != nil {
		t.Fatal(err)
	}
	const checksum = prefixSize + address4Size + tlvSize
	want := binary.BigEndian.Uint32(sample[checksum:])
	clear(sample[checksum : checksum+4])
	if got := bitwiseCRC32C(sample); got != want {
		t.Errorf("checksum %08x, want %08x", got, want)
	}
}

// bitwiseCRC32C is RFC 4960 appendix B by its definition, a bit at a time.
func bitwiseCRC32C(b []byte) uint32 {
	const reversed = 0x82f63b78 // of the polynomial 0x1edc6f41
	crc := ^uint32(0)
	for _, c := range b {
		crc ^= uint32(c)
		for range 8 {
			low := crc & 1
			crc = crc>>1 ^ reversed*low
		}
	}
	return ^crc
}

// TestOracle compares with go-proxyproto for any addresses and options.
func TestOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		checkOracle(t, drawAddr(t, "src"), drawAddr(t, "dst"), Options{
			UniqueID:    [16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "id")),
			HasUniqueID: rapid.Bool().Draw(t, "has id"),
			CRC32C:      rapid.Bool().Draw(t, "crc"),
		})
	})
}

func FuzzOracle(f *testing.F) {
	f.Add([]byte{203, 0, 113, 7}, uint16(51324), []byte{198, 51, 100, 10}, uint16(443), id[:], true, true)
	f.Add(client6.Addr().AsSlice(), uint16(0), vip6.Addr().AsSlice(), uint16(65535), id[:], false, true)
	f.Fuzz(func(t *testing.T, src []byte, sport uint16, dst []byte, dport uint16, unique []byte, hasID, crc bool) {
		s, ok1 := netip.AddrFromSlice(src)
		d, ok2 := netip.AddrFromSlice(dst)
		if !ok1 || !ok2 {
			return
		}
		o := Options{HasUniqueID: hasID, CRC32C: crc}
		copy(o.UniqueID[:], unique)
		checkOracle(t, netip.AddrPortFrom(s, sport), netip.AddrPortFrom(d, dport), o)
	})
}

func drawAddr(t *rapid.T, label string) netip.AddrPort {
	port := rapid.Uint16().Draw(t, label+" port")
	b := rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, label)
	var addr netip.Addr
	switch rapid.IntRange(0, 2).Draw(t, label+" kind") {
	case 0:
		addr = netip.AddrFrom4([4]byte(b[:4]))
	case 1:
		addr = netip.AddrFrom16(netip.AddrFrom4([4]byte(b[:4])).As16())
	case 2:
		addr = netip.AddrFrom16([16]byte(b))
	}
	return netip.AddrPortFrom(addr, port)
}

type fataler interface {
	Helper()
	Fatalf(format string, args ...any)
}

// checkOracle has the oracle write the same header, and read ours back.
func checkOracle(t fataler, src, dst netip.AddrPort, o Options) {
	t.Helper()
	const before, after = "before", "GET / HTTP/1.1\r\n"
	got := AppendHeader([]byte(before), src, dst, o)
	if string(got[:len(before)]) != before {
		t.Fatalf("what was there before is now %q", got[:len(before)])
	}
	got = got[len(before):]

	checksum := len(got) // where it begins
	var tlvs []oracle.TLV
	if o.CRC32C {
		checksum = prefixSize + int(binary.BigEndian.Uint16(got[prefixSize-2:])) - 4
		if o.HasUniqueID {
			checksum -= uniqueIDSize
		}
		tlvs = append(tlvs, oracle.TLV{Type: oracle.PP2_TYPE_CRC32C, Value: got[checksum : checksum+4]})
	}
	if o.HasUniqueID {
		tlvs = append(tlvs, oracle.TLV{Type: oracle.PP2_TYPE_UNIQUE_ID, Value: o.UniqueID[:]})
	}
	theirs := oracle.HeaderProxyFromAddrs(2, net.TCPAddrFromAddrPort(src), net.TCPAddrFromAddrPort(dst))
	if err := theirs.SetTLVs(tlvs); err != nil {
		t.Fatalf("TLVs: %v", err)
	}
	want, err := theirs.Format()
	if err != nil || !bytes.Equal(want, got) {
		t.Fatalf("want %x, %v\ngot  %x", want, err, got)
	}
	if o.CRC32C {
		zeroed := bytes.Clone(got)
		clear(zeroed[checksum : checksum+4])
		if got, want := binary.BigEndian.Uint32(got[checksum:]), bitwiseCRC32C(zeroed); got != want {
			t.Fatalf("checksum %08x, want %08x", got, want)
		}
	}

	r := bufio.NewReader(io.MultiReader(bytes.NewReader(got), strings.NewReader(after)))
	back, err := oracle.Read(r)
	if err != nil {
		t.Fatalf("read back: %v", err)
	}
	rest, _ := io.ReadAll(r)
	if string(rest) != after || !back.EqualsTo(theirs) || back.Command != oracle.PROXY {
		t.Fatalf("read back %+v, then %q", back, rest)
	}
}

// TestNoAllocation: a connection costs the relay no garbage.
func TestNoAllocation(t *testing.T) {
	b := make([]byte, 0, MaxHeader)
	o := Options{UniqueID: id, HasUniqueID: true, CRC32C: true}
	for name, write := range map[string]func(){
		"AppendHeader, IPv4": func() { AppendHeader(b, client4, vip4, o) },
		"AppendHeader, IPv6": func() { AppendHeader(b, client6, vip6, o) },
		"AppendLocal":        func() { AppendLocal(b) },
	} {
		if n := testing.AllocsPerRun(100, write); n != 0 {
			t.Errorf("%s allocates %v times", name, n)
		}
	}
}

func BenchmarkAppendHeader(b *testing.B) {
	for name, o := range map[string]Options{
		"addresses": {},
		"all":       {UniqueID: id, HasUniqueID: true, CRC32C: true},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			var buffer [MaxHeader]byte
			for b.Loop() {
				AppendHeader(buffer[:0], client6, vip6, o)
			}
		})
	}
}
