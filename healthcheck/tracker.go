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
//
// A target that comes back and fails again within relapse answers, time after
// time, needs twice the successes to return from the second time on, up to
// steadfast, until it has stayed longer: a verdict that turns with every answer
// would have every probe of a thousand targets rewrite the kernel's tables. To
// fail never takes longer.
type Tracker struct {
	state              State
	healthy, unhealthy int // thresholds
	streak             int // answers in a row that speak for leaving state
	// needed successes make an unhealthy target healthy.
	needed int
	// lasted counts the answers since the target returned, up to relapse; a
	// target that never failed is as good as one that returned long ago.
	lasted int
	// relapses counts the returns in a row that did not last.
	relapses int
}

const (
	relapse = 20
	// steadfast is the largest threshold there is in ELBv2.
	steadfast = 10
)

// NewTracker returns the Tracker of a new target. Thresholds below one count
// as one.
func NewTracker(healthyThreshold, unhealthyThreshold int) Tracker {
	healthy := max(healthyThreshold, 1)
	return Tracker{healthy: healthy, unhealthy: max(unhealthyThreshold, 1), needed: healthy, lasted: relapse}
}

// State returns what the answers so far amount to.
func (t Tracker) State() State { return t.state }

// Observe returns the Tracker after one more answer, and whether its state is
// another.
func (t Tracker) Observe(ok bool) (next Tracker, changed bool) {
	if t.state == Healthy {
		t.lasted = min(t.lasted+1, relapse)
	}
	if ok == (t.state == Healthy) && t.state != Initial {
		t.streak = 0
		return t, false
	}
	if ok && t.state == Initial {
		return t.enter(Healthy), true
	}
	t.streak++
	switch {
	case ok && t.streak >= t.needed:
		t.lasted = 0
		return t.enter(Healthy), true
	case !ok && t.streak >= t.unhealthy:
		return t.fail(), true
	}
	return t, false
}

// fail is the way to Unhealthy, and decides what the way back takes.
func (t Tracker) fail() Tracker {
	if t.lasted < relapse {
		t.relapses++
	} else {
		t.relapses = 0
	}
	t.needed = t.healthy
	for n := 1; n < t.relapses && t.needed < steadfast; n++ {
		t.needed = min(2*t.needed, steadfast)
	}
	return t.enter(Unhealthy)
}

func (t Tracker) enter(s State) Tracker {
	t.state, t.streak = s, 0
	return t
}

// adopt returns the Tracker with another one's state and its own thresholds.
func (t Tracker) adopt(other Tracker) Tracker { return t.enter(other.state) }
