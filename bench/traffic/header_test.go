package traffic

import (
	"encoding/hex"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"nlb/proxyproto"
)

var (
	source      = netip.MustParseAddrPort("203.0.113.9:40000")
	destination = netip.MustParseAddrPort("198.51.100.10:80")
)

const (
	goodV1 = "PROXY TCP4 203.0.113.9 198.51.100.10 40000 80\r\n"
	goodV2 = "0d0a0d0a000d0a515549540a" + "2111000c" + "cb007109" + "c633640a" + "9c40" + "0050"
)

func bytesOf(t testing.TB, text string) []byte {
	t.Helper()
	p, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestParse(t *testing.T) {
	withTLV := proxyproto.AppendHeader(nil, source, destination, proxyproto.Options{CRC32C: true})
	for _, c := range []struct {
		name    string
		version version
		header  []byte
	}{
		{"none", plain, nil},
		{"v1", v1, []byte(goodV1)},
		{"v2", v2, bytesOf(t, goodV2)},
		{"v2 with a TLV", v2, withTLV},
	} {
		t.Run(c.name, func(t *testing.T) {
			g, n, err := parse(c.version, append(c.header, "request"...))
			if err != nil || n != len(c.header) {
				t.Fatalf("%d bytes of %d, error %v", n, len(c.header), err)
			}
			if c.version != plain && g != (greeting{source, destination}) {
				t.Errorf("%+v", g)
			}
			for i := range c.header {
				if _, _, err := parse(c.version, c.header[:i]); !errors.Is(err, errShort) {
					t.Fatalf("%d bytes of it: %v", i, err)
				}
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	for _, c := range []struct {
		name    string
		version version
		header  []byte
	}{
		{"v1: a request", v1, []byte("GET / HTTP/1.1\r\n")},
		{"v1: unknown", v1, []byte("PROXY UNKNOWN\r\n")},
		{"v1: IPv6", v1, []byte("PROXY TCP6 2001:db8:99::9 2001:db8:77::10 40000 80\r\n")},
		{"v1: no end", v1, []byte(strings.Repeat("x", mostV1))},
		{"v1: no address", v1, []byte("PROXY TCP4 client vip 40000 80\r\n")},
		{"v1: no port", v1, []byte("PROXY TCP4 203.0.113.9 198.51.100.10 40000 http\r\n")},
		{"v1: is v2", v1, append(bytesOf(t, goodV2), '\r', '\n')},
		{"v2: is v1", v2, []byte(goodV1)},
		{"v2: local", v2, proxyproto.AppendLocal(nil)},
		{"v2: version 3", v2, bytesOf(t, strings.Replace(goodV2, "2111", "3111", 1))},
		{"v2: UDP", v2, bytesOf(t, strings.Replace(goodV2, "2111", "2112", 1))},
		{"v2: too short for addresses", v2, bytesOf(t, strings.Replace(goodV2, "2111000c", "2111000b", 1))},
	} {
		t.Run(c.name, func(t *testing.T) {
			if g, n, err := parse(c.version, c.header); err == nil || errors.Is(err, errShort) {
				t.Errorf("%+v, %d bytes, error %v", g, n, err)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add(uint8(1), []byte(goodV1))
	f.Add(uint8(2), bytesOf(f, goodV2))
	f.Fuzz(func(t *testing.T, v uint8, p []byte) {
		g, n, err := parse(version(v%3), p)
		if n < 0 || n > len(p) || err != nil && (n != 0 || g != (greeting{})) {
			t.Errorf("%+v, %d bytes of %d, error %v", g, n, len(p), err)
		}
	})
}

// TestWrongCallersEndIt: whatever a balancer says of the client, or shows of
// it, the target knows better.
func TestWrongCallersEndIt(t *testing.T) {
	told := &station{version: v2, client: source.Addr(), to: []netip.AddrPort{destination}}
	shown := &station{client: source.Addr(), keeps: true}
	hidden := &station{client: source.Addr()}
	lb := netip.MustParseAddrPort("10.0.1.1:40000")
	request := make([]byte, message)
	request[0] = askCheck
	copy(request[1:], []byte{203, 0, 113, 9, 0x9c, 0x40})
	for _, c := range []struct {
		name    string
		station *station
		peer    netip.AddrPort
		g       greeting
		want    string
	}{
		{"right", told, lb, greeting{source, destination}, ""},
		{"the balancer for the client", told, lb, greeting{lb, destination},
			"the header says from 10.0.1.1:40000 to 198.51.100.10:80, it was from 203.0.113.9 to 198.51.100.10:80"},
		{"another VIP", told, lb, greeting{source, netip.MustParseAddrPort("10.0.1.11:80")},
			"the header says from 203.0.113.9:40000 to 10.0.1.11:80, it was from 203.0.113.9 to 198.51.100.10:80"},
		{"another connection", told, lb, greeting{netip.MustParseAddrPort("203.0.113.9:40001"), destination},
			"the header says from 203.0.113.9:40001, it was from 203.0.113.9:40000"},
		{"the client itself", shown, source, greeting{}, ""},
		{"the client with another port", shown, netip.MustParseAddrPort("203.0.113.9:40001"), greeting{},
			"the target sees 203.0.113.9:40001, it was 203.0.113.9:40000"},
		{"hidden", hidden, lb, greeting{}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			before, got := c.station.checked, ""
			if err := c.station.check(c.peer, c.g, request); err != nil {
				got = err.Error()
			}
			if got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
			if right := c.station.checked > before; right != (c.want == "") {
				t.Errorf("counted as right: %v", right)
			}
		})
	}
}

// TestHeaderInPieces: a header and a request may come as they like.
func TestHeaderInPieces(t *testing.T) {
	request := make([]byte, message)
	request[0] = askEcho
	all := append(bytesOf(t, goodV2), request...)
	for size := 1; size <= len(all); size++ {
		s, e := &station{version: v2, client: source.Addr(), to: []netip.AddrPort{destination}}, &end{}
		var rest []byte
		for from := 0; from < len(all); from += size {
			if e.greeted {
				t.Fatalf("pieces of %d: greeted by %d bytes of %d", size, from, len(all))
			}
			var err error
			if rest, err = s.greet(e, all[from:min(from+size, len(all))]); err != nil {
				t.Fatalf("pieces of %d: %v", size, err)
			}
		}
		if !e.greeted || string(rest) != string(request) {
			t.Errorf("pieces of %d: %q is left", size, rest)
		}
	}
	s, e := &station{version: v2, client: source.Addr(), to: []netip.AddrPort{destination}}, &end{}
	long := append(bytesOf(t, strings.Replace(goodV2, "000c", "ffff", 1)), make([]byte, 300)...)
	var err error
	for range 3 {
		if _, err = s.greet(e, long); err != nil {
			break
		}
	}
	if err == nil {
		t.Error("a header without an end was believed")
	}
}
