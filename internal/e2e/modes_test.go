package e2e

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nlb/bench/lab"
)

// TestModes is what a target sees of an outside client, for each way of the
// client's address, protocol and family.
func TestModes(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{})
	serveTargets(t, top, 8080)
	modes := []struct {
		name string
		sees func(family) netip.Addr
	}{
		{"preserve", func(f family) netip.Addr { return f.addr(top.Clients[0]) }},
		{"hairpin_snat", func(f family) netip.Addr { return f.addr(top.Clients[0]) }},
		{"snat", func(f family) netip.Addr { return f.addr(top.LB) }},
	}
	// Port 81 and so on: TCP and UDP by listeners of their own. 91 and so on: by one.
	c := config{Sources: sources(top), VIPs: both()}
	for i, m := range modes {
		n := fmt.Sprint(i)
		c.Listeners = append(c.Listeners, listen("t"+n, "TCP", uint16(81+i), "t"+n)...)
		c.Listeners = append(c.Listeners, listen("u"+n, "UDP", uint16(81+i), "u"+n)...)
		c.Listeners = append(c.Listeners, listen("b"+n, "TCP_UDP", uint16(91+i), "b"+n)...)
		for name, protocol := range map[string]string{"t": "TCP", "u": "UDP", "b": "TCP_UDP"} {
			c.Groups = append(c.Groups, pool(name+n, protocol, m.name, 8080, targets(top.Targets...)))
		}
	}
	d := start(t, top, c.String())
	d.waitAllHealthy()

	const flows = 20
	for i, m := range modes {
		for _, f := range families {
			for _, network := range []string{"tcp", "udp"} {
				for _, port := range []uint16{81, 91} {
					dst := f.at(port + uint16(i))
					t.Run(fmt.Sprint(m.name, "/", network, "/", dst), func(t *testing.T) {
						got := call(t, top.Clients[0], lab.Call{Network: network, Dst: dst, N: flows})
						want := map[string]int{m.sees(f).String(): flows}
						if diff := cmp.Diff(want, got.ByPeer); diff != "" {
							t.Errorf("the peers that targets saw (-want +got):\n%s%v", diff, got)
						}
						if len(got.ByWho) != len(top.Targets) {
							t.Errorf("not every target was asked: %v", got)
						}
					})
				}
			}
		}
	}
}
