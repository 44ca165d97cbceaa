package main

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"nlb/balancer/conntrack"
	"nlb/balancer/doctor"
)

func TestSumFlows(t *testing.T) {
	const seenReply = 1 << 1
	flow := func(protocol conntrack.Protocol, client, target, source string, status conntrack.Status) conntrack.Flow {
		return conntrack.Flow{
			Protocol: protocol, Status: status,
			Original: conntrack.Direction{Src: netip.MustParseAddrPort(client), Dst: netip.MustParseAddrPort("198.51.100.10:80")},
			Reply:    conntrack.Direction{Src: netip.MustParseAddrPort(target), Dst: netip.MustParseAddrPort(source)},
		}
	}
	preserved := func(client, target string, status conntrack.Status) conntrack.Flow {
		return flow(conntrack.TCP, client, target, client, status)
	}
	got := sumFlows([]conntrack.Flow{
		preserved("203.0.113.2:1", "10.0.1.11:80", 0),
		preserved("203.0.113.1:1", "10.0.1.11:80", 0),
		preserved("203.0.113.1:2", "10.0.1.11:81", seenReply),
		preserved("203.0.113.1:3", "10.0.1.11:80", 0),
		flow(conntrack.UDP, "203.0.113.1:1", "10.0.1.12:53", "203.0.113.1:1", 0),
		flow(conntrack.TCP, "203.0.113.1:1", "10.0.1.12:80", "10.0.1.2:1", 0),
	})
	want := []doctor.FlowSum{
		{Client: netip.MustParseAddr("203.0.113.1"), Target: netip.MustParseAddr("10.0.1.11"), Answered: 1, Unanswered: 2},
		{Client: netip.MustParseAddr("203.0.113.2"), Target: netip.MustParseAddr("10.0.1.11"), Unanswered: 1},
	}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}
