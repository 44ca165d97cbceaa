package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/internal/wait"
)

// The MTU of the narrow link and of the others, and a size between the two.
const (
	narrow = 1300
	usual  = 1500
	large  = 1400
)

// A chain has two routers on either side of the balancer, so that each link of
// the way can be the narrow one:
//
//	c1 ─── r1 ─── r2 ─── lb ─── r3 ─── r4 ─── t1
//
// Nobody's own link is: a host that knows announces a small enough MSS.
type chain struct {
	*lab.Topology
	links [][2]lab.End // from the client's to the target's
}

// newChain makes a chain. Link i is 10.1.i.0/24 and 2001:db8:1:i::/64, with
// host 1 on the client's side and 2 on the target's.
func newChain(t *testing.T) *chain {
	t.Helper()
	l, err := lab.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("close the lab: %v", err)
		}
	})
	c := &chain{Topology: &lab.Topology{Lab: l, Name: "chain"}}
	var nodes []*lab.Node
	for _, name := range []string{"c1", "r1", "r2", "lb", "r3", "r4", "t1"} {
		n, err := l.Node(name)
		if err == nil && name != "c1" && name != "t1" {
			err = n.Forward()
		}
		if err != nil {
			t.Fatal(err)
		}
		nodes = append(nodes, n)
	}
	c.Clients, c.LB, c.Targets = nodes[:1], nodes[3], nodes[6:]
	for i, n := range nodes[:len(nodes)-1] {
		left := lab.End{Node: n, Iface: "right", Addrs: c.addrs(i, 1)}
		right := lab.End{Node: nodes[i+1], Iface: "left", Addrs: c.addrs(i, 2)}
		if err := l.Wire(left, right); err != nil {
			t.Fatal(err)
		}
		c.links = append(c.links, [2]lab.End{left, right})
	}
	for at, n := range nodes {
		c.route(t, n, at)
	}
	return c
}

func (c *chain) addrs(link, host int) []netip.Prefix {
	return []netip.Prefix{
		netip.MustParsePrefix(fmt.Sprintf("10.1.%d.%d/24", link, host)),
		netip.MustParsePrefix(fmt.Sprintf("2001:db8:1:%d::%d/64", link, host)),
	}
}

// route gives a node its way to every link and to the VIPs.
func (c *chain) route(t *testing.T, n *lab.Node, at int) {
	t.Helper()
	const lb = 3
	for link := range c.links {
		for f, net := range c.addrs(link, 0) {
			c.hop(t, n, at, net, f, link >= at)
		}
	}
	for f := range families {
		vip := netip.PrefixFrom(families[f].vip, families[f].vip.BitLen())
		if at != lb {
			c.hop(t, n, at, vip, f, at < lb)
		}
	}
}

// hop adds one route, to the right or to the left, if it is not the link's own.
func (c *chain) hop(t *testing.T, n *lab.Node, at int, to netip.Prefix, f int, right bool) {
	t.Helper()
	link, iface, host := at-1, "left", 1
	if right {
		link, iface, host = at, "right", 2
	}
	via := c.addrs(link, host)[f]
	if via.Masked() == to.Masked() {
		return
	}
	if err := n.Route(to.Masked(), via.Addr(), iface); err != nil {
		t.Fatal(err)
	}
}

// mtu sets the MTU of both ends of a link.
func (c *chain) mtu(t *testing.T, link, size int) {
	t.Helper()
	for _, e := range c.links[link] {
		must(t, e.Node, "ip", "link", "set", "dev", e.Iface, "mtu", fmt.Sprint(size))
	}
}

// forget makes the senders forget what they learnt of the path.
func (c *chain) forget(t *testing.T, f family) {
	t.Helper()
	for _, n := range []*lab.Node{c.Clients[0], c.Targets[0]} {
		must(t, n, "ip", "-"+f.name, "route", "flush", "cache")
	}
}

// TestPathMTU narrows the links on either side of the balancer, its own and
// those further away, and sends too large packets in both directions. The error
// of whoever cannot forward them arrives at the sender, and belongs to a flow
// that the sender knows.
func TestPathMTU(t *testing.T) {
	t.Parallel()
	top := newChain(t)
	client, target := top.Clients[0], top.Targets[0]
	serveTargets(t, top.Topology, 8080)
	iperf(t, target)
	modes := []string{"preserve", "snat"}
	c := config{VIPs: both(), Sources: []netip.Addr{netip.MustParseAddr("10.1.3.1"), netip.MustParseAddr("2001:db8:1:3::1")}}
	for i, mode := range modes {
		n := fmt.Sprint(i)
		// iperf3 would take a probe for its one client, and UDP has no answer to one.
		bulk := pool("bulk"+n, "TCP", mode, iperfPort, targets(target))
		dgram := pool("dgram"+n, "UDP", mode, uint16(9000+i), targets(target))
		bulk.HealthCheck["port"], dgram.HealthCheck["port"] = 8080, 8080
		c.Listeners = append(c.Listeners, listen("bulk"+n, "TCP", uint16(81+i), bulk.Name)...)
		c.Listeners = append(c.Listeners, listen("dgram"+n, "UDP", uint16(81+i), dgram.Name)...)
		c.Groups = append(c.Groups, bulk, dgram)
	}
	serving(t, top.Topology, c)

	for link, where := range map[int]string{1: "between the client's routers", 2: "before the balancer", 3: "behind the balancer", 4: "between the target's routers"} {
		top.mtu(t, link, narrow)
		for i, mode := range modes {
			for _, f := range families {
				t.Run(fmt.Sprint(where, "/", mode, f.name), func(t *testing.T) {
					top.forget(t, f)
					datagrams(t, client, target, f, f.at(uint16(81+i)), uint16(9000+i))
					top.forget(t, f)
					transfer(t, client, f, uint16(81+i), "2M")
				})
			}
		}
		top.mtu(t, link, usual)
	}
}

// datagrams sends a large datagram in each direction of a flow, again and again
// until the sender's kernel knows the path's MTU.
func datagrams(t *testing.T, client, target *lab.Node, f family, dst netip.AddrPort, port uint16) {
	t.Helper()
	there := bindUDP(t, target, netip.AddrPortFrom(f.addr(target), port), mustNotFragment)
	here := bindUDP(t, client, netip.AddrPortFrom(f.addr(client), 0), mustNotFragment)
	peer := deliver(t, "the first datagram", here, there, dst, []byte("hello"))
	learns := func(who string, from *net.UDPConn, to netip.AddrPort) {
		wait.For(t, limit, who+" to learn the path's MTU", func() error {
			_, err := from.WriteToUDPAddrPort(make([]byte, large), to)
			if errors.Is(err, unix.EMSGSIZE) {
				return nil
			}
			return fmt.Errorf("a large datagram was sent: %v", err)
		})
	}
	learns("the client", here, dst)
	learns("the target", there, peer)
}
