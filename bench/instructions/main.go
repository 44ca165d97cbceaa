// Command instructions counts the processor instructions that the way through
// nlb takes, for each packet and for each connection.
//
//	make bench-instructions
//
// It boots emulated machines with one of Debian's kernels whose clock counts
// instructions (see internal/vm), so that nothing which happens on the host
// changes a figure. In each, a network is built for each way (client, balancer,
// two targets), nlb installs the way and ends, and one thread sends from the
// client and reads at the targets. On a veth pair the kernel carries a packet all
// the way within the call that sends it, so the instructions between two readings
// of the clock are those of the sender, the path and the receiver. Those of the
// sender and the receiver are the same in every way: the difference to the way
// without a balancer is what the balancer adds.
//
// Instructions aren't time. Caches that miss, locks that processors contend for
// and network cards don't show; bench/path measures time.
//
// It exits with 0 if it could count, whatever came of it.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"nlb/bench/lab"
	"nlb/bench/measure"
	"nlb/internal/vm"
)

func main() {
	if vm.InGuest() {
		vm.Guest()
		return
	}
	lab.MaybeRunAgent()
	var o options
	flag.StringVar(&o.program, "nlb", "bin/nlb-static", "the nlb to measure, built with CGO_ENABLED=0")
	flag.StringVar(&o.kernel, "kernel", "6.12", "`series` of Debian's cloud kernels, or a folder with one unpacked")
	flag.IntVar(&o.boots, "boots", 2, "how often to boot and count; two at a time")
	flag.DurationVar(&o.timeout, "timeout", 15*time.Minute, "for each boot")
	flag.StringVar(&o.format, "o", "table", "output: table or json")
	guest := flag.Bool("guest", false, "count here: what a guest is started with")
	flag.Parse()
	if flag.NArg() > 0 || !o.valid() {
		flag.Usage()
		os.Exit(2)
	}
	ctx := measure.UntilSignal()
	var err error
	if *guest {
		err = countAll(ctx, o.program, os.Stdout, os.Stderr)
	} else {
		err = run(ctx, o, os.Stdout, os.Stderr)
	}
	os.Exit(measure.ExitCode(ctx, err, os.Stderr))
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
	program, err := filepath.Abs(o.program)
	if err != nil {
		return err
	}
	if _, err := os.Stat(program); err != nil {
		return fmt.Errorf("needs nlb itself: make bench-instructions builds it: %w", err)
	}
	kernel, err := vm.FindKernel(ctx, o.kernel)
	if err != nil {
		return err
	}
	emulator, err := emulatorVersion(ctx)
	if err != nil {
		return err
	}
	boots, err := bootAll(ctx, o, kernel, program, stderr)
	if err != nil {
		return err
	}
	r := newReport(boots)
	r.Kernel, r.QEMU, r.Commit = kernel.Release, emulator, commit()
	return measure.Write(stdout, o.format, r)
}

// bootAll boots as often as asked, two at a time: what other programs do on the
// host is not in the figures.
func bootAll(ctx context.Context, o options, kernel *vm.Kernel, program string, progress io.Writer) ([]boot, error) {
	boots, errs := make([]boot, o.boots), make([]error, o.boots)
	slots := make(chan struct{}, 2)
	var all sync.WaitGroup
	for i := range boots {
		all.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			boots[i], errs[i] = bootOnce(ctx, o, kernel, program, &prefixed{w: progress, prefix: fmt.Sprintf("boot %d: ", i+1)})
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

// bootOnce counts in a new guest.
func bootOnce(ctx context.Context, o options, kernel *vm.Kernel, program string, progress io.Writer) (boot, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "nlb-bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeoutCause(ctx, o.timeout, fmt.Errorf("killed after %v", o.timeout))
	defer cancel()

	var out bytes.Buffer
	status := 0
	m := vm.Machine{Kernel: kernel, Files: []string{program}, Counting: true}
	err = m.Do(ctx, []vm.Run{{Binary: self, Dir: dir, Args: []string{"-guest", "-nlb", program}}}, &out, progress,
		func(_ int, r vm.Result) { status = r.Status })
	if err != nil {
		return nil, err
	}
	if status != 0 {
		return nil, fmt.Errorf("exit status %d in the guest", status)
	}
	return parseBoot(out.Bytes())
}

// parseBoot reads what countAll wrote. A count that is missing, or is none, is an
// error.
func parseBoot(text []byte) (boot, error) {
	var b boot
	if err := json.Unmarshal(text, &b); err != nil {
		return nil, fmt.Errorf("the guest's results: %w", err)
	}
	if len(b) != len(metrics) {
		return nil, fmt.Errorf("the guest's results have %d metrics, not %d", len(b), len(metrics))
	}
	for m := range b {
		if len(b[m]) != len(ways) {
			return nil, fmt.Errorf("%s: the guest's results have %d ways, not %d", metrics[m].name, len(b[m]), len(ways))
		}
		for w, n := range b[m] {
			if n <= 0 {
				return nil, fmt.Errorf("%s, %s: the guest counted %g instructions", metrics[m].name, ways[w].name, n)
			}
		}
	}
	return b, nil
}

// emulatorVersion is the first line of what QEMU says of itself.
func emulatorVersion(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "qemu-system-x86_64", "--version").Output()
	if err != nil {
		return "", fmt.Errorf("needs QEMU (Debian package qemu-system-x86): %w", err)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimPrefix(line, "QEMU emulator version "), nil
}
