package top

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"

	"nlb/balancer"
	"nlb/balancer/control"
)

// A picture is one answer of the daemon, with what only two of them tell.
type picture struct {
	status *control.Status
	at     time.Time
	groups []group
	sums   group // of all groups
	// states counts the targets, the worst first; failOpen the groups whose health
	// checks are overruled.
	states   []stateCount
	failOpen int
	// events are the counters of control.Status.Totals that grew, by name.
	events []event
}

// A group is a target group with the sums of its targets.
type group struct {
	*control.TargetGroup
	load
	targets      []target
	healthy, all int
	latest       time.Time // Since of the target whose state changed last
}

// A target has the rates of its counters.
type target struct {
	*control.Target
	load
	name string
}

// A load is what goes through.
type load struct{ flows, newFlows, bytes figure } // bytes and newFlows per second

// An event is a counter of the dataplane.
type event struct {
	name string
	rate figure
}

// newPicture reckons with the answer before, which may be nil.
func newPicture(status *control.Status, at time.Time, before *picture) *picture {
	p := &picture{status: status, at: at}
	var (
		was     map[balancer.TargetKey]*control.Target
		elapsed time.Duration
	)
	if before != nil {
		was, elapsed = before.byKey(), at.Sub(before.at)
	}
	counts := make(map[balancer.State]int)
	for i := range status.TargetGroups {
		g := newGroup(&status.TargetGroups[i], was, elapsed)
		g.count(counts)
		if g.FailOpen {
			p.failOpen++
		}
		p.groups = append(p.groups, g)
		p.sums.add(g.load)
		p.sums.healthy += g.healthy
		p.sums.all += g.all
	}
	p.states = sortedCounts(counts)
	if before != nil {
		p.events = grown(before.status.Totals, status.Totals, elapsed)
	}
	return p
}

func (p *picture) byKey() map[balancer.TargetKey]*control.Target {
	all := make(map[balancer.TargetKey]*control.Target, p.sums.all)
	for i := range p.groups {
		for j := range p.groups[i].targets {
			t := p.groups[i].targets[j].Target
			all[balancer.TargetKey{Group: p.groups[i].Name, AddrPort: t.AddrPort()}] = t
		}
	}
	return all
}

func newGroup(g *control.TargetGroup, was map[balancer.TargetKey]*control.Target, elapsed time.Duration) group {
	out := group{TargetGroup: g, targets: make([]target, 0, len(g.Targets)), all: len(g.Targets)}
	for i := range g.Targets {
		now := &g.Targets[i]
		t := target{Target: now, name: now.AddrPort().String(), load: load{flows: read(now.ActiveFlows)}}
		if before := was[balancer.TargetKey{Group: g.Name, AddrPort: now.AddrPort()}]; before != nil {
			t.newFlows = perSecond(before.NewFlowsTotal, now.NewFlowsTotal, elapsed)
			t.bytes = perSecond(before.BytesTotal, now.BytesTotal, elapsed)
		}
		if now.State == balancer.Healthy {
			out.healthy++
		}
		if now.Since.After(out.latest) {
			out.latest = now.Since
		}
		out.add(t.load)
		out.targets = append(out.targets, t)
	}
	return out
}

func (l *load) add(m load) {
	l.flows, l.newFlows, l.bytes = l.flows.plus(m.flows), l.newFlows.plus(m.newFlows), l.bytes.plus(m.bytes)
}

// grown lists what was counted between two answers.
func grown(before, after map[string]uint64, elapsed time.Duration) []event {
	var all []event
	for _, name := range slices.Sorted(maps.Keys(after)) {
		was, known := before[name]
		if !known {
			continue
		}
		now := after[name]
		if rate := perSecond(&was, &now, elapsed); rate.value > 0 {
			all = append(all, event{name, rate})
		}
	}
	return all
}

func (g *group) count(into map[balancer.State]int) {
	for i := range g.targets {
		into[g.targets[i].State]++
	}
}

// A stateCount is how many targets are in a state.
type stateCount struct {
	state balancer.State
	n     int
}

func sortedCounts(counts map[balancer.State]int) []stateCount {
	var all []stateCount
	for state, n := range counts {
		all = append(all, stateCount{state, n})
	}
	slices.SortFunc(all, func(a, b stateCount) int { return cmp.Compare(badness(b.state), badness(a.state)) })
	return all
}

// badness orders states by how much they want to be looked at.
func badness(s balancer.State) int {
	return slices.Index([]balancer.State{
		balancer.Healthy, balancer.Unused, balancer.Initial, balancer.Draining, balancer.UnhealthyDraining, balancer.Unhealthy,
	}, s)
}

// find is a target of a group, and nil if there is none.
func (p *picture) find(name string, at netip.AddrPort) (*group, *target) {
	for i := range p.groups {
		g := &p.groups[i]
		if g.Name != name {
			continue
		}
		for j := range g.targets {
			if g.targets[j].AddrPort() == at {
				return g, &g.targets[j]
			}
		}
		return g, nil
	}
	return nil, nil
}
