// Command vmrun runs test binaries in an emulated machine with another kernel:
//
//	go build -o bin/vmrun ./internal/vm/vmrun
//	CGO_ENABLED=0 go test -exec "$PWD/bin/vmrun -kernel 6.12" ./balancer/conntrack -run TestDeleteFunc
//	bin/vmrun -kernel 6.1,6.12 -suite .ci/vm-tests [-run REGEXP] [PACKAGE...]
//
// The first form runs one binary. Output, exit status and the files that the
// binary's -test flags name are as if it had run here. The second runs what a
// list names, with one boot for each kernel; its output is go test -v's.
//
// It exits with the binary's status, with 1 if a suite failed, and with 125 if
// no exit status arrived: then the console is shown.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"nlb/internal/vm"
)

// exitBroken is the status when a test binary's own never arrived, as with env(1).
const exitBroken = 125

func main() {
	if vm.InGuest() {
		vm.Guest()
		return
	}
	status, err := vmrun(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "vmrun:", err)
	}
	os.Exit(status)
}

// A list is a flag's value of several words with commas between them.
type list []string

func (l *list) String() string { return strings.Join(*l, ",") }

func (l *list) Set(value string) error {
	*l = append(*l, strings.FieldsFunc(value, func(r rune) bool { return r == ',' })...)
	return nil
}

// settings are the command line.
type settings struct {
	kernels, tools, files list
	timeout               time.Duration
	memory, cpus          int
	suite, run            string
}

func vmrun(args []string) (int, error) {
	var s settings
	flags := flag.NewFlagSet("vmrun", flag.ContinueOnError)
	flags.Var(&s.kernels, "kernel", "`series` of Debian's cloud kernels (6.1, 6.12; a suite takes several), or a folder with one unpacked; default 6.12")
	flags.Var(&s.tools, "tools", "`programs` of this system to take along: curl,nginx")
	flags.Var(&s.files, "file", "`file` or folder to take along, at its path; may be repeated")
	flags.DurationVar(&s.timeout, "timeout", 5*time.Minute, "kill the guest after this time; a binary of a suite ends after a third of it")
	flags.IntVar(&s.memory, "memory", 1024, "memory of the guest in `MiB`")
	flags.IntVar(&s.cpus, "cpus", 1, "processors of the guest")
	flags.StringVar(&s.suite, "suite", "", "`file` that lists packages and their tests")
	flags.StringVar(&s.run, "run", "", "with -suite: only the tests that this `regexp` matches")
	if err := flags.Parse(args); err != nil {
		return 2, nil // it has been said
	}
	if len(s.kernels) == 0 {
		s.kernels = list{"6.12"}
	}

	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP)
	defer cancel()
	if s.suite != "" {
		return runSuite(ctx, s, flags.Args())
	}
	if flags.NArg() == 0 || len(s.kernels) != 1 {
		return 2, errors.New("one test binary and one kernel, or a -suite")
	}
	return runBinary(ctx, s, flags.Args())
}

func (s *settings) machine(ctx context.Context, series string) (*vm.Machine, error) {
	kernel, err := vm.FindKernel(ctx, series)
	if err != nil {
		return nil, err
	}
	return &vm.Machine{Kernel: kernel, Tools: s.tools, Files: s.files, Memory: s.memory, CPUs: s.cpus}, nil
}

// runBinary is what go test -exec calls.
func runBinary(ctx context.Context, s settings, args []string) (int, error) {
	dir, err := os.Getwd()
	if err != nil {
		return exitBroken, err
	}
	machine, err := s.machine(ctx, s.kernels[0])
	if err != nil {
		return exitBroken, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, s.timeout, fmt.Errorf("killed after %v", s.timeout))
	defer cancel()
	status := exitBroken
	err = machine.Do(ctx, []vm.Run{{Binary: args[0], Dir: dir, Args: args[1:]}}, os.Stdout, os.Stderr,
		func(_ int, r vm.Result) { status = r.Status })
	return status, err
}
