package e2e

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nlb/bench/lab"
)

const relayTuples = 150 // per family

// tuples are which targets a client's fixed 5-tuples lead to, and whom headers
// named.
func (d *daemon) tuples(n *lab.Node, f family, port uint16) (chosen map[uint16]string, all []lab.Reply) {
	d.t.Helper()
	const first = keptPort + 2000
	// Flows of an earlier time would keep their targets.
	d.forget("tcp", port)
	flows := held(d.t, n, lab.Call{Network: "tcp", Dst: f.at(port), SrcPort: first, N: relayTuples, Parallel: 20, Timeout: patience})
	chosen = make(map[uint16]string)
	for i, r := range flows.Opened {
		if r.Err != "" {
			d.t.Errorf("IPv%s from port %d: %s", f.name, first+i, r.Err)
		}
		chosen[uint16(first+i)] = r.Who
	}
	if err := flows.Close(); err != nil {
		d.t.Fatal(err)
	}
	return chosen, flows.Opened
}

// clientsByAddress are which targets a client's addresses lead to.
func (d *daemon) clientsByAddress(n *lab.Node, port uint16, from map[string][]netip.Addr) map[netip.Addr]string {
	d.t.Helper()
	chosen := make(map[netip.Addr]string)
	for _, f := range families {
		for _, a := range from[f.name] {
			for _, r := range replies(d.t, n, lab.Call{Network: "tcp", Dst: f.at(port), SrcAddr: a, N: 2}) {
				if r.Err != "" || chosen[a] != "" && chosen[a] != r.Who {
					d.t.Errorf("from %v: %s, after %q: %q", a, r.Who, chosen[a], r.Err)
				}
				chosen[a] = r.Who
			}
		}
	}
	return chosen
}

// manyAddresses gives a client further addresses.
func manyAddresses(t *testing.T, top *lab.Topology, n int) map[string][]netip.Addr {
	t.Helper()
	client := top.Clients[0]
	all := map[string][]netip.Addr{}
	for i := range n {
		for _, a := range []string{fmt.Sprintf("203.0.113.%d/32", 100+i), fmt.Sprintf("2001:db8:99::%d/128", 100+i)} {
			p := netip.MustParsePrefix(a)
			if err := client.Address("eth0", p); err != nil {
				t.Fatal(err)
			}
			if err := top.LB.Route(p, netip.Addr{}, client.Name); err != nil {
				t.Fatal(err)
			}
			name := families[0].name
			if p.Addr().Is6() {
				name = families[1].name
			}
			all[name] = append(all[name], p.Addr())
		}
	}
	return all
}

// TestRelayAgreesWithTheKernel changes the mode of groups, and then of single
// targets: no client is sent to another target by it.
func TestRelayAgreesWithTheKernel(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 4})
	client := top.Clients[0]
	addresses := manyAddresses(t, top, 20)
	// Of different weights.
	of := targets(top.Targets...)
	for i := range of {
		of[i] = of[i].weighed(1 + i%3)
	}
	flow, sticky := pool("flow", "TCP", "snat", targetPort, of), pool("sticky", "TCP", "snat", targetPort, of)
	sticky.Stickiness = "source_ip"
	c := config{Sources: sources(top), VIPs: both(),
		Listeners: append(listen("flow", "TCP", 80, "flow"), listen("sticky", "TCP", 81, "sticky")...),
		Groups:    []group{flow, sticky},
	}
	// listening makes the targets listen, those in headers for them alone.
	listening := map[string]*lab.Listeners{}
	listen := func(headers ...string) {
		t.Helper()
		for _, n := range top.Targets {
			if l := listening[n.Name]; l != nil {
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
			}
			listening[n.Name] = serveOn(t, n, lab.Serve{Ports: []uint16{targetPort}, Networks: []string{"tcp"}, Proxy: slices.Contains(headers, n.Name)})
		}
	}
	listen()
	d := serving(t, top, c)
	type choices struct {
		flows  [2]map[uint16]string
		sticky map[netip.Addr]string
	}
	// look asks everybody, and fails the test unless headers were where they belong.
	look := func(what string, headers ...string) (got choices) {
		t.Helper()
		for i, f := range families {
			var all []lab.Reply
			got.flows[i], all = d.tuples(client, f, 80)
			for _, r := range all {
				if r.Client.IsValid() != slices.Contains(headers, r.Who) || r.Client.IsValid() && r.Client != r.From {
					t.Errorf("%s: %s was told %v by %v", what, r.Who, r.Client, r.From)
					break
				}
			}
		}
		got.sticky = d.clientsByAddress(client, 81, addresses)
		return got
	}
	before := look("snat")
	for i, flows := range before.flows {
		if n := len(slices.Compact(slices.Sorted(maps.Values(flows)))); n != len(top.Targets) {
			t.Errorf("IPv%s: %d targets were chosen", families[i].name, n)
		}
	}
	if n := len(slices.Compact(slices.Sorted(maps.Values(before.sticky)))); n < 2 {
		t.Errorf("%d targets were chosen by address", n)
	}
	same := func(what string, headers ...string) {
		t.Helper()
		after := look(what, headers...)
		for i := range families {
			if diff := cmp.Diff(before.flows[i], after.flows[i]); diff != "" {
				t.Errorf("%s: IPv%s: other targets (-before +after):\n%s", what, families[i].name, diff)
			}
		}
		if diff := cmp.Diff(before.sticky, after.sticky, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Errorf("%s: by address: other targets (-before +after):\n%s", what, diff)
		}
	}
	reload := func() {
		t.Helper()
		if err := d.reload(c.String()); err != nil {
			t.Fatal(err)
		}
		d.waitAllHealthy()
	}

	for i := range c.Groups {
		c.Groups[i].ClientIP = "proxy_protocol_v2"
	}
	listen("t1", "t2", "t3", "t4")
	reload()
	same("all targets", "t1", "t2", "t3", "t4")

	// Targets may have the other mode, here by both of their addresses.
	except := func(mode, others string, names ...string) {
		t.Helper()
		for i := range c.Groups {
			c.Groups[i].ClientIP, c.Groups[i].Targets = mode, slices.Clone(of)
			for j := range c.Groups[i].Targets {
				if slices.Contains(names, top.Targets[j%len(top.Targets)].Name) {
					c.Groups[i].Targets[j].ClientIP = others
				}
			}
		}
	}
	except("snat", "proxy_protocol_v2", "t1", "t3")
	listen("t1", "t3")
	reload()
	same("two targets are relayed", "t1", "t3")
	except("proxy_protocol_v2", "snat", "t4")
	listen("t1", "t2", "t3")
	reload()
	same("one target is not relayed", "t1", "t2", "t3")
}

// TestRelayMixed has a listener with a group of the kernel's and a relayed one.
func TestRelayMixed(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 4})
	client := top.Clients[0]
	for _, n := range top.Targets[:2] {
		serveOn(t, n, lab.Serve{Ports: []uint16{targetPort}, Networks: []string{"tcp"}})
	}
	serveHeaders(t, top.Targets[2:], targetPort)
	c := config{Sources: sources(top), VIPs: both(), Listeners: listen("web", "TCP", webPort, ""), Groups: []group{
		pool("kernel", "TCP", "preserve", targetPort, targets(top.Targets[:2]...)),
		relayed("relayed", targetPort, targets(top.Targets[2:]...)),
	}}
	weigh := func(kernel, relay int) config {
		for i := range c.Listeners {
			c.Listeners[i].Forward = []forward{{"kernel", kernel}, {"relayed", relay}}
		}
		return c
	}
	d := serving(t, top, weigh(1, 1))
	for _, f := range families {
		const flows = 120
		got := replies(t, client, lab.Call{Network: "tcp", Dst: f.at(webPort), N: flows, Parallel: 8})
		through := map[bool]int{}
		for _, r := range got {
			headed := r.Who == "t3" || r.Who == "t4"
			peer, named := f.addr(client), netip.AddrPort{}
			if headed {
				peer, named = f.addr(top.LB), r.From
			}
			if r.Err != "" || r.Peer != peer || r.Client != named {
				t.Errorf("IPv%s: %+v, want peer %v and client %v", f.name, r, peer, named)
				break
			}
			through[headed]++
		}
		// With even odds, 30 of 120 is five standard deviations off.
		if through[true] < flows/4 || through[false] < flows/4 {
			t.Errorf("IPv%s: %d flows through the relay, %d through the kernel", f.name, through[true], through[false])
		}
	}
	for _, weights := range [][2]int{{1, 0}, {0, 1}} {
		if err := d.reload(weigh(weights[0], weights[1]).String()); err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			got := call(t, client, lab.Call{Network: "tcp", Dst: f.at(webPort), N: 20, Parallel: 8})
			peer := f.addr(client)
			if weights[1] > 0 {
				peer = f.addr(top.LB)
			}
			allSeenAs(t, fmt.Sprint("weights ", weights), got, peer)
		}
	}
}
