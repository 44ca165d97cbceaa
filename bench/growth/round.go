package growth

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"time"

	"nlb/bench/measure"
	"nlb/bench/part"
	"nlb/bench/report"
)

// A runner is the part when it is open.
type runner struct {
	care
	sites []*site
	out   *burst
}

// find is the contestant's network for a size; nil if there is none yet.
func (r *runner) find(contestant string, like size) *site {
	for _, s := range r.sites {
		if s.contestant == contestant && s.listeners == like.listeners && s.targets == like.targets {
			return s
		}
	}
	return nil
}

// warmUp has all the sites forward, so that neighbours are known and no error is
// left for a round to find.
func (r *runner) warmUp() error {
	return onThread(func() error {
		for _, s := range r.sites {
			err := s.check()
			if err == nil {
				err = r.turn(&row{site: s})
			}
			if err != nil {
				return fmt.Errorf("%s, %s: %w", s.contestant, s.name, err)
			}
		}
		return nil
	})
}

// onThread runs f on a thread that does nothing else, and without collections:
// what is measured allocates hardly anything.
func onThread(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	runtime.GC()
	return f()
}

// A row is a contestant at a size, and what came of its turns.
type row struct {
	site   *site
	name   string        // of the size
	costs  []float64     // of each batch, ns for a flow
	daemon time.Duration // CPU time that nlb had meanwhile
}

// cost is that of a flow, in ns: with the median of all batches, and with nlb's
// share. Others have the core during one batch of several at most, because they
// get it for longer than a batch takes; nlb would be in none of the median's.
func (w *row) cost() float64 {
	flows := len(w.costs) * batchSize
	return measure.Summarize(w.costs).Median + float64(w.daemon.Nanoseconds())/float64(flows)
}

// turn measures a turn of a row.
func (r *runner) turn(w *row) error {
	r.out.prepare(w.site)
	before, err := w.site.daemon()
	if err != nil {
		return err
	}
	if err := r.out.send(w.site); err != nil {
		return err
	}
	after, err := w.site.daemon()
	if err != nil {
		return err
	}
	w.daemon += after - before
	for _, d := range r.out.took {
		w.costs = append(w.costs, float64(d.Nanoseconds())/batchSize)
	}
	return w.site.forget()
}

// daemon is the CPU time that the site's nlb has had so far; 0 without one.
func (s *site) daemon() (time.Duration, error) {
	pid := s.Balancer.PID()
	if pid == 0 {
		return 0, nil
	}
	return measure.CPUTime(pid)
}

// rows are those of a round, by size.
func (r *runner) rows() [][]*row {
	var all [][]*row
	for _, size := range r.sizes {
		var rows []*row
		for _, c := range contestants {
			if s := r.find(c, size); s != nil {
				rows = append(rows, &row{site: s, name: size.name})
			}
		}
		all = append(all, rows)
	}
	return all
}

// Round measures everybody once.
func (r *runner) Round(ctx context.Context, n int, out part.Recorder) error {
	all := r.rows()
	if err := onThread(func() error { return r.measure(ctx, all) }); err != nil {
		return err
	}
	for _, rows := range all {
		for _, w := range rows {
			err := out.Measure(report.Measurement{
				Round: n, Metric: FirstPacket, Case: w.name, Contestant: w.site.contestant,
				Value: w.cost(), Unit: unit,
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// measure lets the rows take turns until the round is over, at least once.
func (r *runner) measure(ctx context.Context, all [][]*row) error {
	limit := r.round(len(all[0]))
	for began, again := time.Now(), true; again; again = time.Since(began) < limit {
		for _, size := range rand.Perm(len(all)) {
			for _, i := range rand.Perm(len(all[size])) {
				if err := ctx.Err(); err != nil {
					return err
				}
				w := all[size][i]
				if err := r.turn(w); err != nil {
					return fmt.Errorf("%s, %s: %w", w.site.contestant, w.name, err)
				}
			}
		}
	}
	return nil
}

// Close removes all networks and what is in them.
func (r *runner) Close() error {
	var errs []error
	for _, s := range r.sites {
		errs = append(errs, s.close())
	}
	r.sites = nil
	return errors.Join(errs...)
}
