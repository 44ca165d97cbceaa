package balancer

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// relayedTable has services of relayed pools, of others, and of both.
func relayedTable() *Table {
	tcp := []uint8{ProtoTCP}
	to := func(a string, port uint16) Destination {
		return Destination{Address: addr(a), Port: port, Weight: 1, Source: addr("10.0.1.1")}
	}
	kernel := to("10.0.1.14", 8080)
	kernel.ClientIP = SNAT
	quiet := to("10.0.1.15", 8080)
	quiet.Weight = 0
	six := to("2001:db8:1::11", 8080)
	six.Source = addr("2001:db8:1::1")
	t := &Table{
		UntrackedRelay: true,
		Pools: []Pool{
			{Name: "kernel", Protocols: tcp, ClientIP: Preserve, Destinations: []Destination{to("10.0.1.12", 8080), to("10.0.1.12", 9090)}},
			{Name: "none", Protocols: tcp, ClientIP: Preserve},
			{Name: "partly", Protocols: tcp, ClientIP: ProxyProtocolV2, Destinations: []Destination{to("10.0.1.13", 8080), kernel}},
			{Name: "quiet", Protocols: tcp, ClientIP: ProxyProtocolV2, Destinations: []Destination{quiet}},
			{Name: "relay", Protocols: tcp, ClientIP: ProxyProtocolV2, Destinations: []Destination{to("10.0.1.11", 8080), to("10.0.1.12", 8080), six}},
			{Name: "udp", Protocols: []uint8{ProtoUDP}, ClientIP: SNAT, Destinations: []Destination{to("10.0.1.11", 8080)}},
		},
	}
	service := func(name string, pools ...WeightedPool) {
		t.Services = append(t.Services, VirtualService{Name: name, Address: addr("198.51.100.10"), Port: uint16(80 + len(t.Services)), Protocols: tcp, Pools: pools})
	}
	service("all", WeightedPool{"relay", 1}, WeightedPool{"quiet", 1}, WeightedPool{"kernel", 0})
	service("mixed", WeightedPool{"relay", 1}, WeightedPool{"kernel", 1})
	service("partly", WeightedPool{"partly", 1})
	service("quiet", WeightedPool{"quiet", 1})
	service("none", WeightedPool{"none", 1})
	service("kernel", WeightedPool{"kernel", 1})
	return t
}

func TestRelayedOnly(t *testing.T) {
	var names []string
	table := relayedTable()
	only := table.RelayedOnly()
	for _, s := range only.Services {
		names = append(names, s.Name)
	}
	if diff := cmp.Diff([]string{"all", "quiet"}, names); diff != "" {
		t.Errorf("services (-want +got):\n%s", diff)
	}
	at := netip.MustParseAddrPort
	same := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	want := []netip.AddrPort{at("10.0.1.11:8080"), at("10.0.1.13:8080"), at("10.0.1.15:8080"), at("[2001:db8:1::11]:8080")}
	if diff := cmp.Diff(want, only.Destinations, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("destinations (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]netip.Addr{addr("10.0.1.1"), addr("2001:db8:1::1")}, only.Sources, same); diff != "" {
		t.Errorf("sources (-want +got):\n%s", diff)
	}
	table.Sources = []netip.Addr{addr("10.0.1.2")}
	if diff := cmp.Diff([]netip.Addr{addr("10.0.1.2"), addr("2001:db8:1::1")}, table.RelayedOnly().Sources, same); diff != "" {
		t.Errorf("sources, one family is configured (-want +got):\n%s", diff)
	}
}

// Entries of what is not tracked are left from another time.
func TestStaleEntriesOfRelayed(t *testing.T) {
	at := netip.MustParseAddrPort
	flow := func(proto uint8, from, to, target string) Flow {
		return Flow{Protocol: proto, Client: at(from), VIP: at(to), Source: at(from), Target: at(target)}
	}
	const client, source = "203.0.113.9:40112", "10.0.1.1:40112"
	relayed := flow(ProtoTCP, client, "198.51.100.10:80", "198.51.100.10:80")
	relayed.Ours = true
	mixed := flow(ProtoTCP, client, "198.51.100.10:81", "198.51.100.10:81")
	mixed.Ours = true
	former := flow(ProtoTCP, client, "198.51.100.10:80", "10.0.1.12:8080")
	former.Ours = true
	for _, c := range []struct {
		name string
		flow Flow
		want bool
	}{
		{"a client's", relayed, true},
		{"of a mixed service", mixed, false},
		{"of a kernel mode in former times", former, false},
		{"the relay's", flow(ProtoTCP, source, "10.0.1.11:8080", "10.0.1.11:8080"), true},
		{"to a target of both", flow(ProtoTCP, source, "10.0.1.12:8080", "10.0.1.12:8080"), false},
		{"past the balancer", flow(ProtoTCP, client, "10.0.1.11:8080", "10.0.1.11:8080"), false},
		{"UDP", flow(ProtoUDP, source, "10.0.1.11:8080", "10.0.1.11:8080"), false},
	} {
		for _, untracked := range []bool{true, false} {
			j := newStaleness(&Desired{Table: relayedTable()}, nil, untracked)
			if got := j.stale(c.flow); got != (c.want && untracked) {
				t.Errorf("%s, untracked %v: stale %v", c.name, untracked, got)
			}
		}
	}
}
