package prompt

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestSegment(t *testing.T) {
	tests := []struct {
		from, to string
		flags    uint8
		seq, ack uint32
		want     string // without the TCP checksum
	}{
		{
			"198.51.100.10:80", "203.0.113.9:40000", flagSYN | flagACK, 0x01020304, 0x05060708,
			"4500 0028 0000 4000 4006 0000 c633640a cb007109 0050 9c40 01020304 05060708 5012 0400 ____ 0000",
		},
		{
			"[::ffff:203.0.113.9]:40000", "10.0.1.11:65535", flagSYN, 0xffffffff, 0,
			"4500 0028 0000 4000 4006 0000 cb007109 0a00010b 9c40 ffff ffffffff 00000000 5002 0400 ____ 0000",
		},
		{
			"[2001:db8:77::10]:443", "[2001:db8:99::9]:1", flagSYN, 0, 0,
			"60000000 0014 06 40 20010db8007700000000000000000010 20010db8009900000000000000000009 " +
				"01bb 0001 00000000 00000000 5002 0400 ____ 0000",
		},
	}
	for _, tt := range tests {
		p, err := pairOf(netip.MustParseAddrPort(tt.from), netip.MustParseAddrPort(tt.to))
		if err != nil {
			t.Fatal(err)
		}
		b := p.segment(tt.flags, tt.seq, tt.ack)
		text := hex.EncodeToString(b)
		at := len(text) - 8
		if diff := cmp.Diff(strings.ReplaceAll(tt.want, " ", ""), text[:at]+"____"+text[at+4:]); diff != "" {
			t.Errorf("%s → %s (-want +got):\n%s", tt.from, tt.to, diff)
		}
		if err := verify(b); err != nil {
			t.Errorf("%s → %s: %v", tt.from, tt.to, err)
		}
	}
}

// verify checks the TCP checksum as a receiver does, over the pseudo-header as
// the RFCs draw it, byte by byte with the carry at once.
func verify(b []byte) error {
	var pseudo []byte
	tcp := b[20:]
	if b[0]>>4 == 6 {
		tcp = b[40:]
		pseudo = append(append(pseudo, b[8:40]...), 0, 0, 0, byte(len(tcp)), 0, 0, 0, b[6])
	} else {
		pseudo = append(append(pseudo, b[12:20]...), 0, b[9], 0, byte(len(tcp)))
	}
	var hi, lo int
	for i, c := range append(pseudo, tcp...) {
		if i%2 == 0 {
			hi += int(c)
		} else {
			lo += int(c)
		}
		hi += lo >> 8
		lo &= 0xff
		lo += hi >> 8
		hi &= 0xff
	}
	if hi != 0xff || lo != 0xff {
		return fmt.Errorf("the sum is %02x%02x, not ffff", hi, lo)
	}
	return nil
}

// Whatever the addresses and numbers, a receiver takes the checksum for right.
func FuzzSegment(f *testing.F) {
	f.Add([]byte{198, 51, 100, 10}, []byte{203, 0, 113, 9}, uint16(80), uint16(40000), flagSYN, uint32(7), uint32(0))
	f.Add(netip.MustParseAddr("2001:db8::1").AsSlice(), netip.MustParseAddr("2001:db8::2").AsSlice(), uint16(0), uint16(65535), flagSYN|flagACK, ^uint32(0), ^uint32(0))
	f.Fuzz(func(t *testing.T, from, to []byte, sport, dport uint16, flags uint8, seq, ack uint32) {
		src, _ := netip.AddrFromSlice(from)
		dst, _ := netip.AddrFromSlice(to)
		p, err := pairOf(netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport))
		if err != nil {
			return
		}
		if err := verify(p.segment(flags, seq, ack)); err != nil {
			t.Error(err)
		}
	})
}

func TestPairsOfOneFamily(t *testing.T) {
	v4, v6 := netip.MustParseAddrPort("203.0.113.9:1"), netip.MustParseAddrPort("[2001:db8::1]:1")
	for _, p := range [][2]netip.AddrPort{{v4, v6}, {v6, v4}, {v4, {}}, {{}, v6}, {}} {
		if got, err := pairOf(p[0], p[1]); err == nil {
			t.Errorf("%v became %v", p, got)
		}
	}
}

func TestFailuresAreBounded(t *testing.T) {
	var f failures
	f.note(nil)
	if err := f.err(); err != nil {
		t.Error(err)
	}
	for range 1000 {
		f.note(unix.ENETUNREACH)
	}
	want := strings.Repeat("network is unreachable\n", failuresNamed) + "and 996 more"
	if got := f.err().Error(); got != want || !errors.Is(f.err(), unix.ENETUNREACH) {
		t.Errorf("got %q", got)
	}
}
