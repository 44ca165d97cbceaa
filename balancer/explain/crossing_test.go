package explain_test

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"nlb/balancer"
)

// A crossing is a host with two wires, of which the far ends are ours as bare
// frames: whatever we say came from a client comes in by one, and what leaves for
// targets or clients is read at both. So one namespace has as many clients and
// targets as a test can name.
//
//	clients ─ in1 ═ in0 ─ this namespace, with the rules ─ out0 ═ out1 ─ targets
type crossing struct {
	t           *testing.T
	near, far   int // packet sockets at in1 and out1
	nearIfindex int
	to          net.HardwareAddr // of in0
}

var (
	// The host's own addresses. The gateways are the next ones.
	crossingIn  = [2]netip.Prefix{netip.MustParsePrefix("192.0.2.1/30"), netip.MustParsePrefix("2001:db8:ffff:1::1/64")}
	crossingOut = [2]netip.Prefix{netip.MustParsePrefix("192.0.2.5/30"), netip.MustParsePrefix("2001:db8:ffff:2::1/64")}
	// What is behind the far wire; all else is behind the near one.
	crossingTargets = [2]string{"10.0.0.0/8", "2001:db8:1::/48"}
)

func newCrossing(t *testing.T) *crossing {
	t.Helper()
	for _, name := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		setSysctl(t, name, "1")
	}
	c := &crossing{t: t}
	in, in1 := c.wire("in0", "in1", crossingIn, [2]string{"0.0.0.0/0", "::/0"})
	_, out1 := c.wire("out0", "out1", crossingOut, crossingTargets)
	c.to, c.nearIfindex = in.Attrs().HardwareAddr, in1.Attrs().Index
	c.near, c.far = packetSocket(t, in1.Attrs().Index), packetSocket(t, out1.Attrs().Index)
	return c
}

func setSysctl(t *testing.T, name, value string) {
	t.Helper()
	path := "/proc/sys/" + name
	was, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.WriteFile(path, was, 0) })
}

// elsewhere is the link address of all gateways. It is not that of the far end of
// the wire: this host would take from there, and route again, what has left it.
var elsewhere = net.HardwareAddr{2, 0, 0, 0, 0, 1}

// wire makes a pair of links, of which the near end is this host's.
func (c *crossing) wire(near, far string, own [2]netip.Prefix, to [2]string) (a, b netlink.Link) {
	c.t.Helper()
	must := func(err error) {
		c.t.Helper()
		if err != nil {
			c.t.Fatal(err)
		}
	}
	must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: near}, PeerName: far}))
	a, err := netlink.LinkByName(near)
	must(err)
	c.t.Cleanup(func() { must(netlink.LinkDel(a)) })
	b, err = netlink.LinkByName(far)
	must(err)
	must(os.WriteFile("/proc/sys/net/ipv6/conf/"+far+"/disable_ipv6", []byte("1"), 0))
	must(os.WriteFile("/proc/sys/net/ipv4/conf/"+near+"/rp_filter", []byte("0"), 0))
	must(netlink.LinkSetUp(b))
	must(netlink.LinkSetUp(a))
	for i, p := range own {
		must(netlink.AddrAdd(a, &netlink.Addr{Flags: unix.IFA_F_NODAD, IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}))
		gateway := net.IP(p.Addr().Next().AsSlice())
		must(netlink.NeighAdd(&netlink.Neigh{LinkIndex: a.Attrs().Index, IP: gateway, HardwareAddr: elsewhere, State: netlink.NUD_PERMANENT}))
		_, dst, err := net.ParseCIDR(to[i])
		must(err)
		must(netlink.RouteAdd(&netlink.Route{LinkIndex: a.Attrs().Index, Dst: dst, Gw: gateway}))
	}
	return a, b
}

func packetSocket(t *testing.T, ifindex int) int {
	t.Helper()
	all := int(binary.NativeEndian.Uint16([]byte{unix.ETH_P_ALL >> 8, unix.ETH_P_ALL}))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err == nil {
		t.Cleanup(func() { unix.Close(fd) })
		err = errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: uint16(all), Ifindex: ifindex}))
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// send puts a first packet on the near wire. The number comes back in a sighting.
func (c *crossing) send(proto uint8, from, to netip.AddrPort, number uint32) {
	c.t.Helper()
	ethertype := uint16(unix.ETH_P_IP)
	if from.Addr().Is6() {
		ethertype = unix.ETH_P_IPV6
	}
	address := &unix.SockaddrLinklayer{Protocol: ethertype<<8 | ethertype>>8, Ifindex: c.nearIfindex, Halen: 6}
	copy(address.Addr[:], c.to)
	if err := unix.Sendto(c.near, firstPacket(proto, from, to, number), 0, address); err != nil {
		c.t.Fatal(err)
	}
}

// firstPacket is a SYN with the number as its sequence number, or a datagram with
// the number as its content.
func firstPacket(proto uint8, from, to netip.AddrPort, number uint32) []byte {
	src, dst := from.Addr().AsSlice(), to.Addr().AsSlice()
	ports := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, from.Port()), to.Port())
	body, checksumAt := ports, 6
	if proto == balancer.ProtoTCP {
		body = binary.BigEndian.AppendUint32(body, number)
		body = append(body, 0, 0, 0, 0, 5<<4, 2, 4, 0, 0, 0, 0, 0)
		checksumAt = 16
	} else {
		body = append(body, 0, 12, 0, 0)
		body = binary.BigEndian.AppendUint32(body, number)
	}
	pseudo := append(append(append([]byte{}, src...), dst...), 0, proto, 0, byte(len(body)))
	binary.BigEndian.PutUint16(body[checksumAt:], checksum(pseudo, body))
	var head []byte
	if from.Addr().Is4() {
		head = append([]byte{4<<4 | 5, 0, 0, byte(20 + len(body)), 0, 0, 0x40, 0, 64, proto, 0, 0}, append(src, dst...)...)
		binary.BigEndian.PutUint16(head[10:], checksum(head))
	} else {
		head = append([]byte{6 << 4, 0, 0, 0, 0, byte(len(body)), proto, 64}, append(src, dst...)...)
	}
	return append(head, body...)
}

// checksum is that of the Internet (RFC 1071), of parts of even lengths.
func checksum(parts ...[]byte) uint16 {
	var sum uint32
	for _, p := range parts {
		for i := 0; i < len(p); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(p[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// A sighting is a first packet as it left the host, or the reset that a socket of
// this host answered with.
type sighting struct {
	from, to netip.AddrPort
	reset    bool
}

// collect adds what has come out since the last time.
func (c *crossing) collect(into map[uint32]sighting) {
	c.t.Helper()
	buf := make([]byte, 2048)
	for _, fd := range []int{c.near, c.far} {
		for {
			n, from, err := unix.Recvfrom(fd, buf, 0)
			if err == unix.EAGAIN {
				break
			}
			if err != nil {
				c.t.Fatal(err)
			}
			if l, ok := from.(*unix.SockaddrLinklayer); ok && l.Pkttype != unix.PACKET_OUTGOING {
				if number, s, ok := parseSighting(buf[:n]); ok {
					into[number] = s
				}
			}
		}
	}
}

func parseSighting(b []byte) (number uint32, s sighting, ok bool) {
	var src, dst netip.Addr
	var proto uint8
	switch {
	case len(b) >= 28 && b[0] == 4<<4|5:
		src, dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		proto, b = b[9], b[20:]
	case len(b) >= 48 && b[0]>>4 == 6:
		src, dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		proto, b = b[6], b[40:]
	default:
		return 0, s, false
	}
	s.from = netip.AddrPortFrom(src, binary.BigEndian.Uint16(b))
	s.to = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[2:]))
	const syn, rst = 2, 4
	switch {
	case proto == balancer.ProtoTCP && len(b) >= 20 && b[13]&rst != 0:
		s.reset = true
		return binary.BigEndian.Uint32(b[8:]) - 1, s, true
	case proto == balancer.ProtoTCP && len(b) >= 20 && b[13] == syn:
		return binary.BigEndian.Uint32(b[4:]), s, true
	case proto == balancer.ProtoUDP && len(b) >= 12:
		return binary.BigEndian.Uint32(b[8:]), s, true
	}
	return 0, s, false
}

// patience bounds every wait for the kernel.
const patience = 30 * time.Second
