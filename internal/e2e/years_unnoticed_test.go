package e2e

import (
	"fmt"
	"testing"
	"time"

	"nlb/internal/wait"
)

// TestNobodyNotices reloads files that each change something, and replaces daemon
// and relay by another version, under load by every way of the client's address:
// no connection fails, and no flow breaks, misses a byte or goes to another
// target. NLB_LONG=1 makes 100,000 connections by each way, 200 reloads and 20
// upgrades.
func TestNobodyNotices(t *testing.T) {
	t.Parallel()
	reloads, upgrades, calls := 10, 3, 2000 // calls by each way
	load := rush{callers: 2, pause: 5 * time.Millisecond, streams: 3, patience: patience}
	if long() {
		reloads, upgrades, calls = 200, 20, 100_000
		load.callers, load.pause = 6, time.Millisecond
	}
	top, _ := longSite(t)
	var now setting
	d := prepare(t, top, now.config(top).String())
	d.terse = true
	of := releases(t, d)
	d.install(of[0])
	d.start()
	d.waitAllHealthy()
	all := load.begin(t, top)

	begun, upgraded := time.Now(), 0
	for n := range reloads {
		kind := changes[n%len(changes)]
		kind.make(&now)
		if err := d.reload(now.config(top).String()); err != nil {
			t.Fatalf("reload %d, %s: %v", n, kind.what, err)
		}
		if upgraded < upgrades*(n+1)/reloads {
			upgraded++
			end := d.stop
			if upgraded%2 == 0 {
				end = d.kill
			}
			d.upgrade(of[upgraded%2], end)
		}
		untroubled(t, fmt.Sprintf("reload %d, %s", n, kind.what), all, load.streams, calls*(n+1)/reloads)
	}
	took := time.Since(begun)
	d.waitAllHealthy()
	wait.For(t, limit, "nothing to change", d.planned)
	for _, x := range all {
		got := x.stop(t)
		t.Logf("%v: %d well, %d failed", x, got.well, got.failed)
		if x.kind == ofCalls {
			t.Logf("%v: none was answered for %v at most", x, got.gap.Round(time.Millisecond))
		}
		if got.failed > 0 || x.kind == ofStreams && got.open != load.streams {
			t.Errorf("%v: %d failed, %d streams are open, want %d; such as %+v", x, got.failed, got.open, load.streams, got.failures)
		}
	}
	t.Logf("%d reloads and %d upgrades in %v", reloads, upgraded, took.Round(time.Millisecond))
}

// untroubled waits until so many connections were made by each way, and every
// stream has gone on, and fails the test as soon as something failed.
func untroubled(t *testing.T, when string, all []*traffic, streaming, calls int) {
	t.Helper()
	before := make([]int, len(all)) // of streams
	for i, x := range all {
		if x.kind == ofStreams {
			before[i] = x.met(t).well
		}
	}
	wait.For(t, limit, when, func() error {
		made := map[passage]int{}
		for i, x := range all {
			got := x.met(t)
			switch {
			case got.failed > 0:
				t.Fatalf("%s: %v: %d failed, such as %+v", when, x, got.failed, got.failures[0])
			case x.kind == ofCalls:
				made[x.way] += got.well
			case got.open != streaming || got.well == before[i]:
				return fmt.Errorf("%v: %d are open, %d lines were answered", x, got.open, got.well)
			}
		}
		for w, n := range made {
			if n < calls {
				return fmt.Errorf("%s: %d connections, want %d", w.mode, n, calls)
			}
		}
		return nil
	})
}
