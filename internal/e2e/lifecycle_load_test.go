package e2e

import (
	"fmt"
	"os"
	"testing"
	"time"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

// TestManyChangesUnderLoad holds a thousand flows to targets that stay, while
// others come, go, are cut off and change their weights, with flows of their own.
// NLB_LONG=1 makes a thousand changes.
func TestManyChangesUnderLoad(t *testing.T) {
	t.Parallel()
	reloads := 100
	switch {
	case os.Getenv("NLB_LONG") == "1":
		reloads = 1000
	case isRaced(t):
		reloads = 20 // under the race detector a reload takes several times as long
	}
	const stable, flows = 3, 500 // flows per family
	top := routed(t, lab.Options{Targets: 5})
	serveTargets(t, top, targetPort)
	client := top.Clients[0]
	delays := []map[string]any{leaving(0, true), leaving(time.Second, true), leaving(2*time.Second, false)}
	file := func(n int) config {
		of := targets(top.Targets[:stable]...)
		for i, x := range top.Targets[stable:] {
			if n>>i&1 == 1 {
				for _, x := range targets(x) {
					of = append(of, x.weighed(n%5))
				}
			}
		}
		g := pool("web", "TCP", "preserve", targetPort, of)
		g.Deregister = delays[n/4%len(delays)]
		return config{Sources: sources(top), VIPs: both(), Listeners: listen("web", "TCP", webPort, "web"), Groups: []group{g}}
	}
	d := start(t, top, file(0).String())
	d.waitHealthy("web", 2*stable)
	var holdings []*lab.Flows
	for _, f := range families {
		holdings = append(holdings, held(t, client, lab.Call{Network: "tcp", Dst: f.at(webPort), N: flows, Parallel: 25, Timeout: patience}))
		// So that the others have flows when they leave; what becomes of those is
		// not judged here.
		if _, err := client.Agent().Churn(soon(t), lab.Churn{Interval: 50 * time.Millisecond,
			Call: lab.Call{Network: "tcp", Dst: f.at(webPort), Timeout: patience}}); err != nil {
			t.Fatal(err)
		}
	}
	check := func(when string) {
		t.Helper()
		for i, h := range holdings {
			all, err := h.Check(soon(t))
			if err != nil {
				t.Fatal(err)
			}
			if bad := lab.Broken(all); len(bad) > 0 || len(all) != flows {
				t.Errorf("%s, IPv%s: %d of %d held flows are broken or moved, such as %+v", when, families[i].name, len(bad), len(all), append(bad, lab.Flow{})[0])
			}
		}
	}
	check("at the beginning")
	begun := time.Now()
	for n := range reloads {
		if err := d.reload(file(n + 1).String()); err != nil {
			t.Fatalf("reload %d: %v", n, err)
		}
		if n%10 == 9 {
			check(fmt.Sprintf("after %d reloads", n+1))
		}
	}
	t.Logf("%d reloads, of %v each; %d flows were asked after every tenth",
		reloads, (time.Since(begun) / time.Duration(reloads)).Round(time.Millisecond), len(holdings)*flows)
	last := file(0)
	last.Groups[0].Deregister = leaving(0, true)
	if err := d.reload(last.String()); err != nil {
		t.Fatal(err)
	}
	for _, n := range top.Targets[:stable] {
		d.becomes("web", n, balancer.Healthy, "")
	}
	for _, n := range top.Targets[stable:] {
		d.disappears("web", n)
	}
	check("at the end")
	wait.For(t, limit, "nothing to change", d.planned)
}
