package proxyproto

import (
	"encoding/binary"
	"hash/crc32"
	"net/netip"
)

// The parts of a header (section 2.2), in bytes.
const (
	prefixSize   = 16           // signature, version and command, family and transport, length
	address4Size = 2 * (4 + 2)  // source and destination with their ports
	address6Size = 2 * (16 + 2) //
	tlvSize      = 1 + 2        // a type and the length of its value
	crc32cSize   = tlvSize + 4  // PP2_TYPE_CRC32C
	uniqueIDSize = tlvSize + 16 // PP2_TYPE_UNIQUE_ID, as large as Options.UniqueID
)

// Sizes that a caller may reserve, in bytes.
const (
	// MaxHeader is the most that AppendHeader appends. It is far below the
	// smallest segment a path must carry (536 for IPv4, 1220 for IPv6), so that
	// a header is never split, which receivers may count on (section 2).
	MaxHeader = prefixSize + address6Size + crc32cSize + uniqueIDSize
	// LocalHeader is what AppendLocal appends.
	LocalHeader = prefixSize
)

const (
	// signature begins every header: no line of text, and no TLS record or SSH
	// banner, looks like it.
	signature = "\r\n\r\n\x00\r\nQUIT\n"

	// The version in the upper four bits, the command in the lower ones.
	commandLocal = 0x20
	commandProxy = 0x21

	// The address family in the upper four bits, the transport in the lower ones.
	familyUnspecified = 0x00
	familyTCP4        = 0x11
	familyTCP6        = 0x21

	typeCRC32C   = 0x03 // PP2_TYPE_CRC32C, section 2.2.3
	typeUniqueID = 0x05 // PP2_TYPE_UNIQUE_ID, section 2.2.5
)

// castagnoli is the polynomial of RFC 4960 appendix B, which section 2.2.3
// refers to.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Options are what a header carries besides the addresses. The zero value is a
// header of addresses alone.
type Options struct {
	// UniqueID identifies the connection in the logs of all that see it. It is
	// sent if HasUniqueID, whatever its value.
	UniqueID    [16]byte
	HasUniqueID bool
	// CRC32C adds a checksum over the header. A receiver must verify it if it
	// supports it (section 2.2.3); several ignore it.
	CRC32C bool
}

// AppendHeader appends to b the header of a TCP connection from src, the
// client, to dst, the address the client called, and returns the extended
// slice. It appends at most MaxHeader bytes and allocates nothing if b has room
// for them.
//
// The family is TCP over IPv4 if both addresses are IPv4, mapped into IPv6 or
// not, and else TCP over IPv6, where an IPv4 address stands as ::ffff:a.b.c.d.
// A zone is left out, for it means nothing on another host. The zero Addr is
// sent as ::.
func AppendHeader(b []byte, src, dst netip.AddrPort, o Options) []byte {
	start := len(b)
	source, destination := src.Addr().Unmap(), dst.Addr().Unmap()
	is4 := source.Is4() && destination.Is4()

	b = appendPrefix(b, commandProxy, family(is4), o.length(is4))
	if is4 {
		b = appendAddresses4(b, source, destination)
	} else {
		b = appendAddresses6(b, source, destination)
	}
	b = binary.BigEndian.AppendUint16(b, src.Port())
	b = binary.BigEndian.AppendUint16(b, dst.Port())

	checksum := len(b) + tlvSize
	if o.CRC32C {
		b = append(b, typeCRC32C, 0, crc32cSize-tlvSize, 0, 0, 0, 0)
	}
	if o.HasUniqueID {
		b = append(b, typeUniqueID, 0, uniqueIDSize-tlvSize)
		b = append(b, o.UniqueID[:]...)
	}
	if o.CRC32C {
		// Over the whole header, all TLVs included, with the field itself zero.
		binary.BigEndian.PutUint32(b[checksum:], crc32.Checksum(b[start:], castagnoli))
	}
	return b
}

// AppendLocal appends to b the LocalHeader bytes of a connection that is the
// sender's own, such as a health check, and returns the extended slice. The
// receiver takes the addresses from the connection itself.
func AppendLocal(b []byte) []byte {
	return appendPrefix(b, commandLocal, familyUnspecified, 0)
}

func appendPrefix(b []byte, command, family byte, length uint16) []byte {
	b = append(b, signature...)
	b = append(b, command, family)
	return binary.BigEndian.AppendUint16(b, length)
}

func appendAddresses4(b []byte, source, destination netip.Addr) []byte {
	s, d := source.As4(), destination.As4()
	return append(append(b, s[:]...), d[:]...)
}

func appendAddresses6(b []byte, source, destination netip.Addr) []byte {
	s, d := source.As16(), destination.As16()
	return append(append(b, s[:]...), d[:]...)
}

func family(is4 bool) byte {
	if is4 {
		return familyTCP4
	}
	return familyTCP6
}

// length returns how many bytes follow the length field.
func (o Options) length(is4 bool) uint16 {
	n := uint16(address6Size)
	if is4 {
		n = address4Size
	}
	if o.CRC32C {
		n += crc32cSize
	}
	if o.HasUniqueID {
		n += uniqueIDSize
	}
	return n
}
