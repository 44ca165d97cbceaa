package main

import (
	"context"
	"errors"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/balancer/metrics"
	"nlb/healthcheck"
	"nlb/internal/bubble"
)

func probeSpec(groups ...string) *balancer.Spec {
	spec := &balancer.Spec{
		SourceAddresses: []netip.Addr{netip.MustParseAddr("10.0.0.2")},
		VIPs:            []balancer.VIP{{Address: netip.MustParseAddr("198.51.100.10")}},
	}
	for i, name := range groups {
		spec.Listeners = append(spec.Listeners, balancer.Listener{
			Name: name, VIP: spec.VIPs[0].Address, Port: uint16(80 + i), Protocol: balancer.UDP,
			Forward: []balancer.WeightedGroup{{TargetGroup: name, Weight: 1}},
		})
		spec.TargetGroups = append(spec.TargetGroups, balancer.TargetGroup{
			Name: name, Protocol: balancer.UDP, ClientIP: balancer.SNAT,
			HealthCheck: balancer.HealthCheck{
				Protocol: balancer.CheckHTTP, Path: "/ready", Host: "web.example", Matcher: []balancer.StatusRange{{First: 200, Last: 299}},
				Interval: 10 * time.Second, Timeout: 2 * time.Second, HealthyThreshold: 3, UnhealthyThreshold: 2, ProxyProtocolLocal: true,
			},
			Targets: []balancer.Target{{Address: netip.MustParseAddr("10.0.1.11"), Port: 8080, Weight: 1}},
		})
	}
	return spec
}

func TestChecksOf(t *testing.T) {
	spec := probeSpec("blue", "green")
	spec.TargetGroups[1].HealthCheck.Port = 9000
	spec.TargetGroups = append(spec.TargetGroups, balancer.TargetGroup{
		Name: "idle", Targets: []balancer.Target{{Address: netip.MustParseAddr("10.0.9.9"), Port: 1}},
	})
	check := func(target string) healthcheck.Check {
		return healthcheck.Check{
			Target: netip.MustParseAddrPort(target), Protocol: healthcheck.HTTP, Path: "/ready", Host: "web.example",
			Matcher: []healthcheck.StatusRange{{First: 200, Last: 299}}, Interval: 10 * time.Second, Timeout: 2 * time.Second,
			HealthyThreshold: 3, UnhealthyThreshold: 2, Source: netip.MustParseAddr("10.0.0.2"), ProxyProtocolLocal: true,
		}
	}
	want := []healthcheck.Check{check("10.0.1.11:8080"), check("10.0.1.11:9000")}
	got, _ := checksOf(spec)
	comparable := cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })
	addr := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	if diff := cmp.Diff(want, got, comparable, addr); diff != "" {
		t.Error(diff)
	}
}

func TestChecksVerifyWhatTheGroupAsksFor(t *testing.T) {
	spec := probeSpec("any", "blue", "green", "red", "public")
	ask := func(group int, verify bool, name, roots string) {
		h := &spec.TargetGroups[group].HealthCheck
		h.Protocol, h.VerifyTLS, h.ServerName, h.TrustedRoots = balancer.CheckHTTPS, verify, name, roots
	}
	ask(0, false, "sni.example", "")
	ask(1, true, "web.example", "one")
	ask(2, true, "web.example", "one")
	ask(3, true, "web.example", "two")
	ask(4, true, "web.example", "")
	type asked struct {
		Verify bool
		Name   string
		Roots  *healthcheck.Roots
	}
	one, two := healthcheck.NewRoots("one"), healthcheck.NewRoots("two")
	want := []asked{
		{false, "sni.example", nil}, {true, "web.example", one}, {true, "web.example", one},
		{true, "web.example", two}, {true, "web.example", nil},
	}
	list, targets := checksOf(spec)
	var got []asked
	for _, c := range list {
		got = append(got, asked{c.VerifyTLS, c.ServerName, c.Roots})
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if list[1].Roots != list[2].Roots {
		t.Error("two groups that trust the same certificates do not share them")
	}
	if n := len(targets[list[1].Key()]); n != 2 || len(targets) != 4 {
		t.Errorf("%d probes, one of which %d groups share; want 4 and 2", len(targets), n)
	}
}

// A probed world answers probes and records what is reported.
type probed struct {
	mu     sync.Mutex
	result healthcheck.Result
	probes int
	health balancer.HealthView
}

func (p *probed) probe(context.Context, healthcheck.Check) healthcheck.Result {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.probes++
	return p.result
}

func (p *probed) answer(k healthcheck.Kind) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.result = healthcheck.Result{Kind: k}
}

func (p *probed) report(found map[balancer.TargetKey]balancer.Health) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for k, h := range found {
		p.health[k] = h
	}
}

func (p *probed) states() map[string]balancer.State {
	p.mu.Lock()
	defer p.mu.Unlock()
	states := make(map[string]balancer.State)
	for k, h := range p.health {
		states[k.String()] = h.State
	}
	return states
}

func TestGroupsShareAProbeAndItsVerdict(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		world := &probed{health: balancer.HealthView{}}
		world.answer(healthcheck.OK)
		c := newChecks(world.report, nil)
		c.scheduler = healthcheck.New(healthcheck.Options{OnChange: c.changed, Probe: world.probe})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- c.run(ctx) }()

		c.set(probeSpec("blue"))
		bubble.Pass(time.Second)
		// Green's check is known already: there will be no transition.
		c.set(probeSpec("blue", "green"))
		want := map[string]balancer.State{"blue/10.0.1.11:8080": balancer.Healthy, "green/10.0.1.11:8080": balancer.Healthy}
		if diff := cmp.Diff(want, world.states()); diff != "" {
			t.Error(diff)
		}
		if world.probes != 1 {
			t.Errorf("%d probes", world.probes)
		}

		world.answer(healthcheck.Refused)
		bubble.Pass(15 * time.Second) // one failure of two: no transition, but an error to show
		status := &control.Status{TargetGroups: []control.TargetGroup{{
			Name:    "green",
			Targets: []control.Target{{Address: netip.MustParseAddr("10.0.1.11"), Port: 8080}},
		}}}
		bubble.Pass(10 * time.Second)
		for k := range want {
			want[k] = balancer.Unhealthy
		}
		if diff := cmp.Diff(want, world.states()); diff != "" {
			t.Error(diff)
		}
		c.describe(status)
		if status.TargetGroups[0].Targets[0].Description == "" {
			t.Error("the last error is not shown")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// A probe that groups share counts in each of them, until the group is gone.
func TestProbesCountForTheirGroups(t *testing.T) {
	c := newChecks(func(map[balancer.TargetKey]balancer.Health) {}, nil)
	failures := func() (found []string) {
		collector := metrics.NewCollector("", func(context.Context) metrics.Reading { return metrics.Reading{} }, c.probes)
		answer := httptest.NewRecorder()
		metrics.NewHandler(collector, zap.NewNop()).ServeHTTP(answer, httptest.NewRequest("GET", "/metrics", nil))
		for line := range strings.Lines(answer.Body.String()) {
			if rest, ok := strings.CutPrefix(line, "nlb_health_check_failures_total"); ok {
				found = append(found, strings.TrimSpace(rest))
			}
		}
		return found
	}
	probe := func() {
		for key := range *c.groups.Load() {
			c.count(key, healthcheck.Result{Kind: healthcheck.Refused})
		}
	}
	c.set(probeSpec("blue", "green"))
	probe()
	want := []string{`{reason="refused",target_group="blue"} 1`, `{reason="refused",target_group="green"} 1`}
	if diff := cmp.Diff(want, failures()); diff != "" {
		t.Errorf("two groups: %s", diff)
	}
	c.set(probeSpec("green"))
	probe()
	if diff := cmp.Diff([]string{`{reason="refused",target_group="green"} 2`}, failures()); diff != "" {
		t.Errorf("one is gone: %s", diff)
	}
}

// A reload that fails is told, and when the last one succeeded is kept.
func TestReloadsAreNoted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		loaded := time.Now()
		r := reloadRecord{loaded: loaded}
		if got := r.reading(); !got.OK || !got.Succeeded.Equal(loaded) {
			t.Errorf("before any reload: %+v, want the time %v", got, loaded)
		}
		bubble.Pass(time.Minute)
		r.note(time.Now(), errors.New("a bad file"))
		if got := r.reading(); got.OK || !got.Succeeded.Equal(loaded) {
			t.Errorf("after a failure: %+v, want the time %v", got, loaded)
		}
		r.note(time.Now(), nil)
		if got := r.reading(); !got.OK || !got.Succeeded.Equal(time.Now()) {
			t.Errorf("after a success: %+v", got)
		}
	})
}
