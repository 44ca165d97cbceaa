package e2e

import (
	"fmt"
	"testing"
	"time"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

// healthPort is what the probes of some tests go to, so that a target may fail
// them while its flows work.
const healthPort = 9000

// TestUnhealthyTerminates has a target that works and fails its health checks.
// What becomes of its flows is the group's choice.
func TestUnhealthyTerminates(t *testing.T) {
	t.Parallel()
	interval := delay - time.Second
	top := routed(t, lab.Options{})
	serveTargets(t, top, targetPort)
	client, t1, t2 := top.Clients[0], top.Targets[0], top.Targets[1]
	probed := map[string]*lab.Listeners{}
	for _, n := range top.Targets {
		probed[n.Name] = serveOn(t, n, lab.Serve{Ports: []uint16{healthPort}, Networks: []string{"tcp"}})
	}
	all := []struct {
		name      string
		port      uint16
		unhealthy map[string]any // nil: by default flows are cut
	}{
		{"cut", cutPort, nil},
		{"kept", livePort, map[string]any{"connection_termination": false}},
		{"slow", latePort, map[string]any{"connection_termination": false, "draining_interval": interval.String()}},
	}
	c := config{Sources: sources(top), VIPs: both()}
	for _, g := range all {
		p := pool(g.name, "TCP_UDP", "preserve", targetPort, targets(top.Targets...))
		p.Unhealthy = g.unhealthy
		p.HealthCheck["port"] = healthPort
		c.Groups = append(c.Groups, p)
		c.Listeners = append(c.Listeners, listen(g.name, "TCP_UDP", g.port, g.name)...)
	}
	d := serving(t, top, c)
	holdings, datagrams := map[string]*holding{}, map[string][]*pulse{}
	for _, g := range all {
		holdings[g.name] = hold(t, client, g.port)
		datagrams[g.name] = pulsesAt(t, client, g.port, t1.Name)
	}
	busy := talk(t, client, families[1].at(cutPort), t1.Name)
	w := watch(t, top)

	before := time.Now()
	if err := probed[t1.Name].Close(); err != nil {
		t.Fatal(err)
	}
	// The families are probed apart from each other. No flow may be cut before a
	// second probe can have failed, nor stay a second longer than the last verdict.
	first := before.Add(900 * time.Millisecond)
	var failed time.Time
	wait.For(t, limit, "both families unhealthy", func() error {
		found := 0
		for _, x := range d.standing("cut", t1) {
			if x.State == balancer.Unhealthy {
				found++
			}
		}
		if failed = time.Now(); found < len(families) {
			return fmt.Errorf("%d of them", found)
		}
		return nil
	})
	if err := d.stands("slow", t1, balancer.UnhealthyDraining, ""); err != nil {
		t.Error(err)
	}
	holdings["slow"].alive("unhealthy.draining", t1.Name, t2.Name)
	w.cut("unhealthy", holdings["cut"], t1.Name, first, failed.Add(slack))
	holdings["cut"].over("unhealthy", t1.Name)
	select {
	case <-busy.ended:
		if busy.at.After(failed.Add(slack)) {
			t.Errorf("a busy flow ended %v after its target failed", busy.at.Sub(failed))
		}
	case <-soon(t).Done():
		t.Error("a busy flow goes on")
	}
	w.reset("a busy flow", families[1].at(cutPort), []lab.Reply{busy.flow}, first, failed.Add(slack))
	for _, p := range datagrams["cut"] {
		p.answered("unhealthy", failed, t2.Name)
	}
	for _, g := range all {
		avoided(t, "unhealthy", client, g.port, 20, t1.Name)
	}
	// The interval begins with the verdict, which status tells in whole seconds and
	// after the kernel has followed.
	begun := d.standing("slow", t1)[0].Since
	for _, x := range d.standing("slow", t1) {
		if x.Since.Before(begun) {
			begun = x.Since
		}
	}
	d.becomes("slow", t1, balancer.Unhealthy, "")
	drained := time.Now()
	w.cut("after the draining interval", holdings["slow"], t1.Name, begun.Add(interval-slack), failed.Add(interval+slack))
	for _, p := range datagrams["slow"] {
		p.answered("after the draining interval", drained, t2.Name)
	}
	if err := d.stands("kept", t1, balancer.Unhealthy, ""); err != nil {
		t.Error(err)
	}
	holdings["kept"].alive("unhealthy", t1.Name)
	w.spared("kept", holdings["kept"], t1.Name)
	for _, p := range datagrams["kept"] {
		if _, answers := p.since(before); len(answers) == 0 || p.last() != t1.Name {
			t.Errorf("kept: %d answers, the last by %q", len(answers), p.last())
		}
	}
	for _, g := range all {
		holdings[g.name].alive("unhealthy", t2.Name)
		w.spared(g.name, holdings[g.name], t2.Name)
	}
	w.leaks()

	serveOn(t, t1, lab.Serve{Ports: []uint16{healthPort}, Networks: []string{"tcp"}})
	d.waitAllHealthy()
	for _, g := range all {
		reached(t, "healthy again", client, g.port, t1.Name)
	}
	again := hold(t, client, cutPort)
	// The flows of the time before are over, those of now are not touched.
	again.alive("healthy again", t1.Name, t2.Name)
	wait.For(t, limit, "nothing to change", d.planned)
}

// pulsesAt begins a pulse per family that a target answers.
func pulsesAt(t *testing.T, n *lab.Node, port uint16, who string) []*pulse {
	t.Helper()
	const tries = 30
	var all []*pulse
	for _, f := range families {
		var p *pulse
		for range tries {
			if p = beat(t, n, f, f.at(port)); p.found("at first") == who {
				break
			}
			_ = p.conn.Close()
		}
		if p.last() != who {
			t.Fatalf("none of %d clients to %v is at %s", tries, f.at(port), who)
		}
		all = append(all, p)
	}
	return all
}
