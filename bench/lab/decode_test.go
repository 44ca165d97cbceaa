package lab

import (
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const (
	ip4 = "45000028 00004000 40060000 cb007109 0a00010b " // 203.0.113.9 > 10.0.1.11, TCP
	ip6 = "20010db8009900000000000000000009 20010db8000100000000000000000011 "
	tcp = "9cb01f90 00000000 00000000 5012ffff 00000000 " // 40112 > 8080, SYN|ACK
)

var packetTests = []struct {
	name, raw, want string
}{
	{"tcp", ip4 + tcp, " in 203.0.113.9:40112 > 10.0.1.11:8080 tcp SYN|ACK"},
	{"tcp without its header", ip4, " in 203.0.113.9:0 > 10.0.1.11:0 tcp -"},
	{"ipv4 options", "46000028 00004000 40060000 cb007109 0a00010b 01010101" + tcp, " in 203.0.113.9:40112 > 10.0.1.11:8080 tcp SYN|ACK"},
	{"later fragment", "45000028 00000001 40060000 cb007109 0a00010b " + tcp, " in 203.0.113.9:0 > 10.0.1.11:0 tcp -"},
	{"icmp", "4500001c 00000000 40010000 cb007109 0a00010b 0303 000000000000", " in 203.0.113.9 > 10.0.1.11 icmp type 3 code 3"},
	{"another protocol", "45000014 00000000 40320000 cb007109 0a00010b", " in 203.0.113.9 > 10.0.1.11 protocol 50"},
	{"udp over ipv6", "60000000 00081140 " + ip6 + "9cb00035 00080000", " in [2001:db8:99::9]:40112 > [2001:db8:1::11]:53 udp"},
	{"extension headers", "60000000 00180040 " + ip6 + "3c00000000000000 2c00000000000000 1100000100000000 9cb00035 00080000", " in [2001:db8:99::9]:40112 > [2001:db8:1::11]:53 udp"},
	{"later ipv6 fragment", "60000000 00102c40 " + ip6 + "1100000800000000 9cb00035 00080000", " in [2001:db8:99::9]:0 > [2001:db8:1::11]:0 udp"},
	{"extension header cut short", "60000000 00100040 " + ip6 + "110f0000 00000000 9cb00035 00080000", " in [2001:db8:99::9]:0 > [2001:db8:1::11]:0 udp"},
}

func TestDecodePacket(t *testing.T) {
	for _, tt := range packetTests {
		p, ok := decodePacket(unhex(t, tt.raw))
		if !ok || p.String() != tt.want {
			t.Errorf("%s: %q, %v, want %q", tt.name, p, ok, tt.want)
		}
	}
	for _, raw := range []string{"", "45", "55", "60", "44000014 00000000 40320000 cb007109 0a00010b", "4f000014 00000000 40320000 cb007109 0a00010b"} {
		if p, ok := decodePacket(unhex(t, raw)); ok {
			t.Errorf("%q was taken for %v", raw, p)
		}
	}
	p, _ := decodePacket(unhex(t, ip4+tcp))
	want := Packet{Src: netip.MustParseAddr("203.0.113.9"), Dst: netip.MustParseAddr("10.0.1.11"), Proto: 6, SrcPort: 40112, DstPort: 8080, Flags: SYN | ACK, Length: 40}
	if diff := cmp.Diff(want, p, equalNetip); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func FuzzDecodePacket(f *testing.F) {
	for _, tt := range packetTests {
		f.Add(unhex(f, tt.raw))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p, ok := decodePacket(b)
		if ok && (!p.Src.IsValid() || !p.Dst.IsValid() || p.Src.Is4() != p.Dst.Is4()) {
			t.Errorf("%x: addresses %v and %v", b, p.Src, p.Dst)
		}
		_ = p.String()
	})
}
