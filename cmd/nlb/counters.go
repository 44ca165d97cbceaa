package main

import (
	"context"

	"nlb/balancer"
	"nlb/balancer/conntrack"
	"nlb/balancer/nft"
)

// A tally puts together what two kernel interfaces count: the dataplane knows
// how many flows began and which target a mark stands for, conntrack what the
// flows carry.
type tally struct {
	dataplane *nft.Dataplane
	flows     *conntrack.Tracker
}

// counters are what each target's flows did.
func (t tally) counters(ctx context.Context) (map[balancer.TargetKey]balancer.Counters, error) {
	events, err := t.dataplane.Events(ctx)
	if err != nil {
		return nil, err
	}
	carried, err := t.flows.Counts(ctx)
	if err != nil {
		return nil, err
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
	return out, nil
}
