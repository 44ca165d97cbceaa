package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// An End is one end of a link.
type End struct {
	Node  *Node
	Iface string
	Addrs []netip.Prefix
	// Offload leaves the checksums of what this end sends to the link, which is
	// fast and, on a veth, means never computed.
	Offload bool
}

// Wire links two different nodes by a pair of veths, gives the ends their addresses and
// brings them up.
func (l *Lab) Wire(a, b End) error {
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: a.Iface}, PeerName: b.Iface}
	err := a.Node.netlink("", func(h *netlink.Handle, _ netlink.Link) error {
		b.Node.open.RLock()
		defer b.Node.open.RUnlock()
		veth.PeerNamespace = netlink.NsFd(int(b.Node.space))
		return h.LinkAdd(veth)
	})
	if err != nil {
		return a.Node.fail(fmt.Sprintf("link %s to %s of %s", a.Iface, b.Iface, b.Node.Name), err)
	}
	for _, e := range []End{a, b} {
		if err := e.furnish(); err != nil {
			return err
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.links = append(l.links, link{a, b})
	return nil
}

func (e End) furnish() error {
	if !e.Offload {
		if err := e.Node.Do(func() error { return setTXChecksum(e.Iface, false) }); err != nil {
			return e.Node.fail("turn off TX checksum offload of "+e.Iface, err)
		}
	}
	if err := e.Node.up(e.Iface); err != nil {
		return err
	}
	for _, p := range e.Addrs {
		if err := e.Node.Address(e.Iface, p); err != nil {
			return err
		}
	}
	return nil
}

// Bridge makes a bridge on the node, out of reach of the node's own firewall:
// with bridge-nf-call-iptables, NAT would happen inside the bridge, and hairpins
// work or fail for a reason no real network has.
func (n *Node) Bridge(name string) error {
	for _, key := range []string{"iptables", "ip6tables", "arptables"} {
		// Absent as long as br_netfilter is not loaded, and then there is nothing to turn off.
		err := n.Sysctl("net.bridge.bridge-nf-call-"+key, "0")
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	// Without a querier, snooping could withhold neighbour solicitations (RFC 4541, 3).
	snooping := false
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}, MulticastSnooping: &snooping}
	err := n.netlink("", func(h *netlink.Handle, _ netlink.Link) error { return h.LinkAdd(br) })
	if err != nil {
		return n.fail("ip link add "+name+" type bridge", err)
	}
	return n.up(name)
}

// Dummy adds a device that leads nowhere, for addresses that the node is to have
// besides. The error wraps EOPNOTSUPP where the kernel has none (module dummy).
func (n *Node) Dummy(name string) error {
	device := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: name}}
	err := n.netlink("", func(h *netlink.Handle, _ netlink.Link) error { return h.LinkAdd(device) })
	if err != nil {
		return n.fail("ip link add "+name+" type dummy", err)
	}
	return n.up(name)
}

// Enslave makes an interface of the node a port of its bridge.
func (n *Node) Enslave(iface, bridge string) error {
	err := n.netlink(iface, func(h *netlink.Handle, port netlink.Link) error {
		br, err := h.LinkByName(bridge)
		if err != nil {
			return err
		}
		return h.LinkSetMaster(port, br)
	})
	if err != nil {
		return n.fail(fmt.Sprintf("ip link set %s master %s", iface, bridge), err)
	}
	return nil
}

// ethtoolValue is struct ethtool_value (linux/ethtool.h).
type ethtoolValue struct{ cmd, data uint32 }

// ethtoolRequest is struct ifreq (linux/if.h) with ifr_data.
type ethtoolRequest struct {
	name [unix.IFNAMSIZ]byte
	data *ethtoolValue
	_    [16]byte // the union's longest member is 24 bytes
}

// ethtool does an ETHTOOL_… command in the calling thread's namespace.
func ethtool(iface string, v *ethtoolValue) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req := ethtoolRequest{data: v}
	copy(req.name[:unix.IFNAMSIZ-1], iface)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req)))
	runtime.KeepAlive(v)
	if errno != 0 {
		return errno
	}
	return nil
}

func setTXChecksum(iface string, on bool) error {
	v := ethtoolValue{cmd: unix.ETHTOOL_STXCSUM}
	if on {
		v.data = 1
	}
	return ethtool(iface, &v)
}

func txChecksum(iface string) (bool, error) {
	v := ethtoolValue{cmd: unix.ETHTOOL_GTXCSUM}
	err := ethtool(iface, &v)
	return v.data != 0, err
}

// String draws the lab as a tree that starts at the first node. A line is a
// link: the interface and addresses at the near end, those at the far end, the
// far node; in brackets if it was drawn before.
//
//	lb  (nlb-812-a6f1c0-lb)
//	|-- c1 203.0.113.1/32 ---- eth0 203.0.113.9/32 c1
//	`-- t1 10.0.1.1/32 ---- eth0 10.0.1.11/32 t1
func (l *Lab) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.nodes) == 0 {
		return "(no nodes)\n"
	}
	d := drawing{links: l.links, seen: map[*Node]bool{}, drawn: make([]bool, len(l.links))}
	root := l.nodes[0]
	fmt.Fprintf(&d.text, "%s  (%s)\n", root.Name, root.NS)
	d.branch(root, "")
	return d.text.String()
}

type drawing struct {
	links []link
	seen  map[*Node]bool
	drawn []bool // by index of links
	text  strings.Builder
}

func (d *drawing) branch(from *Node, indent string) {
	d.seen[from] = true
	// Claimed at once: a cycle that leads back here must not draw them first.
	type edge struct{ near, far End }
	var edges []edge
	for i, k := range d.links {
		near, far := k.a, k.b
		if far.Node == from {
			near, far = far, near
		}
		if near.Node == from && !d.drawn[i] {
			d.drawn[i] = true
			edges = append(edges, edge{near, far})
		}
	}
	for i, e := range edges {
		fork, deeper := "|-- ", "|   "
		if i == len(edges)-1 {
			fork, deeper = "`-- ", "    "
		}
		name := e.far.Node.Name
		again := d.seen[e.far.Node]
		if again {
			name = "(" + name + ")"
		}
		d.text.WriteString(indent + fork + e.near.String() + " ---- " + e.far.String() + " " + name + "\n")
		if !again {
			d.branch(e.far.Node, indent+deeper)
		}
	}
}

func (e End) String() string {
	s := e.Iface
	for _, p := range e.Addrs {
		s += " " + p.String()
	}
	return s
}
