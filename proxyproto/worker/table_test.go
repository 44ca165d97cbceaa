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

	// IPVS sends the relay a share of its own, of which nothing is the kernel's.
	some := pool("d", pp, target, other)
	some.Destinations[1].ClientIP = balancer.Preserve
	mixed := table([]balancer.VirtualService{choosing(80, "a", "b", "d")}, pool("a", pp, target), pool("b", snat, target), some)
	mixed.Dataplane = balancer.IPVS
	got = relayed(mixed, nil)
	some.Destinations = some.Destinations[:1]
	some.Destinations[0].Domain = nil
	first := pool("a", pp, target)
	first.Destinations[0].Domain = nil
	want = table([]balancer.VirtualService{choosing(80, "a", "b", "d")}, first, balancer.Pool{Name: "b", ClientIP: snat}, some)
	want.Services[0].Pools = []balancer.WeightedPool{{Pool: "a", Weight: 1000}, {Pool: "b"}, {Pool: "d", Weight: 500}}
	if d := cmp.Diff(want, got, values, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("with IPVS (-want +got):\n%s", d)
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
