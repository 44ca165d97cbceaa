package balancer

import (
	"net/netip"
	"testing"
	"time"
)

func TestStaleFlows(t *testing.T) {
	now := time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)
	at := netip.MustParseAddrPort
	spec := webSpec(4)
	spec.Listeners[0].Protocol = TCPUDP
	g := &spec.TargetGroups[0]
	g.Protocol = TCPUDP
	g.Unhealthy.ConnectionTermination = true
	g.DeregistrationDelay.Timeout = time.Minute
	removed := newDrain(g, now)
	removed.Removed, removed.Target = true, Target{Address: addr("10.0.1.99"), Port: 8080, Weight: 1}
	seen := View{
		Now: now.Add(time.Hour), // long after every Since
		Health: HealthView{
			webKey("10.0.1.11"): healthy(now), webKey("10.0.1.12"): unhealthy(now), webKey("10.0.1.13"): healthy(now),
			webKey("10.0.1.14"): healthy(now),
		},
		Drains: Drains{
			webKey("10.0.1.13"): {Since: now, Until: now.Add(2 * time.Hour)},
			webKey("10.0.1.99"): Drain{Since: now, Until: now.Add(2 * time.Hour), Removed: true, Target: removed.Target, Protocol: TCPUDP},
		},
	}
	vip := netip.AddrPortFrom(spec.Listeners[0].VIP, spec.Listeners[0].Port)
	vips := map[netip.Addr]bool{vip.Addr(): true}
	j := newStaleness(Forward(spec, seen), vips, false)
	client := at("203.0.113.9:40112")
	to := func(proto uint8, target string) Flow {
		key := webKey(target)
		return Flow{Protocol: proto, Client: client, VIP: vip, Source: client, Target: key.AddrPort, To: key, Ours: true}
	}
	past := Flow{Protocol: ProtoUDP, Client: client, VIP: vip, Source: client, Target: vip}
	elsewhere := to(ProtoUDP, "10.0.1.11")
	elsewhere.Target = at("10.0.1.77:8080")
	otherPort := to(ProtoUDP, "10.0.1.11")
	otherPort.VIP = netip.AddrPortFrom(vip.Addr(), vip.Port()+1)
	foreign := to(ProtoUDP, "10.0.1.11")
	foreign.VIP, foreign.To = at("192.0.2.1:53"), TargetKey{}
	pastTCP := past
	pastTCP.Protocol = ProtoTCP
	strangers := past
	strangers.VIP, strangers.Target = at("192.0.2.1:53"), at("192.0.2.1:53")
	virtual := to(ProtoUDP, "10.0.1.11")
	virtual.By = IPVS
	virtualTCP := to(ProtoTCP, "10.0.1.11")
	virtualTCP.By = IPVS
	left := to(ProtoUDP, "10.0.1.55")
	left.To = TargetKey{}
	for _, c := range []struct {
		name string
		flow Flow
		want bool
	}{
		{"healthy", to(ProtoUDP, "10.0.1.11"), false},
		{"unhealthy", to(ProtoUDP, "10.0.1.12"), true},
		{"unhealthy, TCP", to(ProtoTCP, "10.0.1.12"), false},
		{"drained by command", to(ProtoUDP, "10.0.1.13"), false},
		{"removed from the file", to(ProtoUDP, "10.0.1.99"), true},
		{"removed from the file, TCP", to(ProtoTCP, "10.0.1.99"), false},
		{"target left long ago", left, true},
		{"of IPVS", virtual, true},
		{"of IPVS, TCP", virtualTCP, false},
		{"number of another", elsewhere, true},
		{"listener gone", otherPort, true},
		{"before the listener", past, true},
		{"before the listener, TCP", pastTCP, true},
		{"somebody else's mark", foreign, false},
		{"somebody else's flow", strangers, false},
	} {
		if got := j.stale(c.flow); got != c.want {
			t.Errorf("%s: stale %v", c.name, got)
		}
	}
}
