package web

import (
	"net/netip"
	"slices"
	"time"

	"nlb/balancer/control"
)

// A history is what the samples say of the past, in columns: entry i of each is
// about the step that ended at At[i]. Null stands for what is not known.
//
// Samples are taken while somebody looks, be it at this. Between two of them is a
// step, or as much more as nobody looked; rates are over the time that passed.
type history struct {
	StepSeconds float64       `json:"step_seconds"`
	At          []time.Time   `json:"at"` // UTC
	Listeners   []namedSeries `json:"listeners"`
	// TargetGroups are all there are, with the targets of those that were asked for.
	TargetGroups []groupSeries `json:"target_groups"`
}

// A series has the columns of one listener, group or target.
type series struct {
	ActiveFlows       []number `json:"active_flows"`
	NewFlowsPerSecond []number `json:"new_flows_per_second"`
	BytesPerSecond    []number `json:"bytes_per_second"`
}

type namedSeries struct {
	Name string `json:"name"`
	series
}

type groupSeries struct {
	Name string `json:"name"`
	series
	Targets []targetSeries `json:"targets,omitempty"`
}

type targetSeries struct {
	Address netip.Addr `json:"address"`
	Port    uint16     `json:"port"`
	series
}

func (s *series) add(p point) {
	s.ActiveFlows = append(s.ActiveFlows, number(p.active))
	s.NewFlowsPerSecond = append(s.NewFlowsPerSecond, number(p.flows))
	s.BytesPerSecond = append(s.BytesPerSecond, number(p.bytes))
}

// newHistory has the listeners and groups of the present, and the targets of some
// of the groups.
func newHistory(seen past, withTargets []string) history {
	h := history{
		StepSeconds: seen.step.Seconds(), At: make([]time.Time, 0, len(seen.samples)),
		Listeners: []namedSeries{}, TargetGroups: []groupSeries{},
	}
	for _, s := range seen.samples {
		h.At = append(h.At, moment(s.at))
	}
	for _, l := range seen.status.Listeners {
		h.Listeners = append(h.Listeners, namedSeries{Name: l.Name})
	}
	for _, s := range seen.samples {
		for i, p := range listenerPoints(seen.status, s) {
			h.Listeners[i].add(p)
		}
	}
	for _, g := range seen.status.TargetGroups {
		row := groupSeries{Name: g.Name}
		for _, s := range seen.samples {
			row.add(sum(s.of(g.Name)))
		}
		if slices.Contains(withTargets, g.Name) {
			row.Targets = targetHistory(g, seen.samples)
		}
		h.TargetGroups = append(h.TargetGroups, row)
	}
	return h
}

// targetHistory finds the targets of a group in samples that may have had others.
func targetHistory(g control.TargetGroup, samples []sample) []targetSeries {
	rows := make([]targetSeries, 0, len(g.Targets))
	for _, t := range g.Targets {
		rows = append(rows, targetSeries{Address: t.Address, Port: t.Port})
	}
	var (
		places map[netip.AddrPort]int
		of     *layout
	)
	for _, s := range samples {
		part := s.layout.groups[g.Name]
		if s.layout != of {
			of, places = s.layout, make(map[netip.AddrPort]int, part.end-part.first)
			for i := part.first; i < part.end; i++ {
				places[of.targets[i]] = i
			}
		}
		for i, t := range g.Targets {
			if place, ok := places[t.AddrPort()]; ok {
				rows[i].add(s.points[place])
			} else {
				rows[i].add(nothingKnown)
			}
		}
	}
	return rows
}

// listenerPoints are what came through each listener of a status. Flows are
// counted by target, so that is the sum of its groups where no other listener
// leads to one of them, and else not known.
func listenerPoints(status *control.Status, s sample) []point {
	users := make(map[string]int)
	for _, l := range status.Listeners {
		for _, f := range l.Forward {
			users[f.TargetGroup]++
		}
	}
	points := make([]point, 0, len(status.Listeners))
	for _, l := range status.Listeners {
		total := nothingKnown
		for _, f := range l.Forward {
			if users[f.TargetGroup] > 1 {
				total = nothingKnown
				break
			}
			total = total.plus(sum(s.of(f.TargetGroup)))
		}
		points = append(points, total)
	}
	return points
}

// moment is a time as it is told: UTC, and no finer than a browser's clock.
func moment(t time.Time) time.Time { return t.UTC().Truncate(time.Millisecond) }
