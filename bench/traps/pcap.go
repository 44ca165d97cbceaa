package traps

import (
	"encoding/binary"

	"nlb/bench/lab"
)

// pcap is packets as a capture file that tcpdump and Wireshark read
// (draft-ietf-opsawg-pcap, sections 4 and 5).
func pcap(packets []lab.Packet) []byte {
	const (
		nanoseconds = 0xa1b23c4d // the magic number of files with such times
		raw         = 101        // LINKTYPE_RAW: begins with an IP header
	)
	le := binary.LittleEndian
	b := le.AppendUint32(nil, nanoseconds)
	b = le.AppendUint16(b, 2)
	b = le.AppendUint16(b, 4)
	b = append(b, make([]byte, 8)...) // reserved
	b = le.AppendUint32(b, lab.SnapLength)
	b = le.AppendUint32(b, raw)
	for _, p := range packets {
		b = le.AppendUint32(b, uint32(p.Time.Unix()))
		b = le.AppendUint32(b, uint32(p.Time.Nanosecond()))
		b = le.AppendUint32(b, uint32(len(p.Data)))
		b = le.AppendUint32(b, uint32(max(p.Length, len(p.Data))))
		b = append(b, p.Data...)
	}
	return b
}
