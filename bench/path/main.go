// Command path measures what the way through nlb costs, against the way through
// the smallest nftables ruleset that does the same job.
//
//	go run ./bench/path -nlb bin/nlb
//
// Each way has a network of its own (client, balancer, three targets; all alike,
// all there from the beginning). In a round the ways take turns, 10 ms each in
// an order that changes, so that what happens to the machine happens to all of
// them; a ratio compares two ways within a round, and the median over the rounds
// is the result. "A second time" is the same ruleset in another network: it
// shows how much two equal things differ.
//
// Everything runs on one core, and the load is one thread that sends a batch
// from the client's sockets and then reads it from the targets': on a veth pair
// the kernel carries a packet all the way within the call that sends it, so the
// thread's time is the path's, without queues, wake-ups or losses between. Time
// that other programs had the core is subtracted; time that nlb and the kernel's
// softirq thread had it is not. See clock.
//
// It exits with 0 if it could measure, whatever came of it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime/debug"
	"time"

	"nlb/bench/lab"
	"nlb/bench/measure"
)

func main() {
	lab.MaybeRunAgent()
	o := options{}
	flag.StringVar(&o.program, "nlb", "bin/nlb", "the nlb to measure")
	flag.IntVar(&o.rounds, "rounds", 7, "how often each way is measured")
	flag.Float64Var(&o.seconds, "seconds", 0.4, "how long each way is measured in a round, for packets and again for connections")
	flag.IntVar(&o.core, "core", -1, "the core to run on; -1 is the last one")
	flag.StringVar(&o.format, "o", "table", "output: table or json")
	flag.Parse()
	if flag.NArg() > 0 || !o.valid() {
		flag.Usage()
		os.Exit(2)
	}
	core, err := measure.Pin(o.core)
	if err != nil {
		fmt.Fprintf(os.Stderr, "nlb bench: %v\n", err)
		os.Exit(1)
	}
	o.core = core
	os.Exit(run(measure.UntilSignal(), o, os.Stdout, os.Stderr))
}

type options struct {
	program string
	rounds  int
	seconds float64
	core    int // where everything runs
	format  string
}

func (o options) valid() bool {
	return o.rounds > 0 && o.seconds > 0 && o.seconds <= 60 && (o.format == "table" || o.format == "json")
}

// share is each way's part of a round, for one metric.
func (o options) share() time.Duration { return time.Duration(o.seconds * float64(time.Second)) }

func run(ctx context.Context, o options, stdout, stderr io.Writer) int {
	report, err := bench(ctx, o, stderr)
	if err == nil {
		err = measure.Write(stdout, o.format, report)
	}
	return measure.ExitCode(ctx, err, stderr)
}

// bench builds the networks, measures, and removes them.
func bench(ctx context.Context, o options, progress io.Writer) (r *report, err error) {
	if err := ready(o.program); err != nil {
		return nil, err
	}
	var sites []*site
	defer func() {
		for _, s := range sites {
			err = errors.Join(err, s.close())
		}
	}()
	for _, w := range ways {
		s, err := newSite(ctx, w, o.program)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", w.name, err)
		}
		sites = append(sites, s)
	}
	// No collection while the clock runs: nothing that is measured allocates,
	// and what the turns leave is collected between them.
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	results, err := runRounds(ctx, sites, o, progress)
	if err != nil {
		return nil, err
	}
	return newReport(o, results)
}

// ready says what the benchmark needs and does not find.
func ready(program string) error {
	if os.Geteuid() != 0 {
		return errors.New("needs root, because it makes network namespaces")
	}
	if _, err := exec.LookPath("nft"); err != nil {
		return fmt.Errorf("needs nft(8) for the ruleset to compare with: apt-get install nftables: %w", err)
	}
	if _, err := exec.LookPath(program); err != nil {
		return fmt.Errorf("needs nlb itself: make build: %w", err)
	}
	return nil
}
