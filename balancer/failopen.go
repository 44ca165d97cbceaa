package balancer

import "time"

// A group at its limit would turn with every probe: a group that fails open
// again within failOpenMemory of having stopped stays open until its limits
// have been kept for failOpenHold.
const (
	failOpenMemory = time.Minute
	failOpenHold   = 10 * time.Second
)

// A FailOpenState is whether a group fails open, and what is remembered so that
// it does not flap.
type FailOpenState struct {
	Open bool
	// Since is when Open last changed; zero if it never did.
	Since time.Time
	// Held says that the group came back to failing open and closes only when
	// its limits have been kept for a while; Until is the end of that while,
	// zero as long as they are not kept.
	Held  bool
	Until time.Time
}

// next is the state once it was seen whether the group is below its limits.
// Opening takes effect at once: there is traffic to be saved.
func (s FailOpenState) next(below bool, now time.Time) FailOpenState {
	switch {
	case below && !s.Open:
		again := !s.Since.IsZero() && now.Sub(s.Since) < failOpenMemory
		return FailOpenState{Open: true, Since: now, Held: again}
	case below:
		s.Until = time.Time{}
	case !s.Open:
	case s.Held && s.Until.IsZero():
		s.Until = now.Add(failOpenHold)
	case !s.Held, !now.Before(s.Until):
		return FailOpenState{Since: now}
	}
	return s
}
