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
	"os/signal"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
)

// timeout bounds the demo, which takes a quarter of it.
const timeout = 40 * time.Second

func main() {
	lab.MaybeRunAgent()
	program := flag.String("nlb", "bin/nlb", "the nlb to show")
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	// A reader that leaves (make demo | head) must not end us before we cleaned up.
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	context.AfterFunc(ctx, stop) // a second signal kills
	os.Exit(run(ctx, *program, os.Stdout, os.Stderr))
}

// interrupted is the exit code of what a signal ended, as for a shell's ^C.
const interrupted = 130

func run(ctx context.Context, program string, stdout, stderr io.Writer) int {
	if err := ready(program); err != nil {
		fmt.Fprintf(stderr, "nlb demo %v\n", err)
		return 1
	}
	bounded, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	begun := time.Now()
	out := newScreen(stdout)
	failed, err := show(bounded, program, out)
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(stderr, "\nnlb demo: interrupted, everything was removed")
		return interrupted
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
