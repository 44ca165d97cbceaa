package balancer

import (
	"cmp"
	"net/netip"
	"slices"
	"time"
)

// A View is what is seen of the world besides the Spec.
type View struct {
	// Key becomes the Table's.
	Key    HashKey
	Health HealthView
	Drains Drains
	Holds  Holds
	// Routes says how the host reaches targets. A target that is not in it has
	// no route, or none is known yet.
	Routes map[netip.Addr]Route
	// Links are the interfaces that packets come and go by; only looked for if
	// the Spec has a Flowtable.
	Links []string
	// FailOpen is how each group stood when it was last looked at.
	FailOpen map[string]FailOpenState
	// Leftover has the targets whose flows were found, or began to be ended,
	// later than their state says, and when.
	Leftover map[TargetKey]time.Time
	// LastHeld is when the state was seen that the kernel was last brought to; zero
	// where nobody knows.
	LastHeld time.Time
	Now      time.Time
}

// endsFrom is when flows of a target begin to be ended that should be from some
// time on. That is now if the kernel holds nothing that was seen since: however
// late a pass is, it must not miss what was due.
func (v View) endsFrom(k TargetKey, from time.Time) time.Time {
	if !v.LastHeld.IsZero() && from.After(v.LastHeld) {
		return later(from, v.Now)
	}
	return later(from, v.Leftover[k])
}

// A TargetGroupStatus is where the targets of a group stand.
type TargetGroupStatus struct {
	Name     string
	Protocol Protocol
	ClientIP ClientIP
	// FailOpen says whether too few targets are healthy, so that the health
	// checks are overruled and every target takes new flows.
	FailOpen FailOpenState
	Targets  []TargetStatus // sorted by address and port
}

// A TargetStatus is where a target stands.
type TargetStatus struct {
	Target Target
	// Health has the state; its Since is zero where nobody recorded one.
	Health
	// Until is when the state ends by itself; zero when it does not.
	Until time.Time
	// Probed is what the health checks found, whatever the state is.
	Probed Health
	// Held says that the passive check overrules them. Hold is its latest
	// verdict, in force or not.
	Held bool
	Hold Hold
	// Share is the weight that new flows see: the configured one or 0.
	Share int
	// Removed says that the target is not in the Spec any more.
	Removed bool
	// Cut says that the target should have no flows. Terminate says that those
	// it has are being ended; TerminateUntil is when that stops.
	Cut, Terminate bool
	TerminateUntil time.Time
}

// Targets says where every target of spec stands, groups sorted by name.
//
// New flows go to healthy targets. When fewer are healthy than the group's
// FailOpen asks for, they go to all of them, in whatever state, as NLB does
// ("Target group health" in the ELBv2 guide). The limits are compared with the
// targets that could take flows: those with a weight that are not draining.
// They hold for the group as a whole, not for each address family.
//
// Before the first verdict of a group there is nothing to overrule: all of its
// targets take flows, because a start must not refuse traffic, and the group is
// not said to fail open. A draining target takes no new flows in any case.
func Targets(spec *Spec, seen View) []TargetGroupStatus {
	used := spec.GroupsInUse()
	removed := removedTargets(seen)
	groups := make([]TargetGroupStatus, 0, len(spec.TargetGroups))
	for i := range spec.TargetGroups {
		g := &spec.TargetGroups[i]
		groups = append(groups, groupStatus(g, used[g.Name], removed[g.Name], seen))
		delete(removed, g.Name)
	}
	for name, left := range removed { // of groups that are gone
		d := seen.Drains[TargetKey{Group: name, AddrPort: left[0].Target.AddrPort()}]
		gone := &TargetGroup{Name: name, Protocol: d.Protocol, ClientIP: d.ClientIP}
		groups = append(groups, groupStatus(gone, false, left, seen))
	}
	slices.SortFunc(groups, func(a, b TargetGroupStatus) int { return cmp.Compare(a.Name, b.Name) })
	return groups
}

// removedTargets lists, by group, the targets that left the Spec and still have
// flows, or may have.
func removedTargets(seen View) map[string][]TargetStatus {
	byGroup := make(map[string][]TargetStatus)
	for k, d := range seen.Drains {
		if d.Removed && !d.over(k, seen) {
			s := TargetStatus{Target: d.Target, Removed: true}
			byGroup[k.Group] = append(byGroup[k.Group], s.drained(k, d, seen))
		}
	}
	return byGroup
}

func groupStatus(g *TargetGroup, used bool, removed []TargetStatus, seen View) TargetGroupStatus {
	status := TargetGroupStatus{
		Name: g.Name, Protocol: g.Protocol, ClientIP: g.ClientIP,
		Targets: make([]TargetStatus, 0, len(g.Targets)+len(removed)),
	}
	var able, judged, healthy int
	for _, t := range g.Targets {
		s := targetStatus(g, t, used, seen)
		status.Targets = append(status.Targets, s)
		if !s.able() {
			continue
		}
		able++
		switch s.State {
		case Healthy:
			healthy++
			judged++
		case Unhealthy, UnhealthyDraining:
			judged++
		}
	}
	status.Targets = append(status.Targets, removed...)
	slices.SortFunc(status.Targets, func(a, b TargetStatus) int {
		return a.Target.AddrPort().Compare(b.Target.AddrPort())
	})
	// Targets without a verdict yet may turn out healthy: as long as there is one
	// to send to, they are waited for.
	undecided := able - judged
	below := judged > 0 && g.FailOpen.below(healthy, able) && (healthy == 0 || g.FailOpen.below(healthy+undecided, able))
	status.FailOpen = seen.FailOpen[g.Name].next(below, seen.Now)
	for i := range status.Targets {
		s := &status.Targets[i]
		if s.able() && (judged == 0 || status.FailOpen.Open || s.State == Healthy) {
			s.Share = s.Target.Weight
		}
		if s.State == Unhealthy && !s.Held && s.Share == 0 {
			s.cutUnhealthy(g, seen)
		}
	}
	return status
}

// below reports whether healthy targets out of all are too few.
func (f FailOpen) below(healthy, all int) bool {
	return healthy < f.MinimumHealthyCount || healthy*100 < f.MinimumHealthyPercentage*all
}

// able reports whether the target may take new flows if its health permits.
func (s TargetStatus) able() bool {
	return s.Target.Weight > 0 && !s.Removed && s.State != Draining && s.State != Unused
}

// targetStatus is the life of one target; its Share is decided by the group.
func targetStatus(g *TargetGroup, t Target, used bool, seen View) TargetStatus {
	key := TargetKey{Group: g.Name, AddrPort: t.AddrPort()}
	status := TargetStatus{Target: t, Health: seen.Health[key], Probed: seen.Health[key], Hold: seen.Holds[key]}
	if !used {
		status.Health = Health{State: Unused, Reason: ReasonNotInUse, Description: "no listener forwards to the target group"}
		return status
	}
	if d, ok := seen.Drains[key]; ok && !d.Removed {
		return status.drained(key, d, seen)
	}
	failed := status.State == Unhealthy || status.State == UnhealthyDraining
	if status.Hold.inForce(seen.Now) && !failed && g.Passive.MaxFailures > 0 {
		status.Held, status.Health, status.Until = true, status.Hold.health(), status.Hold.Until
		return status
	}
	switch status.State {
	case Healthy:
	case Unhealthy, UnhealthyDraining:
		status.State = Unhealthy
		end := status.Since.Add(g.Unhealthy.DrainingInterval)
		if !g.Unhealthy.ConnectionTermination && seen.Now.Before(end) {
			status.State, status.Until = UnhealthyDraining, end
		}
	default:
		status.State = Initial
		if status.Reason == ReasonNone {
			status.Reason = ReasonInitialHealthChecking
		}
	}
	return status
}

// drained is the status of a target that is being deregistered.
func (s TargetStatus) drained(k TargetKey, d Drain, seen View) TargetStatus {
	if seen.Now.Before(d.Until) {
		s.Health = Health{State: Draining, Reason: ReasonDeregistrationInProgress, Since: d.Since}
		s.Until = d.Until
		return s
	}
	s.Health = Health{State: Unused, Reason: ReasonNotRegistered, Since: d.Until}
	if d.Terminate && !d.Done {
		s.Cut = true
		s.terminate(seen.endsFrom(k, d.Until), seen.Now)
	}
	return s
}

// cutUnhealthy ends the flows of a target that failed and takes no new ones, if
// the group says so.
func (s *TargetStatus) cutUnhealthy(g *TargetGroup, seen View) {
	if !g.Unhealthy.ConnectionTermination && g.Unhealthy.DrainingInterval == 0 {
		return
	}
	s.Cut = true
	from := s.Since
	if !g.Unhealthy.ConnectionTermination {
		from = from.Add(g.Unhealthy.DrainingInterval)
	}
	s.terminate(seen.endsFrom(s.key(g.Name), from), seen.Now)
}

// EndsFlowsSince is what View.Leftover has of a target whose flows are ended until
// then.
func EndsFlowsSince(until time.Time) time.Time { return until.Add(-terminateFor) }

// terminate ends the target's flows for a while after from.
func (s *TargetStatus) terminate(from, now time.Time) {
	if until := from.Add(terminateFor); now.Before(until) {
		s.Terminate, s.TerminateUntil = true, until
	}
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
