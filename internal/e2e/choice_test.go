package e2e

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"nlb/bench/lab"
)

// within fails the test unless got is what n draws with probability p give, up
// to six standard deviations: one false alarm in 500 million.
func within(t *testing.T, what string, got, n int, p float64) {
	t.Helper()
	mean, deviation := float64(n)*p, math.Sqrt(float64(n)*p*(1-p))
	if math.Abs(float64(got)-mean) > 6*deviation {
		t.Errorf("%s: %d of %d, want %.0f ± %.0f", what, got, n, mean, 6*deviation)
	}
}

// TestTargetWeights is targets of one group with weights 1, 3 and 0.
func TestTargetWeights(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 3})
	serveTargets(t, top, 8080)
	weights := []int{1, 3, 0}
	var of []target
	for i, n := range top.Targets {
		for _, x := range targets(n) {
			of = append(of, x.weighed(weights[i]))
		}
	}
	serving(t, top, config{
		Sources: sources(top), VIPs: both(),
		Listeners: listen("dns", "UDP", 53, "dns"),
		Groups:    []group{pool("dns", "UDP", "preserve", 8080, of)},
	})
	const flows = 3000
	for _, f := range families {
		got := call(t, top.Clients[0], lab.Call{Network: "udp", Dst: f.at(53), N: flows, Parallel: 20, Again: time.Second})
		allSeenAs(t, "IPv"+f.name, got, f.addr(top.Clients[0]))
		within(t, "weight 1, IPv"+f.name, got.ByWho["t1"], flows, 0.25)
		within(t, "weight 3, IPv"+f.name, got.ByWho["t2"], flows, 0.75)
		if n := got.ByWho["t3"]; n > 0 {
			t.Errorf("weight 0, IPv%s: %d flows", f.name, n)
		}
	}
}

// TestGroupWeights is a listener that shares its flows 90 to 10, and one that
// gives a group nothing.
func TestGroupWeights(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 3})
	serveTargets(t, top, 8080)
	c := config{Sources: sources(top), VIPs: both(), Listeners: listen("dns", "UDP", 53, "g0")}
	for i, n := range top.Targets {
		c.Groups = append(c.Groups, pool(fmt.Sprint("g", i), "UDP", "preserve", 8080, targets(n)))
	}
	for i := range c.Listeners {
		c.Listeners[i].Forward = []forward{{"g0", 90}, {"g1", 10}, {"g2", 0}}
	}
	d := start(t, top, c.String())
	d.waitHealthy("g0", 2)
	d.waitHealthy("g1", 2)
	const flows = 2000
	for _, f := range families {
		got := call(t, top.Clients[0], lab.Call{Network: "udp", Dst: f.at(53), N: flows, Parallel: 20, Again: time.Second})
		allSeenAs(t, "IPv"+f.name, got, f.addr(top.Clients[0]))
		within(t, "weight 90, IPv"+f.name, got.ByWho["t1"], flows, 0.9)
		within(t, "weight 10, IPv"+f.name, got.ByWho["t2"], flows, 0.1)
		if n := got.ByWho["t3"]; n > 0 {
			t.Errorf("weight 0, IPv%s: %d flows", f.name, n)
		}
	}
}

// clientNets are further addresses of a client.
var clientNets = map[string]netip.Prefix{
	"4": netip.MustParsePrefix("203.0.113.128/25"),
	"6": netip.MustParsePrefix("2001:db8:99:1::/64"),
}

// TestStickiness is one client that opens many flows: with source_ip they stay
// in one group and one target, without they spread over all.
func TestStickiness(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 4})
	serveTargets(t, top, 8080)
	client := top.Clients[0]
	c := config{Sources: sources(top), VIPs: both()}
	for i, stickiness := range []string{"source_ip", "none"} {
		listeners := listen(fmt.Sprint("l", i), "TCP_UDP", uint16(81+i), "")
		for half := range 2 {
			g := pool(fmt.Sprintf("g%d%d", i, half), "TCP_UDP", "preserve", 8080, targets(top.Targets[2*half:2*half+2]...))
			g.Stickiness = stickiness
			c.Groups = append(c.Groups, g)
		}
		for j := range listeners {
			listeners[j].Forward = []forward{{fmt.Sprintf("g%d0", i), 1}, {fmt.Sprintf("g%d1", i), 1}}
		}
		c.Listeners = append(c.Listeners, listeners...)
	}
	serving(t, top, c)

	// With 40 clients or 60 flows and four targets, one that is never chosen is
	// less likely than 1 in 20,000.
	const clients, each, flows = 40, 6, 60
	for _, f := range families {
		net := clientNets[f.name]
		if err := top.LB.Route(net, netip.Addr{}, client.Name); err != nil {
			t.Fatal(err)
		}
		met := map[string]int{}
		for addr, i := net.Addr().Next(), 0; i < clients; addr, i = addr.Next(), i+1 {
			if err := client.Address("eth0", netip.PrefixFrom(addr, addr.BitLen())); err != nil {
				t.Fatal(err)
			}
			network := networks[i%2]
			got := call(t, client, lab.Call{Network: network, Dst: f.at(81), SrcAddr: addr, N: each, Parallel: each})
			allSeenAs(t, network+f.name, got, addr)
			if len(got.ByWho) != 1 {
				t.Errorf("%v over %s is not sticky: %v", addr, network, got)
			}
			for who := range got.ByWho {
				met[who]++
			}
		}
		if len(met) != len(top.Targets) {
			t.Errorf("IPv%s: %d sticky clients met only %v", f.name, clients, met)
		}
		for _, network := range networks {
			got := call(t, client, lab.Call{Network: network, Dst: f.at(82), SrcAddr: f.addr(client), N: flows, Parallel: 8})
			if len(got.ByWho) != len(top.Targets) || got.Failed > 0 {
				t.Errorf("%s%s without stickiness: %v", network, f.name, got)
			}
		}
	}
}

// TestAllow is a listener for some clients only.
func TestAllow(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Clients: 2, Targets: 1})
	serveTargets(t, top, 8080)
	c := config{
		Sources: sources(top), VIPs: both(),
		Listeners: listen("some", "TCP_UDP", 80, "web"),
		Groups:    []group{pool("web", "TCP_UDP", "preserve", 8080, targets(top.Targets...))},
	}
	in, out := top.Clients[0], top.Clients[1]
	// The prefixes have .8 and .9, ::8 to ::b. The second client is .10 and ::10.
	c.Listeners[0].Allow = []string{"203.0.113.8/31", "192.0.2.1"}
	c.Listeners[1].Allow = []string{"2001:db8:99::8/126", "2001:db8::1"}
	d := serving(t, top, c)
	const flows = 5
	for _, f := range families {
		for _, network := range networks {
			what := network + f.name
			ask := func(n *lab.Node) lab.Tally {
				return call(t, n, lab.Call{Network: network, Dst: f.at(80), N: flows, Parallel: flows, Timeout: briefly})
			}
			refused, again := d.counter("not_allowed_drops"), sentAgain(t, out)
			allSeenAs(t, what+", allowed", ask(in), f.addr(in))
			if now := d.counter("not_allowed_drops"); now != refused {
				t.Errorf("%s: %d allowed flows were counted as refused", what, now-refused)
			}
			allFail(t, what+", not allowed", ask(out), lab.Timeout)
			// On a busy machine a SYN may be sent again before its caller gives up.
			again = sentAgain(t, out) - again
			if n := d.counter("not_allowed_drops") - refused; n != flows+again {
				t.Errorf("%s: not_allowed_drops rose by %d for %d flows and %d SYNs sent again", what, n, flows, again)
			}
		}
	}
}

// sentAgain is how many TCP segments a node has sent again, SYNs too.
func sentAgain(t *testing.T, n *lab.Node) int {
	t.Helper()
	var names []string
	for line := range strings.Lines(must(t, n, "cat", "/proc/net/snmp")) {
		values := strings.Fields(line)
		if len(values) == 0 || values[0] != "Tcp:" {
			continue
		}
		if names == nil {
			names = values
			continue
		}
		count, err := strconv.Atoi(values[slices.Index(names, "RetransSegs")])
		if err != nil {
			t.Fatal(err)
		}
		return count
	}
	t.Fatal("the kernel counts no TCP segments")
	return 0
}
