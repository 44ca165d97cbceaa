// Command compare compares two runs of the benchmark:
//
//	go run ./bench/compare old.jsonl new.jsonl
//
// What it compares are ratios to the way without a balancer, so that the runs
// may be of different machines. It exits with 0 if nothing of nlb is worse, with
// 1 if something is, and with 2 if it cannot compare. See CompareRuns in package
// report for what counts as a change.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"nlb/bench/measure"
	"nlb/bench/report"
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

const (
	regression = 1
	failure    = 2
)

type options struct {
	old, now  string
	threshold float64 // in percent
	format    string
}

const usage = `usage: compare [flags] OLD.jsonl NEW.jsonl

Compares the ratios to direct routing of two runs of the benchmark. Exits with 0
if nothing of nlb is worse, with 1 if something is, and with 2 if it cannot
compare.

`

func run(args []string, stdout, stderr io.Writer) int {
	o, err := parse(args, stdout, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return failure // said already, with the usage
	}
	c, err := compare(o)
	if err == nil {
		err = measure.Write(stdout, o.format, c)
	}
	switch {
	case err != nil:
		fmt.Fprintf(stderr, "compare: %v\n", err)
		return failure
	case c.Regressions > 0:
		return regression
	}
	return 0
}

// parse reads the command line. What is wrong with it goes to stderr, help that
// was asked for to stdout.
func parse(args []string, stdout, stderr io.Writer) (*options, error) {
	o := new(options)
	f := flag.NewFlagSet("compare", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.Float64Var(&o.threshold, "threshold", 3, "the least `percent` of a ratio that count as a change")
	f.StringVar(&o.format, "o", "table", "output: table or json")
	err := f.Parse(args)
	switch {
	case err != nil:
	case f.NArg() != 2:
		err = fmt.Errorf("needs two files, has %d", f.NArg())
	case o.format != "table" && o.format != "json":
		err = fmt.Errorf("-o: %q is neither table nor json", o.format)
	case !(o.threshold >= 0 && o.threshold <= 100):
		err = fmt.Errorf("-threshold: %g is not between 0 and 100", o.threshold)
	}
	if err == nil {
		o.old, o.now = f.Arg(0), f.Arg(1)
		return o, nil
	}
	out := stderr
	if errors.Is(err, flag.ErrHelp) {
		out = stdout
	} else {
		fmt.Fprintf(out, "compare: %v\n\n", err)
	}
	fmt.Fprint(out, usage)
	f.SetOutput(out)
	f.PrintDefaults()
	return nil, err
}

func compare(o *options) (*report.Comparison, error) {
	old, err := report.ReadFile(o.old)
	if err != nil {
		return nil, err
	}
	now, err := report.ReadFile(o.now)
	if err != nil {
		return nil, err
	}
	return report.CompareRuns(old, now, o.threshold/100)
}
