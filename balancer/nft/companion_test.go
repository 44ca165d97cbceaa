package nft

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"pgregory.net/rapid"

	"nlb/balancer"
	"nlb/internal/golden"
)

func withIPVS(t *balancer.Table) *balancer.Table {
	t.Dataplane = balancer.IPVS
	return t
}

// What differs from everything.nft, in full.
func TestRenderCompanion(t *testing.T) {
	golden.Check(t, "companion.nft", contrast(t, withIPVS(everything()), everything()))
}

// The same where some flows are relayed.
func TestRenderCompanionRelayed(t *testing.T) {
	golden.Check(t, "companion-relayed.nft", contrast(t, withIPVS(untracking()), untracking()))
}

// contrast is what one ruleset has and the other has not, or has otherwise, and
// the names of what it has not.
func contrast(t *testing.T, one, other *balancer.Table) string {
	t.Helper()
	all, plain := renderAfresh(t, one), renderAfresh(t, other)
	short := otherChains(all, plain)
	for name, s := range all.Sets {
		if old := plain.Sets[name]; old == nil || !cmp.Equal(old.Elems, s.Elems) {
			short.addSet(s)
		}
	}
	if diff := cmp.Diff(plain.Objects, all.Objects); diff != "" {
		t.Errorf("counters differ, which keep their values in a change:\n%s", diff)
	}
	var b strings.Builder
	b.WriteString(short.String())
	for _, name := range missing(plain.Sets, all.Sets) {
		fmt.Fprintf(&b, "# no %s %s\n", plain.Sets[name].word(), name)
	}
	for _, name := range missing(plain.Chains, all.Chains) {
		fmt.Fprintf(&b, "# no chain %s\n", name)
	}
	return b.String()
}

// Every destination that IPVS may choose for a service has one number, which is
// one of a target with that address in a pool of that service, and each number
// leads to its own chain.
func TestCompanionKnowsEveryDestination(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		table := withIPVS(drawTable(t))
		n, err := newNumbers().assign(tableKeys(table))
		if err != nil {
			t.Fatal(err)
		}
		rs := new(renderer).render(table, n)
		want := map[string]map[string]bool{} // element → the numbers it may have
		may := func(svc *balancer.VirtualService, proto uint8, to netip.AddrPort, number uint16) {
			key := destinationKey(netip.AddrPortFrom(svc.Address, svc.Port), proto, to)
			if want[key] == nil {
				want[key] = map[string]bool{}
			}
			want[key][string(native32(uint32(number)))] = true
		}
		pools := table.PoolsByName()
		for i := range table.Services {
			svc := &table.Services[i]
			for _, w := range svc.Pools {
				p := pools[w.Pool]
				for j := range p.Destinations {
					d := &p.Destinations[j]
					for _, proto := range svc.Protocols {
						switch key := (balancer.TargetKey{Group: p.Name, AddrPort: d.AddrPort()}); {
						case p.ClientIPOf(d) != balancer.ProxyProtocolV2 && d.Address.BitLen() == svc.Address.BitLen():
							may(svc, proto, d.AddrPort(), n.byKey[key])
						case p.ClientIPOf(d) == balancer.ProxyProtocolV2 && proto == balancer.ProtoTCP:
							may(svc, proto, netip.AddrPortFrom(svc.Address, svc.Port), relayed)
						}
					}
				}
			}
		}
		got := map[string]bool{}
		for _, f := range families {
			for _, e := range rs.Sets["destinations"+f.name].Elems {
				switch {
				case got[e.Key]:
					t.Errorf("%s is there twice", rs.Sets["destinations"+f.name].elemText(e))
				case !want[e.Key][e.Data]:
					t.Errorf("%s is unexpected", rs.Sets["destinations"+f.name].elemText(e))
				}
				got[e.Key] = true
			}
		}
		if len(got) != len(want) {
			t.Errorf("%d destinations have a number, of %d", len(got), len(want))
		}
		for _, e := range rs.Sets["numbered"].Elems {
			c := rs.Chains[e.Goto]
			if c == nil {
				t.Fatalf("there is no chain %s", e.Goto)
			}
			if num, _, ok := parseTargetChain(c); !ok || string(native32(markOf(num, 0))) != e.Key {
				t.Errorf("%s leads to %s", nativeText([]byte(e.Key)), c.Name)
			}
		}
	})
}

// drawTable draws pools that share addresses, and services that share pools.
func drawTable(t *rapid.T) *balancer.Table {
	table := &balancer.Table{VIPs: []netip.Addr{addr("198.51.100.10"), addr("2001:db8:77::10")}}
	modes := []balancer.ClientIP{0, balancer.Preserve, balancer.SNAT, balancer.ProxyProtocolV2}
	for i := range rapid.IntRange(1, 4).Draw(t, "pools") {
		p := balancer.Pool{Name: fmt.Sprintf("p%d", i), Protocols: []uint8{balancer.ProtoTCP}, ClientIP: modes[1+rapid.IntRange(0, 2).Draw(t, "mode")]}
		hosts := rapid.SliceOfNDistinct(rapid.SampledFrom([]string{"10.0.1.11", "10.0.1.12", "2001:db8:1::11", "2001:db8:1::12"}), 0, 4, rapid.ID).Draw(t, "hosts")
		slices.Sort(hosts)
		for _, h := range hosts {
			d := dest(h, uint16(rapid.IntRange(8080, 8081).Draw(t, "port")), rapid.IntRange(0, 2).Draw(t, "weight"))
			d.ClientIP = modes[rapid.IntRange(0, 3).Draw(t, "own mode")]
			p.Destinations = append(p.Destinations, d)
		}
		// A pool that relays counts as one even if nobody in it is relayed.
		if p.Relays() && !slices.ContainsFunc(p.Destinations, func(d balancer.Destination) bool { return p.ClientIPOf(&d) == balancer.ProxyProtocolV2 }) {
			p.ClientIP = balancer.Preserve
		}
		table.Pools = append(table.Pools, p)
	}
	for i := range rapid.IntRange(1, 4).Draw(t, "services") {
		svc := balancer.VirtualService{
			Name: fmt.Sprintf("s%d", i), Address: table.VIPs[i%2], Port: uint16(80 + i),
			Protocols: [][]uint8{{balancer.ProtoTCP}, {balancer.ProtoUDP}, {balancer.ProtoTCP, balancer.ProtoUDP}}[rapid.IntRange(0, 2).Draw(t, "protocols")],
		}
		for _, p := range table.Pools {
			if rapid.Bool().Draw(t, "chosen from") {
				svc.Pools = append(svc.Pools, balancer.WeightedPool{Pool: p.Name, Weight: rapid.IntRange(0, 2).Draw(t, "weight")})
			}
		}
		table.Services = append(table.Services, svc)
	}
	return table
}

// The last rule of a listener, by what its pools have.
func TestCompanionListeners(t *testing.T) {
	const (
		leave = "ct mark set ct mark & 0x3fffbfff | 0x3fff8000 dnat ip to ip daddr"
		drop  = `counter name "no_target_drops" drop`
		relay = "ct mark set ct mark & 0x3fffffff | 0x3fffc000 dnat ip to ip daddr"
	)
	drained := dest("10.0.1.11", 3, 0)
	drained.ClientIP = balancer.SNAT
	pools := []balancer.Pool{
		{Name: "drained", ClientIP: balancer.SNAT, Destinations: []balancer.Destination{dest("10.0.1.11", 1, 0)}},
		{Name: "empty", ClientIP: balancer.SNAT},
		{Name: "kernel", ClientIP: balancer.SNAT, Destinations: []balancer.Destination{dest("10.0.1.11", 1, 1)}},
		// The relay takes a target of the other family where the group has none of the VIP's.
		{Name: "mixed", ClientIP: balancer.ProxyProtocolV2, Destinations: []balancer.Destination{drained, dest("2001:db8:1::11", 2, 1)}},
		{Name: "relayed", ClientIP: balancer.ProxyProtocolV2, Destinations: []balancer.Destination{dest("10.0.1.11", 2, 1)}},
		{Name: "relayed6", ClientIP: balancer.ProxyProtocolV2, Destinations: []balancer.Destination{dest("2001:db8:1::11", 2, 1)}},
		{Name: "six", ClientIP: balancer.SNAT, Destinations: []balancer.Destination{dest("2001:db8:1::11", 1, 1)}},
	}
	for want, cases := range map[string][]string{
		leave:                 {"kernel", "drained kernel", "empty kernel", "kernel relayed", "kernel six"},
		drop:                  {"", "drained", "empty", "six", "drained empty", "mixed", "drained mixed"},
		relay:                 {"drained relayed", "empty relayed", "mixed relayed", "empty relayed6"},
		"goto group4.relayed": {"relayed"},
	} {
		for _, names := range cases {
			table := &balancer.Table{Dataplane: balancer.IPVS, VIPs: []netip.Addr{addr("198.51.100.10")}, Pools: pools}
			svc := balancer.VirtualService{Name: "web", Address: table.VIPs[0], Port: 80, Protocols: []uint8{balancer.ProtoTCP}, Allow: prefixes("0.0.0.0/0")}
			for _, name := range strings.Fields(names) {
				svc.Pools = append(svc.Pools, balancer.WeightedPool{Pool: name, Weight: 1})
			}
			table.Services = []balancer.VirtualService{svc}
			rules := renderAfresh(t, table).Chains["listener.web"].Rules
			if got := rules[len(rules)-1].Text; got != want {
				t.Errorf("%q: got %q, want %q", names, got, want)
			}
		}
	}
}

// A destination of two pools of a service is the first one's that has a weight,
// whatever the order they come in.
func TestCompanionSameDestinationTwice(t *testing.T) {
	table := withIPVS(everything())
	table.Services[3].Pools = []balancer.WeightedPool{{Pool: "snat", Weight: 1}, {Pool: "hairpin", Weight: 1}, {Pool: "avoid", Weight: 0}}
	other := withIPVS(everything())
	other.Services[3].Pools = []balancer.WeightedPool{{Pool: "avoid", Weight: 0}, {Pool: "hairpin", Weight: 1}, {Pool: "snat", Weight: 1}}
	one, two := renderAfresh(t, table), renderAfresh(t, other)
	if diff := cmp.Diff(one.String(), two.String()); diff != "" {
		t.Error(diff)
	}
	want := "198.51.100.11 . udp . 443 . 10.0.1.11 . 8080 : 0x00000006" // hairpin's
	s := one.Sets["destinations4"]
	if all := s.elemTexts(s.Elems); !slices.Contains(all, want) {
		t.Errorf("%q is not among %q", want, all)
	}
}

// A second rendering of the same is the same, and nothing is made again.
func TestCompanionRemembers(t *testing.T) {
	var r renderer
	n, err := newNumbers().assign(tableKeys(everything()))
	if err != nil {
		t.Fatal(err)
	}
	one, two := r.render(withIPVS(everything()), n), r.render(withIPVS(everything()), n)
	if steps := diff(one, two); len(steps) > 0 {
		t.Errorf("%d steps from a ruleset to itself", len(steps))
	}
	for name := range one.Chains {
		if strings.HasPrefix(name, "t") && one.Chains[name] != two.Chains[name] {
			t.Errorf("%s was made again", name)
		}
	}
	if r.render(everything(), n); r.beside.pools != nil {
		t.Error("what is not used is remembered")
	}
}

func TestCompanionObserveAfterApply(t *testing.T) {
	d := newDataplane(t)
	for _, table := range []*balancer.Table{everything(), relaying(), untracking()} {
		want := &balancer.Desired{Table: withIPVS(table)}
		converge(t, d, want)
		if p := planAfresh(t, want); !p.Empty() {
			t.Fatalf("a second look wants to change %q", p.Lines())
		}
		if list := nftList(t, "inet nlb"); !strings.Contains(list, "chain arrived") || strings.Contains(list, "slots4") {
			t.Errorf("not what stands beside IPVS:\n%s", list)
		}
	}
}

func TestCompanionDrift(t *testing.T) {
	d := newDataplane(t)
	want := &balancer.Desired{Table: withIPVS(everything())}
	converge(t, d, want)
	for _, script := range []string{
		"flush chain inet nlb chosen", "flush chain inet nlb arrived", "flush chain inet nlb postrouting",
		"flush map inet nlb destinations4", "flush map inet nlb numbered",
		"delete element inet nlb destinations6 { 2001:db8:77::10 . tcp . 80 . 2001:db8:1::12 . 8080 }",
		"add element inet nlb destinations4 { 198.51.100.10 . tcp . 80 . 10.0.1.99 . 22 : 0x0000000b }",
		"delete element inet nlb numbered { 0x00004000 }\nadd element inet nlb numbered { 0x00004000 : goto t2.avoid }",
	} {
		nft(t, script)
		if p := converge(t, d, want); p.Empty() {
			t.Errorf("%s: nothing was noticed", script)
		}
		if p := planAfresh(t, want); !p.Empty() {
			t.Errorf("%s: not mended: %q", script, p.Lines())
		}
	}
}

// Who chooses can change at any time: in one transaction, in which the table stays
// and the targets keep their numbers and counters.
func TestCompanionTakesOver(t *testing.T) {
	d := newDataplane(t)
	for _, table := range []func() *balancer.Table{everything, relaying, untracking} {
		variants := []*balancer.Desired{{Table: table()}, {Table: withIPVS(table())}}
		converge(t, d, variants[0])
		numbers := maps.Clone(d.numbers.byKey)
		for _, want := range []*balancer.Desired{variants[1], variants[0]} {
			p, err := d.Plan(t.Context(), want)
			if err != nil {
				t.Fatal(err)
			}
			for _, line := range p.Lines() {
				if line == "delete table inet nlb" || strings.HasPrefix(line, "delete counter") {
					t.Errorf("unexpected: %s", line)
				}
			}
			if err := d.Apply(t.Context(), p); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(numbers, d.numbers.byKey, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
				t.Errorf("numbers changed:\n%s", diff)
			}
			if p := planAfresh(t, want); !p.Empty() {
				t.Errorf("a second look wants to change %q", p.Lines())
			}
		}
	}
}

// A restarted daemon finds the numbers in either variant.
func TestCompanionKeepsNumbersOverRestart(t *testing.T) {
	d := newDataplane(t)
	want := &balancer.Desired{Table: withIPVS(everything())}
	want.Table.Pools = slices.Clone(want.Table.Pools)
	want.Table.Pools[0].Destinations = nil // numbers begin with another pool's
	converge(t, d, &balancer.Desired{Table: withIPVS(everything())})
	converge(t, d, want)
	fresh, err := New(zap.NewNop(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer fresh.Close()
	if p, err := fresh.Plan(t.Context(), want); err != nil || !p.Empty() {
		t.Fatalf("%v, %v", p, err)
	}
	if diff := cmp.Diff(d.numbers.byKey, fresh.numbers.byKey, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}

// BenchmarkCompanionScale is BenchmarkScale beside IPVS.
func BenchmarkCompanionScale(b *testing.B) { benchmarkScale(b, balancer.IPVS) }
