package explain_test

import (
	"fmt"
	"math"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nlb/balancer"
	"nlb/balancer/explain"
)

func dest(a string, port uint16, weight int, domain ...string) balancer.Destination {
	ip := addr(a)
	return balancer.Destination{
		Address: ip, Port: port, Weight: weight,
		Domain: append([]netip.Prefix{netip.PrefixFrom(ip, ip.BitLen())}, prefixes(domain...)...),
	}
}

// everything is a table with a listener for each way that a flow may go.
func everything() *balancer.Table {
	both, tcp := []uint8{balancer.ProtoTCP, balancer.ProtoUDP}, []uint8{balancer.ProtoTCP}
	t := &balancer.Table{
		Key:     balancer.HashKey{1, 2, 3},
		VIPs:    []netip.Addr{addr("198.51.100.10"), addr("2001:db8:77::10")},
		Sources: []netip.Addr{addr("10.0.0.2"), addr("10.0.0.3")},
	}
	add := func(port uint16, protocols []uint8, p balancer.Pool) {
		p.Name = fmt.Sprint("p", port)
		t.Pools = append(t.Pools, p)
		for i, a := range t.VIPs {
			t.Services = append(t.Services, balancer.VirtualService{
				Name: fmt.Sprint("l", port, "-", []int{4, 6}[i]), Address: a, Protocols: protocols, Port: port,
				Allow: prefixes("0.0.0.0/0", "::/0"), Pools: []balancer.WeightedPool{{Pool: p.Name, Weight: 1}},
			})
		}
	}
	one := []balancer.Destination{dest("10.0.1.11", 8080, 1, "10.244.1.0/24")}
	two := []balancer.Destination{dest("10.0.1.11", 8080, 1), dest("10.0.1.12", 8080, 3)}
	six := dest("2001:db8:1::11", 8080, 1)
	six.Source = addr("2001:db8:1::1")
	add(1, tcp, balancer.Pool{ClientIP: balancer.Preserve, Destinations: one})
	add(2, both, balancer.Pool{ClientIP: balancer.HairpinSNAT, Destinations: one})
	add(3, tcp, balancer.Pool{ClientIP: balancer.SNAT, Sticky: true, Destinations: append([]balancer.Destination{six}, two...)})
	add(4, tcp, balancer.Pool{ClientIP: balancer.ProxyProtocolV2, Destinations: one})
	add(5, tcp, balancer.Pool{ClientIP: balancer.Preserve, AvoidSelf: true, Destinations: two})
	add(6, tcp, balancer.Pool{ClientIP: balancer.Preserve, AvoidSelf: true, Destinations: one})
	add(7, tcp, balancer.Pool{ClientIP: balancer.Preserve})
	add(8, tcp, balancer.Pool{ClientIP: balancer.Preserve, Destinations: two})
	t.Services[0].Allow = prefixes("203.0.113.0/24", "10.0.0.0/8", "198.51.100.10/32")
	return t
}

// words are an outcome in one line.
func words(o explain.Outcome) string {
	w := []string{string(o.Verdict)}
	add := func(format string, args ...any) { w = append(w, fmt.Sprintf(format, args...)) }
	if o.Reason != "" {
		add("(%s)", o.Reason)
	}
	if o.Listener != "" {
		add("%s", o.Listener)
	}
	if o.Target != nil {
		add("%s %s", o.ClientIP, o.Target.AddrPort())
	}
	if o.Hairpin {
		add("hairpin by %s", o.HairpinKind)
	}
	if o.Avoided != nil {
		add("not %s", o.Avoided.AddrPort())
	}
	if o.TargetSees != "" {
		add("sees %s", o.TargetSees)
	}
	if len(o.TargetSeesOneOf) > 0 {
		add("sees one of %v", o.TargetSeesOneOf)
	}
	if o.HeaderClient != "" {
		add("told of %s", o.HeaderClient)
	}
	for _, r := range o.Rewrites {
		add("| %s %s > %s", r.By, r.SourceAfter, r.DestinationAfter)
	}
	return strings.Join(w, " ")
}

func ask(e *explain.Explainer, protocol uint8, client, to string) explain.Answer {
	q := explain.Question{Protocol: protocol, Destination: netip.MustParseAddrPort(to)}
	if a, err := netip.ParseAddr(client); err == nil {
		q.Client = netip.AddrPortFrom(a, 0)
	} else {
		q.Client = netip.MustParseAddrPort(client)
	}
	return e.Explain(q)
}

// TestExplainTellsOfProtection: a listener's SYN proxy is of TCP alone, and its limit of
// all who count as one client.
func TestExplainTellsOfProtection(t *testing.T) {
	table := everything()
	for i := range table.Services {
		if table.Services[i].Port == 2 {
			table.Services[i].SYNProxy = balancer.SYNProxy{MSS: 1460}
			table.Services[i].SourceLimit = balancer.SourceLimit{Flows: 7, Prefix: 24}
		}
	}
	e := explain.New(nil, table)
	for _, c := range []struct {
		protocol uint8
		to       string
		proxy    bool
		limit    *explain.Limit
	}{
		{balancer.ProtoTCP, "198.51.100.10:2", true, &explain.Limit{Flows: 7, Client: prefixes("203.0.113.0/24")[0]}},
		{balancer.ProtoUDP, "198.51.100.10:2", false, &explain.Limit{Flows: 7, Client: prefixes("203.0.113.0/24")[0]}},
		{balancer.ProtoTCP, "198.51.100.10:1", false, nil},
	} {
		o := ask(e, c.protocol, "203.0.113.9:4000", c.to).Outcome
		if diff := cmp.Diff(c.limit, o.Limit, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" || o.SYNProxy != c.proxy {
			t.Errorf("protocol %d to %s: SYN proxy %v, limit (-want +got):\n%s", c.protocol, c.to, o.SYNProxy, diff)
		}
	}
}

func TestExplain(t *testing.T) {
	e := explain.New(nil, everything())
	for _, c := range []struct {
		name, client, to, want string
	}{
		{"no VIP", "203.0.113.9:4000", "10.0.1.11:8080", "none"},
		{"no listener", "203.0.113.9:4000", "198.51.100.10:22", "drop (no listener)"},
		{"not allowed", "192.0.2.1:4000", "198.51.100.10:1", "drop (source not allowed) l1-4"},
		{"preserve", "203.0.113.9:4000", "198.51.100.10:1",
			"forward l1-4 preserve 10.0.1.11:8080 sees 203.0.113.9 | dnat 203.0.113.9:4000 > 10.0.1.11:8080"},
		{"preserve, to itself", "10.0.1.11:4000", "198.51.100.10:1", "drop (hairpin) l1-4 preserve 10.0.1.11:8080 hairpin by self"},
		{"preserve, from the same host", "10.244.1.7:4000", "198.51.100.10:1", "drop (hairpin) l1-4 preserve 10.0.1.11:8080 hairpin by colocated"},
		{"from a VIP of this host", "198.51.100.10:4000", "198.51.100.10:1",
			"forward l1-4 preserve 10.0.1.11:8080 sees 10.0.0.2 | dnat 198.51.100.10:4000 > 10.0.1.11:8080 | snat 10.0.0.2:4000 > 10.0.1.11:8080"},
		{"hairpin_snat", "10.0.1.11:4001", "198.51.100.10:2",
			"forward l2-4 hairpin_snat 10.0.1.11:8080 hairpin by self sees 10.0.0.3 | dnat 10.0.1.11:4001 > 10.0.1.11:8080 | snat 10.0.0.3:4001 > 10.0.1.11:8080"},
		{"a source of the target's own", "[2001:db8:99::9]:4000", "[2001:db8:77::10]:3",
			"forward l3-6 snat [2001:db8:1::11]:8080 sees 2001:db8:1::1 | dnat [2001:db8:99::9]:4000 > [2001:db8:1::11]:8080 | snat [2001:db8:1::1]:4000 > [2001:db8:1::11]:8080"},
		{"sticky, whatever the port", "203.0.113.9", "198.51.100.10:3",
			"forward l3-4 snat 10.0.1.11:8080 sees one of [10.0.0.2 10.0.0.3] | dnat 203.0.113.9:0 > 10.0.1.11:8080 | snat invalid AddrPort > 10.0.1.11:8080"},
		{"relayed", "203.0.113.9:4000", "198.51.100.10:4",
			"forward l4-4 proxy_protocol_v2 10.0.1.11:8080 sees one of [10.0.0.2 10.0.0.3] told of 203.0.113.9:4000 | relay invalid AddrPort > 10.0.1.11:8080"},
		{"relayed to the other family", "[2001:db8:99::9]:4000", "[2001:db8:77::10]:4",
			"forward l4-6 proxy_protocol_v2 10.0.1.11:8080 sees one of [10.0.0.2 10.0.0.3] told of [2001:db8:99::9]:4000 | relay invalid AddrPort > 10.0.1.11:8080"},
		{"relayed, from a VIP of this host", "198.51.100.10:4000", "198.51.100.10:4",
			"forward l4-4 proxy_protocol_v2 10.0.1.11:8080 sees one of [10.0.0.2 10.0.0.3] told of 10.0.0.2:4000 | snat 10.0.0.2:4000 > 198.51.100.10:4 | relay invalid AddrPort > 10.0.1.11:8080"},
		{"relayed, from a VIP of this host without a source", "[2001:db8:77::10]:4000", "[2001:db8:77::10]:4",
			"drop (no source address) l4-6"},
		{"avoid_self", "10.0.1.12:4000", "198.51.100.10:5",
			"forward l5-4 preserve 10.0.1.11:8080 not 10.0.1.12:8080 sees 10.0.1.12 | dnat 10.0.1.12:4000 > 10.0.1.11:8080"},
		{"avoid_self, and nobody else", "10.0.1.11:4001", "198.51.100.10:6",
			"forward l6-4 preserve 10.0.1.11:8080 hairpin by self sees 10.0.0.3 | dnat 10.0.1.11:4001 > 10.0.1.11:8080 | snat 10.0.0.3:4001 > 10.0.1.11:8080"},
		{"no target", "203.0.113.9:4000", "198.51.100.10:7", "drop (no target) l7-4"},
		{"no target of the family", "[2001:db8:99::9]:4000", "[2001:db8:77::10]:8", "drop (no target) l8-6"},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := ask(e, balancer.ProtoTCP, c.client, c.to)
			if got := words(a.Outcome); got != c.want || a.DependsOn != "" {
				t.Errorf("%s, which depends on %q\nwant %s", got, a.DependsOn, c.want)
			}
		})
	}
}

// Without a port the answer has all outcomes, each with its part of the ports.
func TestExplainAnyPort(t *testing.T) {
	e := explain.New(nil, everything())
	a := ask(e, balancer.ProtoTCP, "203.0.113.9", "198.51.100.10:8")
	if a.DependsOn != explain.DependsOnPort || len(a.Possible) != 2 {
		t.Fatalf("%+v", a)
	}
	var got []string
	for i, p := range a.Possible {
		got = append(got, words(p.Outcome))
		if want := []float64{0.75, 0.25}[i]; math.Abs(p.Share-want) > 0.02 {
			t.Errorf("%s has %v, want about %v", got[i], p.Share, want)
		}
	}
	want := []string{
		"forward l8-4 preserve 10.0.1.12:8080 sees 203.0.113.9 | dnat 203.0.113.9:0 > 10.0.1.12:8080",
		"forward l8-4 preserve 10.0.1.11:8080 sees 203.0.113.9 | dnat 203.0.113.9:0 > 10.0.1.11:8080",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// IPVS has a hash of its own: what it may choose is told, with the weights' parts.
func TestExplainIPVS(t *testing.T) {
	table := everything()
	table.Dataplane = balancer.IPVS
	e := explain.New(nil, table)
	a := ask(e, balancer.ProtoTCP, "10.0.1.11:4000", "198.51.100.10:8")
	var got []string
	for _, p := range a.Possible {
		got = append(got, fmt.Sprintf("%.2f %s", p.Share, words(p.Outcome)))
	}
	want := []string{
		"0.75 forward l8-4 preserve 10.0.1.12:8080 sees 10.0.1.11 | dnat 10.0.1.11:4000 > 10.0.1.12:8080",
		"0.25 drop (hairpin) l8-4 preserve 10.0.1.11:8080 hairpin by self",
	}
	if diff := cmp.Diff(want, got); diff != "" || a.DependsOn != explain.DependsOnIPVS {
		t.Errorf("depends on %q (-want +got):\n%s", a.DependsOn, diff)
	}
	for to, want := range map[string]string{
		"198.51.100.10:1": "forward l1-4 preserve 10.0.1.11:8080 sees 203.0.113.9 | dnat 203.0.113.9:4000 > 10.0.1.11:8080",
		"198.51.100.10:4": "forward l4-4 proxy_protocol_v2 10.0.1.11:8080 sees one of [10.0.0.2 10.0.0.3] told of 203.0.113.9:4000 | relay invalid AddrPort > 10.0.1.11:8080",
		"198.51.100.10:7": "drop (no target) l7-4",
	} {
		if got := words(ask(e, balancer.ProtoTCP, "203.0.113.9:4000", to).Outcome); got != want {
			t.Errorf("%s\nwant %s", got, want)
		}
	}
}

// A neighbour in the target's subnet is told from what shares its host.
func TestHairpinKinds(t *testing.T) {
	table := everything()
	table.Pools[1].Destinations[0].Domain = prefixes("10.0.1.0/24", "10.244.1.0/24")
	spec := &balancer.Spec{TargetGroups: []balancer.TargetGroup{{Name: "p2", Targets: []balancer.Target{
		{Address: addr("10.0.1.11"), Port: 8080, Colocated: prefixes("10.244.1.0/24")},
	}}}}
	e := explain.New(spec, table)
	for client, want := range map[string]string{
		"10.0.1.11": explain.Self, "10.244.1.3": explain.Colocated, "10.0.1.77": explain.Subnet, "203.0.113.9": "",
	} {
		if got := ask(e, balancer.ProtoUDP, client+":4000", "198.51.100.10:2").HairpinKind; got != want {
			t.Errorf("%s: %q, want %q", client, got, want)
		}
	}
}

// A chain that certainly ends the flow is the answer; others are only named.
func TestMeets(t *testing.T) {
	fw := explain.Foreign{Where: "inet fw c (forward, handle 2)", Does: "drop", Ends: true}
	for _, c := range []struct {
		certain bool
		want    string
	}{
		{false, "forward l1-4 preserve 10.0.1.11:8080 sees 203.0.113.9 | dnat 203.0.113.9:4000 > 10.0.1.11:8080"},
		{true, "drop (foreign chain: inet fw c (forward, handle 2)) l1-4 preserve 10.0.1.11:8080"},
	} {
		a := ask(explain.New(nil, everything()), balancer.ProtoTCP, "203.0.113.9:4000", "198.51.100.10:1")
		fw.Certain = c.certain
		a.Meets([]explain.Foreign{fw})
		if got := words(a.Outcome); got != c.want || len(a.Foreign) != 1 {
			t.Errorf("certain %v: %s\nwant %s", c.certain, got, c.want)
		}
	}
}
