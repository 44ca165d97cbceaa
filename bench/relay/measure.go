package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// samples are by contestant and round.
type samples [][]sample

// runRounds does the rounds.
func runRounds(ctx context.Context, sites []*site, o *options, progress io.Writer) (samples, error) {
	all := make(samples, len(sites))
	for n := range o.rounds {
		fmt.Fprintf(progress, "round %d of %d\n", n+1, o.rounds)
		got := make([]sample, len(sites))
		for _, l := range loads {
			runtime.GC() // main has turned off the rest
			if err := takeTurns(ctx, sites, l, o.share(), got); err != nil {
				return nil, fmt.Errorf("%s: %w", l.name, err)
			}
		}
		for i := range got {
			slices.Sort(got[i].latencies)
			if len(got[i].latencies) == 0 {
				return nil, fmt.Errorf("%s: no response at all", sites[i].name)
			}
			all[i] = append(all[i], got[i])
		}
	}
	return all, nil
}

// takeTurns lets the sites take turns with a load, in an order that changes,
// until each has had its share.
func takeTurns(ctx context.Context, sites []*site, l load, share time.Duration, got []sample) error {
	turn := min(l.turn, share)
	for range max(1, int((share+turn-1)/turn)) {
		for _, i := range rand.Perm(len(sites)) {
			if err := ctx.Err(); err != nil {
				return err
			}
			s := sites[i]
			err := s.Clients[0].Do(func() error {
				// Wake-ups are for the moment, not for 50 µs about it. The thread may be
				// any, and keeps it.
				if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
					return fmt.Errorf("timer slack: %w", err)
				}
				return l.run(s, turn, &got[i])
			})
			if err != nil {
				if s.Balancer.Ended() {
					err = errors.Join(err, errors.New("it has ended"))
				}
				return fmt.Errorf("%s: %w: %s", s.name, err, s.Balancer.Said())
			}
		}
	}
	return nil
}
