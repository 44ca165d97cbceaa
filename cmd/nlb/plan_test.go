package main

import (
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"nlb/balancer"
	"nlb/balancer/conntrack"
	"nlb/balancer/control"
	"nlb/config"
)

// Without a daemon, a plan is what serve would do: what should have ended while
// none ran ends when it starts.
func TestPlanTakesUpDrainsAsServeWould(t *testing.T) {
	at := netip.MustParseAddrPort("10.0.1.11:8080")
	key := balancer.TargetKey{Group: "web", AddrPort: at}
	dir := t.TempDir()
	long := time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)
	if err := (balancer.Drains{key: {Since: long, Until: long.Add(time.Minute), Terminate: true}}).Save(dir); err != nil {
		t.Fatal(err)
	}
	cfg := &config.Config{Spec: &balancer.Spec{
		Listeners: []balancer.Listener{{Name: "web", Protocol: balancer.TCP, Forward: []balancer.WeightedGroup{{TargetGroup: "web", Weight: 1}}}},
		TargetGroups: []balancer.TargetGroup{{
			Name: "web", Protocol: balancer.TCP, ClientIP: balancer.SNAT,
			Targets: []balancer.Target{{Address: at.Addr(), Port: at.Port(), Weight: 1}},
		}},
	}}
	cfg.StateDir = dir
	seen, _, err := look(t.Context(), cfg, control.NewClient(filepath.Join(dir, "nlb.sock")), noRoutes{})
	if err != nil {
		t.Fatal(err)
	}
	if got := seen.Drains[key].Until; !got.Equal(seen.Now) {
		t.Errorf("its flows end at %v, want %v", got, seen.Now)
	}
	if d := balancer.Forward(cfg.Spec, seen).Table.Pools[0].Destinations; len(d) != 1 || !d[0].Terminate {
		t.Errorf("the plan does not end them: %+v", d)
	}
}

// What a plan was made of is from one time only if the daemon wrote nothing meanwhile.
func TestWroteNothing(t *testing.T) {
	status := func(generation, writes uint64) *control.Status {
		return &control.Status{Apply: control.Apply{Generation: generation, WritesTotal: writes}}
	}
	for _, c := range []struct {
		name        string
		before, now *control.Status
		want        bool
	}{
		{"none runs", nil, nil, true},
		{"it has started", nil, status(1, 0), false},
		{"it has ended", status(1, 1), nil, false},
		{"it is at rest", status(1, 1), status(1, 1), true},
		{"it has written", status(1, 1), status(1, 2), false},
		{"it has another configuration, which changes nothing", status(1, 1), status(2, 1), false},
	} {
		if got := wroteNothing(c.before, c.now); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// Most flows of a host may be others': nobody is asked whose their mark is.
func TestFlowsOfOthersAreNotLookedUp(t *testing.T) {
	foreign := conntrack.Flow{Protocol: conntrack.UDP, Mark: 0x2a}
	if f := (flowTable{}).flow(foreign); f.Ours || f.To != (balancer.TargetKey{}) { // without a dataplane to ask
		t.Errorf("%+v", f)
	}
}
