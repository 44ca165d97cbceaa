package measure

import (
	"bytes"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"nlb/bench/lab"
)

// TestFrame adds up a frame as a receiver would.
func TestFrame(t *testing.T) {
	src, dst := net.HardwareAddr{2, 0, 0, 0, 0, 1}, net.HardwareAddr{2, 0, 0, 0, 0, 2}
	b := bytes.Repeat([]byte{0xff}, FrameSize) // whatever was there before
	PutFrame(b, src, dst, netip.MustParseAddrPort("203.0.113.9:10000"), netip.MustParseAddrPort("198.51.100.10:80"))
	if b[0] != 1 || b[6] != ethernet+ipv4 || b[8] != 6 {
		t.Errorf("virtio header %x", b[:vnetHeader])
	}
	b = b[vnetHeader:]
	if diff := cmp.Diff([]byte{2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0}, b[:ethernet]); diff != "" {
		t.Error(diff)
	}
	ip := b[ethernet:]
	if got := sum(ip[:ipv4], 0); got != 0xffff {
		t.Errorf("the IPv4 header adds up to %#x (RFC 1071: all ones)", got)
	}
	// What completes the checksum is the complement of the sum of all of UDP,
	// the partial sum in its place included; then the packet adds up to ones.
	u := ip[ipv4:]
	sent := ^sum(u, 0)
	u[6], u[7] = byte(sent>>8), byte(sent)
	if got := sum(u, uint32(sum(ip[12:20], 17+udp+FramePayload))); got != 0xffff {
		t.Errorf("UDP adds up to %#x", got)
	}
	if got := netip.AddrFrom4([4]byte(ip[16:20])); got != lab.VIP4 {
		t.Errorf("to %v", got)
	}
	if u[0] != 10000>>8 || u[1] != 10000&0xff || u[3] != 80 || len(u) != udp+FramePayload {
		t.Errorf("UDP header %x of %d bytes", u[:udp], len(u))
	}
}

func TestPacketSocketSaysWhy(t *testing.T) {
	if fd, err := PacketSocket(1 << 30); err == nil || !strings.Contains(err.Error(), unix.ENODEV.Error()) {
		t.Errorf("%d, %v", fd, err)
	}
}
