package measure

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

const (
	vnetHeader = 10 // struct virtio_net_hdr
	ethernet   = 14
	ipv4       = 20
	udp        = 8
	// FramePayload is how many bytes of its own a frame's datagram has.
	FramePayload = 64
	// FrameSize is a frame's, in bytes, with what a packet socket wants before it.
	FrameSize = vnetHeader + ethernet + ipv4 + udp + FramePayload
)

// PutFrame makes a UDP packet for a PacketSocket of FrameSize bytes. The kernel is
// told that the checksum is still to be computed: on virtual links nobody does,
// as nobody does behind a network card that has checked it. Addresses are IPv4.
func PutFrame(b []byte, src, dst net.HardwareAddr, from, to netip.AddrPort) {
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
	binary.BigEndian.PutUint16(ip[2:], ipv4+udp+FramePayload)
	ip[8], ip[9] = 64, 17 // TTL, UDP
	s, d := from.Addr().As4(), to.Addr().As4()
	copy(ip[12:], s[:])
	copy(ip[16:], d[:])
	binary.BigEndian.PutUint16(ip[10:], ^sum(ip[:ipv4], 0))

	u := b[udpAt:]
	binary.BigEndian.PutUint16(u, from.Port())
	binary.BigEndian.PutUint16(u[2:], to.Port())
	binary.BigEndian.PutUint16(u[4:], udp+FramePayload)
	// Of the pseudo-header alone; whoever completes it adds the rest.
	binary.BigEndian.PutUint16(u[6:], sum(ip[12:20], 17+udp+FramePayload))
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

// PacketSocket makes a socket that sends frames on a link of the thread's
// namespace, by its index, past the queue (packet(7)), so that they are at the
// other end as from a network card. It receives nothing: that takes a protocol.
// The errors are those of socket(2), setsockopt(2) and bind(2).
func PacketSocket(link int) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1),
		unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: link}),
	)
	if err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("packet socket: %w", err)
	}
	return fd, nil
}
