package main

import (
	"context"
	"sync"
	"time"

	"go.uber.org/zap"

	"nlb/balancer/conntrack"
	"nlb/balancer/control"
	"nlb/balancer/events"
)

// watching is how often the table's usage is looked at. A flood fills an empty table of
// the kernel's default size in about that time.
const watching = time.Second

// A gauge knows how full the conntrack table is.
type gauge struct {
	log  *zap.Logger
	read func(context.Context) (conntrack.Usage, error)

	mu       sync.Mutex // guards the rest
	usage    conntrack.Usage
	err      error // why there is no usage
	alarm    conntrack.Alarm
	shortage conntrack.Shortage
}

func newGauge(read func(context.Context) (conntrack.Usage, error), log *zap.Logger) *gauge {
	return &gauge{log: log, read: read}
}

// Run looks again and again until ctx ends. It warns when the table is nearly full or
// refuses flows, and says when it has room again.
func (g *gauge) Run(ctx context.Context) error {
	tick := time.NewTicker(watching)
	defer tick.Stop()
	for {
		g.look(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// look takes a reading, and logs what it changes.
func (g *gauge) look(ctx context.Context) {
	usage, err := g.read(ctx)
	g.mu.Lock()
	defer g.mu.Unlock()
	if err != nil {
		if g.err == nil && ctx.Err() == nil {
			g.log.Warn("how full the conntrack table is cannot be read", events.ConntrackUnread.Field(), zap.Error(err))
		}
		g.err = err
		return
	}
	g.usage, g.err = usage, nil
	if n := g.shortage.Hear(usage, time.Now()); n > 0 {
		g.log.Warn("new flows are dropped because others have their addresses and ports: with SNAT, add source_addresses or targets",
			events.FlowsRefused.Field(), zap.Uint64("refused", n), zap.Uint64("refused_total", usage.InsertFailed))
	}
	if !g.alarm.Hear(usage) {
		return
	}
	count, most := zap.Uint64("count", usage.Entries), zap.Uint64("max", usage.Limit)
	dropped, early := zap.Uint64("dropped", usage.Dropped), zap.Uint64("early_dropped", usage.EarlyDropped)
	if g.alarm.On() {
		g.log.Warn("the conntrack table is nearly full: new flows are dropped when it is (raise net.netfilter.nf_conntrack_max)",
			events.ConntrackNearlyFull.Field(), count, most, dropped, early)
	} else {
		g.log.Info("the conntrack table has room again", events.ConntrackRelaxed.Field(), count, most, dropped, early)
	}
}

// describe adds the usage to a Status, as it is now.
func (g *gauge) describe(ctx context.Context, s *control.Status) {
	g.look(ctx)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err != nil {
		return
	}
	s.Conntrack = &control.Conntrack{
		Count: g.usage.Entries, Max: g.usage.Limit, Alarm: g.alarm.On(),
		DropsTotal: g.usage.Dropped, EarlyDropsTotal: g.usage.EarlyDropped, InsertFailuresTotal: g.usage.InsertFailed,
	}
}
