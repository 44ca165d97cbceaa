// Command relay measures nlb's relay (client_ip proxy_protocol_v2) against
// HAProxy with send-proxy-v2, with and without splice(2), and nginx's stream
// module, which only knows version 1 of the header.
//
//	go run ./bench/relay -nlb bin/nlb [-quick]
//
// Each contestant has a network of its own (client, balancer, target; all alike,
// all there from the beginning), because nlb's nftables table makes the kernel
// track connections in the balancer's namespace: that is measured with nlb, as
// installed, and nobody else pays for it. "nlb's relay alone" is the same relay
// without the table; the difference is what the table costs. "nlb, untracked" has
// the table and relay.conntrack: false.
//
// The contestants take turns in an order that changes, and all others are idle
// meanwhile. A ratio compares two contestants within a round, and the median
// over the rounds is the result.
//
// Everything runs on one core: the balancer, and one thread that is client and
// target. The core's work is the CPU time of both and of the kernel's softirq
// thread, so that other programs on the core do not count; rates are per second
// of it. The target checks every connection's header, and of some that it names
// the client's very port; a wrong one ends the benchmark.
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
	maybeEngine()
	o := options{}
	flag.StringVar(&o.nlb, "nlb", "bin/nlb", "the nlb to measure")
	flag.StringVar(&o.haproxy, "haproxy", "haproxy", "the HAProxy to compare with")
	flag.StringVar(&o.nginx, "nginx", "nginx", "the nginx to compare with")
	flag.IntVar(&o.rounds, "rounds", 9, "how often each is measured")
	flag.Float64Var(&o.seconds, "seconds", 0.5, "how long each is measured in a round, for each of the four loads")
	flag.IntVar(&o.core, "core", -1, "the core to run on; -1 is the last one")
	flag.StringVar(&o.format, "o", "table", "output: table or json")
	quick := flag.Bool("quick", false, "3 rounds of 0.25 s")
	flag.Parse()
	if *quick {
		o.rounds, o.seconds = 3, 0.25
	}
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
	nlb, haproxy, nginx string // programs
	rounds              int
	seconds             float64
	core                int // where everything runs
	format              string
}

func (o *options) valid() bool {
	return o.rounds > 0 && o.seconds > 0 && o.seconds <= 60 && (o.format == "table" || o.format == "json")
}

// share is each contestant's part of a round, for one load.
func (o *options) share() time.Duration { return time.Duration(o.seconds * float64(time.Second)) }

func run(ctx context.Context, o options, stdout, stderr io.Writer) int {
	report, err := bench(ctx, &o, stderr)
	if err == nil {
		err = measure.Write(stdout, o.format, report)
	}
	return measure.ExitCode(ctx, err, stderr)
}

// bench builds the networks, measures, and removes them.
func bench(ctx context.Context, o *options, progress io.Writer) (r *report, err error) {
	if err := ready(o); err != nil {
		return nil, err
	}
	var sites []*site
	defer func() {
		for _, s := range sites {
			err = errors.Join(err, s.close())
		}
	}()
	for _, c := range contestants {
		s, err := newSite(ctx, c, o)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", c.name, err)
		}
		sites = append(sites, s)
	}
	calm, err := hurryAll(sites, o.core)
	if err != nil {
		return nil, err
	}
	defer calm()
	// No collection while the clock runs: what the turns leave is collected
	// between them.
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	load := loadAverage()
	all, err := runRounds(ctx, sites, o, progress)
	if err != nil {
		return nil, err
	}
	r, err = newReport(o, all)
	if err == nil {
		r.Load = load + " before, " + loadAverage() + " after"
	}
	return r, err
}

// hurryAll prepares what the turns need to know of the machine, and gives
// urgency to this program and the balancers. calm takes it back from the
// program's session, which may be its user's.
func hurryAll(sites []*site, core int) (calm func(), err error) {
	softirqd, err := measure.Ksoftirqd(core)
	if err != nil {
		return nil, err
	}
	for _, s := range sites {
		s.meter.softirqd = softirqd
		if err := s.hurry(); err != nil {
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return hurry(os.Getpid())
}

// ready says what the benchmark needs and does not find.
func ready(o *options) error {
	if os.Geteuid() != 0 {
		return errors.New("needs root, because it makes network namespaces")
	}
	for _, p := range []struct{ name, remedy string }{
		{o.nlb, "make build"},
		{o.haproxy, "apt-get install haproxy"},
		{o.nginx, "apt-get install nginx-light libnginx-mod-stream"},
	} {
		if _, err := exec.LookPath(p.name); err != nil {
			return fmt.Errorf("needs %s: %s: %w", p.name, p.remedy, err)
		}
	}
	_, err := streamModule()
	return err
}
