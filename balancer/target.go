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
	// Routes says how the host reaches targets. A target that is not in it has
	// no route, or none is known yet.
	Routes map[netip.Addr]Route
	Now    time.Time
}

// A TargetGroupStatus is where the targets of a group stand.
type TargetGroupStatus struct {
	Name string
	// FailOpen says that too few targets are healthy, so that the health checks
	// are overruled and every target takes new flows.
	FailOpen bool
	Targets  []TargetStatus // sorted by address and port
}

// A TargetStatus is where a target stands.
type TargetStatus struct {
	Target Target
	// Health has the state; its Since is zero where nobody recorded one.
	Health
	// Until is when the state ends by itself; zero when it does not.
	Until time.Time
	// Share is the weight that new flows see: the configured one or 0.
	Share int
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
	groups := make([]TargetGroupStatus, 0, len(spec.TargetGroups))
	for i := range spec.TargetGroups {
		g := &spec.TargetGroups[i]
		groups = append(groups, groupStatus(g, used[g.Name], seen))
	}
	slices.SortFunc(groups, func(a, b TargetGroupStatus) int { return cmp.Compare(a.Name, b.Name) })
	return groups
}

func groupStatus(g *TargetGroup, used bool, seen View) TargetGroupStatus {
	status := TargetGroupStatus{Name: g.Name, Targets: make([]TargetStatus, 0, len(g.Targets))}
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
	slices.SortFunc(status.Targets, func(a, b TargetStatus) int {
		return a.Target.AddrPort().Compare(b.Target.AddrPort())
	})
	status.FailOpen = judged > 0 && g.FailOpen.below(healthy, able)
	for i := range status.Targets {
		s := &status.Targets[i]
		if s.able() && (judged == 0 || status.FailOpen || s.State == Healthy) {
			s.Share = s.Target.Weight
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
	return s.Target.Weight > 0 && s.State != Draining && s.State != Unused
}

// targetStatus is the life of one target; its Share is decided by the group.
func targetStatus(g *TargetGroup, t Target, used bool, seen View) TargetStatus {
	key := TargetKey{Group: g.Name, AddrPort: t.AddrPort()}
	status := TargetStatus{Target: t, Health: seen.Health[key]}
	if !used {
		status.Health = Health{State: Unused, Reason: ReasonNotInUse, Description: "no listener forwards to the target group"}
		return status
	}
	if since, ok := seen.Drains[key]; ok {
		return drainStatus(g, status, since, seen.Now)
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

func drainStatus(g *TargetGroup, status TargetStatus, since, now time.Time) TargetStatus {
	end := since.Add(g.DeregistrationDelay.Timeout)
	if now.Before(end) {
		status.Health = Health{State: Draining, Reason: ReasonDeregistrationInProgress, Since: since}
		status.Until = end
		return status
	}
	status.Health = Health{State: Unused, Reason: ReasonNotRegistered, Since: end}
	return status
}
