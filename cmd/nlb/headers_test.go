package main

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nlb/balancer"
)

func TestHeaderChangesAreNoted(t *testing.T) {
	one, two := netip.MustParseAddr("10.0.1.11"), netip.MustParseAddr("10.0.1.12")
	group := func(mode balancer.ClientIP, own ...balancer.ClientIP) *balancer.Spec {
		g := balancer.TargetGroup{Name: "web", ClientIP: mode}
		for i, address := range []netip.Addr{one, two}[:len(own)] {
			g.Targets = append(g.Targets, balancer.Target{Address: address, Port: 8080, ClientIP: own[i]})
		}
		return &balancer.Spec{TargetGroups: []balancer.TargetGroup{g}}
	}
	const (
		begin = " begin to get PROXY v2 headers, and must read them from then on"
		cease = " get no PROXY v2 headers any more, and must not expect them from then on"
		asks  = "; nlb verify web asks them, and client_ip of a target of its own changes them one by one\n"
	)
	for _, c := range []struct {
		name            string
		inForce, wanted *balancer.Spec
		want            string
	}{
		{"nothing is in force", nil, group(balancer.ProxyProtocolV2, 0), ""},
		{"the mode stays", group(balancer.ProxyProtocolV2, 0), group(balancer.ProxyProtocolV2, 0), ""},
		{"a target is new", group(balancer.ProxyProtocolV2, 0), group(balancer.ProxyProtocolV2, 0, 0), ""},
		{"between kernel modes", group(balancer.SNAT, 0), group(balancer.Preserve, 0), ""},
		{"to headers", group(balancer.SNAT, 0, 0), group(balancer.ProxyProtocolV2, 0, 0), "# note: target group web: 2 targets" + begin + asks},
		{"from headers", group(balancer.ProxyProtocolV2, 0), group(balancer.Preserve, 0), "# note: target group web: 1 target" + cease + asks},
		{"one by one", group(balancer.SNAT, 0, balancer.ProxyProtocolV2), group(balancer.ProxyProtocolV2, 0, balancer.SNAT),
			"# note: target group web: 1 target" + begin + asks + "# note: target group web: 1 target" + cease + asks},
		{"the group follows its targets", group(balancer.SNAT, balancer.ProxyProtocolV2), group(balancer.ProxyProtocolV2, 0), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var b bytes.Buffer
			if err := printHeaderChanges(&b, c.inForce, c.wanted); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, b.String()); diff != "" {
				t.Error(diff)
			}
		})
	}
}
