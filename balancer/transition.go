package balancer

import (
	"maps"
	"slices"
	"time"

	"go.uber.org/zap"

	"nlb/balancer/events"
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

// logTransitions says what became of targets and groups that were there before,
// and which drains began and ended.
func logTransitions(log *zap.Logger, known map[TargetKey]*TargetStatus, before, now []TargetGroupStatus) {
	failOpen := make(map[string]bool)
	draining := make(map[TargetKey]bool)
	for _, g := range before {
		failOpen[g.Name] = g.FailOpen.Open
		for i := range g.Targets {
			if t := &g.Targets[i]; t.State == Draining {
				draining[t.key(g.Name)] = true
			}
		}
	}
	for _, g := range now {
		for i := range g.Targets {
			t := &g.Targets[i]
			key := t.key(g.Name)
			if b := known[key]; b != nil && b.State != t.State {
				log.Info("target health changed",
					events.TargetStateChanged.Field(), zap.String("target_group", g.Name), zap.Stringer("target", t.Target.AddrPort()),
					zap.Stringer("from", b.State), zap.Stringer("to", t.State),
					zap.String("reason", t.Reason), zap.String("description", t.Description))
			}
			logDrain(log, key, t, draining[key])
			delete(draining, key)
		}
		switch {
		case g.FailOpen.Open && !failOpen[g.Name]:
			log.Warn("target group fails open: too few targets are healthy, new flows go to all of them",
				events.FailOpenBegan.Field(), zap.String("target_group", g.Name))
		case !g.FailOpen.Open && failOpen[g.Name]:
			log.Info("target group no longer fails open: new flows go to healthy targets only",
				events.FailOpenEnded.Field(), zap.String("target_group", g.Name))
		}
	}
	for _, key := range slices.SortedFunc(maps.Keys(draining), TargetKey.Compare) {
		logDrainEnd(log, key, drainExpired) // it had left the Spec, and now it is gone
	}
}

// What a drain came to, as the events say.
const (
	drainExpired    = "expired"
	drainRegistered = "registered"
	drainNotInUse   = "not_in_use"
)

// logDrain says whether a drain of the target began or ended. Was says that it
// drained before.
func logDrain(log *zap.Logger, key TargetKey, t *TargetStatus, was bool) {
	is := t.State == Draining
	switch {
	case is && !was:
		log.Info("target drains", events.DrainStarted.Field(), zap.String("target_group", key.Group),
			zap.Stringer("target", key.AddrPort), zap.Time("until", t.Until), zap.Bool("removed", t.Removed))
	case was && !is && t.State != Unused:
		logDrainEnd(log, key, drainRegistered)
	case was && !is && t.Reason == ReasonNotInUse:
		logDrainEnd(log, key, drainNotInUse)
	case was && !is:
		logDrainEnd(log, key, drainExpired)
	}
}

func logDrainEnd(log *zap.Logger, key TargetKey, outcome string) {
	log.Info("target drains no more", events.DrainEnded.Field(), zap.String("target_group", key.Group),
		zap.Stringer("target", key.AddrPort), zap.String("outcome", outcome))
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
