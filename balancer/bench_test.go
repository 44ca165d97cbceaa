package balancer

import (
	"fmt"
	"net/netip"
	"testing"
)

// BenchmarkForward has 1,000 listeners, each with a group of 10 targets.
func BenchmarkForward(b *testing.B) {
	spec := &Spec{}
	routes := make(map[netip.Addr]Route)
	for i := range 1000 {
		one := webSpec(10)
		name := fmt.Sprintf("web-%d", i)
		l, g := one.Listeners[0], one.TargetGroups[0]
		l.Name, l.Port, l.Forward = name, uint16(i+1), []WeightedGroup{{TargetGroup: name, Weight: 1}}
		g.Name = name
		spec.VIPs = one.VIPs
		spec.Listeners = append(spec.Listeners, l)
		spec.TargetGroups = append(spec.TargetGroups, g)
		for _, t := range g.Targets {
			routes[t.Address] = Route{Source: addr("10.0.1.1"), Interface: "eth1"}
		}
	}
	for b.Loop() {
		Forward(spec, View{Routes: routes})
	}
}
