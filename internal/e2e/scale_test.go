package e2e

import (
	"net/netip"
	"testing"

	"nlb/bench/lab"
)

// crowd is so many targets that nobody is, and that are probed rarely.
func crowd(n int) group {
	g := pool("crowd", "TCP", "preserve", targetPort, nil)
	g.HealthCheck = map[string]any{"interval": "300s"}
	for i := range n {
		g.Targets = append(g.Targets, target{Address: netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)})})
	}
	return g
}

// A group of hundreds of targets has a table of 65,536 slots. It is loaded,
// changed and removed while others connect, who notice nothing of it.
func TestLargeTableBlocksNobody(t *testing.T) {
	top, d := served(t, lab.Options{Targets: 2}, 2)
	must(t, top.LB, "ip", "route", "add", "unreachable", "10.9.0.0/16")
	p := press(t, top)
	small := twoServices(top, top.Targets...)
	for _, n := range []int{500, 499, 500, 0} {
		c := twoServices(top, top.Targets...)
		if n > 0 {
			c.Groups = append(c.Groups, crowd(n))
			c.Listeners = append(c.Listeners, listener{Name: "crowd", VIP: lab.VIP4.String(), Protocol: "TCP", Port: extraPort, Forward: to("crowd")})
		}
		if err := d.reload(c.String()); err != nil {
			t.Fatalf("%d targets: %v", n, err)
		}
		t.Logf("%d targets more: the pass took %.0f ms", n, 1000*d.status().Apply.TookSeconds)
	}
	for _, c := range p.fresh {
		t.Logf("new connections: %v", p.load(c))
	}
	t.Logf("%d new connections", p.end())
	if err := d.reload(small.String()); err != nil {
		t.Error(err)
	}
}
