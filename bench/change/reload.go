package change

import (
	"context"
	"net/netip"
	"slices"
	"time"
)

const (
	// reloadRate tells four targets apart within milliseconds, and is far from what
	// the slowest relay can take while its next process starts on the same core.
	reloadRate    = time.Second / 1000
	reloadTargets = 4
	// A target is out of use when so many flows for each target have gone to the
	// others since its last one: the chance that a random choice passes it over
	// as often is e^-15.
	passedOver = 15
	// pause is for a contestant to tidy up after a reload.
	pause = 100 * time.Millisecond
)

// Reloads are what came of them.
type reloads struct {
	added, removed []time.Duration
	failed, all    int
	reasons        string // of failures
}

// reload reloads a running contestant n times under load: a target is removed,
// and added again.
func (s *site) reload(ctx context.Context, p plan, n int) (r reloads, err error) {
	by := p.services[0]
	l := load{to: by.at(), every: reloadRate}
	if err := s.settle(ctx, l, by.targets); err != nil {
		return r, err
	}
	s.count()
	for range n / 2 {
		removed, err := s.remove(ctx, p, 0, l)
		if err != nil {
			return r, err
		}
		added, err := s.add(ctx, p, l)
		if err != nil {
			return r, err
		}
		r.removed, r.added = append(r.removed, removed), append(r.added, added)
		r.all += 2
	}
	err = s.drain(ctx)
	r.failed, r.reasons = s.failed, s.why()
	return r, s.explain(err)
}

// remove takes the last target away from one of a plan's services, which the
// load is for, and returns how long after the order it got its last flow.
func (s *site) remove(ctx context.Context, p plan, n int, l load) (time.Duration, error) {
	all := p.services[n].targets
	gone := all[len(all)-1]
	o, err := s.prepare(ctx, p.without(n, len(all)-1))
	if err != nil {
		return 0, err
	}
	began, err := s.give(ctx, o, l, gone, func() bool { return s.wire.others(gone) >= passedOver*len(all) })
	if a := s.wire.of(gone); a.n > 0 {
		return a.last.Sub(began), err
	}
	return 0, err
}

// add goes back to the plan of before remove, and returns how long after the
// order the target got its first flow.
func (s *site) add(ctx context.Context, p plan, l load) (time.Duration, error) {
	all := p.services[0].targets
	back := all[len(all)-1]
	o, err := s.prepare(ctx, p.next())
	if err != nil {
		return 0, err
	}
	began, err := s.give(ctx, o, l, back, func() bool { return s.wire.of(back).n > 0 })
	return s.wire.of(back).first.Sub(began), err
}

// give gives an order about a target under load. It returns when it did so, as
// soon as a condition holds and the contestant has had time to tidy up.
func (s *site) give(ctx context.Context, o *order, l load, about netip.Addr, until func() bool) (began time.Time, err error) {
	if err := s.run(ctx, l, startTime, func() bool { return s.heard(o) }); err != nil {
		return began, s.explain(err)
	}
	s.wire.forget(about)
	began = time.Now()
	if err := o.give(); err != nil {
		return began, s.explain(err)
	}
	if err := s.run(ctx, l, startTime, until); err != nil {
		return began, s.explain(err)
	}
	if err := o.wait(); err != nil {
		return began, s.explain(err)
	}
	return began, s.explain(s.pass(ctx, l, pause))
}

// middle is the median of durations, of which there is one at least.
func middle(all []time.Duration) time.Duration {
	sorted := slices.Sorted(slices.Values(all))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}
