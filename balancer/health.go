package balancer

import "time"

// A State is where a target stands in its life, in ELBv2's words.
type State uint8

const (
	Initial State = iota + 1
	Healthy
	Unhealthy
	UnhealthyDraining
	Draining
	Unused
)

var stateNames = map[State]string{
	Initial: "initial", Healthy: "healthy", Unhealthy: "unhealthy",
	UnhealthyDraining: "unhealthy.draining", Draining: "draining", Unused: "unused",
}

func (s State) String() string                { return enumName(stateNames, s) }
func (s State) MarshalText() ([]byte, error)  { return enumText(stateNames, s) }
func (s *State) UnmarshalText(b []byte) error { return enumParse(stateNames, s, b, "a target state") }

// Reason codes of target health (ELBv2 API, TargetHealth.Reason).
const (
	ReasonNone                     = ""
	ReasonRegistrationInProgress   = "Elb.RegistrationInProgress"
	ReasonInitialHealthChecking    = "Elb.InitialHealthChecking"
	ReasonFailedHealthChecks       = "Target.FailedHealthChecks"
	ReasonTimeout                  = "Target.Timeout"
	ReasonResponseCodeMismatch     = "Target.ResponseCodeMismatch"
	ReasonDeregistrationInProgress = "Target.DeregistrationInProgress"
	ReasonNotInUse                 = "Target.NotInUse"
	ReasonNotRegistered            = "Target.NotRegistered"
)

// Health is what is known of a target. The zero value says nothing was
// observed yet, which is Initial.
type Health struct {
	State       State
	Reason      string // one of the reason codes
	Description string // the last error, in words
	Since       time.Time
}

// same reports whether h and o say the same.
func (h Health) same(o Health) bool {
	return h.State == o.State && h.Reason == o.Reason && h.Description == o.Description && h.Since.Equal(o.Since)
}

// A HealthView has what the health checks found, by target. A target that is
// not in it is Initial.
type HealthView map[TargetKey]Health
