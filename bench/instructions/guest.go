package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/measure"
)

// A metric is what is counted: packets or connections.
type metric struct {
	name string
	// open prepares a load, in the namespace of the site's client.
	open func(*site) (load, error)
	// batches of how many runs are measured. What connections leave to be freed is
	// freed in bulk, with the timer's ticks (RCU): a batch of theirs is as long as
	// several ticks of 4 ms, or some would have that work and some none.
	batches, runs int
}

// A load makes traffic and says how much of it arrived, which must be all. It
// runs in the namespace of the site's client. prepare precedes each run.
type load interface {
	prepare() error
	run() (int, error)
	close()
}

var metrics = []metric{
	{"UDP packet of an established flow", newEstablished, 41, 8},
	{"first UDP packet of a new flow", newFresh, 41, 8},
	{"TCP connection, with a request and an answer", newTCPLoad, 7, 128},
}

// A boot is what one guest found out: instructions for each packet or
// connection, by metric and way.
type boot [][]float64

// settle is the time before the first count, by the guest's clock.
const settle = 30 * time.Second

// countAll is what happens in the guest; the boot goes to w as JSON. The ways are
// measured one after the other, and only one of their networks exists.
func countAll(ctx context.Context, program string, w, progress io.Writer) error {
	debug.SetGCPercent(-1) // no collection while instructions are counted; see count
	// With a single P, the runtime would take it away from a thread whose system
	// call takes more than 20 µs, and give it back at a price.
	runtime.GOMAXPROCS(2)
	// What a kernel puts off while it boots would be counted with the first ways:
	// they took twice as long. With nothing to do, the clock jumps.
	time.Sleep(settle)
	b := make(boot, len(metrics))
	for _, way := range ways {
		fmt.Fprintln(progress, way.name)
		counts, err := countWay(ctx, way, program)
		if err != nil {
			return fmt.Errorf("%s: %w", way.name, err)
		}
		for m, n := range counts {
			b[m] = append(b[m], n)
		}
	}
	return json.NewEncoder(w).Encode(b)
}

// countWay counts each metric for a way.
func countWay(ctx context.Context, w way, program string) (counts []float64, err error) {
	s, err := newSite(ctx, w, program)
	if err != nil {
		return nil, err
	}
	for _, m := range metrics {
		var n float64
		err = s.Clients[0].Do(func() (err error) {
			n, err = m.count(s)
			return err
		})
		if err != nil {
			err = fmt.Errorf("%s: %w", m.name, err)
			break
		}
		counts = append(counts, n)
	}
	if e := s.close(); err == nil {
		err = e
	}
	return counts, err
}

// count is the median of the metric's batches, after one to warm up: what
// happens now and then meets a minority of them.
func (m metric) count(s *site) (float64, error) {
	l, err := m.open(s)
	if err != nil {
		return 0, err
	}
	defer l.close()
	runtime.GC()
	var counts []float64
	for i := range m.batches + 1 {
		n, err := m.batch(l)
		if err != nil {
			return 0, err
		}
		if i > 0 {
			counts = append(counts, n)
		}
	}
	return measure.Summarize(counts).Median, nil
}

// batch is the instructions for each thing in one batch.
func (m metric) batch(l load) (float64, error) {
	var things int
	var spent int64
	for range m.runs {
		if err := l.prepare(); err != nil {
			return 0, err
		}
		began := instructions()
		n, err := l.run()
		spent += instructions() - began
		if err != nil {
			return 0, err
		}
		things += n
	}
	return float64(spent) / float64(things), nil
}

// instructions is how many the processor has executed: nanoseconds of a clock
// that nobody adjusts (vm.Machine.Counting).
func instructions() int64 {
	var now unix.Timespec
	// It cannot fail: the clock and the memory are there (clock_gettime(2)).
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC_RAW, &now)
	return now.Nano()
}
