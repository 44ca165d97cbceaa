package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/bench/measure"
)

// A metric is what is counted: packets or connections.
type metric struct {
	name string
	// open prepares a load, in the namespace of the site's client.
	open func(*site) (load, error)
}

// A load makes traffic for a time and counts what was sent and what arrived. It
// runs in the namespace of the site's client.
type load interface {
	run(time.Duration) (sent, received int, err error)
	close()
}

var metrics = []metric{
	{"UDP packets of established flows", func(s *site) (load, error) { return newUDPLoad(s) }},
	{"TCP connections, with a request and a response", func(s *site) (load, error) { return newTCPLoad(s), nil }},
}

// slice is one turn of a way within a round. Short, so that a disturbance meets
// all ways; long against the cache misses at its beginning.
const slice = 10 * time.Millisecond

// A sample is a way's share of one round.
type sample struct {
	sent, received int
	passed         time.Duration // of its slices
	worked         time.Duration // by the core, see clock
	// daemon is nlb's CPU time from the round's beginning to its end, and
	// around how long that was.
	daemon, around time.Duration
}

// rate is per second that the core worked.
func (s sample) rate() float64 { return float64(s.received) / s.worked.Seconds() }

// samples are those of a metric, by way and round.
type samples [][]sample

// runRounds does the rounds of each metric.
func runRounds(ctx context.Context, sites []*site, o options, progress io.Writer) ([]samples, error) {
	softirqd, err := measure.Ksoftirqd(o.core)
	if err != nil {
		return nil, err
	}
	all := make([]samples, len(metrics))
	for m := range metrics {
		all[m] = make(samples, len(sites))
	}
	for n := range o.rounds {
		fmt.Fprintf(progress, "round %d of %d\n", n+1, o.rounds)
		for m, metric := range metrics {
			r := round{sites: sites, softirqd: softirqd}
			got, err := r.run(ctx, metric, o.share())
			if err != nil {
				return nil, fmt.Errorf("%s: %w", metric.name, err)
			}
			for i := range sites {
				all[m][i] = append(all[m][i], got[i])
			}
		}
	}
	return all, nil
}

// A round measures every site once for a metric.
type round struct {
	sites    []*site
	softirqd int
	loads    []load
	got      []sample
}

func (r *round) run(ctx context.Context, m metric, share time.Duration) ([]sample, error) {
	defer func() {
		for _, l := range r.loads {
			l.close()
		}
	}()
	r.got = make([]sample, len(r.sites))
	for _, s := range r.sites {
		if err := r.open(s, m); err != nil {
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
	}
	// Nothing that is measured allocates much: what the last round left is
	// collected here, and main has turned the rest off.
	runtime.GC()
	for i, s := range r.sites {
		if err := r.slice(i, &sample{}); err != nil { // to warm up
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return r.got, r.measure(ctx, share*time.Duration(len(r.sites)))
}

// open begins a site's load. There are no tracked connections then, so that
// each round finds the same table.
func (r *round) open(s *site, m metric) error {
	if err := s.LB.Do(func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) }); err != nil {
		return fmt.Errorf("flush the connections: %w", err)
	}
	return s.Clients[0].Do(func() error {
		l, err := m.open(s)
		if err == nil {
			r.loads = append(r.loads, l)
		}
		return err
	})
}

// measure lets the sites take turns until the time is over, at least once.
func (r *round) measure(ctx context.Context, d time.Duration) error {
	began := time.Now()
	before, err := r.daemons()
	if err != nil {
		return err
	}
	for again := true; again; again = time.Since(began) < d {
		for _, i := range rand.Perm(len(r.sites)) {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := r.slice(i, &r.got[i]); err != nil {
				return fmt.Errorf("%s: %w", r.sites[i].name, err)
			}
		}
	}
	after, err := r.daemons()
	for i := range r.got {
		r.got[i].daemon, r.got[i].around = after[i]-before[i], time.Since(began)
	}
	return err
}

// daemons is the CPU time that each site's nlb has used so far.
func (r *round) daemons() ([]time.Duration, error) {
	used := make([]time.Duration, len(r.sites))
	for i, s := range r.sites {
		pid := s.Balancer.PID()
		if pid == 0 {
			continue
		}
		var err error
		if used[i], err = measure.CPUTime(pid); err != nil {
			return nil, err
		}
	}
	return used, nil
}

// slice is one turn of a site.
func (r *round) slice(i int, to *sample) error {
	s := r.sites[i]
	helpers := []int{r.softirqd}
	if pid := s.Balancer.PID(); pid != 0 {
		helpers = append(helpers, pid)
	}
	return s.Clients[0].Do(func() error {
		c, err := newClock(helpers)
		if err != nil {
			return err
		}
		sent, received, err := r.loads[i].run(slice)
		if err != nil {
			return err
		}
		if received == 0 {
			return errors.New("nothing arrived")
		}
		passed, worked, err := c.elapsed()
		to.sent, to.received = to.sent+sent, to.received+received
		to.passed, to.worked = to.passed+passed, to.worked+worked
		return err
	})
}

// address is where a client's flow from a port goes.
func (s *site) address(from int) unix.SockaddrInet4 {
	a := lab.VIP4
	if s.clientIP == "" && s.nft == "" {
		a = s.Targets[from%targets].Addr4
	}
	return unix.SockaddrInet4{Addr: a.As4(), Port: measure.Port}
}
