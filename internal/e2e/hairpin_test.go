package e2e

import (
	"fmt"
	"testing"
	"time"

	"nlb/bench/lab"
)

var networks = []string{"tcp", "udp"}

// briefly is long enough for an answer, and too short for a SYN to be repeated
// (1 s, RFC 6298 section 2.1): one call is one packet.
const briefly = 700 * time.Millisecond

// TestHairpinSelf is a target that calls the VIP whose only target it is.
func TestHairpinSelf(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{})
	serveTargets(t, top, 8080)
	self := top.Targets[0]
	c := config{Sources: sources(top), VIPs: both()}
	for i, mode := range []string{"preserve", "hairpin_snat", "snat"} {
		name := fmt.Sprint("g", i)
		c.Listeners = append(c.Listeners, listen(name, "TCP_UDP", uint16(81+i), name)...)
		c.Groups = append(c.Groups, pool(name, "TCP_UDP", mode, 8080, targets(self)))
	}
	d := serving(t, top, c)

	const flows = 5
	for _, f := range families {
		for _, network := range networks {
			what := network + f.name
			t.Run(what, func(t *testing.T) {
				dropped := d.counter("hairpin_drops")
				got := call(t, self, lab.Call{Network: network, Dst: f.at(81), N: flows, Parallel: flows, Timeout: briefly})
				allFail(t, "preserve", got, lab.Timeout)
				if now := d.counter("hairpin_drops"); now != dropped+flows {
					t.Errorf("hairpin_drops rose by %d for %d flows", now-dropped, flows)
				}
				hairpins := d.counter("hairpins")
				allSeenAs(t, "hairpin_snat", call(t, self, lab.Call{Network: network, Dst: f.at(82), N: flows}), f.addr(top.LB))
				if now := d.counter("hairpins"); now != hairpins+flows {
					t.Errorf("hairpins rose by %d for %d flows", now-hairpins, flows)
				}
				allSeenAs(t, "snat", call(t, self, lab.Call{Network: network, Dst: f.at(83), N: flows}), f.addr(top.LB))
				for port, mode := range map[uint16]string{81: "preserve", 82: "hairpin_snat"} {
					got := call(t, top.Clients[0], lab.Call{Network: network, Dst: f.at(port), N: flows})
					allSeenAs(t, mode+" from outside", got, f.addr(top.Clients[0]))
				}
			})
		}
	}
}

// TestHairpinAmongOthers is a target that calls a VIP with two targets: only
// where it meets itself is its address replaced.
func TestHairpinAmongOthers(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{})
	serveTargets(t, top, 8080)
	self := top.Targets[0]
	serving(t, top, config{
		Sources: sources(top), VIPs: both(),
		Listeners: listen("web", "TCP_UDP", 80, "web"),
		Groups:    []group{pool("web", "TCP_UDP", "hairpin_snat", 8080, targets(top.Targets...))},
	})
	for _, f := range families {
		for _, network := range networks {
			got := replies(t, self, lab.Call{Network: network, Dst: f.at(80), N: 40})
			met := map[string]int{}
			for _, r := range got {
				want := f.addr(self)
				if r.Who == self.Name {
					want = f.addr(top.LB)
				}
				if r.Err != "" || r.Peer != want {
					t.Errorf("%s%s: %s saw %v, want %v (%s)", network, f.name, r.Who, r.Peer, want, r.Err)
				}
				met[r.Who]++
			}
			if len(met) != 2 {
				t.Errorf("%s%s: met %v", network, f.name, met)
			}
		}
	}
}

// TestHairpinSameNode is a pod that is sent to another pod of its own node. The
// node answers it directly, unless the operator said who is colocated.
func TestHairpinSameNode(t *testing.T) {
	t.Parallel()
	top := made(t, lab.PodNode, lab.Options{})
	serveTargets(t, top, 8080)
	client, node, other, stranger := top.Targets[0], top.Hosts[0], top.Targets[1], top.Targets[2]
	told := targets(other)
	for i := range told {
		told[i].Colocated = []string{"10.244.1.0/24", "2001:db8:244:1::/64", node.Addr4.String(), node.Addr6.String()}
	}
	serving(t, top, config{
		Sources: sources(top), VIPs: both(),
		Listeners: append(listen("told", "TCP_UDP", 81, "told"), listen("untold", "TCP_UDP", 82, "untold")...),
		Groups: []group{
			pool("told", "TCP_UDP", "hairpin_snat", 8080, told),
			pool("untold", "TCP_UDP", "hairpin_snat", 8080, targets(other)),
		},
	})
	for _, f := range families {
		for _, network := range networks {
			t.Run(network+f.name, func(t *testing.T) {
				ask := func(from *lab.Node, port uint16) lab.Tally {
					return call(t, from, lab.Call{Network: network, Dst: f.at(port), N: 5, Parallel: 5, Timeout: briefly})
				}
				allSeenAs(t, "colocated pod", ask(client, 81), f.addr(top.LB))
				allSeenAs(t, "the node", ask(node, 81), f.addr(top.LB))
				allSeenAs(t, "pod of another node", ask(stranger, 81), f.addr(stranger))
				allSeenAs(t, "outside", ask(top.Clients[0], 81), f.addr(top.Clients[0]))
				if got := ask(client, 82); got.OK > 0 {
					t.Errorf("it works without colocated too, so this test shows nothing: %v", got)
				}
			})
		}
	}
}

// TestHairpinSameSubnet is a client in the targets' segment, which answer it
// directly, unless the subnet counts as the target's host.
func TestHairpinSameSubnet(t *testing.T) {
	t.Parallel()
	top := made(t, lab.OneArm, lab.Options{})
	serveTargets(t, top, 8080)
	near := pool("near", "TCP_UDP", "hairpin_snat", 8080, targets(top.Targets...))
	near.HairpinSubnet = true
	serving(t, top, config{
		Sources: sources(top), VIPs: both(),
		Listeners: append(listen("near", "TCP_UDP", 81, "near"), listen("far", "TCP_UDP", 82, "far")...),
		Groups:    []group{near, pool("far", "TCP_UDP", "hairpin_snat", 8080, targets(top.Targets...))},
	})
	for _, f := range families {
		for _, network := range networks {
			t.Run(network+f.name, func(t *testing.T) {
				ask := func(from *lab.Node, port uint16) lab.Tally {
					return call(t, from, lab.Call{Network: network, Dst: f.at(port), N: 10, Parallel: 10, Timeout: briefly})
				}
				allSeenAs(t, "neighbour", ask(top.Inside[0], 81), f.addr(top.LB))
				allSeenAs(t, "target", ask(top.Targets[0], 81), f.addr(top.LB))
				allSeenAs(t, "outside", ask(top.Clients[0], 81), f.addr(top.Clients[0]))
				if got := ask(top.Inside[0], 82); got.OK > 0 {
					t.Errorf("it works without hairpin_subnet too, so this test shows nothing: %v", got)
				}
			})
		}
	}
}

// TestAvoidSelf is a preserved client that is a target: it is sent to the
// others, or, being the only one, has its address replaced.
func TestAvoidSelf(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 3})
	serveTargets(t, top, 8080)
	self := top.Targets[0]
	many := pool("many", "TCP_UDP", "preserve", 8080, targets(top.Targets...))
	only := pool("only", "TCP_UDP", "preserve", 8080, targets(self))
	many.AvoidSelf, only.AvoidSelf = true, true
	serving(t, top, config{
		Sources: sources(top), VIPs: both(),
		Listeners: append(listen("many", "TCP_UDP", 81, "many"), listen("only", "TCP_UDP", 82, "only")...),
		Groups:    []group{many, only},
	})
	// A third of the choices fall on the client. The others should share them: with
	// even odds, 20 of 120 is more than seven standard deviations off.
	const flows, fewest = 120, 20
	for _, f := range families {
		for _, network := range networks {
			got := call(t, self, lab.Call{Network: network, Dst: f.at(81), N: flows, Parallel: 8})
			allSeenAs(t, network+f.name, got, f.addr(self))
			if got.ByWho["t1"] > 0 || got.ByWho["t2"] < fewest || got.ByWho["t3"] < fewest {
				t.Errorf("%s%s: %v", network, f.name, got)
			}
			got = call(t, self, lab.Call{Network: network, Dst: f.at(82), N: 5})
			allSeenAs(t, network+f.name+", the only target", got, f.addr(top.LB))
			got = call(t, top.Clients[0], lab.Call{Network: network, Dst: f.at(81), N: flows, Parallel: 8})
			allSeenAs(t, network+f.name+" from outside", got, f.addr(top.Clients[0]))
			if len(got.ByWho) != 3 {
				t.Errorf("%s%s from outside: %v", network, f.name, got)
			}
		}
	}
}
