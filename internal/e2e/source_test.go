package e2e

import (
	"fmt"
	"net/netip"
	"testing"

	"nlb/bench/lab"
)

// outward are the balancer's addresses on the side of the clients.
var outward = map[string]netip.Addr{
	"4": netip.MustParseAddr("203.0.113.1"),
	"6": netip.MustParseAddr("2001:db8:99::1"),
}

// TestClientsOnTheBalancer has programs of the balancer's own host call the VIP,
// which is on that host, so that the kernel gives them the VIP for a source.
func TestClientsOnTheBalancer(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{})
	serveTargets(t, top, 8080)
	// A target that holds the VIP itself takes a packet from it for its own.
	for _, f := range families {
		must(t, top.Targets[0], "ip", "address", "add", f.vip.String(), "dev", "lo")
	}
	modes := []string{"preserve", "hairpin_snat", "snat"}
	c := config{Sources: sources(top), VIPs: both()}
	for i, mode := range modes {
		name := fmt.Sprint("g", i)
		c.Listeners = append(c.Listeners, listen(name, "TCP_UDP", uint16(81+i), name)...)
		c.Groups = append(c.Groups, pool(name, "TCP_UDP", mode, 8080, targets(top.Targets...)))
	}
	serving(t, top, c)
	const flows = 20
	for i, mode := range modes {
		for _, f := range families {
			for _, network := range networks {
				what := fmt.Sprint(mode, " ", network, f.name)
				ask := lab.Call{Network: network, Dst: f.at(uint16(81 + i)), N: flows}
				got := call(t, top.LB, ask)
				allSeenAs(t, what, got, f.addr(top.LB))
				if len(got.ByWho) != 2 {
					t.Errorf("%s: %v", what, got)
				}
				ask.SrcAddr = outward[f.name]
				want := outward[f.name]
				if mode == "snat" {
					want = f.addr(top.LB)
				}
				allSeenAs(t, what+" from another address of the host", call(t, top.LB, ask), want)
			}
		}
	}
}

// TestSourcePool has two source addresses in each family. Both are used.
func TestSourcePool(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{})
	serveTargets(t, top, 8080)
	second := map[string]netip.Addr{"4": netip.MustParseAddr("10.0.1.2"), "6": netip.MustParseAddr("2001:db8:1::2")}
	c := config{
		Sources: sources(top), VIPs: both(),
		Listeners: listen("web", "TCP_UDP", 80, "web"),
		Groups:    []group{pool("web", "TCP_UDP", "snat", 8080, targets(top.Targets...))},
	}
	for _, f := range families {
		if err := top.LB.Address("lo", netip.PrefixFrom(second[f.name], f.vip.BitLen())); err != nil {
			t.Fatal(err)
		}
		c.Sources = append(c.Sources, second[f.name])
	}
	serving(t, top, c)
	const flows = 200
	for _, f := range families {
		for _, network := range networks {
			what := network + f.name
			got := call(t, top.Clients[0], lab.Call{Network: network, Dst: f.at(80), N: flows, Parallel: 8})
			first := got.ByPeer[f.addr(top.LB).String()]
			within(t, what+": the first source", first, flows, 0.5)
			if second := got.ByPeer[second[f.name].String()]; first+second != flows {
				t.Errorf("%s: %v", what, got)
			}
		}
	}
}

// TestSourceOfTheRoute leaves source_addresses out, where the kernel would take
// the VIP: it is bound on the interface that leads to the target, and the route
// asks for it.
func TestSourceOfTheRoute(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{})
	serveTargets(t, top, 8080)
	toFirst, second := top.Targets[0], top.Targets[1]
	c := config{
		Listeners: listen("plain", "TCP_UDP", 81, "plain"),
		Groups:    []group{pool("plain", "TCP_UDP", "snat", 8080, targets(second))},
	}
	own := map[string]netip.Addr{"4": netip.MustParseAddr("10.0.1.3"), "6": netip.MustParseAddr("2001:db8:1::3")}
	for _, f := range families {
		c.VIPs = append(c.VIPs, vip{f.vip, toFirst.Name})
		g := pool("web"+f.name, "TCP_UDP", "snat", 8080, []target{{Address: f.addr(toFirst)}})
		c.Groups = append(c.Groups, g)
		c.Listeners = append(c.Listeners, listener{Name: g.Name, VIP: f.vip.String(), Protocol: "TCP_UDP", Port: 80, Forward: to(g.Name)})
		// The operator bound the VIP before, as an ordinary address.
		must(t, top.LB, "ip", "address", "add", f.vip.String(), "dev", toFirst.Name)
		must(t, top.LB, "ip", "-"+f.name, "route", "replace", f.addr(toFirst).String(), "dev", toFirst.Name, "src", f.vip.String())
		// And another target's route has a source of its own.
		must(t, top.LB, "ip", "address", "add", own[f.name].String(), "dev", "lo")
		must(t, top.LB, "ip", "-"+f.name, "route", "replace", f.addr(second).String(), "dev", second.Name, "src", own[f.name].String())
	}
	seen := capture(t, toFirst, "eth0")
	d := serving(t, top, c)
	for _, f := range families {
		for _, network := range networks {
			for port, want := range map[uint16]netip.Addr{80: f.addr(top.LB), 81: own[f.name]} {
				got := call(t, top.Clients[0], lab.Call{Network: network, Dst: f.at(port), N: 10})
				allSeenAs(t, fmt.Sprint(network, f.name, " ", port), got, want)
			}
		}
	}
	strangers := packets(t, seen, func(p lab.Packet) bool {
		// Neighbour discovery may come from any address of the interface.
		return !p.Out && (p.SrcPort != 0 || p.DstPort != 0) && (p.Src == lab.VIP4 || p.Src == lab.VIP6)
	})
	if len(strangers) > 0 {
		t.Errorf("packets from the VIP reached the target, such as %v", strangers[0])
	}
	if n := d.counter("no_source_drops"); n > 0 {
		t.Errorf("%d flows found no source", n)
	}
}
