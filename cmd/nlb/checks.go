package main

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/balancer/metrics"
	"nlb/healthcheck"
)

// checks probes the targets of a Spec and reports what was found. Targets that
// would be probed alike share a probe.
type checks struct {
	scheduler *healthcheck.Scheduler
	report    func(map[balancer.TargetKey]balancer.Health)
	spec      atomic.Pointer[balancer.Spec]
	probes    *metrics.Probes
	groups    atomic.Pointer[map[healthcheck.Key][]string] // whom each check is for; never modified

	// mu keeps reports in order: what is read later is reported later.
	mu      sync.Mutex
	targets map[healthcheck.Key][]balancer.TargetKey // mu
}

// newChecks reports to report. Instead names a source where the kernel's is a VIP.
func newChecks(report func(map[balancer.TargetKey]balancer.Health), instead func(netip.Addr) netip.Addr) *checks {
	c := &checks{report: report, probes: metrics.NewProbes()}
	c.spec.Store(new(balancer.Spec))
	c.groups.Store(new(map[healthcheck.Key][]string))
	c.scheduler = healthcheck.New(healthcheck.Options{
		Mark:      balancer.ProbeMark,
		Forbidden: func(a netip.Addr) bool { return c.spec.Load().HasVIP(a) },
		Instead:   instead,
		OnChange:  c.changed,
		OnResult:  c.count,
	})
	return c
}

func (c *checks) run(ctx context.Context) error { return c.scheduler.Run(ctx) }

// overdue is how late the latest result of a probe is; see healthcheck.Scheduler.
func (c *checks) overdue() time.Duration { return c.scheduler.Overdue() }

// set probes the targets of spec from now on. What is known of its checks is
// reported, because a target that joins one learns of no change.
func (c *checks) set(spec *balancer.Spec) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.spec.Store(spec)
	list, targets := checksOf(spec)
	c.targets = targets
	was, groups := *c.groups.Load(), groupsOf(targets)
	c.groups.Store(&groups)
	c.scheduler.Set(list)
	c.forget(was, groups)
	found := make(map[balancer.TargetKey]balancer.Health)
	for key, status := range c.scheduler.Snapshot() {
		c.collect(found, key, status)
	}
	c.report(found)
}

// count adds a probe to the metrics of the groups that it is for.
func (c *checks) count(key healthcheck.Key, r healthcheck.Result) {
	for _, group := range (*c.groups.Load())[key] {
		c.probes.Observe(group, r)
	}
}

// forget drops the metrics of groups that are not probed any more.
func (c *checks) forget(was, is map[healthcheck.Key][]string) {
	gone := make(map[string]bool)
	for _, groups := range was {
		for _, g := range groups {
			gone[g] = true
		}
	}
	for _, groups := range is {
		for _, g := range groups {
			delete(gone, g)
		}
	}
	for g := range gone {
		c.probes.Forget(g)
	}
}

// groupsOf has the groups of each check, each once.
func groupsOf(targets map[healthcheck.Key][]balancer.TargetKey) map[healthcheck.Key][]string {
	groups := make(map[healthcheck.Key][]string, len(targets))
	for key, list := range targets {
		for _, t := range list {
			if !slices.Contains(groups[key], t.Group) {
				groups[key] = append(groups[key], t.Group)
			}
		}
	}
	return groups
}

// changed does not trust the transitions' own statuses, which set may have
// overtaken.
func (c *checks) changed(transitions []healthcheck.Transition) {
	c.mu.Lock()
	defer c.mu.Unlock()
	found := make(map[balancer.TargetKey]balancer.Health)
	for _, t := range transitions {
		if status, ok := c.scheduler.Status(t.Key); ok {
			c.collect(found, t.Key, status)
		}
	}
	c.report(found)
}

// collect needs mu. It leaves out checks without a verdict: a target that had
// one before a reload keeps it.
func (c *checks) collect(found map[balancer.TargetKey]balancer.Health, key healthcheck.Key, s healthcheck.Status) {
	if s.State == healthcheck.Initial {
		return
	}
	h := balancer.Health{State: balancer.Healthy, Reason: s.Reason, Description: s.Description, Since: s.Since}
	if s.State == healthcheck.Unhealthy {
		h.State = balancer.Unhealthy
	}
	for _, t := range c.targets[key] {
		found[t] = h
	}
}

// describe fills in the latest error of targets: a status shows it although it
// changed no state.
func (c *checks) describe(status *control.Status) {
	c.mu.Lock()
	defer c.mu.Unlock()
	latest := make(map[balancer.TargetKey]string)
	for key, s := range c.scheduler.Snapshot() {
		for _, t := range c.targets[key] {
			latest[t] = s.Description
		}
	}
	for _, g := range status.TargetGroups {
		for i := range g.Targets {
			t := &g.Targets[i]
			if text := latest[balancer.TargetKey{Group: g.Name, AddrPort: t.AddrPort()}]; text != "" {
				t.Description = text
			}
		}
	}
}

// checksOf lists the checks of the target groups in use, and whom each is for.
func checksOf(spec *balancer.Spec) ([]healthcheck.Check, map[healthcheck.Key][]balancer.TargetKey) {
	used := spec.GroupsInUse()
	var list []healthcheck.Check
	targets := make(map[healthcheck.Key][]balancer.TargetKey)
	roots := make(map[string]*healthcheck.Roots)
	for i := range spec.TargetGroups {
		g := &spec.TargetGroups[i]
		if !used[g.Name] {
			continue
		}
		trusted := trustedRoots(g, roots)
		for _, t := range g.Targets {
			c := checkOf(spec, g, t)
			c.Roots = trusted
			list = append(list, c)
			targets[c.Key()] = append(targets[c.Key()], balancer.TargetKey{Group: g.Name, AddrPort: t.AddrPort()})
		}
	}
	return list, targets
}

var checkProtocols = map[balancer.CheckProtocol]healthcheck.Protocol{
	balancer.CheckTCP: healthcheck.TCP, balancer.CheckHTTP: healthcheck.HTTP, balancer.CheckHTTPS: healthcheck.HTTPS,
}

// trustedRoots are what the targets of a group are verified with, nil for the
// host's. Groups that trust the same certificates share them.
func trustedRoots(g *balancer.TargetGroup, known map[string]*healthcheck.Roots) *healthcheck.Roots {
	text := g.HealthCheck.TrustedRoots
	if text == "" {
		return nil
	}
	if known[text] == nil {
		known[text] = healthcheck.NewRoots(text)
	}
	return known[text]
}

func checkOf(spec *balancer.Spec, g *balancer.TargetGroup, t balancer.Target) healthcheck.Check {
	h := g.HealthCheck
	port := h.Port
	if port == 0 {
		port = t.Port
	}
	c := healthcheck.Check{
		Target:             netip.AddrPortFrom(t.Address, port),
		Protocol:           checkProtocols[h.Protocol],
		Path:               h.Path,
		Host:               h.Host,
		Interval:           h.Interval,
		Timeout:            h.Timeout,
		HealthyThreshold:   h.HealthyThreshold,
		UnhealthyThreshold: h.UnhealthyThreshold,
		Source:             spec.ProbeSource(g, t.Address),
		ProxyProtocolLocal: h.ProxyProtocolLocal,
		VerifyTLS:          h.VerifyTLS,
		ServerName:         h.ServerName,
	}
	for _, r := range h.Matcher {
		c.Matcher = append(c.Matcher, healthcheck.StatusRange(r))
	}
	return c
}
