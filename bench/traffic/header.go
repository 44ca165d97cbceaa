package traffic

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// A version is that of the PROXY protocol.
type version int

const (
	plain version = iota // no header
	v1
	v2
)

// A greeting is what a header says.
type greeting struct{ source, destination netip.AddrPort }

// errShort is a header that is not all there yet.
var errShort = errors.New("the header is incomplete")

// parse reads the header at the beginning of p and returns its length. It knows
// TCP over IPv4, which is all that is measured. See the specification,
// "proxy-protocol.txt", of HAProxy.
func parse(v version, p []byte) (greeting, int, error) {
	switch v {
	case v1:
		return parseV1(p)
	case v2:
		return parseV2(p)
	}
	return greeting{}, 0, nil
}

// mostV1 is the longest header of version 1 (section 2.1).
const mostV1 = 107

func parseV1(p []byte) (g greeting, n int, err error) {
	end := bytes.Index(p, []byte("\r\n"))
	switch {
	case end < 0 && len(p) < mostV1:
		return g, 0, errShort
	case end < 0:
		return g, 0, fmt.Errorf("%q is no PROXY header of version 1", p[:mostV1])
	}
	f := bytes.Split(p[:end], []byte(" "))
	if len(f) != 6 || string(f[0]) != "PROXY" || string(f[1]) != "TCP4" {
		return g, 0, fmt.Errorf("%q is no PROXY header of TCP over IPv4", p[:end])
	}
	if g.source, err = netip.ParseAddrPort(string(f[2]) + ":" + string(f[4])); err == nil {
		g.destination, err = netip.ParseAddrPort(string(f[3]) + ":" + string(f[5]))
	}
	if err != nil {
		return greeting{}, 0, fmt.Errorf("%q: %w", p[:end], err)
	}
	return g, end + 2, nil
}

// signature begins a header of version 2 (section 2.2).
const signature = "\r\n\r\n\x00\r\nQUIT\n"

func parseV2(p []byte) (g greeting, n int, err error) {
	const fixed, addresses = 16, 12
	if len(p) < fixed {
		return g, 0, errShort
	}
	if string(p[:len(signature)]) != signature {
		return g, 0, fmt.Errorf("%x does not begin as a PROXY header of version 2", p[:fixed])
	}
	length := int(binary.BigEndian.Uint16(p[14:]))
	switch {
	case p[12] != 0x21 || p[13] != 0x11 || length < addresses:
		return g, 0, fmt.Errorf("%x is no PROXY header of TCP over IPv4", p[:fixed])
	case len(p) < fixed+length:
		return g, 0, errShort
	}
	a := p[fixed:]
	g.source = netip.AddrPortFrom(netip.AddrFrom4([4]byte(a)), binary.BigEndian.Uint16(a[8:]))
	g.destination = netip.AddrPortFrom(netip.AddrFrom4([4]byte(a[4:])), binary.BigEndian.Uint16(a[10:]))
	return g, fixed + length, nil
}
