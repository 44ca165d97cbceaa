// Command instructions counts the processor instructions that the way through
// nlb takes, for each packet and for each connection.
//
//	make bench-instructions
//
// How is in bench/counting. The same ways are a part of the race.
//
// It exits with 0 if it could count, whatever came of it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"nlb/bench/counting"
	"nlb/bench/lab"
	"nlb/bench/measure"
)

func main() {
	counting.MaybeGuest()
	lab.MaybeRunAgent()
	var o options
	flag.StringVar(&o.program, "nlb", "bin/nlb-static", "the nlb to measure, built with CGO_ENABLED=0")
	flag.StringVar(&o.kernel, "kernel", counting.Series, "`series` of Debian's cloud kernels, or a folder with one unpacked")
	flag.IntVar(&o.boots, "boots", 2, "how often to boot and count; two at a time")
	flag.DurationVar(&o.timeout, "timeout", 15*time.Minute, "for each boot")
	flag.StringVar(&o.format, "o", "table", "output: table or json")
	flag.Parse()
	if flag.NArg() > 0 || !o.valid() {
		flag.Usage()
		os.Exit(2)
	}
	ctx := measure.UntilSignal()
	os.Exit(measure.ExitCode(ctx, run(ctx, o, os.Stdout, os.Stderr), os.Stderr))
}

type options struct {
	program, kernel string
	boots           int
	timeout         time.Duration
	format          string
}

func (o options) valid() bool {
	return o.boots > 0 && o.timeout > 0 && (o.format == "table" || o.format == "json")
}

// run boots, and writes the report.
func run(ctx context.Context, o options, stdout, stderr io.Writer) error {
	c, err := counting.NewCounter(ctx, o.program, o.kernel)
	if err != nil {
		return err
	}
	boots, err := bootAll(ctx, o, c, stderr)
	if err != nil {
		return err
	}
	r := newReport(boots)
	r.Kernel, r.QEMU, r.Commit = c.Kernel.Release, c.QEMU, commit()
	return measure.Write(stdout, o.format, r)
}

// bootAll boots as often as asked, two at a time: what other programs do on the
// host is not in the figures.
func bootAll(ctx context.Context, o options, c *counting.Counter, progress io.Writer) ([]counting.Counts, error) {
	var names []string
	for _, w := range counting.Ways {
		names = append(names, w.Name)
	}
	boots, errs := make([]counting.Counts, o.boots), make([]error, o.boots)
	slots := make(chan struct{}, 2)
	var all sync.WaitGroup
	for i := range boots {
		all.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			boots[i], errs[i] = c.Count(ctx, names, o.timeout, &prefixed{w: progress, prefix: fmt.Sprintf("boot %d: ", i+1)})
		})
	}
	all.Wait()
	return boots, errors.Join(errs...)
}

// prefixed marks each Write, which is a line or several.
type prefixed struct {
	w      io.Writer
	prefix string
}

func (p *prefixed) Write(b []byte) (int, error) {
	_, err := io.WriteString(p.w, p.prefix+string(b))
	return len(b), err
}
