package vip

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/mdlayher/arp"
	"github.com/mdlayher/ndp"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

var (
	broadcast = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	// allNodes and its Ethernet address (RFC 2464 section 7).
	allNodes    = netip.MustParseAddr("ff02::1")
	allNodesMAC = net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}
)

// A sender puts announcements on any link. It is bound to no protocol, so that
// nothing is ever queued for it.
type sender struct{ fd int }

func newSender() (sender, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return sender{}, fmt.Errorf("packet socket: %w", err)
	}
	return sender{fd}, nil
}

func (s sender) close() { _ = unix.Close(s.fd) }

// announce tells the neighbours on l, once, that addr is there.
func (s sender) announce(l link, addr netip.Addr) error {
	if addr.Is6() {
		packet, err := unsolicitedNA(l.mac, addr, forwards(l.name))
		if err != nil {
			return fmt.Errorf("neighbour advertisement: %w", err)
		}
		return s.send(l, unix.ETH_P_IPV6, allNodesMAC, packet)
	}
	// Request and reply: RFC 5227 section 3 asks for the request, which every
	// conforming host takes; some switches and appliances only update from the
	// reply form of RFC 5944 section 4.6. MetalLB and kube-vip met both kinds.
	for _, op := range []arp.Operation{arp.OperationRequest, arp.OperationReply} {
		packet, err := gratuitousARP(op, l.mac, addr)
		if err != nil {
			return fmt.Errorf("gratuitous ARP: %w", err)
		}
		if err := s.send(l, unix.ETH_P_ARP, broadcast, packet); err != nil {
			return err
		}
	}
	return nil
}

func (s sender) send(l link, ethertype uint16, to net.HardwareAddr, packet []byte) error {
	sa := &unix.SockaddrLinklayer{
		// sll_protocol is in network byte order.
		Protocol: binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, ethertype)),
		Ifindex:  l.index,
		Halen:    uint8(len(to)),
	}
	copy(sa.Addr[:], to)
	if err := unix.Sendto(s.fd, packet, 0, sa); err != nil {
		return fmt.Errorf("send to %s: %w", to, err)
	}
	return nil
}

// gratuitousARP is an ARP announcement: sender and target protocol address are
// both addr. The target hardware address is unused in a request (RFC 5227
// section 3) and the address to learn in a reply (RFC 5944 section 4.6).
func gratuitousARP(op arp.Operation, mac net.HardwareAddr, addr netip.Addr) ([]byte, error) {
	target := mac
	if op == arp.OperationRequest {
		target = make(net.HardwareAddr, len(mac))
	}
	p, err := arp.NewPacket(op, mac, addr, target, addr)
	if err != nil {
		return nil, err
	}
	return p.MarshalBinary()
}

// unsolicitedNA is an IPv6 packet with an unsolicited neighbour advertisement
// to all nodes (RFC 4861 section 7.2.6). It has the override flag, for the
// neighbours shall forget who had the address before. It comes from the
// address itself, which is on the link, link-local or not. The router flag
// says what the kernel's own answers say; neighbours act when it changes.
func unsolicitedNA(mac net.HardwareAddr, addr netip.Addr, router bool) ([]byte, error) {
	na := &ndp.NeighborAdvertisement{
		Router:        router,
		Override:      true,
		TargetAddress: addr,
		Options:       []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Target, Addr: mac}},
	}
	body, err := ndp.MarshalMessageChecksum(na, addr, allNodes)
	if err != nil {
		return nil, err
	}
	packet := make([]byte, ipv6.HeaderLen, ipv6.HeaderLen+len(body))
	packet[0] = ipv6.Version << 4
	binary.BigEndian.PutUint16(packet[4:], uint16(len(body)))
	packet[6] = unix.IPPROTO_ICMPV6
	packet[7] = ndp.HopLimit
	copy(packet[8:], addr.AsSlice())
	copy(packet[24:], allNodes.AsSlice())
	return append(packet, body...), nil
}

// forwards reports whether the kernel forwards IPv6 that arrives on the
// interface, and therefore calls itself a router there.
func forwards(ifname string) bool { return sysctl6(ifname, "forwarding") == "1" }

func ipv6Off(ifname string) bool { return sysctl6(ifname, "disable_ipv6") != "0" }

// sysctl6 reads an IPv6 setting of an interface; empty when there is none.
func sysctl6(ifname, key string) string {
	b, err := os.ReadFile(filepath.Join("/proc/sys/net/ipv6/conf", ifname, key))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
