package healthcheck

import "fmt"

// A State is what is known of a target, in ELBv2's words.
type State uint8

const (
	// Initial has not been found healthy or unhealthy yet.
	Initial State = iota
	Healthy
	Unhealthy
)

func (s State) String() string {
	switch s {
	case Initial:
		return "initial"
	case Healthy:
		return "healthy"
	case Unhealthy:
		return "unhealthy"
	}
	return fmt.Sprintf("State(%d)", uint8(s))
}

// A Tracker turns answers into a state. It is a value: Observe returns the
// next one.
//
//	initial   ── 1 success ──────────────────────► healthy
//	initial   ── unhealthy threshold failures ───► unhealthy
//	healthy   ── unhealthy threshold failures ───► unhealthy
//	unhealthy ── healthy threshold successes ────► healthy
//
// Successes and failures count when they come in a row. The first success
// admits a new target whatever the threshold ("the load balancer must receive
// one successful health check", Network Load Balancers, Target registration).
type Tracker struct {
	state              State
	healthy, unhealthy int // thresholds
	streak             int // answers in a row that speak for leaving state
}

// NewTracker returns the Tracker of a new target. Thresholds below one count
// as one.
func NewTracker(healthyThreshold, unhealthyThreshold int) Tracker {
	return Tracker{healthy: max(healthyThreshold, 1), unhealthy: max(unhealthyThreshold, 1)}
}

// State returns what the answers so far amount to.
func (t Tracker) State() State { return t.state }

// Observe returns the Tracker after one more answer, and whether its state is
// another.
func (t Tracker) Observe(ok bool) (next Tracker, changed bool) {
	if ok == (t.state == Healthy) && t.state != Initial {
		t.streak = 0
		return t, false
	}
	if ok && t.state == Initial {
		return t.enter(Healthy), true
	}
	t.streak++
	switch {
	case ok && t.streak >= t.healthy:
		return t.enter(Healthy), true
	case !ok && t.streak >= t.unhealthy:
		return t.enter(Unhealthy), true
	}
	return t, false
}

func (t Tracker) enter(s State) Tracker {
	t.state, t.streak = s, 0
	return t
}

// adopt returns the Tracker with another one's state and its own thresholds.
func (t Tracker) adopt(other Tracker) Tracker { return t.enter(other.state) }
