package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"nlb/bench/part"
	"nlb/bench/report"
)

// A plan is what will be measured.
type plan struct {
	parts   []planned
	options part.Options
}

// A planned part is one of which something was chosen.
type planned struct {
	part.Part
	metrics []part.Metric // those that were chosen
	rounds  int
}

// choose makes the plan. It is an error if the command line names what there is
// not, or leaves nothing to measure.
func choose(parts []part.Part, o *options) (*plan, error) {
	contestants, err := chooseContestants(o)
	if err != nil {
		return nil, err
	}
	keys, err := chooseKeys("--metrics", o.metrics, metricKeys(parts))
	if err != nil {
		return nil, err
	}
	p := &plan{options: part.Options{Programs: o.programs, Core: o.core, Quick: o.quick, Contestants: contestants}}
	for _, one := range parts {
		if !slices.ContainsFunc(one.Contestants, func(name string) bool { return slices.Contains(contestants, name) }) {
			continue
		}
		chosen := planned{Part: one, rounds: o.rounds}
		for _, m := range one.Metrics {
			if slices.Contains(keys, m.Key) {
				chosen.metrics = append(chosen.metrics, m)
				p.options.Metrics = append(p.options.Metrics, m.Name)
			}
		}
		switch {
		case len(chosen.metrics) == 0:
			continue
		case chosen.rounds > 0:
		case o.quick:
			chosen.rounds = one.QuickRounds
		default:
			chosen.rounds = one.Rounds
		}
		p.parts = append(p.parts, chosen)
	}
	if len(p.parts) == 0 {
		return nil, fmt.Errorf("nothing to measure: none of the chosen contestants is measured in %s", strings.Join(keys, ", "))
	}
	return p, nil
}

// chooseContestants are the names of those with the chosen keys, and the baseline.
func chooseContestants(o *options) ([]string, error) {
	modes, err := chooseKeys("--modes", o.modes, keysOf(report.NLB))
	if err != nil {
		return nil, err
	}
	peers, err := chooseKeys("--peers", o.peers, keysOf(report.Peer))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, c := range part.Contestants {
		if c.Role == report.Baseline || slices.Contains(modes, c.Key) && c.Role == report.NLB ||
			slices.Contains(peers, c.Key) && c.Role == report.Peer {
			names = append(names, c.Name)
		}
	}
	return names, nil
}

// chooseKeys checks a list of the command line: nil is all, none is none.
func chooseKeys(flag string, list, known []string) ([]string, error) {
	if list == nil {
		return known, nil
	}
	if slices.Equal(list, []string{"none"}) {
		return nil, nil
	}
	for _, key := range list {
		if !slices.Contains(known, key) {
			return nil, fmt.Errorf("%s: there is no %q, only %s", flag, key, strings.Join(known, ", "))
		}
	}
	return list, nil
}

// contestants are those that take part, in the order in which they are shown.
func (p *plan) contestants() (all []part.Contestant) {
	for _, c := range part.Contestants {
		wanted := slices.Contains(p.options.Contestants, c.Name)
		if wanted && slices.ContainsFunc(p.parts, func(one planned) bool { return slices.Contains(one.Contestants, c.Name) }) {
			all = append(all, c)
		}
	}
	return all
}

// rounds is the most that a part has.
func (p *plan) rounds() (n int) {
	for _, one := range p.parts {
		n = max(n, one.rounds)
	}
	return n
}

// estimate is how long all of it takes.
func (p *plan) estimate() (all time.Duration) {
	for _, one := range p.parts {
		round, around := one.Estimate(p.options)
		all += around + round*time.Duration(one.rounds)
	}
	return all
}

// ready says what the plan needs and does not find.
func (p *plan) ready() error {
	for _, c := range p.contestants() {
		if err := p.options.Programs.Ready(c.Program); err != nil {
			return err
		}
	}
	return nil
}
