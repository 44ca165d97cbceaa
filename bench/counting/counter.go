package counting

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"nlb/internal/vm"
)

// Series is that of the Debian kernels on which is counted, if nothing else is
// asked for.
const Series = "6.12"

// A Counter boots guests that count.
type Counter struct {
	Kernel *vm.Kernel
	// QEMU is the emulator's version.
	QEMU string
	// Program is nlb's path. It is linked statically: a guest has no libraries.
	Program string
}

// NewCounter looks for what is needed: nlb at a path, QEMU, and a kernel, which is
// fetched if the cache has none (vm.FindKernel). The error says what is missing.
func NewCounter(ctx context.Context, program, series string) (*Counter, error) {
	program, err := filepath.Abs(program)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(program); err != nil {
		return nil, fmt.Errorf("needs nlb itself, linked statically: make build-static builds it: %w", err)
	}
	c := &Counter{Program: program}
	if c.QEMU, err = emulatorVersion(ctx); err != nil {
		return nil, err
	}
	c.Kernel, err = vm.FindKernel(ctx, series)
	return c, err
}

// emulatorVersion is in the first line of what QEMU says of itself:
// "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)".
func emulatorVersion(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "qemu-system-x86_64", "--version").Output()
	if err != nil {
		return "", fmt.Errorf("needs QEMU (Debian package qemu-system-x86): %w", err)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	version, _, _ := strings.Cut(strings.TrimPrefix(line, "QEMU emulator version "), " ")
	return version, nil
}

// Machine is the kernel and the emulator: what counts depend on, apart from the
// ways.
func (c *Counter) Machine() string { return "Linux " + c.Kernel.Release + ", QEMU " + c.QEMU }

// Counts are instructions, by metric as in Metrics, and by the way's name.
type Counts []map[string]float64

// Count boots a guest, which counts the ways of some names, in this order. Each
// name of a way that begins is written to progress, as a line. The errors are those
// of vm.Machine.Do, and whatever the guest says; without one, all counts are there.
// The program that calls it has called MaybeGuest, and is linked statically.
func (c *Counter) Count(ctx context.Context, ways []string, limit time.Duration, progress io.Writer) (Counts, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(task{Program: c.Program, Ways: ways})
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "nlb-bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("killed after %v", limit))
	defer cancel()

	var out bytes.Buffer
	status := 0
	m := vm.Machine{Kernel: c.Kernel, Files: []string{c.Program}, Counting: true}
	err = m.Do(ctx, []vm.Run{{Binary: self, Dir: dir, Args: []string{guestArgument, string(text)}}}, &out, progress,
		func(_ int, r vm.Result) { status = r.Status })
	if err != nil {
		return nil, err
	}
	if status != 0 {
		return nil, fmt.Errorf("exit status %d in the guest", status)
	}
	return parseCounts(out.Bytes(), ways)
}

// parseCounts reads what a guest wrote. A count that is missing, or is none, is an
// error.
func parseCounts(text []byte, ways []string) (Counts, error) {
	var c Counts
	if err := json.Unmarshal(text, &c); err != nil {
		return nil, fmt.Errorf("the guest's results: %w", err)
	}
	if len(c) != len(metrics) {
		return nil, fmt.Errorf("the guest's results have %d metrics, not %d", len(c), len(metrics))
	}
	for m := range c {
		for _, way := range ways {
			if n := c[m][way]; n <= 0 {
				return nil, fmt.Errorf("%s, %s: the guest counted %g", metrics[m].name, way, n)
			}
		}
	}
	return c, nil
}
