package e2e

import (
	"errors"
	"fmt"
	"testing"

	"nlb/bench/lab"
	"nlb/internal/wait"
)

// TestForeignMark has another table that marks flows before ours chooses for
// them. The bits that are not ours survive, and the flows work.
func TestForeignMark(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{})
	serveTargets(t, top, 8080)
	const (
		ours    = 0xffffc000
		theirs  = 0x5
		foreign = "table inet other { chain mangle { type filter hook prerouting priority -150; ct state new ct mark set 0x5; }; }"
	)
	must(t, top.LB, "nft", foreign)
	c := config{Sources: sources(top), VIPs: both()}
	modes := []string{"preserve", "hairpin_snat", "snat"}
	for i, mode := range modes {
		name := fmt.Sprint("g", i)
		c.Listeners = append(c.Listeners, listen(name, "TCP_UDP", uint16(81+i), name)...)
		c.Groups = append(c.Groups, pool(name, "TCP_UDP", mode, 8080, targets(top.Targets...)))
	}
	d := serving(t, top, c)
	const flows = 10
	for i, mode := range modes {
		for _, f := range families {
			dst := f.at(uint16(81 + i))
			for _, network := range networks {
				for _, from := range []*lab.Node{top.Clients[0], top.Targets[0]} {
					if mode == "preserve" && from == top.Targets[0] {
						continue // dropped when it meets itself
					}
					if got := call(t, from, lab.Call{Network: network, Dst: dst, N: flows}); got.Failed > 0 {
						t.Errorf("%s, %s to %v from %s: %v", mode, network, dst, from.Name, got)
					}
				}
			}
			entries := d.entries(dst)
			if len(entries) < 2*flows {
				t.Errorf("%s: only %d flows to %v", mode, len(entries), dst)
			}
			for _, e := range entries {
				if e.mark&^ours != theirs {
					t.Errorf("%s: the other's bits of the mark are %#x, want %#x: %s", mode, e.mark&^ours, theirs, e.text)
				}
				if e.mark&ours == 0 {
					t.Errorf("%s: no target in the mark: %s", mode, e.text)
				}
			}
		}
	}
}

// TestIdleTimeout has two listeners with different idle timeouts for one group.
func TestIdleTimeout(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 1})
	serveTargets(t, top, 8080)
	c := config{
		Sources: sources(top), VIPs: both(),
		Listeners: append(listen("short", "TCP", 81, "web"), listen("long", "TCP", 82, "web")...),
		Groups:    []group{pool("web", "TCP", "preserve", 8080, targets(top.Targets...))},
	}
	for i := range c.Listeners {
		c.Listeners[i].Idle = map[uint16]string{81: "60s", 82: "6000s"}[c.Listeners[i].Port]
	}
	d := serving(t, top, c)
	const flows = 3
	for _, f := range families {
		// The floor tells the long one from the kernel's own values for data that is
		// not acknowledged yet (300 s), the ceiling from the 5 days of its default.
		for port, want := range map[uint16]struct{ above, upTo int }{81: {0, 60}, 82: {5900, 6000}} {
			held(t, top.Clients[0], lab.Call{Network: "tcp", Dst: f.at(port), N: flows})
			wait.For(t, limit, fmt.Sprint("timeouts of ", f.at(port)), func() error {
				entries := d.entries(f.at(port))
				if len(entries) != flows {
					return fmt.Errorf("%d flows", len(entries))
				}
				var errs []error
				for _, e := range entries {
					if e.state != "ESTABLISHED" || e.timeout <= want.above || e.timeout > want.upTo {
						errs = append(errs, fmt.Errorf("not within (%d, %d] s: %s", want.above, want.upTo, e.text))
					}
				}
				return errors.Join(errs...)
			})
		}
	}
}
