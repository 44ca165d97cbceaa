package relay

import (
	"net/netip"
	"testing"

	"nlb/balancer"
	"nlb/balancer/explain"
)

// What is foretold of a relayed connection is what the relay does.
func TestExplainAgreesWithRelay(t *testing.T) {
	for _, sticky := range []bool{false, true} {
		table := twoPools(balancer.ProxyProtocolV2, sticky)
		// One pool is relayed in part, and one has a family that takes nothing.
		for i := range table.Pools[0].Destinations {
			if i%3 == 0 {
				table.Pools[0].Destinations[i].ClientIP = balancer.SNAT
			}
		}
		for i := range table.Pools[1].Destinations {
			if d := &table.Pools[1].Destinations[i]; d.Address.Is6() {
				d.Weight = 0
			}
		}
		p, err := compile(table, nil, 1)
		if err != nil {
			t.Fatal(err)
		}
		e := explain.New(nil, table)
		relayed := make(map[balancer.TargetKey]int)
		for _, s := range p.services {
			client := client4
			if s.vip.Addr().Is6() {
				client = client6
			}
			for i := range 10_000 {
				from := netip.AddrPortFrom(nth(client, i%250), uint16(1024+i))
				a := e.Explain(explain.Question{Protocol: balancer.ProtoTCP, Client: from, Destination: s.vip})
				if a.ClientIP != balancer.ProxyProtocolV2.String() || a.Verdict != explain.Forward {
					continue // the kernel's
				}
				in, hash := s.choose(from)
				got := in.family(s.vip.Addr()).next(hash, nil).target.key
				if got.Group != a.TargetGroup || got.AddrPort != a.Target.AddrPort() {
					t.Fatalf("%v went to %v, and not to %s %v", from, got, a.TargetGroup, a.Target)
				}
				relayed[got]++
			}
		}
		if len(relayed) < 3 {
			t.Errorf("sticky %v: only %v got connections", sticky, relayed)
		}
	}
}

// nth is the address that comes n after a.
func nth(a netip.Addr, n int) netip.Addr {
	for range n {
		a = a.Next()
	}
	return a
}
