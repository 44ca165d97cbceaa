package vip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// Protocol is the address protocol (IFA_PROTO) of our addresses, an "n".
	// The kernel uses 1 to 3 for itself (linux/if_addr.h, IFAPROT_*) and leaves
	// the rest of the byte to administrators.
	Protocol = 0x6e
	// Metric is the mark of our addresses where the kernel does not know
	// address protocols: "nlb" in ASCII.
	Metric = 0x6e6c62
)

// ifaProto is IFA_PROTO of linux/if_addr.h, which x/sys does not have yet.
const ifaProto = 11

// A link is an interface as far as binding and announcing goes.
type link struct {
	index    int
	name     string
	flags    uint32 // IFF_*
	hardware uint16 // ARPHRD_*
	mac      net.HardwareAddr
	// carriers counts how often the carrier came (IFLA_CARRIER_UP_COUNT, Linux
	// 4.16): the kernel reports carrier changes at most once a second, so a
	// short loss shows here alone.
	carriers uint32
}

func (l link) up() bool { return l.flags&unix.IFF_UP != 0 }

// carrier reports that frames can leave.
func (l link) carrier() bool { return l.up() && l.flags&unix.IFF_LOWER_UP != 0 }

// announces reports that the link's neighbours resolve addresses by ARP and
// neighbour discovery.
func (l link) announces() bool {
	return l.hardware == unix.ARPHRD_ETHER && len(l.mac) == 6 &&
		l.flags&(unix.IFF_LOOPBACK|unix.IFF_NOARP) == 0
}

// A rtnl is a connection to the kernel's addresses and links. One goroutine at
// a time may use it.
type rtnl struct{ conn *netlink.Conn }

func dial() (rtnl, error) {
	conn, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return rtnl{}, fmt.Errorf("rtnetlink: %w", err)
	}
	// The kernel's own words make better errors. Before Linux 4.12 it has none.
	_ = conn.SetOption(netlink.ExtendedAcknowledge, true)
	return rtnl{conn}, nil
}

func (k rtnl) close() { _ = k.conn.Close() }

// observe lists the links by index and the addresses on them.
func (k rtnl) observe() (map[int]link, []Address, error) {
	links, err := k.links()
	if err != nil {
		return nil, nil, err
	}
	msgs, err := k.dump(unix.RTM_GETADDR, make([]byte, unix.SizeofIfAddrmsg))
	if err != nil {
		return nil, nil, fmt.Errorf("list addresses: %w", err)
	}
	var as []Address
	for _, m := range msgs {
		a, index, err := parseAddress(m.Data)
		if err != nil {
			return nil, nil, fmt.Errorf("list addresses: %w", err)
		}
		l, ok := links[index]
		if !ok {
			continue // a link that came between the two dumps
		}
		a.Interface = l.name
		as = append(as, a)
	}
	return links, as, nil
}

func (k rtnl) links() (map[int]link, error) {
	msgs, err := k.dump(unix.RTM_GETLINK, make([]byte, unix.SizeofIfInfomsg))
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	links := make(map[int]link, len(msgs))
	for _, m := range msgs {
		l, err := parseLink(m.Data)
		if err != nil {
			return nil, fmt.Errorf("list links: %w", err)
		}
		links[l.index] = l
	}
	return links, nil
}

// dumpTries bounds how often a list is read again because it changed while it
// was read.
const dumpTries = 10

func (k rtnl) dump(typ netlink.HeaderType, header []byte) ([]netlink.Message, error) {
	request := netlink.Message{
		Header: netlink.Header{Type: typ, Flags: netlink.Request | netlink.Dump},
		Data:   header,
	}
	for range dumpTries {
		msgs, err := k.conn.Execute(request)
		if err != nil {
			return nil, err
		}
		if !interrupted(msgs) {
			return msgs, nil
		}
	}
	return nil, errors.New("it kept changing while it was read")
}

func interrupted(msgs []netlink.Message) bool {
	for _, m := range msgs {
		if m.Header.Flags&netlink.DumpInterrupted != 0 {
			return true
		}
	}
	return false
}

// add binds a. An address that is there already is fine.
func (k rtnl) add(l link, a Address) error {
	msg, err := addMessage(l.index, a)
	if err != nil {
		return err
	}
	if _, err := k.conn.Execute(msg); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// remove unbinds a. An address or interface that is gone already is fine.
func (k rtnl) remove(l link, a Address) error {
	ae := netlink.NewAttributeEncoder()
	ae.Bytes(unix.IFA_LOCAL, a.Prefix.Addr().AsSlice())
	ae.Bytes(unix.IFA_ADDRESS, a.Prefix.Addr().AsSlice())
	msg, err := addressMessage(unix.RTM_DELADDR, 0, l.index, a.Prefix, unix.RT_SCOPE_UNIVERSE, ae)
	if err != nil {
		return err
	}
	_, err = k.conn.Execute(msg)
	if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

func addMessage(index int, a Address) (netlink.Message, error) {
	p := a.Prefix
	ae := netlink.NewAttributeEncoder()
	ae.Bytes(unix.IFA_LOCAL, p.Addr().AsSlice())
	ae.Bytes(unix.IFA_ADDRESS, p.Addr().AsSlice())
	if name := label(a); name != "" {
		ae.String(unix.IFA_LABEL, name)
	}
	ae.Uint32(unix.IFA_RT_PRIORITY, Metric)
	ae.Uint8(ifaProto, Protocol)
	scope := uint8(unix.RT_SCOPE_HOST)
	if p.Addr().Is6() {
		scope = unix.RT_SCOPE_UNIVERSE
		ae.Uint32(unix.IFA_FLAGS, unix.IFA_F_NODAD|unix.IFA_F_NOPREFIXROUTE)
		ae.Bytes(unix.IFA_CACHEINFO, deprecated())
	}
	return addressMessage(unix.RTM_NEWADDR, netlink.Create|netlink.Excl, index, p, scope, ae)
}

// deprecated is a struct ifa_cacheinfo (linux/if_addr.h) that says valid for
// ever, preferred never.
func deprecated() []byte {
	info := make([]byte, unix.SizeofIfaCacheinfo)
	binary.NativeEndian.PutUint32(info[4:], math.MaxUint32) // ifa_valid; ifa_prefered stays 0
	return info
}

func addressMessage(typ netlink.HeaderType, flags netlink.HeaderFlags, index int, p netip.Prefix, scope uint8, ae *netlink.AttributeEncoder) (netlink.Message, error) {
	attrs, err := ae.Encode()
	if err != nil {
		return netlink.Message{}, err
	}
	family := byte(unix.AF_INET)
	if p.Addr().Is6() {
		family = unix.AF_INET6
	}
	// struct ifaddrmsg of linux/if_addr.h
	header := []byte{family, byte(p.Bits()), 0, scope}
	header = binary.NativeEndian.AppendUint32(header, uint32(index))
	return netlink.Message{
		Header: netlink.Header{Type: typ, Flags: netlink.Request | netlink.Acknowledge | flags},
		Data:   append(header, attrs...),
	}, nil
}

// parseAddress reads an RTM_NEWADDR or RTM_DELADDR message, which knows its
// interface by index only.
func parseAddress(data []byte) (a Address, index int, err error) {
	if len(data) < unix.SizeofIfAddrmsg {
		return Address{}, 0, fmt.Errorf("address message of %d bytes", len(data))
	}
	bits := int(data[1])
	index = int(binary.NativeEndian.Uint32(data[4:]))
	ad, err := netlink.NewAttributeDecoder(data[unix.SizeofIfAddrmsg:])
	if err != nil {
		return Address{}, 0, fmt.Errorf("address message: %w", err)
	}
	var (
		address, local netip.Addr
		protocol       uint8
		metric         uint32
	)
	for ad.Next() {
		switch ad.Type() {
		case unix.IFA_ADDRESS:
			address, _ = netip.AddrFromSlice(ad.Bytes())
		case unix.IFA_LOCAL:
			local, _ = netip.AddrFromSlice(ad.Bytes())
		case unix.IFA_RT_PRIORITY:
			metric = ad.Uint32()
		case ifaProto:
			protocol = ad.Uint8()
		}
	}
	if err := ad.Err(); err != nil {
		return Address{}, 0, fmt.Errorf("address message: %w", err)
	}
	// With a peer IFA_ADDRESS is the peer's and IFA_LOCAL ours; without one
	// IPv6 has IFA_ADDRESS alone (linux/if_addr.h).
	if local.IsValid() {
		address = local
	}
	a.Prefix = netip.PrefixFrom(address, bits)
	if !a.Prefix.IsValid() {
		return Address{}, 0, fmt.Errorf("address message: %v/%d is no address", address, bits)
	}
	a.Ours = protocol == Protocol || protocol == 0 && metric == Metric
	return a, index, nil
}

// parseLink reads an RTM_NEWLINK or RTM_DELLINK message.
func parseLink(data []byte) (link, error) {
	if len(data) < unix.SizeofIfInfomsg {
		return link{}, fmt.Errorf("link message of %d bytes", len(data))
	}
	l := link{
		hardware: binary.NativeEndian.Uint16(data[2:]),
		index:    int(int32(binary.NativeEndian.Uint32(data[4:]))),
		flags:    binary.NativeEndian.Uint32(data[8:]),
	}
	ad, err := netlink.NewAttributeDecoder(data[unix.SizeofIfInfomsg:])
	if err != nil {
		return link{}, fmt.Errorf("link message: %w", err)
	}
	for ad.Next() {
		switch ad.Type() {
		case unix.IFLA_IFNAME:
			l.name = ad.String()
		case unix.IFLA_ADDRESS:
			l.mac = ad.Bytes()
		case unix.IFLA_CARRIER_UP_COUNT:
			l.carriers = ad.Uint32()
		}
	}
	if err := ad.Err(); err != nil {
		return link{}, fmt.Errorf("link message: %w", err)
	}
	return l, nil
}
