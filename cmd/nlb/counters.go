package main

import (
	"context"

	"nlb/balancer"
	"nlb/balancer/conntrack"
	"nlb/balancer/control"
	"nlb/balancer/nft"
)

// A tally puts together what two kernel interfaces count: the dataplane knows
// how many flows began and which target a mark stands for, conntrack what the
// flows carry.
type tally struct {
	dataplane *nft.Dataplane
	flows     *conntrack.Tracker
}

// counts are what each target's flows did, and what was dropped.
func (t tally) counts(ctx context.Context) (control.Counts, error) {
	events, err := t.dataplane.Events(ctx)
	if err != nil {
		return control.Counts{}, err
	}
	carried, err := t.flows.Counts(ctx)
	if err != nil {
		return control.Counts{}, err
	}
	out := make(map[balancer.TargetKey]balancer.Counters, len(events.NewFlows))
	for target, n := range events.NewFlows {
		out[target] = balancer.Counters{NewFlows: n}
	}
	for mark, c := range carried {
		target, ok := t.dataplane.TargetOf(nft.Mark(mark))
		if !ok {
			continue // flows of a target that has left
		}
		counted := out[target]
		counted.ActiveFlows, counted.Bytes = c.Active, c.Bytes
		out[target] = counted
	}
	return control.Counts{Targets: out, Totals: events.Totals}, nil
}
