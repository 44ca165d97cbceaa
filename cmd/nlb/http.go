package main

import (
	"context"
	"net/http"

	"nlb/balancer/metrics"
	"nlb/balancer/ready"
	"nlb/balancer/web"
)

// reading is what there is to scrape now. What fails is left out, and the rest is there.
func (d *daemon) reading(ctx context.Context) metrics.Reading {
	r := metrics.Reading{Snapshot: d.reconciler.Snapshot(), Reload: d.reloads.reading(), Failed: make(map[string]error)}
	if counted, err := d.kernel.tally.kernelCounts(ctx); err != nil {
		r.Failed[metrics.SourceDataplane] = err
	} else {
		r.Kernel = &metrics.Kernel{Targets: counted.Targets, Totals: counted.Totals}
	}
	if usage, err := d.kernel.flows.flows.Usage(ctx); err != nil {
		r.Failed[metrics.SourceConntrack] = err
	} else {
		r.Table, r.LostEvents = &usage, d.kernel.flows.flows.Stats().LostEvents
	}
	stats, err := d.kernel.tally.relayed(ctx, relayCountsWithin)
	switch {
	case err != nil:
		r.Failed[metrics.SourceRelay] = err
	case stats.MaxConnections > 0: // a relay runs
		r.Relay = &stats
	}
	return r
}

// newMux is what the daemon answers over HTTP.
func newMux(d *daemon) *http.ServeMux {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", metrics.NewHandler(metrics.NewCollector(version(), d.reading, d.checks.probes), d.log.Named("metrics")))
	mux.Handle("GET "+ready.LivePath, d.health)
	mux.Handle("GET "+ready.ReadyPath, d.health)
	mux.Handle("/", web.Handler(d))
	return mux
}
