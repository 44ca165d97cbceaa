package main

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"nlb/balancer/conntrack"
	"nlb/balancer/control"
)

// TestGaugeSaysItOnce has a table fill and empty around the mark: each way is logged
// once, and so are flows that it refuses again and again, and an error that lasts.
func TestGaugeSaysItOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zapcore.InfoLevel)
		counts := []uint64{10, 79, 80, 81, 79, 82, 69, 70, 71, 90}
		i := 0
		g := newGauge(func(context.Context) (conntrack.Usage, error) {
			i++
			if i > len(counts) {
				return conntrack.Usage{}, errors.New("gone")
			}
			return conntrack.Usage{Entries: counts[i-1], Limit: 100, Dropped: 3, EarlyDropped: 4, InsertFailed: uint64(max(0, i-7))}, nil
		}, zap.New(core))
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(len(counts))*watching-watching/2)
		defer cancel()
		if err := g.Run(ctx); err != nil {
			t.Fatal(err)
		}
		i = len(counts) - 1
		var s control.Status
		g.describe(t.Context(), &s)
		if diff := cmp.Diff(&control.Conntrack{Count: 90, Max: 100, Alarm: true, DropsTotal: 3, EarlyDropsTotal: 4, InsertFailuresTotal: 3}, s.Conntrack); diff != "" {
			t.Errorf("status (-want +got):\n%s", diff)
		}
		s.Conntrack = nil
		g.look(t.Context())
		if g.describe(t.Context(), &s); s.Conntrack != nil {
			t.Errorf("a usage that cannot be read is %+v", s.Conntrack)
		}
		var levels []string
		for _, e := range logs.All() {
			levels = append(levels, e.Level.String())
		}
		if diff := cmp.Diff([]string{"warn", "info", "warn", "warn", "warn"}, levels); diff != "" {
			t.Errorf("levels of what was logged (-want +got):\n%s", diff)
		}
	})
}
