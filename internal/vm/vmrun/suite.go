package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"nlb/internal/vm"
)

// A suitePackage is a line of a suite's file.
type suitePackage struct {
	name   string // as go test takes it: ./balancer/nft
	series string // the only kernel that it is for, or empty
	tests  string // for -test.run
	skip   string // for -test.skip
	path   string // import path
	dir    string
	binary string
}

// on says whether the package is for a kernel.
func (p *suitePackage) on(series string) bool { return p.series == "" || p.series == series }

// parseSuite reads lines of a package, a regexp of the tests to run and,
// optionally, one of those to leave out. A package that ends with @ and a series of
// kernels is for that one alone. The sign # begins a comment.
func parseSuite(r io.Reader) ([]suitePackage, error) {
	var all []suitePackage
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		text, _, _ := strings.Cut(lines.Text(), "#")
		fields := strings.Fields(text)
		switch len(fields) {
		case 0:
			continue
		case 2, 3:
		default:
			return nil, fmt.Errorf("line %d: %q is not a package, the tests to run and, at will, those to leave out", n, text)
		}
		p := suitePackage{tests: fields[1]}
		p.name, p.series, _ = strings.Cut(fields[0], "@")
		if len(fields) == 3 {
			p.skip = fields[2]
		}
		all = append(all, p)
	}
	return all, lines.Err()
}

// choose narrows a suite to some packages, if any are named, and to the tests
// that run matches, if it isn't empty. A package that the list doesn't have is
// taken with all of its tests.
func choose(all []suitePackage, names []string, run string) []suitePackage {
	chosen := all
	if len(names) > 0 {
		chosen = nil
		for _, name := range names {
			known := len(chosen)
			for _, p := range all {
				if p.name == name {
					chosen = append(chosen, p)
				}
			}
			if len(chosen) == known {
				chosen = append(chosen, suitePackage{name: name, tests: "."})
			}
		}
	}
	if run != "" {
		chosen = slices.Clone(chosen)
		for i := range chosen {
			chosen[i].tests, chosen[i].skip = run, ""
		}
	}
	return chosen
}

// runSuite runs the suite on each kernel, all at the same time, and prints one
// after the other.
func runSuite(ctx context.Context, s settings, names []string) (int, error) {
	file, err := os.Open(s.suite)
	if err != nil {
		return 2, err
	}
	defer file.Close()
	all, err := parseSuite(file)
	if err != nil {
		return 2, fmt.Errorf("%s: %w", s.suite, err)
	}
	packages := choose(all, names, s.run)
	dir, err := os.MkdirTemp("", "nlb-vm-suite-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	for i := range packages {
		p := &packages[i]
		if built := slices.IndexFunc(packages[:i], func(q suitePackage) bool { return q.name == p.name }); built >= 0 {
			p.path, p.dir, p.binary = packages[built].path, packages[built].dir, packages[built].binary
			continue
		}
		if err := p.build(ctx, filepath.Join(dir, fmt.Sprint(i))); err != nil {
			return 1, err
		}
	}

	outputs, failures := make([]bytes.Buffer, len(s.kernels)), make([]bool, len(s.kernels))
	var booted sync.WaitGroup
	for i, series := range s.kernels {
		booted.Go(func() { failures[i] = !s.boot(ctx, series, packages, &outputs[i]) })
	}
	booted.Wait()
	for i := range outputs {
		if _, err := outputs[i].WriteTo(os.Stdout); err != nil {
			return 1, err
		}
	}
	if slices.Contains(failures, true) {
		return 1, nil
	}
	return 0, nil
}

// build builds the package's test binary.
func (p *suitePackage) build(ctx context.Context, dir string) error {
	tool := cmp.Or(os.Getenv("GO"), "go") // make's variable
	cmd := exec.CommandContext(ctx, tool, "list", "-f", "{{.ImportPath}}\n{{.Dir}}", p.name)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("go list %s: %w", p.name, err)
	}
	var ok bool
	if p.path, p.dir, ok = strings.Cut(strings.TrimSpace(string(out)), "\n"); !ok {
		return fmt.Errorf("go list %s: one package, please", p.name)
	}
	p.binary = filepath.Join(dir, filepath.Base(p.path)+".test")
	cmd = exec.CommandContext(ctx, tool, "test", "-c", "-trimpath", "-o", p.binary, p.name)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("go test -c %s: %w", p.name, err)
	}
	if _, err := os.Stat(p.binary); err != nil {
		return fmt.Errorf("%s has no tests", p.name)
	}
	return nil
}

// arguments are those of a package's test binary. It has a third of the boot's
// time: one that hangs shall end with its stacks before the guest is killed, though
// others ran before it, and though the guest's clock, which loses ticks on a busy
// host, goes at less than half the speed there.
func (s *settings) arguments(p suitePackage) []string {
	args := []string{"-test.paniconexit0", "-test.v=true", fmt.Sprint("-test.timeout=", s.timeout/3), "-test.run=" + p.tests}
	if p.skip != "" {
		args = append(args, "-test.skip="+p.skip)
	}
	return args
}

// verdict is how go test's line about a package begins and ends, by the status and
// the output of its binary. If no test ran the binary calls that a success, as go
// test does. Here it is a failure: a line of the suite would keep the name of a
// test that has another one now. But -run may mean one package of many.
func (s *settings) verdict(status int, output []byte) (word, remark string) {
	word = "ok  "
	if status == 0 && !bytes.Contains(output, []byte(testBegins)) {
		remark = " [no tests to run]"
	}
	if status != 0 || remark != "" && s.run == "" {
		word = "FAIL"
	}
	return word, remark
}

// boot runs the packages on one kernel and writes what go test -v would. It
// reports whether all of them passed.
func (s *settings) boot(ctx context.Context, series string, packages []suitePackage, out *bytes.Buffer) bool {
	packages = slices.DeleteFunc(slices.Clone(packages), func(p suitePackage) bool { return !p.on(series) })
	var runs []vm.Run
	for _, p := range packages {
		runs = append(runs, vm.Run{Binary: p.binary, Dir: p.dir, Args: s.arguments(p)})
	}
	name := func(i int) string { return packages[i].path + " [Linux " + series + "]" }

	ended, passed, read := 0, true, 0
	machine, err := s.machine(ctx, series)
	if err == nil {
		ctx, cancel := context.WithTimeoutCause(ctx, s.timeout, fmt.Errorf("killed after %v", s.timeout))
		defer cancel()
		err = machine.Do(ctx, runs, out, out, func(i int, r vm.Result) {
			word, remark := s.verdict(r.Status, out.Bytes()[read:])
			if r.Status != 0 {
				fmt.Fprintf(out, "exit status %d\n", r.Status)
			}
			fmt.Fprintf(out, "%s\t%s\t%.3fs%s\n", word, name(i), r.Duration.Seconds(), remark)
			ended, passed, read = i+1, passed && word != "FAIL", out.Len()
		})
	}
	if err == nil {
		return passed
	}
	running := lastTest(out.Bytes())
	// The line FAIL ends the test's output, as it does after a panic.
	fmt.Fprintf(out, "\nFAIL\nno end of %s: %v\n", running, err)
	for i := ended; i < len(packages); i++ {
		why := "not run"
		if errors.Is(err, vm.ErrNoExit) && i == ended {
			why = "no exit status"
		}
		fmt.Fprintf(out, "FAIL\t%s\t%s\n", name(i), why)
	}
	return false
}

// testBegins is before the name of a test that begins, in the output of go test -v.
const testBegins = "=== RUN "

// lastTest is the test that began last, by the output of go test -v.
func lastTest(output []byte) string {
	i := bytes.LastIndex(output, []byte(testBegins))
	if i < 0 {
		return "the start"
	}
	line, _, _ := bytes.Cut(output[i+len(testBegins):], []byte("\n"))
	return string(bytes.TrimSpace(line))
}
