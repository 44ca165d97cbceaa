package e2e

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"

	"nlb/bench/lab"
)

// TestFragments sends datagrams that take several packets, of which only the
// first one has ports, in both directions.
func TestFragments(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 1})
	serveTargets(t, top, 8080)
	client, target := top.Clients[0], top.Targets[0]
	modes := []string{"preserve", "hairpin_snat", "snat"}
	c := config{Sources: sources(top), VIPs: both()}
	for i, mode := range modes {
		g := pool(fmt.Sprint("g", i), "UDP", mode, 9000, targets(target))
		g.HealthCheck["port"] = 8080
		c.Groups = append(c.Groups, g)
		c.Listeners = append(c.Listeners, listen(g.Name, "UDP", uint16(81+i), g.Name)...)
	}
	serving(t, top, c)
	const size = 5000
	sent := bytes.Repeat([]byte("fragment"), size/8)
	for _, f := range families {
		there := bindUDP(t, target, netip.AddrPortFrom(f.addr(target), 9000), mayFragment)
		for i, mode := range modes {
			here := bindUDP(t, client, netip.AddrPortFrom(f.addr(client), 0), mayFragment)
			dst := f.at(uint16(81 + i))
			peer := deliver(t, fmt.Sprint(mode, f.name, ", question"), here, there, dst, sent)
			if source := deliver(t, fmt.Sprint(mode, f.name, ", answer"), there, here, peer, sent); source != dst {
				t.Errorf("%s%s: the answer comes from %v, want %v", mode, f.name, source, dst)
			}
		}
	}
}
