// Command race measures nlb side by side with what a user would pick instead, and
// writes a report.
//
//	bench/run.sh [--quick] [--modes LIST] [--peers LIST] [--metrics LIST]
//
// bench/run.sh builds it and nlb, and installs the peers. What it measures is in
// packages of their own, its parts; this command chooses among them, looks whether
// the machine is fit, and keeps what they say: run.jsonl first, one value after the
// other, then report.md with charts, and report.html, made of that file.
//
// Everything runs on one core, which nobody else should use meanwhile.
//
// It exits with 0 if it could measure, whatever came of it; with 2 for a command
// line that it does not understand, with 3 on an unfit machine.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"nlb/bench/counting"
	"nlb/bench/lab"
	"nlb/bench/measure"
	"nlb/bench/part"
	"nlb/bench/report"
)

// Exit codes beside those of measure.ExitCode.
const (
	exitUsage = 2
	exitUnfit = 3
)

func main() {
	counting.MaybeGuest()
	lab.MaybeRunAgent()
	o, err := parse(os.Args[1:])
	switch {
	case errors.Is(err, pflag.ErrHelp):
		fmt.Print(help())
		return
	case err != nil:
		fmt.Fprintf(os.Stderr, "nlb bench: %v\nTry --help.\n", err)
		os.Exit(exitUsage)
	}
	core, err := measure.Pin(o.core)
	if err != nil {
		fmt.Fprintf(os.Stderr, "nlb bench: %v\n", err)
		os.Exit(1)
	}
	o.core = core
	ctx := measure.UntilSignal()
	err = run(ctx, o, os.Stdout, os.Stderr)
	if unfit := (*unfitError)(nil); errors.As(err, &unfit) {
		fmt.Fprintf(os.Stderr, "nlb bench: %v\n", err)
		os.Exit(exitUnfit)
	}
	os.Exit(measure.ExitCode(ctx, err, os.Stderr))
}

// options are what the command line says.
type options struct {
	modes, peers, metrics []string // keys; all if nil
	quick, force          bool
	rounds                int // 0 for each part's own number
	core                  int
	out                   string // folder; empty for one of its own
	programs              part.Programs
	flags                 map[string]string // as given or left, for the record
}

// flagSet declares the flags.
func flagSet(o *options) *pflag.FlagSet {
	f := pflag.NewFlagSet("bench/run.sh", pflag.ContinueOnError)
	f.SortFlags = false
	f.BoolVar(&o.quick, "quick", false, "less than two minutes, to see that all works; not for conclusions")
	f.StringSliceVar(&o.modes, "modes", nil, "nlb's modes, a `list` with commas, or none (default all)")
	f.StringSliceVar(&o.peers, "peers", nil, "whom to compare with: a `list`, or none (default all)")
	f.StringSliceVar(&o.metrics, "metrics", nil, "what to measure: a `list` (default all)")
	f.IntVar(&o.rounds, "rounds", 0, "how often each is measured, a `number` (default by metric)")
	f.StringVar(&o.out, "out", "", "`folder` for the result (default bench/results/ and the time)")
	f.IntVar(&o.core, "core", -1, "the `core` to run on; -1 is the last one")
	f.BoolVar(&o.force, "force", false, "measure also if the machine is unfit")
	for _, p := range []part.Program{part.NLB, part.HAProxy, part.Nginx, part.NFT, part.IPVSAdm} {
		f.Var(&programFlag{o.programs, p}, string(p), "the `program` to measure")
	}
	return f
}

// A programFlag is a flag for one of the programs.
type programFlag struct {
	programs part.Programs
	name     part.Program
}

func (f *programFlag) Set(path string) error { f.programs[f.name] = path; return nil }
func (f *programFlag) String() string        { return f.programs[f.name] }
func (f *programFlag) Type() string          { return "program" }

func newOptions() *options {
	return &options{programs: part.Programs{part.NLB: "bin/nlb-static", part.HAProxy: "haproxy", part.Nginx: "nginx", part.NFT: "nft", part.IPVSAdm: "ipvsadm"}}
}

// parse reads the command line.
func parse(args []string) (*options, error) {
	o := newOptions()
	f := flagSet(o)
	f.Usage = func() {}
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	switch {
	case f.NArg() > 0:
		return nil, fmt.Errorf("unexpected argument %q", f.Arg(0))
	case o.rounds < 0:
		return nil, fmt.Errorf("--rounds: %d is less than 1", o.rounds)
	}
	o.flags = make(map[string]string)
	f.VisitAll(func(f *pflag.Flag) { o.flags[f.Name] = f.Value.String() })
	_, err := choose(parts, o)
	return o, err
}

// help is what --help prints.
func help() string {
	var b strings.Builder
	b.WriteString("Measures nlb side by side with what one would use instead, in network namespaces\n" +
		"of its own, and writes a report. Needs root.\n\nUsage: bench/run.sh [flags]\n\n")
	b.WriteString(flagSet(newOptions()).FlagUsages())
	for _, list := range []struct {
		title string
		keys  []string
	}{
		{"modes", keysOf(report.NLB)}, {"peers", keysOf(report.Peer)}, {"metrics", metricKeys(parts)},
	} {
		fmt.Fprintf(&b, "\n%-8s %s", list.title, strings.Join(list.keys, ", "))
	}
	b.WriteString("\n")
	return b.String()
}

// keysOf are the keys of the contestants with a role, once each.
func keysOf(role report.Role) (keys []string) {
	for _, c := range part.Contestants {
		if c.Role == role && !slices.Contains(keys, c.Key) {
			keys = append(keys, c.Key)
		}
	}
	return keys
}

func metricKeys(parts []part.Part) (keys []string) {
	for _, p := range parts {
		for _, m := range p.Metrics {
			if !slices.Contains(keys, m.Key) {
				keys = append(keys, m.Key)
			}
		}
	}
	return keys
}

// run measures what was chosen.
func run(ctx context.Context, o *options, stdout, stderr io.Writer) error {
	p, err := choose(parts, o)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("needs root, because it makes network namespaces")
	}
	if err := p.ready(); err != nil {
		return err
	}
	if err := fit(ctx, o, stderr); err != nil {
		return err
	}
	h, err := newHeader(ctx, p, o, append([]string{"bench/run.sh"}, os.Args[1:]...))
	if err != nil {
		return err
	}
	dir, err := newFolder(o.out, h.Start)
	if err != nil {
		return err
	}
	r, err := race(ctx, p, h, dir, stderr)
	if r == nil {
		return err
	}
	return errors.Join(err, publish(dir, r, stdout))
}

// fit is an error on a machine that is not, unless that was said not to matter.
func fit(ctx context.Context, o *options, stderr io.Writer) error {
	s, err := look(ctx, o.core)
	if err != nil {
		return err
	}
	bad := judge(s)
	if len(bad) == 0 {
		return nil
	}
	if !o.force {
		return &unfitError{bad}
	}
	fmt.Fprintf(stderr, "nlb bench: %v\n", &unfitError{bad})
	return nil
}
