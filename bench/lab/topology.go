package lab

import (
	"errors"
	"fmt"
	"net/netip"
)

// The VIPs of every topology. No node has them: whatever is under test binds
// them on LB, and the clients' routes lead there.
var (
	VIP4 = netip.MustParseAddr("198.51.100.10")
	VIP6 = netip.MustParseAddr("2001:db8:77::10")
)

// vipNets are the networks the VIPs are in, which every router sends to LB.
var vipNets = dual{
	netip.MustParseAddr("198.51.100.0"),
	netip.MustParseAddr("2001:db8:77::"),
}

// Options say how large a topology is. Zero values mean the defaults.
type Options struct {
	Clients int // outside the balancer's network; default 1
	Targets int // default 2; of a node, with PodNode
	Inside  int // clients in the targets' segment, with OneArm; default 1
	Nodes   int // hosts of pods, with PodNode; default 2
	// Offload leaves TX checksums to the (virtual) links, which is faster and
	// hides wrong ones. For throughput measurements only.
	Offload bool
	// Keep names the namespaces so that Sweep spares them: for who leaves without
	// Close, to have them looked at. SweepKept removes them.
	Keep bool
}

const maxNodes = 80 // of a kind: their addresses count up from .9, .11, .21 or .101

func (o Options) complete() (Options, error) {
	for _, n := range []struct {
		what     string
		p        *int
		fallback int
	}{{"clients", &o.Clients, 1}, {"targets", &o.Targets, 2}, {"inside clients", &o.Inside, 1}, {"nodes", &o.Nodes, 2}} {
		if *n.p == 0 {
			*n.p = n.fallback
		}
		if *n.p < 1 || *n.p > maxNodes {
			return o, fmt.Errorf("lab: %d %s: not 1-%d", *n.p, n.what, maxNodes)
		}
	}
	return o, nil
}

// A Topology is a lab with roles. Its addresses are the same each time.
type Topology struct {
	*Lab
	Name string
	// LB is where the balancer goes. Its Addr4 and Addr6, on the side of the
	// targets, suit as source addresses.
	LB *Node
	// Clients are 203.0.113.9, .10 …, 2001:db8:99::9, ::10 …, beyond a router or
	// directly at LB.
	Clients []*Node
	// Inside are clients in the targets' own segment (OneArm).
	Inside []*Node
	// Targets are 10.0.1.11, .12 …, 2001:db8:1::11, ::12 …, or the pods (PodNode).
	Targets []*Node
	// Hosts are the nodes that have pods (PodNode).
	Hosts []*Node
	// Gateway is the way out of the pods (Egress).
	Gateway *Node
	// Router is between the clients and LB, where the topology has one.
	Router *Node
}

// String draws the topology.
func (t *Topology) String() string {
	return fmt.Sprintf("%s: VIPs %s %s\n%s", t.Name, VIP4, VIP6, t.Lab)
}

// dual is an address, or the first address of a network, in both families.
type dual struct{ v4, v6 netip.Addr }

// at is host n of 10.0.1.0/24 and 2001:db8:1::/64 and their likes. The IPv6
// address repeats the decimal digits of the IPv4 one, for the reader.
func at(net4, net6 string, n int) dual {
	return dual{
		netip.MustParseAddr(fmt.Sprintf("%s.%d", net4, n)),
		netip.MustParseAddr(fmt.Sprintf("%s::%d", net6, n)),
	}
}

func clientNet(n int) dual  { return at("203.0.113", "2001:db8:99", n) }
func targetNet(n int) dual  { return at("10.0.1", "2001:db8:1", n) }
func transitNet(n int) dual { return at("10.0.0", "2001:db8:0", n) }
func secondNet(n int) dual  { return at("10.0.2", "2001:db8:2", n) }
func outNet(n int) dual     { return at("10.0.3", "2001:db8:3", n) }
func podNet(host, n int) dual {
	return at(fmt.Sprintf("10.244.%d", host), fmt.Sprintf("2001:db8:244:%d", host), n)
}

// host is the address alone, /32 and /128.
func (d dual) host() []netip.Prefix { return []netip.Prefix{prefix(d.v4, 32), prefix(d.v6, 128)} }

// subnet is the address with its network, /24 and /64.
func (d dual) subnet() []netip.Prefix { return []netip.Prefix{prefix(d.v4, 24), prefix(d.v6, 64)} }

func prefix(a netip.Addr, bits int) netip.Prefix { return netip.PrefixFrom(a, bits) }

var everywhere = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}

// A builder makes a topology; after an error it does nothing more.
type builder struct {
	*Topology
	o   Options
	err error
}

func build(name string, o Options, wire func(*builder)) (*Topology, error) {
	o, err := o.complete()
	if err != nil {
		return nil, err
	}
	l, err := New()
	if err != nil {
		return nil, err
	}
	if o.Keep {
		l.Prefix = keptPrefix + l.Prefix[len(namePrefix):]
	}
	b := &builder{Topology: &Topology{Lab: l, Name: name}, o: o}
	// Also when wire panics.
	built := false
	defer func() {
		if !built {
			_ = l.Close()
		}
	}()
	b.LB = b.router("lb")
	wire(b)
	if b.err != nil {
		return nil, errors.Join(b.err, l.Close())
	}
	built = true
	return b.Topology, nil
}

func (b *builder) node(name string) (n *Node) {
	if b.err == nil {
		n, b.err = b.Node(name)
	}
	return n
}

// router is a node that forwards.
func (b *builder) router(name string) *Node {
	n := b.node(name)
	if b.err == nil {
		b.err = n.Forward()
	}
	return n
}

func (b *builder) wire(x, y End) {
	if b.err == nil {
		x.Offload, y.Offload = b.o.Offload, b.o.Offload
		b.err = b.Wire(x, y)
	}
}

func (b *builder) route(n *Node, to []netip.Prefix, via dual, iface string) {
	for _, dst := range to {
		gw := via.v4
		if dst.Addr().Is6() {
			gw = via.v6
		}
		if b.err == nil {
			b.err = n.Route(dst, gw, iface)
		}
	}
}

// leaf wires a node to its router by a link of its own. Neither end has a
// subnet: a route on each side says who is there, so that the router may use
// one address for all its leaves.
func (b *builder) leaf(router *Node, gw dual, n *Node, addr dual) {
	if b.err != nil {
		return
	}
	b.wire(End{Node: router, Iface: n.Name, Addrs: gw.host()}, End{Node: n, Iface: "eth0", Addrs: addr.host()})
	b.route(router, addr.host(), dual{}, n.Name)
	b.route(n, everywhere, gw, "eth0")
}

// clients puts the clients behind a router.
func (b *builder) clients(router *Node) {
	for i := range b.o.Clients {
		c := b.node(fmt.Sprint("c", i+1))
		b.leaf(router, clientNet(1), c, clientNet(9+i))
		b.Clients = append(b.Clients, c)
	}
}

// Routed is the plain case: LB is everyone's router, each neighbour has a link
// of its own, and replies come back through LB by themselves.
//
//	c1 203.0.113.9 --- 203.0.113.1 lb 10.0.1.1 --- 10.0.1.11 t1
//	   2001:db8:99::9        ...::1    2001:db8:1::1 \- 10.0.1.12 t2
func Routed(o Options) (*Topology, error) {
	return build("routed", o, func(b *builder) {
		for i := range b.o.Targets {
			t := b.node(fmt.Sprint("t", i+1))
			b.leaf(b.LB, targetNet(1), t, targetNet(11+i))
			b.Targets = append(b.Targets, t)
		}
		b.clients(b.LB)
	})
}

// OneArm has everyone in one segment, where a target can answer a neighbour
// without LB. The targets' and inside clients' default route is LB, whose own is
// the router rt; the outside clients are behind rt.
//
//	c1 203.0.113.9 --- 203.0.113.1 rt 10.0.1.254 --+-- 10.0.1.1 lb
//	                                               +-- 10.0.1.11, .12 … t1, t2 …
//	                                               +-- 10.0.1.101 …    i1 …
//
// The bridge is in a namespace of its own, sw.
func OneArm(o Options) (*Topology, error) {
	return build("one-arm", o, func(b *builder) {
		sw := b.node("sw")
		if b.err == nil {
			b.err = sw.Bridge("br0")
		}
		plug := func(n *Node, addr dual) {
			if b.err != nil {
				return
			}
			b.wire(End{Node: n, Iface: "eth0", Addrs: addr.subnet()}, End{Node: sw, Iface: n.Name})
			if b.err == nil {
				b.err = sw.Enslave(n.Name, "br0")
			}
		}
		plug(b.LB, targetNet(1))
		b.Router = b.router("rt")
		plug(b.Router, targetNet(254))
		b.route(b.LB, everywhere, targetNet(254), "eth0")
		b.route(b.Router, vipNets.subnet(), targetNet(1), "eth0")
		for i := range b.o.Targets {
			t := b.node(fmt.Sprint("t", i+1))
			plug(t, targetNet(11+i))
			b.route(t, everywhere, targetNet(1), "eth0")
			b.Targets = append(b.Targets, t)
		}
		for i := range b.o.Inside {
			c := b.node(fmt.Sprint("i", i+1))
			plug(c, targetNet(101+i))
			b.route(c, everywhere, targetNet(1), "eth0")
			b.Inside = append(b.Inside, c)
		}
		b.clients(b.Router)
	})
}

// MultiHomed has a first target with two interfaces: LB reaches it by eth0, but
// its route back to the clients is eth1, past LB. With rp_filter=1 on it a
// preserved client is dropped; without, the reply has nobody to translate it
// back. The other targets are as in Routed.
//
//	c1 203.0.113.9 --- 203.0.113.1 rt 10.0.0.1 --- 10.0.0.2 lb 10.0.1.1 --- eth0 10.0.1.11 t1
//	                               10.0.2.1 ------------------------------- eth1 10.0.2.11
//	                                                            \---------- eth0 10.0.1.12 t2
func MultiHomed(o Options) (*Topology, error) {
	return build("multi-homed", o, func(b *builder) {
		b.Router = b.router("rt")
		t1 := b.node("t1")
		if b.err != nil {
			return
		}
		// First, so that LB is known by its address on the targets' side.
		b.wire(End{Node: b.LB, Iface: "t1", Addrs: targetNet(1).host()}, End{Node: t1, Iface: "eth0", Addrs: targetNet(11).host()})
		b.route(b.LB, targetNet(11).host(), dual{}, "t1")
		b.route(t1, targetNet(1).host(), dual{}, "eth0")
		b.wire(End{Node: b.Router, Iface: "t1", Addrs: secondNet(1).subnet()}, End{Node: t1, Iface: "eth1", Addrs: secondNet(11).subnet()})
		b.route(t1, everywhere, secondNet(1), "eth1")
		b.Targets = append(b.Targets, t1)

		b.wire(End{Node: b.Router, Iface: "lb", Addrs: transitNet(1).subnet()}, End{Node: b.LB, Iface: "rt", Addrs: transitNet(2).subnet()})
		b.route(b.LB, everywhere, transitNet(1), "rt")
		b.route(b.Router, vipNets.subnet(), transitNet(2), "lb")
		b.route(b.Router, []netip.Prefix{prefix(targetNet(0).v4, 24), prefix(targetNet(0).v6, 64)}, transitNet(2), "lb")
		for i := 1; i < b.o.Targets; i++ {
			t := b.node(fmt.Sprint("t", i+1))
			b.leaf(b.LB, targetNet(1), t, targetNet(11+i))
			b.Targets = append(b.Targets, t)
		}
		b.clients(b.Router)
	})
}

// PodNode has pods behind hosts, each host with a prefix of pods that LB routes
// to it. Targets has the pods of the first host, then those of the second, and
// so on.
//
//	c1 203.0.113.9 --- 203.0.113.1 lb 10.0.1.1 --- 10.0.1.21 n1 10.244.1.1 --- 10.244.1.11, .12 … p1x1, p1x2 …
//	                                  \----------- 10.0.1.22 n2 10.244.2.1 --- 10.244.2.11, .12 … p2x1, p2x2 …
//
// In IPv6 the hosts are 2001:db8:1::21 … and the pods 2001:db8:244:1::11 ….
func PodNode(o Options) (*Topology, error) {
	return build("pod-node", o, func(b *builder) {
		for h := 1; h <= b.o.Nodes; h++ {
			host, addr := b.router(fmt.Sprint("n", h)), targetNet(20+h)
			b.leaf(b.LB, targetNet(1), host, addr)
			b.route(b.LB, []netip.Prefix{prefix(podNet(h, 0).v4, 24), prefix(podNet(h, 0).v6, 64)}, addr, fmt.Sprint("n", h))
			b.Hosts = append(b.Hosts, host)
			for i := 1; i <= b.o.Targets; i++ {
				pod := b.node(fmt.Sprint("p", h, "x", i))
				b.leaf(host, podNet(h, 1), pod, podNet(h, 10+i))
				b.Targets = append(b.Targets, pod)
			}
		}
		b.clients(b.LB)
	})
}

// Egress has one pod behind a host with two uplinks: LB reaches the pod by the
// first, but the host's way out is the second, through a gateway. The gateway
// does nothing but forward, as long as it has no rules.
//
//	c1 203.0.113.9 --- rt 10.0.0.1 --- 10.0.0.2 lb 10.0.1.1 --- eth0 10.0.1.21 n1 10.244.1.1 --- 10.244.1.11 p1x1
//	                   rt 10.0.3.1 --- 10.0.3.2 gw 10.0.2.1 --- eth1 10.0.2.11 n1
func Egress(o Options) (*Topology, error) {
	return build("egress", o, func(b *builder) {
		b.Router = b.router("rt")
		b.Gateway = b.router("gw")
		n1 := b.router("n1")
		if b.err != nil {
			return
		}
		b.Hosts = append(b.Hosts, n1)
		pods := []netip.Prefix{prefix(podNet(1, 0).v4, 24), prefix(podNet(1, 0).v6, 64)}
		// First, so that LB is known by its address on the targets' side.
		b.wire(End{Node: b.LB, Iface: "n1", Addrs: targetNet(1).host()}, End{Node: n1, Iface: "eth0", Addrs: targetNet(21).host()})
		b.route(b.LB, targetNet(21).host(), dual{}, "n1")
		b.route(b.LB, pods, targetNet(21), "n1")
		b.route(n1, targetNet(1).host(), dual{}, "eth0")
		b.wire(End{Node: b.Gateway, Iface: "rt", Addrs: outNet(2).subnet()}, End{Node: b.Router, Iface: "gw", Addrs: outNet(1).subnet()})
		b.route(b.Gateway, everywhere, outNet(1), "rt")
		b.wire(End{Node: b.Gateway, Iface: "n1", Addrs: secondNet(1).subnet()}, End{Node: n1, Iface: "eth1", Addrs: secondNet(11).subnet()})
		b.route(b.Gateway, pods, secondNet(11), "n1")
		b.route(n1, everywhere, secondNet(1), "eth1")
		b.wire(End{Node: b.Router, Iface: "lb", Addrs: transitNet(1).subnet()}, End{Node: b.LB, Iface: "rt", Addrs: transitNet(2).subnet()})
		b.route(b.LB, everywhere, transitNet(1), "rt")
		b.route(b.Router, vipNets.subnet(), transitNet(2), "lb")
		b.route(b.Router, pods, transitNet(2), "lb")
		pod := b.node("p1x1")
		b.leaf(n1, podNet(1, 1), pod, podNet(1, 11))
		b.Targets = append(b.Targets, pod)
		b.clients(b.Router)
	})
}
