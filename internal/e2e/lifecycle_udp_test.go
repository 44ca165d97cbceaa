package e2e

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"nlb/bench/lab"
	"nlb/internal/wait"
)

// TestUDPFollows has UDP clients that never pause and never change their port, so
// that conntrack never forgets where it sent them. They reach a target within a
// second of there being one, whatever came before, and none that has left.
func TestUDPFollows(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 3})
	serveTargets(t, top, targetPort)
	client, t1, t2 := top.Clients[0], top.Targets[0], top.Targets[1]
	// VIPs that come later are routed past the balancer's rules until then: the
	// datagrams are forwarded as they are, to a host that drops them.
	later := []netip.Addr{netip.MustParseAddr("198.51.100.99"), netip.MustParseAddr("2001:db8:ffff::99")}
	for i, f := range families {
		if err := top.LB.Route(netip.PrefixFrom(later[i], later[i].BitLen()), f.addr(t2), t2.Name); err != nil {
			t.Fatal(err)
		}
	}
	const (
		removedPort = 53 + iota
		zeroPort
		emptyPort
		unheardPort
		laterPort
		drainedPort
	)
	group := func(name string, of []target) group { return pool(name, "UDP", "preserve", targetPort, of) }
	at := func(c *config, name string) *[]target {
		for i := range c.Groups {
			if c.Groups[i].Name == name {
				return &c.Groups[i].Targets
			}
		}
		t.Fatalf("no group is %q", name)
		return nil
	}
	c := config{Sources: sources(top), VIPs: both()}
	for _, g := range []struct {
		name string
		port uint16
		of   []target
	}{
		{"removed", removedPort, targets(top.Targets...)},
		{"zero", zeroPort, targets(t1)},
		{"empty", emptyPort, nil},
		{"drained", drainedPort, targets(top.Targets...)},
	} {
		c.Groups = append(c.Groups, group(g.name, g.of))
		c.Listeners = append(c.Listeners, listen(g.name, "UDP", g.port, g.name)...)
	}
	c.Groups[len(c.Groups)-1].Deregister = map[string]any{"timeout": "0s"}
	c.Groups = append(c.Groups, group("unheard", targets(t1)), group("later", targets(t1)))
	d := start(t, top, c.String())
	for name, healthy := range map[string]int{"removed": 6, "zero": 2, "drained": 6} {
		d.waitHealthy(name, healthy)
	}
	// reload returns when the configuration is in force.
	reload := func() time.Time {
		t.Helper()
		if err := d.reload(c.String()); err != nil {
			t.Fatal(err)
		}
		return time.Now()
	}

	begun := time.Now()
	unheard, empty := beats(t, client, unheardPort), beats(t, client, emptyPort)
	var before []*pulse
	for i, f := range families {
		p := beat(t, client, f, netip.AddrPortFrom(later[i], laterPort))
		wait.For(t, limit, "a flow from before the VIP", func() error {
			if len(d.entries(p.to)) == 0 {
				return errors.New("conntrack knows none")
			}
			return nil
		})
		before = append(before, p)
	}
	// One target of each family's choice is removed, and the client of the other
	// family may have another one.
	for _, p := range beats(t, client, removedPort) {
		who := p.found("at first")
		gone := node(t, top, who)
		*at(&c, "removed") = targets(nodes(top, without(top.Targets, who))...)
		p.answered("removed", reload(), without(top.Targets, who)...)
		avoidedUDP(t, "removed", client, removedPort, gone)
		*at(&c, "removed") = targets(top.Targets...)
		reload()
		d.waitHealthy("removed", 6)
	}

	zero := beats(t, client, zeroPort)
	for _, p := range zero {
		p.found("at first")
	}
	*at(&c, "zero") = nil
	emptied := reload()
	for _, p := range zero {
		p.unanswered("without targets", emptied.Add(follow))
	}
	*at(&c, "zero") = targets(t2)
	back := reload()
	for _, p := range zero {
		p.answered("with another target", back, t2.Name)
	}

	for _, p := range empty {
		p.unanswered("empty from the beginning", begun)
	}
	*at(&c, "empty") = targets(t1)
	arrived := reload()
	for _, p := range empty {
		p.answered("a first target", arrived, t1.Name)
	}

	for _, p := range unheard {
		p.unanswered("without a listener", begun)
	}
	c.Listeners = append(c.Listeners, listen("unheard", "UDP", unheardPort, "unheard")...)
	heard := reload()
	for _, p := range unheard {
		p.answered("a new listener", heard, t1.Name)
	}

	for i, f := range families {
		before[i].unanswered("without the VIP", begun)
		c.VIPs = append(c.VIPs, vip{later[i], "lo"})
		c.Listeners = append(c.Listeners, listener{Name: "later" + f.name, VIP: later[i].String(), Protocol: "UDP", Port: laterPort, Forward: to("later")})
	}
	bound := reload()
	for _, p := range before {
		p.answered("a new VIP", bound, t1.Name)
	}

	// Before the drains, which plan would name.
	wait.For(t, limit, "nothing to change", d.planned)
	for i, p := range beats(t, client, drainedPort) {
		who := p.found("at first")
		if out := d.override("drain", "drained", families[i].addr(node(t, top, who)).String()); out.code != 0 {
			t.Fatalf("nlb drain: %+v", out)
		}
		p.answered("drained with no delay", time.Now(), without(top.Targets, who)...)
	}
}

// nodes are a topology's targets by their names.
func nodes(top *lab.Topology, names []string) []*lab.Node {
	var found []*lab.Node
	for _, n := range top.Targets {
		for _, name := range names {
			if n.Name == name {
				found = append(found, n)
			}
		}
	}
	return found
}

// avoidedUDP fails the test unless new UDP flows work and none is a target's.
func avoidedUDP(t *testing.T, what string, client *lab.Node, port uint16, gone *lab.Node) {
	t.Helper()
	for _, f := range families {
		got := call(t, client, lab.Call{Network: "udp", Dst: f.at(port), N: 40, Parallel: 20})
		if got.ByWho[gone.Name] > 0 || got.Failed > 0 {
			t.Errorf("%s, IPv%s: new flows: %v, want none at %s", what, f.name, got, gone.Name)
		}
	}
}
