package traffic

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"nlb/bench/part"
	"nlb/bench/report"
)

// measure is one load's share of a round.
func (r *runner) measure(ctx context.Context, round int, l *load, out part.Recorder) error {
	var sites []*site
	for _, s := range r.sites {
		if l.wanted(&r.o, s.contestant) {
			sites = append(sites, s)
		}
	}
	if len(sites) == 0 {
		return nil
	}
	for _, s := range sites {
		if err := s.forget(); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	runtime.GC() // Round has turned off the rest
	got, err := takeTurns(ctx, sites, l, r.share(l))
	if err != nil {
		return err
	}
	for i, s := range sites {
		if err := r.record(round, l, s.name, &got[i], out); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

// forget empties the balancer's table of connections, so that each round finds
// the same, and begins to count anew what comes to which target.
func (s *site) forget() error {
	clear(s.station.arrived)
	if err := s.LB.Do(func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) }); err != nil {
		return fmt.Errorf("flush the connections: %w", err)
	}
	return nil
}

// takeTurns lets the sites take turns with a load, in an order that changes,
// until each has had its share.
func takeTurns(ctx context.Context, sites []*site, l *load, share time.Duration) ([]sample, error) {
	got := make([]sample, len(sites))
	turn := min(l.turn, share)
	for range l.turns(share) {
		for _, i := range rand.Perm(len(sites)) {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			if err := sites[i].turn(l, turn, &got[i]); err != nil {
				return nil, fmt.Errorf("%s: %w", sites[i].name, err)
			}
		}
	}
	return got, nil
}

// turn is one of a site's.
func (s *site) turn(l *load, d time.Duration, to *sample) error {
	err := s.traffic(l, d, to)
	if err == nil || s.Balancer.PID() == 0 {
		return err
	}
	if s.Balancer.Ended() {
		err = errors.Join(err, errors.New("it has ended"))
	}
	return fmt.Errorf("%w: %s", err, s.Balancer.Said())
}

func (s *site) traffic(l *load, d time.Duration, to *sample) error {
	return s.Clients[0].Do(func() error {
		// Wake-ups are for the moment, not for 50 µs about it. The thread may be
		// any, and keeps it.
		if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("timer slack: %w", err)
		}
		return l.run(s, d, to)
	})
}

// record keeps what came of a contestant's turns.
func (r *runner) record(round int, l *load, name string, got *sample, out part.Recorder) error {
	for _, y := range l.yields {
		if !r.o.Wants(y.metric, name) {
			continue
		}
		err := out.Measure(report.Measurement{
			Round: round, Metric: y.metric, Case: y.cas, Contestant: name, Value: y.of(got), Unit: unit(y.metric),
		})
		if err != nil {
			return err
		}
		if got.lost == 0 {
			continue
		}
		text := fmt.Sprintf("round %d: %d %s", round, got.lost, l.lost)
		if err := out.Note(report.Note{Metric: y.metric, Case: y.cas, Contestant: name, Text: text}); err != nil {
			return err
		}
	}
	return nil
}
