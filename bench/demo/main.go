// Command demo shows on one screen what nlb does: it builds a network out of
// namespaces, runs the real nlb in it, makes traffic and prints what came of it.
//
//	go run ./bench/demo -nlb bin/nlb
//
// Every number was measured in that run. The exit code is 1 if something did
// not come out as it should.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"nlb/bench/lab"
	"nlb/bench/measure"
)

// timeout bounds the demo, which takes a tenth of it where nothing else happens.
const timeout = 2 * time.Minute

func main() {
	lab.MaybeRunAgent()
	program := flag.String("nlb", "bin/nlb", "the nlb to show")
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	os.Exit(run(measure.UntilSignal(), *program, os.Stdout, os.Stderr))
}

func run(ctx context.Context, program string, stdout, stderr io.Writer) int {
	if err := ready(program); err != nil {
		fmt.Fprintf(stderr, "nlb demo %v\n", err)
		return 1
	}
	bounded, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("ended after %v", timeout))
	defer cancel()
	begun := time.Now()
	out := newScreen(stdout)
	failed, err := show(bounded, program, out)
	if err != nil && bounded.Err() != nil {
		err = fmt.Errorf("%w: %w", context.Cause(bounded), err)
	}
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(stderr, "\nnlb demo: interrupted, everything was removed")
		return measure.Interrupted
	case err != nil:
		fmt.Fprintf(stderr, "\nnlb demo: %v\n", err)
		return 1
	}
	out.line("")
	for _, f := range failed {
		out.line("%s", out.bad("FAILED: "+f))
	}
	if len(failed) > 0 {
		return 1
	}
	out.line("%s in %.0f seconds. The namespaces and all in them are gone.",
		out.good("Everything came out as it should,"), time.Since(begun).Seconds())
	return 0
}

// show plays the acts and returns what did not come out. It cleans up, and
// fails if it cannot.
func show(ctx context.Context, program string, out *screen) (failed []string, err error) {
	s, err := newScene(ctx, program)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	out.opening(s)
	for _, act := range []func(context.Context, *scene, *screen) ([]string, error){modes, hairpin, spread, restart} {
		missed, err := act(ctx, s, out)
		if err != nil {
			return nil, err
		}
		failed = append(failed, missed...)
	}
	return failed, nil
}
