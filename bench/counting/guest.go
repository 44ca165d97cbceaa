package counting

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/measure"
	"nlb/internal/vm"
)

// A task is what a guest is told to count.
type task struct {
	Program string   // nlb's path
	Ways    []string // by name, in this order
}

// guestArgument is the first argument of the program that counts in a guest; the
// second is the task, in JSON.
const guestArgument = "count-instructions"

// MaybeGuest is for main, and for TestMain, before anything else: a program that
// boots guests is also what runs in them, as their first process and as the one
// that counts. There it does not return.
func MaybeGuest() {
	if vm.InGuest() {
		vm.Guest()
		os.Exit(0)
	}
	if len(os.Args) != 3 || os.Args[1] != guestArgument {
		return
	}
	ctx := measure.UntilSignal()
	os.Exit(measure.ExitCode(ctx, obey(ctx, os.Args[2], os.Stdout, os.Stderr), os.Stderr))
}

// obey counts what the task says. The counts go to w, in JSON, and the name of
// each way to progress, in a line.
func obey(ctx context.Context, text string, w, progress io.Writer) error {
	var t task
	if err := json.Unmarshal([]byte(text), &t); err != nil {
		return fmt.Errorf("what to count: %w", err)
	}
	ways := make([]*Way, len(t.Ways))
	for i, name := range t.Ways {
		var err error
		if ways[i], err = find(name); err != nil {
			return err
		}
	}
	counts, err := countAll(ctx, ways, t.Program, progress)
	if err != nil {
		return err
	}
	return json.NewEncoder(w).Encode(counts)
}

// settle is the time before the first count, by the guest's clock.
const settle = 30 * time.Second

// countAll counts the ways one after the other; only one of their networks exists.
func countAll(ctx context.Context, ways []*Way, program string, progress io.Writer) (Counts, error) {
	debug.SetGCPercent(-1) // no collection while instructions are counted; see metric.count
	// With a single P, the runtime would take it away from a thread whose system
	// call takes more than 20 µs, and give it back at a price.
	runtime.GOMAXPROCS(2)
	// What a kernel puts off while it boots would be counted with the first ways:
	// they took twice as long. With nothing to do, the clock jumps.
	time.Sleep(settle)
	all := make(Counts, len(metrics))
	for m := range all {
		all[m] = make(map[string]float64)
	}
	for _, w := range ways {
		fmt.Fprintln(progress, w.Name)
		counts, err := w.count(ctx, program)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", w.Name, err)
		}
		for m, n := range counts {
			all[m][w.Name] = n
		}
	}
	return all, nil
}

// count counts each metric for the way.
func (w *Way) count(ctx context.Context, program string) (counts []float64, err error) {
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

// A metric is what is counted: packets or connections.
type metric struct {
	name string
	// open prepares a load, in the namespace of the site's client.
	open func(*site) (load, error)
	// batches of how many runs are measured: so many that ratios of five boots agree
	// within 0.5 %. What comes with a tick is in a minority of them.
	batches, runs int
}

// A load makes traffic and says how much of it arrived, which must be all. It
// runs in the namespace of the site's client. pause precedes each batch, and
// prepare each run.
type load interface {
	pause()
	prepare() error
	run() (int, error)
	close()
}

var metrics = []metric{
	{"instructions per established UDP packet", newEstablished, 25, 8},
	{"instructions per first packet of a UDP flow", newFresh, 15, 8},
	{"instructions per TCP connection", newTCPLoad, 21, 16},
}

// Metrics are the names of what is counted.
func Metrics() []string {
	var names []string
	for _, m := range metrics {
		names = append(names, m.name)
	}
	return names
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
	l.pause()
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
