package main

import (
	"slices"

	"nlb/bench/report"
)

// reachable are those of the parts' goals that a run with this header can judge.
func reachable(p *plan, h *report.Header) (goals []report.Goal) {
	for _, one := range p.parts {
		for _, g := range one.Goals {
			if judgeable(h, g) {
				goals = append(goals, g)
			}
		}
	}
	return goals
}

func judgeable(h *report.Header, g report.Goal) bool {
	metric := slices.ContainsFunc(h.Metrics, func(m report.Metric) bool { return m.Name == g.Metric })
	return metric && takesPart(h, g.Row.Contestant) && takesPart(h, g.Of.Contestant)
}

func takesPart(h *report.Header, name string) bool {
	return slices.ContainsFunc(h.Contestants, func(c report.Contestant) bool { return c.Name == name })
}
