package e2e

import (
	"fmt"
	"strings"
	"testing"

	"nlb/balancer"
	"nlb/bench/lab"
)

// TestDeadTargets kills one target and then all of them.
func TestDeadTargets(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{})
	serveTargets(t, top, 8080)
	closed := pool("closed", "TCP", "preserve", 8080, targets(top.Targets...))
	closed.FailOpen = map[string]any{"minimum_healthy_count": 0}
	d := serving(t, top, config{
		Sources: sources(top), VIPs: both(),
		Listeners: append(listen("open", "TCP", 80, "open"), listen("closed", "TCP", 81, "closed")...),
		Groups:    []group{pool("open", "TCP", "preserve", 8080, targets(top.Targets...)), closed},
	})
	const flows = 50
	for _, f := range families {
		if got := call(t, top.Clients[0], lab.Call{Network: "tcp", Dst: f.at(80), N: flows}); len(got.ByWho) != 2 || got.Failed > 0 {
			t.Fatalf("both alive, IPv%s: %v", f.name, got)
		}
	}

	top.Targets[1].Agent().Kill()
	for _, name := range []string{"open", "closed"} {
		d.waitHealthy(name, 2) // the living one, by both families
		for _, x := range d.group(name).Targets {
			if x.State != balancer.Healthy && (!strings.HasPrefix(x.Reason, "Target.") || x.Description == "") {
				t.Errorf("status does not tell why: %+v", x)
			}
		}
		if d.group(name).FailOpen {
			t.Errorf("%s fails open with one target alive", name)
		}
	}
	for _, f := range families {
		for _, port := range []uint16{80, 81} {
			got := call(t, top.Clients[0], lab.Call{Network: "tcp", Dst: f.at(port), N: flows})
			allSeenAs(t, fmt.Sprint("one dead, ", f.at(port)), got, f.addr(top.Clients[0]))
			if got.ByWho["t1"] != flows {
				t.Errorf("one dead, %v: %v", f.at(port), got)
			}
		}
	}

	top.Targets[0].Agent().Kill()
	d.waitHealthy("open", 0)
	d.waitHealthy("closed", 0)
	if !d.group("open").FailOpen || d.group("closed").FailOpen {
		t.Errorf("fail_open: %v and %v, want true where it is not turned off", d.group("open").FailOpen, d.group("closed").FailOpen)
	}
	for _, f := range families {
		dropped := d.counter("no_target_drops")
		// Targets refuse, so the flows reach them.
		allFail(t, "fail open, IPv"+f.name, call(t, top.Clients[0], lab.Call{Network: "tcp", Dst: f.at(80), N: 5}), lab.Refused)
		allFail(t, "nobody left, IPv"+f.name, call(t, top.Clients[0], lab.Call{Network: "tcp", Dst: f.at(81), Timeout: briefly}), lab.Timeout)
		if now := d.counter("no_target_drops"); now != dropped+1 {
			t.Errorf("IPv%s: no_target_drops rose by %d for one flow", f.name, now-dropped)
		}
	}

	serveTargets(t, top, 8080)
	d.waitAllHealthy()
	for _, f := range families {
		if got := call(t, top.Clients[0], lab.Call{Network: "tcp", Dst: f.at(80), N: flows}); len(got.ByWho) != 2 || got.Failed > 0 {
			t.Errorf("both alive again, IPv%s: %v", f.name, got)
		}
	}
}
