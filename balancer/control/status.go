package control

import (
	"maps"
	"net/netip"
	"time"

	"nlb/balancer"
)

// Status is what the daemon says of itself. Fields are added and never renamed
// or removed.
type Status struct {
	Dataplane    string        `json:"dataplane"`
	Apply        Apply         `json:"apply"`
	Reload       Reload        `json:"reload"`
	Listeners    []Listener    `json:"listeners"`
	TargetGroups []TargetGroup `json:"target_groups"`
	// Totals counts what happened to new flows that no target got, and other
	// events, by the names of the dataplane's counters; see its README.
	Totals map[string]uint64 `json:"totals"`
	// Conntrack says how full the table of flows is; absent where that cannot be read.
	Conntrack *Conntrack `json:"conntrack,omitempty"`
}

// Conntrack is the usage of the kernel's table of flows, everybody's included.
type Conntrack struct {
	Count uint64 `json:"count"`
	Max   uint64 `json:"max"`
	// Alarm is on from when 80 % are in use until fewer than 70 % are.
	Alarm bool `json:"alarm"`
	// Totals since the network namespace's beginning: packets of new flows that found no
	// room, unanswered flows that made room for others, and first packets whose addresses
	// and ports are another flow's, as of an SNAT without a free port.
	DropsTotal          uint64 `json:"drops_total"`
	EarlyDropsTotal     uint64 `json:"early_drops_total"`
	InsertFailuresTotal uint64 `json:"insert_failures_total"`
}

// Counts are what a dataplane counted.
type Counts struct {
	Targets map[balancer.TargetKey]balancer.Counters
	Totals  map[string]uint64
}

// Apply says how well the kernel follows.
type Apply struct {
	// Generation counts the configurations that were put in force.
	Generation uint64 `json:"generation"`
	// Held says that the kernel holds the configuration.
	Held bool `json:"held"`
	// Error is why it does not, or that it follows routes of some time ago, since
	// there are no others; else empty.
	Error string `json:"error"`
	// ConvergedAt is when the last pass without an error ended; absent: never.
	ConvergedAt time.Time `json:"converged_at,omitzero"`
	// TookSeconds is how long that pass took.
	TookSeconds float64 `json:"took_seconds"`
	// Totals since the daemon's start: plans carried out, those of them that
	// undid a stranger's change, passes that failed.
	WritesTotal       uint64 `json:"writes_total"`
	DriftRepairsTotal uint64 `json:"drift_repairs_total"`
	FailuresTotal     uint64 `json:"failures_total"`
	// Latency says how long verdicts took from the probe that decided to the end
	// of the pass that put them into the kernel.
	Latency Latency `json:"verdict_latency"`
	// CountersError is why flows and bytes of some or all targets are null; empty
	// when none are.
	CountersError string `json:"counters_error,omitempty"`
}

// Reload says what came of reloads.
type Reload struct {
	// LastAttemptAt is when the last one began; absent: there was none.
	LastAttemptAt time.Time `json:"last_attempt_at,omitzero"`
	// Success says that it put the file's configuration in force, or that there was
	// none. Error is why it did not; else empty.
	Success bool   `json:"success"`
	Error   string `json:"error"`
	// LastSuccessAt is when one last succeeded; absent: none has.
	LastSuccessAt time.Time `json:"last_success_at,omitzero"`
	// Totals since the daemon's start.
	AttemptsTotal uint64 `json:"attempts_total"`
	FailuresTotal uint64 `json:"failures_total"`
}

// Latency counts durations since the daemon's start.
type Latency struct {
	Count      uint64          `json:"count"`
	SumSeconds float64         `json:"sum_seconds"`
	Buckets    []LatencyBucket `json:"buckets"`
}

// LatencyBucket counts what took up to LeSeconds, cumulatively. What took longer
// than the last one's is in Count alone.
type LatencyBucket struct {
	LeSeconds float64 `json:"le_seconds"`
	Count     uint64  `json:"count"`
}

func latency(l balancer.Latency) Latency {
	out := Latency{Count: l.Count, SumSeconds: l.Sum.Seconds()}
	below := uint64(0)
	for i, bound := range balancer.LatencyBounds {
		below += l.Buckets[i]
		out.Buckets = append(out.Buckets, LatencyBucket{bound.Seconds(), below})
	}
	return out
}

// Listener is one listener of a Status.
type Listener struct {
	Name     string            `json:"name"`
	VIP      netip.Addr        `json:"vip"`
	Port     uint16            `json:"port"`
	Protocol balancer.Protocol `json:"protocol"`
	Forward  []Forward         `json:"forward"`
}

// Forward is one choice of a listener.
type Forward struct {
	TargetGroup string `json:"target_group"`
	Weight      int    `json:"weight"`
}

// TargetGroup is one target group of a Status.
type TargetGroup struct {
	Name     string            `json:"name"`
	Protocol balancer.Protocol `json:"protocol"`
	ClientIP balancer.ClientIP `json:"client_ip"`
	FailOpen bool              `json:"fail_open"`
	// DeregistrationDelay is absent when the group is gone and only the last
	// flows of its targets are left.
	DeregistrationDelay *DeregistrationDelay `json:"deregistration_delay,omitempty"`
	Targets             []Target             `json:"targets"`
}

// DeregistrationDelay is what happens to the flows of a target that leaves.
type DeregistrationDelay struct {
	TimeoutSeconds        float64 `json:"timeout_seconds"`
	ConnectionTermination bool    `json:"connection_termination"`
}

// Target is one target of a TargetGroup.
type Target struct {
	Address netip.Addr `json:"address"`
	Port    uint16     `json:"port"`
	// Number is in the conntrack marks of the target's flows and in the names of its
	// chains; absent where it has none.
	Number uint16 `json:"number,omitempty"`
	// ClientIP is the target's own; absent if it is the group's.
	ClientIP balancer.ClientIP `json:"client_ip,omitzero"`
	// Weight is the configured one, EffectiveWeight the one new flows see.
	Weight          int            `json:"weight"`
	EffectiveWeight int            `json:"effective_weight"`
	State           balancer.State `json:"state"`
	Reason          string         `json:"reason"`
	Description     string         `json:"description"`
	Since           time.Time      `json:"since"`
	// Until is when the state ends by itself; absent when it does not.
	Until time.Time `json:"until,omitzero"`
	// EndsFlowsUntil is until when, at least, its flows are answered with resets;
	// absent when they are not.
	EndsFlowsUntil time.Time `json:"ends_flows_until,omitzero"`
	// Held is why a target that passes its health checks is unhealthy: clients'
	// connections failed. Absent where that is not so.
	Held *Held `json:"held,omitempty"`
	// Removed says that the target is not in the file any more, and is shown
	// because it may have flows.
	Removed bool `json:"removed,omitempty"`
	// Null when the dataplane could not say.
	ActiveFlows   *uint64 `json:"active_flows"`
	NewFlowsTotal *uint64 `json:"new_flows_total"`
	BytesTotal    *uint64 `json:"bytes_total"`
}

// Held is what the passive health check found, and how long it has its way.
type Held struct {
	Since time.Time `json:"since"`
	Until time.Time `json:"until"`
	// Times counts the holds in a row, this one included.
	Times int `json:"times"`
	// Failures counts the connections in a row that had failed.
	Failures uint64 `json:"failures"`
}

// AddrPort is where the target listens.
func (t Target) AddrPort() netip.AddrPort { return netip.AddrPortFrom(t.Address, t.Port) }

// NewStatus tells a snapshot in the words of a Status. Uncounted is the reason
// why the dataplane could not count, if it could not.
func NewStatus(s *balancer.Snapshot, counted Counts, uncounted error) *Status {
	status := &Status{
		Dataplane: s.Spec.Dataplane.String(),
		Apply: Apply{
			Generation:        s.Generation,
			Held:              s.Held,
			Error:             errorText(s.Err),
			ConvergedAt:       s.Converged.UTC(),
			TookSeconds:       s.Took.Seconds(),
			WritesTotal:       s.Writes,
			DriftRepairsTotal: s.Repairs,
			FailuresTotal:     s.Failures,
			Latency:           latency(s.Latency),
			CountersError:     errorText(uncounted),
		},
		Reload:       Reload{Success: true},
		Listeners:    []Listener{},
		TargetGroups: []TargetGroup{},
		Totals:       map[string]uint64{},
	}
	maps.Copy(status.Totals, counted.Totals)
	for _, l := range s.Spec.Listeners {
		status.Listeners = append(status.Listeners, listener(l))
	}
	byName := make(map[string]*balancer.TargetGroup, len(s.Spec.TargetGroups))
	for i := range s.Spec.TargetGroups {
		byName[s.Spec.TargetGroups[i].Name] = &s.Spec.TargetGroups[i]
	}
	for _, g := range s.Groups {
		status.TargetGroups = append(status.TargetGroups, targetGroup(byName[g.Name], g, counted.Targets))
	}
	return status
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func listener(l balancer.Listener) Listener {
	out := Listener{Name: l.Name, VIP: l.VIP, Port: l.Port, Protocol: l.Protocol, Forward: []Forward{}}
	for _, f := range l.Forward {
		out.Forward = append(out.Forward, Forward{TargetGroup: f.TargetGroup, Weight: f.Weight})
	}
	return out
}

func targetGroup(g *balancer.TargetGroup, s balancer.TargetGroupStatus, counted map[balancer.TargetKey]balancer.Counters) TargetGroup {
	out := TargetGroup{Name: s.Name, Protocol: s.Protocol, ClientIP: s.ClientIP, FailOpen: s.FailOpen.Open, Targets: []Target{}}
	if g != nil {
		out.DeregistrationDelay = &DeregistrationDelay{g.DeregistrationDelay.Timeout.Seconds(), g.DeregistrationDelay.ConnectionTermination}
	}
	for _, t := range s.Targets {
		target := Target{
			Address:         t.Target.Address,
			Port:            t.Target.Port,
			ClientIP:        t.Target.ClientIP,
			Weight:          t.Target.Weight,
			EffectiveWeight: t.Share,
			State:           t.State,
			Reason:          t.Reason,
			Description:     t.Description,
			Since:           t.Since.UTC().Truncate(time.Second),
			Until:           utc(t.Until),
			EndsFlowsUntil:  t.TerminateUntil.UTC(),
			Removed:         t.Removed,
		}
		if h := t.Hold; t.Held {
			target.Held = &Held{h.Since.UTC(), h.Until.UTC(), h.Times, h.Failures}
		}
		if counted != nil {
			c := counted[balancer.TargetKey{Group: s.Name, AddrPort: t.Target.AddrPort()}]
			target.ActiveFlows, target.NewFlowsTotal, target.BytesTotal = &c.ActiveFlows, &c.NewFlows, &c.Bytes
		}
		out.Targets = append(out.Targets, target)
	}
	return out
}

// utc keeps the zero time, which is in no zone.
func utc(t time.Time) time.Time {
	if t.IsZero() {
		return t
	}
	return t.UTC().Truncate(time.Second)
}

// SetNumbers fills in the numbers of targets.
func (s *Status) SetNumbers(numbers map[balancer.TargetKey]uint16) {
	s.eachTarget(func(k balancer.TargetKey, t *Target) { t.Number = numbers[k] })
}

// Numbers are those of the targets that have one.
func (s *Status) Numbers() map[balancer.TargetKey]uint16 {
	numbers := make(map[balancer.TargetKey]uint16)
	s.eachTarget(func(k balancer.TargetKey, t *Target) {
		if t.Number > 0 {
			numbers[k] = t.Number
		}
	})
	return numbers
}

func (s *Status) eachTarget(f func(balancer.TargetKey, *Target)) {
	for _, g := range s.TargetGroups {
		for i := range g.Targets {
			t := &g.Targets[i]
			f(balancer.TargetKey{Group: g.Name, AddrPort: t.AddrPort()}, t)
		}
	}
}

// Seen tells back what the daemon knows of its targets, for another run of the
// pure step over the same world: their health, and the Spec in force as far as
// it matters to targets that leave it.
func (s *Status) Seen() (balancer.View, *balancer.Spec) {
	seen := balancer.View{
		Health: make(balancer.HealthView), Holds: make(balancer.Holds), FailOpen: make(map[string]balancer.FailOpenState),
		Leftover: make(map[balancer.TargetKey]time.Time),
	}
	spec := new(balancer.Spec)
	_ = spec.Dataplane.UnmarshalText([]byte(s.Dataplane)) // of a later version, perhaps
	for _, l := range s.Listeners {
		listener := balancer.Listener{Name: l.Name, VIP: l.VIP, Port: l.Port, Protocol: l.Protocol}
		for _, f := range l.Forward {
			listener.Forward = append(listener.Forward, balancer.WeightedGroup{TargetGroup: f.TargetGroup, Weight: f.Weight})
		}
		spec.Listeners = append(spec.Listeners, listener)
	}
	for _, g := range s.TargetGroups {
		// Held, so that a plan does not close what the daemon keeps open.
		seen.FailOpen[g.Name] = balancer.FailOpenState{Open: g.FailOpen, Held: g.FailOpen}
		group := balancer.TargetGroup{Name: g.Name, Protocol: g.Protocol, ClientIP: g.ClientIP}
		if d := g.DeregistrationDelay; d != nil {
			group.DeregistrationDelay = balancer.DeregistrationDelay{
				Timeout: time.Duration(d.TimeoutSeconds * float64(time.Second)), ConnectionTermination: d.ConnectionTermination,
			}
		}
		for _, t := range g.Targets {
			if !t.Removed {
				group.Targets = append(group.Targets, balancer.Target{Address: t.Address, Port: t.Port, Weight: t.Weight, ClientIP: t.ClientIP})
			}
			key := balancer.TargetKey{Group: g.Name, AddrPort: t.AddrPort()}
			if !t.EndsFlowsUntil.IsZero() {
				seen.Leftover[key] = balancer.EndsFlowsSince(t.EndsFlowsUntil)
			}
			if h := t.Held; h != nil {
				seen.Health[key] = balancer.Health{State: balancer.Healthy, Since: h.Since}
				seen.Holds[key] = balancer.Hold(*h)
				continue
			}
			switch t.State {
			case balancer.Draining, balancer.Unused, balancer.Initial:
				// Says nothing of the target's health.
			default:
				seen.Health[key] = balancer.Health{State: t.State, Reason: t.Reason, Description: t.Description, Since: t.Since}
			}
		}
		if g.DeregistrationDelay != nil {
			spec.TargetGroups = append(spec.TargetGroups, group)
		}
	}
	return seen, spec
}
