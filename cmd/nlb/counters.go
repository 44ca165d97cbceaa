package main

import (
	"context"
	"errors"
	"maps"

	"nlb/balancer"
	"nlb/balancer/conntrack"
	"nlb/balancer/control"
	"nlb/balancer/nft"
	"nlb/proxyproto/worker"
)

// A tally puts together what is counted in three places: the dataplane knows how
// many flows began and which target a mark stands for, conntrack what the flows
// carry, and the relay all of its own.
type tally struct {
	dataplane *nft.Dataplane
	flows     *conntrack.Tracker
	relay     *worker.Manager
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
	stats, err := t.relayed(ctx)
	if err != nil {
		return control.Counts{}, err
	}
	for target, s := range stats.Targets {
		counted := out[target]
		counted.NewFlows += s.New
		counted.ActiveFlows += s.Active
		counted.Bytes += s.Bytes
		out[target] = counted
	}
	totals := relayTotals(stats)
	maps.Copy(totals, events.Totals)
	return control.Counts{Targets: out, Totals: totals}, nil
}

// relayed is what the relay counted, if there is one.
func (t tally) relayed(ctx context.Context) (worker.Stats, error) {
	stats, err := t.relay.Stats(ctx)
	if errors.Is(err, worker.ErrNotRunning) {
		return worker.Stats{}, nil
	}
	return stats, err
}

// Outcomes implements balancer.OutcomeCounter.
func (t tally) Outcomes(ctx context.Context) (map[balancer.TargetKey]balancer.Outcomes, error) {
	outcomes, err := t.dataplane.Outcomes(ctx)
	if err != nil {
		return nil, err
	}
	stats, err := t.relayed(ctx)
	if err != nil {
		return nil, err
	}
	for target, s := range stats.Targets {
		sum := outcomes[target]
		sum.Failed += s.Failed
		sum.Answered += s.Answered
		outcomes[target] = sum
	}
	return outcomes, nil
}
