package main

import (
	"encoding/binary"
	"net"
	"net/netip"
)

const (
	vnetHeader = 10 // struct virtio_net_hdr
	ethernet   = 14
	ipv4       = 20
	udp        = 8
	payload    = 64 // bytes
	frameSize  = vnetHeader + ethernet + ipv4 + udp + payload
)

// putFrame makes a UDP packet for a packet socket with PACKET_VNET_HDR, by which
// the kernel is told that the checksum is still to be computed: on virtual links
// nobody does, as nobody does behind a network card that has checked it.
func putFrame(b []byte, src, dst net.HardwareAddr, from, to netip.AddrPort) {
	clear(b)
	const udpAt = ethernet + ipv4
	b[0] = 1                                    // VIRTIO_NET_HDR_F_NEEDS_CSUM
	binary.NativeEndian.PutUint16(b[6:], udpAt) // csum_start, from the frame's beginning
	binary.NativeEndian.PutUint16(b[8:], 6)     // csum_offset, of UDP's checksum
	b = b[vnetHeader:]

	copy(b, dst)
	copy(b[6:], src)
	binary.BigEndian.PutUint16(b[12:], 0x0800)

	ip := b[ethernet:]
	ip[0] = 0x45
	binary.BigEndian.PutUint16(ip[2:], ipv4+udp+payload)
	ip[8], ip[9] = 64, 17 // TTL, UDP
	s, d := from.Addr().As4(), to.Addr().As4()
	copy(ip[12:], s[:])
	copy(ip[16:], d[:])
	binary.BigEndian.PutUint16(ip[10:], ^sum(ip[:ipv4], 0))

	u := b[udpAt:]
	binary.BigEndian.PutUint16(u, from.Port())
	binary.BigEndian.PutUint16(u[2:], to.Port())
	binary.BigEndian.PutUint16(u[4:], udp+payload)
	// Of the pseudo-header alone; whoever completes it adds the rest.
	binary.BigEndian.PutUint16(u[6:], sum(ip[12:20], 17+udp+payload))
}

// sum is the Internet's checksum (RFC 1071) of an even number of bytes, on top of
// another sum, before it is complemented.
func sum(b []byte, s uint32) uint16 {
	for ; len(b) > 0; b = b[2:] {
		s += uint32(binary.BigEndian.Uint16(b))
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}
