package worker

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"nlb/balancer"
)

var other = netip.MustParseAddrPort("10.0.1.12:8080")

func at(port uint16) netip.AddrPort { return netip.AddrPortFrom(vip, port) }

// choosing is a service that chooses from some pools.
func choosing(port uint16, pools ...string) balancer.VirtualService {
	s := service(at(port), pools[0])
	for _, p := range pools[1:] {
		s.Pools = append(s.Pools, balancer.WeightedPool{Pool: p, Weight: 1})
	}
	return s
}

func table(services []balancer.VirtualService, pools ...balancer.Pool) *balancer.Table {
	return &balancer.Table{Services: services, Pools: pools}
}

func TestRelayed(t *testing.T) {
	const pp, snat = balancer.ProxyProtocolV2, balancer.SNAT
	all := full()
	all.Services = []balancer.VirtualService{choosing(80, "a", "b"), choosing(81, "b", "c"), choosing(82, "a")}
	all.Pools[1].Destinations = all.Pools[0].Destinations
	got := relayed(all, nil)
	want := &balancer.Table{
		Key: all.Key, Sources: all.Sources, Services: []balancer.VirtualService{all.Services[0], all.Services[2]},
		Pools: []balancer.Pool{
			all.Pools[0], {Name: "b", ClientIP: balancer.Preserve}, {Name: "c", ClientIP: balancer.HairpinSNAT}, {Name: "d", ClientIP: balancer.SNAT},
		},
	}
	want.Pools[0].Destinations = slices.Clone(want.Pools[0].Destinations)
	want.Pools[0].Destinations[0].Domain = nil
	if d := cmp.Diff(want, got, values); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if d := cmp.Diff(full().Pools[0], all.Pools[0], values); d != "" {
		t.Errorf("the argument was changed (-want +got):\n%s", d)
	}

	tests := []struct {
		name  string
		have  *balancer.Table
		table *balancer.Table
		want  *balancer.Table
	}{
		{"nothing", nil, &balancer.Table{VIPs: []netip.Addr{vip}}, &balancer.Table{}},
		{"nothing relayed", nil, table([]balancer.VirtualService{choosing(80, "web")}, pool("web", snat, target)), &balancer.Table{}},
		{"no service, but connections", nil, table(nil, pool("web", pp, target)), table(nil, bare(pool("web", pp, target)))},
		{
			"a pool that was relayed", table(nil, pool("web", pp, target)),
			table([]balancer.VirtualService{choosing(80, "web")}, pool("web", snat, target), pool("x", snat, other)),
			table(nil, bare(pool("web", snat, target)), balancer.Pool{Name: "x", ClientIP: snat}),
		},
	}
	for _, tt := range tests {
		if d := cmp.Diff(tt.want, relayed(tt.table, tt.have), values); d != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, d)
		}
	}
}

// TestRelayedBesideIPVS: IPVS sends the relay a share of its own, of which nothing
// is the kernel's. What is only relayed is drawn as by the rules of nftables.
func TestRelayedBesideIPVS(t *testing.T) {
	const pp, snat = balancer.ProxyProtocolV2, balancer.SNAT
	target6 := netip.MustParseAddrPort("[2001:db8:1::11]:8080")
	weight := func(n int, p balancer.Pool) balancer.Pool {
		for i := range p.Destinations {
			p.Destinations[i].Weight = n
		}
		return p
	}
	// with is a pool with one more destination, of a mode and weight of its own.
	with := func(p balancer.Pool, mode balancer.ClientIP, n int, at netip.AddrPort) balancer.Pool {
		p.Destinations = append(p.Destinations, balancer.Destination{Address: at.Addr(), Port: at.Port(), Weight: n, ClientIP: mode})
		return p
	}
	shares := func(s balancer.VirtualService, weights ...int) balancer.VirtualService {
		for i, w := range weights {
			s.Pools[i].Weight = w
		}
		return s
	}
	of := func(s balancer.VirtualService, pools ...balancer.Pool) *balancer.Table {
		t := table([]balancer.VirtualService{s}, pools...)
		t.Dataplane = balancer.IPVS
		return t
	}
	none := balancer.Pool{Name: "k", ClientIP: snat}
	for _, tt := range []struct {
		name  string
		have  *balancer.Table
		table *balancer.Table
		want  *balancer.Table
	}{
		{
			name:  "pools and parts of pools",
			table: of(choosing(80, "a", "k", "p"), pool("a", pp, target), pool("k", snat, target), with(pool("p", pp, target), snat, 1, other)),
			want:  of(shares(choosing(80, "a", "k", "p"), 1000, 0, 500), pool("a", pp, target), none, with(pool("p", pp, target), snat, 0, other)),
		},
		{
			name:  "only relayed, one pool has drained",
			table: of(choosing(80, "a", "b", "c"), weight(0, pool("a", pp, target)), pool("b", pp, target), pool("c", pp, other)),
			want:  of(choosing(80, "a", "b", "c"), weight(0, pool("a", pp, target)), pool("b", pp, target), pool("c", pp, other)),
		},
		{
			name:  "only relayed for this family",
			table: of(choosing(80, "p"), with(pool("p", pp, target), snat, 1, target6)),
			want:  of(choosing(80, "p"), with(pool("p", pp, target), snat, 0, target6)),
		},
		{
			name:  "a part of each, by this family's weights",
			table: of(choosing(80, "k", "p"), pool("k", snat, target), with(with(pool("p", pp, target), snat, 1, other), snat, 2, target6)),
			want:  of(shares(choosing(80, "k", "p"), 0, 500), none, with(with(pool("p", pp, target), snat, 0, other), snat, 0, target6)),
		},
		{
			name:  "the kernel's pools, and one that has drained",
			table: of(choosing(80, "a", "k"), weight(0, pool("a", pp, target)), pool("k", snat, target)),
			want:  of(shares(choosing(80, "a", "k"), 0, 0), weight(0, pool("a", pp, target)), none),
		},
		{
			name:  "a pool that was relayed keeps its connections",
			have:  table(nil, pool("k", pp, target)),
			table: of(choosing(80, "a", "k"), pool("a", pp, target), pool("k", snat, target)),
			want:  of(shares(choosing(80, "a", "k"), 1000, 0), pool("a", pp, target), weight(0, pool("k", snat, target))),
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := fmt.Sprint(tt.table)
			want := *tt.want
			want.Dataplane = 0 // the relay does not ask
			for i, p := range want.Pools {
				want.Pools[i] = bare(p)
			}
			if d := cmp.Diff(&want, relayed(tt.table, tt.have), values, cmpopts.EquateEmpty()); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
			if after := fmt.Sprint(tt.table); after != before {
				t.Error("the argument was changed")
			}
		})
	}
}

// bare is a pool without domains.
func bare(p balancer.Pool) balancer.Pool {
	for i := range p.Destinations {
		p.Destinations[i].Domain = nil
	}
	return p
}

func TestStaged(t *testing.T) {
	const pp, snat = balancer.ProxyProtocolV2, balancer.SNAT
	weightless := func(p balancer.Pool) balancer.Pool {
		p.Destinations[0].Weight = 0
		return p
	}
	services := func(s ...balancer.VirtualService) []balancer.VirtualService { return s }
	tests := []struct {
		name             string
		have, want, mean *balancer.Table
	}{
		{
			"from nothing", &balancer.Table{},
			table(services(choosing(80, "web")), pool("web", pp, target)),
			table(services(choosing(80, "web")), pool("web", pp, target)),
		},
		{
			"a service goes, its targets drain",
			table(services(choosing(80, "web")), pool("web", pp, target)),
			table(nil, weightless(pool("web", pp, target))),
			table(services(choosing(80, "web")), pool("web", pp, target)),
		},
		{
			"a service goes, another one uses its pool",
			table(services(choosing(80, "web"), choosing(81, "web")), pool("web", pp, target)),
			table(services(choosing(80, "web")), pool("web", pp, other)),
			table(services(choosing(80, "web"), choosing(81, "web")), pool("web", pp, other)),
		},
		{
			"a service goes with its pool",
			table(services(choosing(80, "web"), choosing(81, "gone")), pool("gone", pp, other), pool("web", pp, target)),
			table(services(choosing(80, "web")), pool("web", pp, target)),
			table(services(choosing(80, "web"), choosing(81, "gone")), pool("web", pp, target), pool("gone", pp, other)),
		},
		{
			"a pool is relayed no more, its service goes",
			table(services(choosing(80, "web")), pool("web", pp, target)),
			table(nil, pool("web", snat, target)),
			table(services(choosing(80, "web")), pool("web", pp, target)),
		},
		{
			"a pool is relayed no more, its service stays",
			table(services(choosing(80, "a", "b")), pool("a", pp, target), pool("b", pp, other)),
			table(services(choosing(80, "a", "b")), pool("a", pp, target), pool("b", snat, other)),
			table(services(choosing(80, "a", "b")), pool("a", pp, target), pool("b", pp, other)),
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := fmt.Sprint(tt.have, tt.want)
			got := staged(tt.have, tt.want)
			if d := cmp.Diff(tt.mean, got, values); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
			if again := staged(got, tt.want); !reflect.DeepEqual(again, got) {
				t.Errorf("staged again: %+v", again)
			}
			if after := fmt.Sprint(tt.have, tt.want); after != before {
				t.Error("an argument was changed")
			}
		})
	}

	// The pool more would deal all slots anew.
	many := table(services(choosing(80, "p0")))
	for i := range 32 {
		many.Pools = append(many.Pools, pool(fmt.Sprintf("p%d", i), pp, target))
	}
	have := table(services(choosing(81, "gone", "p1")), pool("gone", pp, other), pool("p1", pp, target))
	got := staged(have, many)
	if len(got.Pools) != len(many.Pools) || len(got.Services) != 2 || len(got.Services[1].Pools) != 1 {
		t.Errorf("%d pools, services %+v", len(got.Pools), got.Services)
	}
}

func TestChanges(t *testing.T) {
	from := full()
	to := full()
	if got := changes(from, to); got != nil {
		t.Errorf("no change: %q", got)
	}
	to.Key[3], to.Sources = 1, nil
	s := &to.Services[0]
	s.Name, s.IdleTimeout, s.Allow, s.Sticky = "new", 60e9, nil, false
	to.Services[1].Port = 80
	p := &to.Pools[0]
	p.ClientIP, p.Sticky, p.ProxyProtocol.UniqueID = balancer.SNAT, false, false
	d := &p.Destinations[0]
	d.Weight, d.Terminate, d.Source = 0, false, netip.Addr{}
	p.Destinations[1].Port = 81
	to.Pools = to.Pools[:3]
	want := []string{
		"relay: another hash key",
		"relay: connect from []",
		"relay: listen on invalid AddrPort",
		"relay: [2001:db8::10]:65535 is named web <\"&é -> new",
		"relay: [2001:db8::10]:65535 idle timeout 5m50.000000001s -> 1m0s",
		"relay: [2001:db8::10]:65535 allow []",
		"relay: [2001:db8::10]:65535 choose by the flow from a:999 b:0",
		"relay: stop listening on invalid AddrPort",
		"relay: a 10.0.1.11:8080 weight 256 -> 0",
		"relay: a 10.0.1.11:8080 keep its connections",
		"relay: a 10.0.1.11:8080 connect from invalid IP",
		"relay: a [fe80::1%eth0]:81 add with weight 0",
		"relay: a [fe80::1%eth0]:0 remove",
		"relay: a client_ip proxy_protocol_v2 -> snat",
		"relay: a headers with unique_id false, crc32c true",
		"relay: a sticky true -> false",
		"relay: target groups 4 -> 3",
	}
	got := changes(from, to)
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}
