package balancer

import (
	"context"
	"fmt"
	"maps"
	"time"

	"go.uber.org/zap"

	"nlb/balancer/events"
)

// Outcomes count how a target's TCP flows began.
type Outcomes struct {
	// Failed flows were refused, by a reset or an ICMP error, or left without
	// an answer until the client asked again.
	Failed uint64
	// Answered flows got a SYN, ACK. A retransmission may count as another.
	Answered uint64
}

// An OutcomeCounter knows the Outcomes of the targets in observed Pools. They
// only grow while a target is installed; one may be missing for a while, and is
// as long as it has none.
type OutcomeCounter interface {
	Outcomes(ctx context.Context) (map[TargetKey]Outcomes, error)
}

// A Hold keeps a target from new flows because clients found it dead, whatever
// the health checks say. Flows that it has are not touched: a full accept queue
// refuses connections of a target that serves others well.
type Hold struct {
	Since, Until time.Time
	// Times counts the holds in a row, this one included.
	Times int
	// Failures is how many flows in a row failed before it.
	Failures uint64
}

// Holds has the targets that are held, or were not long ago.
type Holds map[TargetKey]Hold

// inForce reports whether the target is held at a moment.
func (h Hold) inForce(now time.Time) bool { return now.Before(h.Until) }

// next is the hold of a target that failed again.
func (h Hold) next(p PassiveCheck, failures uint64, now time.Time) Hold {
	times := 1
	if h.Times > 0 && now.Before(h.Until.Add(p.MaxHold)) {
		times = h.Times + 1
	}
	length := p.Hold
	for n := 1; n < times && length < p.MaxHold; n++ {
		length *= 2
	}
	return Hold{Since: now, Until: now.Add(min(length, p.MaxHold)), Times: times, Failures: failures}
}

// health is what a held target's status says.
func (h Hold) health() Health {
	return Health{
		State: Unhealthy, Reason: ReasonFailedHealthChecks, Since: h.Since,
		Description: fmt.Sprintf("%d connections of clients in a row refused or not answered", h.Failures),
	}
}

// A streak counts a target's flows that failed in a row.
type streak struct {
	seen   Outcomes
	failed uint64
}

// next takes in the outcomes that are known now. Between two looks the order of
// flows is unknown, so that one which was answered counts as the last.
func (s streak) next(o Outcomes) streak {
	failed, answered := grown(s.seen.Failed, o.Failed), grown(s.seen.Answered, o.Answered)
	if answered > 0 {
		return streak{seen: o}
	}
	return streak{seen: o, failed: s.failed + failed}
}

// grown is how much a counter grew, which begins anew with a new table.
func grown(was, is uint64) uint64 {
	if is < was {
		return is
	}
	return is - was
}

// outcomeEvery is how often outcomes are looked at.
const outcomeEvery = 100 * time.Millisecond

// An Observer is the passive health check: it holds targets that fail their
// clients.
type Observer struct {
	reconciler *Reconciler
	counter    OutcomeCounter
	log        *zap.Logger

	// The goroutine of Run owns these.
	streaks map[TargetKey]streak
	failing bool
}

// NewObserver returns an Observer that holds the targets of r's Spec.
func NewObserver(r *Reconciler, counter OutcomeCounter, log *zap.Logger) *Observer {
	return &Observer{reconciler: r, counter: counter, log: log, streaks: make(map[TargetKey]streak)}
}

// Run observes until ctx ends. Then it returns nil.
func (o *Observer) Run(ctx context.Context) error {
	tick := time.NewTicker(outcomeEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if s := o.reconciler.Snapshot(); s != nil && s.observes() {
			o.look(ctx, s)
		}
	}
}

// observes reports whether any target is to be observed.
func (s *Snapshot) observes() bool {
	for i := range s.Desired.Table.Pools {
		if s.Desired.Table.Pools[i].Observed {
			return true
		}
	}
	return false
}

func (o *Observer) look(ctx context.Context, s *Snapshot) {
	outcomes, err := o.counter.Outcomes(ctx)
	if err != nil {
		if !o.failing && ctx.Err() == nil {
			o.log.Error("how clients' connections began cannot be read: no target is judged by them", events.PassiveFailed.Field(), zap.Error(err))
		}
		o.failing = true
		return
	}
	o.failing = false
	streaks, held := observe(s, o.streaks, outcomes, time.Now())
	o.streaks = streaks
	if len(held) > 0 {
		o.reconciler.hold(held)
	}
}

// observe judges targets that take new flows by the outcomes, and returns the
// streaks that are left and the holds that begin.
func observe(s *Snapshot, before map[TargetKey]streak, outcomes map[TargetKey]Outcomes, now time.Time) (map[TargetKey]streak, Holds) {
	after := make(map[TargetKey]streak, len(before))
	held := make(Holds)
	for _, g := range s.Groups {
		group := s.Spec.Group(g.Name)
		if group == nil || group.Passive.MaxFailures == 0 {
			continue
		}
		for _, t := range g.Targets {
			key := t.key(g.Name)
			was, known := before[key]
			counted, told := outcomes[key]
			switch {
			case !known:
				// What was counted before is nobody's: a number may have been another's.
				after[key] = streak{seen: counted}
				continue
			case !told:
				after[key] = was // a dump may overlook it
				continue
			}
			is := was.next(counted)
			if t.State != Healthy && t.State != Initial {
				is.failed = 0
			}
			if is.failed >= uint64(group.Passive.MaxFailures) {
				held[key] = t.Hold.next(group.Passive, is.failed, now)
				is.failed = 0
			}
			after[key] = is
		}
	}
	return after, held
}

// with adds holds of known targets.
func (h Holds) with(more Holds, known map[TargetKey]bool) Holds {
	next := make(Holds, len(h)+len(more))
	maps.Copy(next, h)
	for k, hold := range more {
		if known[k] {
			next[k] = hold
		}
	}
	return next
}

// current are the holds that still mean something: those of targets that are
// judged, until nothing follows from them. Known are spec's targets.
func (h Holds) current(spec *Spec, known map[TargetKey]bool, now time.Time) Holds {
	if len(h) == 0 {
		return h
	}
	next := maps.Clone(h)
	maps.DeleteFunc(next, func(k TargetKey, hold Hold) bool {
		if !known[k] {
			return true
		}
		p := spec.Group(k.Group).Passive
		return p.MaxFailures == 0 || !now.Before(hold.Until.Add(p.MaxHold))
	})
	return next
}
