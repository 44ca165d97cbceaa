package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

// TestPassiveHealth has a target that passes its health checks and fails its
// clients, in each way there is. Groups that look at clients' flows send it no new
// ones for a while, and leave those alone that it has.
func TestPassiveHealth(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, verdict string }{
		{"refuses", "reject with tcp reset"},
		{"is silent", "drop"},
		{"is unreachable", "reject with icmpx type port-unreachable"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			failsItsClients(t, c.verdict)
		})
	}
}

func failsItsClients(t *testing.T, verdict string) {
	const held = 5 * time.Second
	top := routed(t, lab.Options{})
	serveTargets(t, top, targetPort, healthPort)
	client, t1, t2 := top.Clients[0], top.Targets[0], top.Targets[1]
	passive := map[string]any{"enabled": true, "max_failures": 3, "hold": held.String(), "max_hold": held.String()}
	all := []struct {
		name, mode string
		port       uint16
		passive    map[string]any
	}{
		{"watched", "preserve", cutPort, passive},
		{"source", "snat", snatPort, passive},
		{"off", "preserve", livePort, nil},
	}
	c := config{Sources: sources(top), VIPs: both()}
	for _, g := range all {
		p := pool(g.name, "TCP", g.mode, targetPort, targets(top.Targets...))
		p.HealthCheck["port"] = healthPort
		p.Passive = g.passive
		c.Groups = append(c.Groups, p)
		c.Listeners = append(c.Listeners, listen(g.name, "TCP", g.port, g.name)...)
	}
	d := serving(t, top, c)
	holdings := map[string]*holding{}
	for _, g := range all {
		holdings[g.name] = hold(t, client, g.port)
	}
	w := watch(t, top)

	must(t, t1, "nft", "add table inet fault; add chain inet fault in { type filter hook input priority 0; };"+
		"add rule inet fault in tcp dport 8080 tcp flags & (syn|ack) == syn "+verdict)
	knock := func(port uint16) lab.Tally {
		var sum lab.Tally
		for _, f := range families {
			got := call(t, client, lab.Call{Network: "tcp", Dst: f.at(port), N: 16, Parallel: 16, Timeout: 1500 * time.Millisecond})
			sum.OK, sum.Failed = sum.OK+got.OK, sum.Failed+got.Failed
			if got.ByWho[t1.Name] > 0 {
				t.Fatalf("t1 answers: %v", got)
			}
		}
		return sum
	}
	for _, g := range all[:2] {
		// Failures that are read together with an answer from before are not in a row.
		wait.For(t, limit, g.name+" is held", func() error {
			knock(g.port)
			return d.stands(g.name, t1, balancer.Unhealthy, balancer.ReasonFailedHealthChecks)
		})
		avoided(t, "held", client, g.port, 12, t1.Name)
		for _, x := range d.standing(g.name, t1) {
			if x.Held == nil {
				t.Fatalf("%s: the machine took longer than %v for some calls, or it was not held: %+v", g.name, held, x)
			}
			if x.EffectiveWeight != 0 || x.Held.Failures < 3 || x.Held.Until.Sub(x.Held.Since) != held || x.Until.IsZero() {
				t.Errorf("%s: %+v, held %+v", g.name, x, *x.Held)
			}
		}
	}
	// A daemon that comes back goes on with it; a plan knows of it.
	wait.For(t, limit, "a plan with holds", d.planned)
	wait.For(t, limit, "holds that are written down", func() error {
		if n := strings.Count(read(d.state("health.json")), `"held"`); n != 2*len(families) {
			return fmt.Errorf("%d of them", n)
		}
		return nil
	})
	before := d.standing("source", t1)
	d.kill()
	d.start()
	for i, x := range d.standing("source", t1) {
		if was := before[i].Held; x.Held == nil && was != nil && time.Now().Before(was.Until) || x.Held != nil && *x.Held != *was {
			t.Errorf("held before the restart %+v, after it %+v", was, x.Held)
		}
	}
	// Who does not look goes on sending clients there.
	d.becomes("off", t1, balancer.Healthy, "")
	if got := knock(livePort); got.Failed == 0 || got.OK == 0 {
		t.Errorf("without the passive check: %+v, want some to fail", got)
	}
	if err := d.stands("off", t1, balancer.Healthy, ""); err != nil {
		t.Error(err)
	}
	for _, g := range all {
		holdings[g.name].alive("held", t1.Name, t2.Name)
		w.spared(g.name, holdings[g.name], t1.Name)
	}
	must(t, t1, "nft", "delete table inet fault")
	d.waitAllHealthy()
	for _, g := range all {
		reached(t, "no longer held", client, g.port, t1.Name)
		for _, x := range d.standing(g.name, t1) {
			if x.Held != nil || x.EffectiveWeight != 1 || x.Reason != "" {
				t.Errorf("%s: back as %+v", g.name, x)
			}
		}
		holdings[g.name].alive("no longer held", t1.Name, t2.Name)
	}
	w.leaks()
}
