package balancer

import (
	"time"

	"go.uber.org/zap"
)

// stamp fills in since when targets are in a state that no health check dates.
func stamp(known map[TargetKey]*TargetStatus, now []TargetGroupStatus, at time.Time) {
	for _, g := range now {
		for i := range g.Targets {
			t := &g.Targets[i]
			if !t.Since.IsZero() {
				continue
			}
			t.Since = at
			if b := known[t.key(g.Name)]; b != nil && b.State == t.State {
				t.Since = b.Since
			}
		}
	}
}

// logTransitions says what became of targets and groups that were there before.
func logTransitions(log *zap.Logger, known map[TargetKey]*TargetStatus, before, now []TargetGroupStatus) {
	failOpen := make(map[string]bool)
	for _, g := range before {
		failOpen[g.Name] = g.FailOpen.Open
	}
	for _, g := range now {
		for i := range g.Targets {
			t := &g.Targets[i]
			if b := known[t.key(g.Name)]; b != nil && b.State != t.State {
				log.Info("target health changed",
					zap.String("target_group", g.Name), zap.Stringer("target", t.Target.AddrPort()),
					zap.Stringer("from", b.State), zap.Stringer("to", t.State),
					zap.String("reason", t.Reason), zap.String("description", t.Description))
			}
		}
		switch {
		case g.FailOpen.Open && !failOpen[g.Name]:
			log.Warn("target group fails open: too few targets are healthy, new flows go to all of them",
				zap.String("target_group", g.Name))
		case !g.FailOpen.Open && failOpen[g.Name]:
			log.Info("target group no longer fails open: new flows go to healthy targets only",
				zap.String("target_group", g.Name))
		}
	}
}

func (t *TargetStatus) key(group string) TargetKey {
	return TargetKey{Group: group, AddrPort: t.Target.AddrPort()}
}

func statusByKey(groups []TargetGroupStatus) map[TargetKey]*TargetStatus {
	total := 0
	for _, g := range groups {
		total += len(g.Targets)
	}
	byKey := make(map[TargetKey]*TargetStatus, total)
	for _, g := range groups {
		for i := range g.Targets {
			t := &g.Targets[i]
			byKey[t.key(g.Name)] = t
		}
	}
	return byKey
}
