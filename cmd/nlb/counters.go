package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"nlb/balancer"
	"nlb/balancer/conntrack"
	"nlb/balancer/control"
	"nlb/balancer/nft"
	"nlb/proxyproto/worker"
)

// The relay is another process, which may be stopped or busy. What the kernel
// counted must not wait for it: the one is for a passive check that is due ten
// times a second, the other for somebody who looks.
const (
	relayOutcomesWithin = 100 * time.Millisecond
	relayCountsWithin   = time.Second
)

// A tally puts together what is counted in three places: the dataplane knows how
// many flows began and which target a mark stands for, conntrack what the flows
// carry, and the relay all of its own.
type tally struct {
	dataplane interface {
		balancer.OutcomeCounter
		Events(ctx context.Context) (nft.Events, error)
		TargetOf(m nft.Mark) (balancer.TargetKey, bool)
	}
	flows interface {
		Counts(ctx context.Context) (map[uint32]conntrack.Counts, error)
	}
	relay interface {
		Stats(ctx context.Context) (worker.Stats, error)
	}
}

// errRelaySilent says that counts are without the relay's.
var errRelaySilent = errors.New("relayed targets cannot be counted")

// counts are what each target's flows did, and what was dropped. With an error
// that wraps errRelaySilent they are the kernel's alone.
func (t tally) counts(ctx context.Context) (control.Counts, error) {
	counted, err := t.kernelCounts(ctx)
	if err != nil {
		return control.Counts{}, err
	}
	stats, err := t.relayed(ctx, relayCountsWithin)
	if err != nil {
		return counted, fmt.Errorf("%w: %w", errRelaySilent, err)
	}
	for target, s := range stats.Targets {
		sum := counted.Targets[target]
		sum.NewFlows += s.New
		sum.ActiveFlows += s.Active
		sum.Bytes += s.Bytes
		counted.Targets[target] = sum
	}
	maps.Copy(counted.Totals, relayTotals(stats))
	return counted, nil
}

func (t tally) kernelCounts(ctx context.Context) (control.Counts, error) {
	events, err := t.dataplane.Events(ctx)
	if err != nil {
		return control.Counts{}, err
	}
	carried, err := t.flows.Counts(ctx)
	if err != nil {
		return control.Counts{}, err
	}
	out := control.Counts{Targets: make(map[balancer.TargetKey]balancer.Counters, len(events.NewFlows)), Totals: make(map[string]uint64)}
	maps.Copy(out.Totals, events.Totals)
	for target, n := range events.NewFlows {
		out.Targets[target] = balancer.Counters{NewFlows: n}
	}
	for mark, c := range carried {
		target, ok := t.dataplane.TargetOf(nft.Mark(mark))
		if !ok {
			continue // flows of a target that has left
		}
		counted := out.Targets[target]
		counted.ActiveFlows, counted.Bytes, counted.Packets, counted.Resets = c.Active, c.Bytes, c.Packets, c.Resets
		out.Targets[target] = counted
	}
	return out, nil
}

// relayed is what the relay counted, if there is one.
func (t tally) relayed(ctx context.Context, within time.Duration) (worker.Stats, error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	stats, err := t.relay.Stats(ctx)
	if errors.Is(err, worker.ErrNotRunning) {
		return worker.Stats{}, nil
	}
	return stats, err
}

// Outcomes implements balancer.OutcomeCounter. While the relay does not answer,
// which its Manager tells, they are the kernel's alone: an outcome may be missing
// for a while.
func (t tally) Outcomes(ctx context.Context) (map[balancer.TargetKey]balancer.Outcomes, error) {
	outcomes, err := t.dataplane.Outcomes(ctx)
	if err != nil {
		return nil, err
	}
	stats, err := t.relayed(ctx, relayOutcomesWithin)
	if err != nil {
		return outcomes, nil
	}
	for target, s := range stats.Targets {
		sum := outcomes[target]
		sum.Failed += s.Failed
		sum.Answered += s.Answered
		outcomes[target] = sum
	}
	return outcomes, nil
}

// uncountRelayed leaves out what the relay would have said of its targets: that
// they have no flows would be wrong.
func uncountRelayed(status *control.Status) {
	for _, g := range status.TargetGroups {
		for i := range g.Targets {
			t := &g.Targets[i]
			if cmp.Or(t.ClientIP, g.ClientIP) == balancer.ProxyProtocolV2 {
				t.ActiveFlows, t.NewFlowsTotal, t.BytesTotal = nil, nil, nil
			}
		}
	}
}
