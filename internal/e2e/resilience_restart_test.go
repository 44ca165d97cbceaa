package e2e

import (
	"errors"
	"fmt"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

// A daemon that comes back to an unchanged file finds what it left and writes
// nothing: no rule, no address, no file. Clients keep their targets.
func TestRestartWritesNothing(t *testing.T) {
	const tuples = 200
	top, d := served(t, lab.Options{Targets: 4}, 4)
	before := choicesOfBoth(t, top.Clients[0], tuples)
	table, key := d.tableWords(), read(d.state("hash.key"))
	d.forget("udp", dnsPort)

	s := listenForSilence(t, top.LB)
	for _, end := range []func(){d.stop, d.kill} {
		end()
		d.start()
		d.waitAllHealthy()
		if got := d.status().Apply.WritesTotal; got != 0 {
			t.Errorf("the daemon counts %d writes", got)
		}
	}
	d.stop()
	if heard := s.heard(); heard != "" {
		t.Errorf("the kernel was written to:\n%s", heard)
	}

	if diff := cmp.Diff(table, d.tableWords()); diff != "" {
		t.Errorf("the table changed:\n%s", diff)
	}
	if now := read(d.state("hash.key")); now != key {
		t.Errorf("the hash key changed from %q to %q", key, now)
	}
	if diff := cmp.Diff(before, choicesOfBoth(t, top.Clients[0], tuples)); diff != "" {
		t.Errorf("clients changed targets:\n%s", diff)
	}
}

// choicesOfBoth are the choices for both families, by family and port.
func choicesOfBoth(t *testing.T, n *lab.Node, tuples int) map[string]string {
	t.Helper()
	chosen := make(map[string]string)
	for _, f := range families {
		for port, who := range choices(t, n, f, tuples) {
			chosen[fmt.Sprint(f.name, " ", port)] = who
		}
	}
	return chosen
}

// A restart must not believe again in targets that were found dead: until the
// checks say otherwise, the kernel keeps what it has.
func TestRestartKeepsDeadTargetsOut(t *testing.T) {
	top := routed(t, lab.Options{Targets: 3})
	for _, n := range top.Targets[:2] {
		serveOn(t, n, lab.Serve{Ports: []uint16{targetPort}})
	}
	// The third one is silent, as a host that is down: its checks take their time.
	must(t, top.Targets[2], "nft", "table inet mute { chain input { type filter hook input priority 0; tcp dport 8080 drop; udp dport 8080 drop; }; }")
	d := start(t, top, twoServices(top, top.Targets...).String())
	d.waitHealthy("web", 4)
	d.waitHealthy("dns", 4)
	wait.For(t, limit, "verdicts", func() error {
		for _, g := range []string{"web", "dns"} {
			for _, x := range d.group(g).Targets {
				if x.State == balancer.Initial {
					return fmt.Errorf("%v is initial", x.AddrPort())
				}
			}
		}
		return nil
	})
	wait.For(t, limit, "their flows are ended", func() error {
		if slices.Contains(d.tableWords(), "ended") {
			return errors.New("there are rules for it")
		}
		return nil
	})
	s := listenForSilence(t, top.LB)
	fresh, err := top.Clients[0].Agent().Churn(soon(t), lab.Churn{Interval: time.Millisecond,
		Call: lab.Call{Network: "tcp", Dst: families[0].at(webPort), Parallel: 4, Timeout: 500 * time.Millisecond}})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		d.stop()
		d.start()
		d.waitHealthy("web", 4)
		d.waitHealthy("dns", 4)
	}
	load, err := fresh.Stop(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	if load.Failed > 0 {
		t.Errorf("restarts sent new connections to a dead target: %v", load)
	}
	if heard := s.heard(); heard != "" {
		t.Errorf("the kernel was written to:\n%.3000s", heard)
	}
}

// SIGTERM ends the daemon and nothing else: flows go on, new ones are made.
func TestStoppedDaemonLeavesTheKernelForwarding(t *testing.T) {
	top, d := served(t, lab.Options{Targets: 3}, 3)
	p := press(t, top)
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	d.await()
	if d.err != nil {
		t.Errorf("nlb serve: %v", d.err)
	}
	works(t, top, "without a daemon")
	p.more(50)
	p.check("without a daemon")
	p.end()
}

// One of five targets leaves: the flows of the others stay where they are, and
// new flows of the same 5-tuples go there too, but for the few slots that
// consistent hashing cannot keep.
func TestRemovingOneTargetMovesItsFlowsOnly(t *testing.T) {
	const tuples, count = 400, 5
	top, d := served(t, lab.Options{Targets: count}, count)
	held, before := map[string]*lab.Flows{}, map[string]map[uint16]string{}
	for _, f := range families {
		flows, err := top.Clients[0].Agent().Hold(soon(t), lab.Call{Network: "tcp", Dst: f.at(webPort), N: heldFlows, Parallel: 10, Timeout: patience})
		if err != nil {
			t.Fatal(err)
		}
		held[f.name], before[f.name] = flows, choices(t, top.Clients[0], f, tuples)
	}
	leaver := top.Targets[1]
	if err := d.reload(twoServices(top, append(top.Targets[:1:1], top.Targets[2:]...)...).String()); err != nil {
		t.Fatal(err)
	}
	d.forget("udp", dnsPort)
	for _, f := range families {
		after := choices(t, top.Clients[0], f, tuples)
		var moved, left, total int
		for port, was := range before[f.name] {
			switch now := after[port]; {
			case was == leaver.Name:
				total++
				if now == leaver.Name {
					left++
				}
			case now != was:
				moved++
			}
		}
		if left > 0 {
			t.Errorf("IPv%s: %d of %d new flows still go to the target that left", f.name, left, total)
		}
		if limit := tuples * 2 / 100; moved > limit {
			t.Errorf("IPv%s: %d of %d new flows of other targets moved, more than %d", f.name, moved, tuples-total, limit)
		}
		// A share far from a fifth is a hash that does not spread: 40 are five
		// standard deviations of 400 draws.
		if total < tuples/count-40 || total > tuples/count+40 {
			t.Errorf("IPv%s: the target had %d of %d flows", f.name, total, tuples)
		}
		t.Logf("IPv%s: %d flows were the leaver's, %d of the others' moved", f.name, total, moved)

		flows, err := held[f.name].Check(soon(t))
		if err != nil {
			t.Fatal(err)
		}
		for _, flow := range lab.Broken(flows) {
			if flow.First.Who != leaver.Name {
				t.Errorf("IPv%s: a flow of another target is broken or moved: %+v", f.name, flow)
			}
		}
	}
}
