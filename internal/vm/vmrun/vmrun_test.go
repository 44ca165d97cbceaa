package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// kernel is the one that boots faster: these tests are about vmrun.
const kernel = "6.1"

// What the tests run: vmrun, and the probe's tests.
var program, probe string

func TestMain(m *testing.M) { os.Exit(buildAndRun(m)) }

func buildAndRun(m *testing.M) int {
	dir, err := os.MkdirTemp("", "vmrun-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program, probe = filepath.Join(dir, "vmrun"), filepath.Join(dir, "probe.test")
	for _, args := range [][]string{
		{"build", "-o", program, "."},
		{"test", "-c", "-cover", "-o", probe, "./testdata/probe"},
	} {
		cmd := exec.Command("go", args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-trimpath")
		if out, err := cmd.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "%v: %v\n%s", cmd.Args, err, out)
			return 1
		}
	}
	return m.Run()
}

// command is vmrun, called as go test does. Its temporary files go to a folder
// that must be empty in the end.
func command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	tmp := t.TempDir()
	t.Cleanup(func() {
		if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v (%v)", left, err)
		}
		processes, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, p := range processes {
			if line, err := os.ReadFile(p); err == nil && bytes.Contains(line, []byte(tmp)) {
				t.Errorf("left behind: %s %q", p, line)
			}
		}
	})
	cmd := exec.Command(program, append([]string{"-kernel", kernel}, args...)...)
	cmd.Dir = "testdata/probe"
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	return cmd
}

// status runs the command and returns its exit status and what it wrote.
func status(t *testing.T, cmd *exec.Cmd) (int, string) {
	t.Helper()
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

func TestResults(t *testing.T) {
	profile := filepath.Join(t.TempDir(), "cover.out")
	got, out := status(t, command(t, probe, "-test.v=true", "-test.paniconexit0", "-test.testlogfile=/none/log.txt",
		"-test.coverprofile="+profile, "-test.run=TestPass|TestFail|TestSkip|TestDaemon"))
	if got != 1 {
		t.Errorf("exit status %d, want 1", got)
	}
	for _, line := range []string{"--- PASS: TestPass", "testdata came along", "--- FAIL: TestFail", "failed on purpose",
		"--- SKIP: TestSkip", "--- PASS: TestDaemon"} {
		if !strings.Contains(out, line) {
			t.Errorf("%q isn't in the output", line)
		}
	}
	if text, err := os.ReadFile(profile); err != nil || !strings.Contains(string(text), "probe.go:") {
		t.Errorf("coverage: %q (%v)", text, err)
	}
	if t.Failed() {
		t.Log(out)
	}
}

func TestExitStatus(t *testing.T) {
	if got, out := status(t, command(t, probe, "-test.run=TestExit")); got != 7 {
		t.Errorf("exit status %d, want 7\n%s", got, out)
	}
}

func TestCrashedGuest(t *testing.T) {
	got, out := status(t, command(t, probe, "-test.v=true", "-test.run=TestCrash"))
	if got != exitBroken || !strings.Contains(out, "no exit status arrived") || !strings.Contains(out, "sysrq triggered crash") {
		t.Errorf("exit status %d, want %d, and the console's last words\n%s", got, exitBroken, out)
	}
}

// A hanging guest is killed, whether it has booted by then or not.
func TestHangingGuest(t *testing.T) {
	got, out := status(t, command(t, "-timeout", "4s", probe, "-test.v=true", "-test.run=TestHang"))
	if got != exitBroken || !strings.Contains(out, "killed after 4s") {
		t.Errorf("exit status %d, want %d, and the reason\n%s", got, exitBroken, out)
	}
}

// An interrupt ends the guest before vmrun itself.
func TestInterrupted(t *testing.T) {
	cmd := command(t, probe, "-test.v=true", "-test.run=TestHang")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	begun := make([]byte, len("=== RUN"))
	if _, err := stdout.Read(begun); err != nil {
		t.Fatalf("%v\n%s", err, &stderr)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != exitBroken {
		t.Errorf("%v, want exit status %d", err, exitBroken)
	}
}

func TestRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		args   []string
		status int
		says   string
	}{
		"nothing to run":  {nil, 2, "one test binary"},
		"two kernels":     {[]string{"-kernel", "6.12", "a.test"}, 2, "one kernel"},
		"needs libraries": {[]string{"/usr/bin/dash"}, exitBroken, "needs shared libraries: build it with CGO_ENABLED=0"},
		"unknown program": {[]string{"-tools", "no-such-program", probe}, exitBroken, "deploy/packages"},
		"no such file":    {[]string{"-file", "/nonexistent", probe}, exitBroken, "/nonexistent"},
	} {
		t.Run(name, func(t *testing.T) {
			got, out := status(t, command(t, c.args...))
			if got != c.status || !strings.Contains(out, c.says) {
				t.Errorf("exit status %d, want %d, and %q\n%s", got, c.status, c.says, out)
			}
		})
	}
}

func TestParseSuite(t *testing.T) {
	got, err := parseSuite(strings.NewReader("# all\n./a  .\n\n./b ^TestB$ /slow # why\n./a@6.1 C\n"))
	want := []suitePackage{{name: "./a", tests: "."}, {name: "./b", tests: "^TestB$", skip: "/slow"}, {name: "./a", series: "6.1", tests: "C"}}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(suitePackage{})); diff != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	for _, bad := range []string{"./a", "./a . . ."} {
		if _, err := parseSuite(strings.NewReader(bad)); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestChoose(t *testing.T) {
	all := []suitePackage{
		{name: "./a", tests: ".", skip: "x"}, {name: "./b", tests: "B"},
		{name: "./d", series: "6.1", tests: "D"}, {name: "./d", series: "6.12", tests: "E"},
	}
	for name, c := range map[string]struct {
		names []string
		run   string
		want  []suitePackage
	}{
		"all":     {nil, "", all},
		"one":     {[]string{"./b"}, "", all[1:2]},
		"two":     {[]string{"./d"}, "", all[2:]},
		"another": {[]string{"./c"}, "", []suitePackage{{name: "./c", tests: "."}}},
		"run":     {[]string{"./a"}, "T", []suitePackage{{name: "./a", tests: "T"}}},
	} {
		if diff := cmp.Diff(c.want, choose(all, c.names, c.run), cmp.AllowUnexported(suitePackage{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	if all[0].tests != "." {
		t.Error("the list itself was changed")
	}
}

// TestSuite boots for two packages' worth of lines, one of which names a test that
// isn't there.
func TestSuite(t *testing.T) {
	suite := filepath.Join(t.TempDir(), "suite")
	if err := os.WriteFile(suite, []byte("./testdata/probe ^TestPass$\n./testdata/probe ^TestNone$\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := command(t, "-suite", suite)
	cmd.Dir = "" // names are relative to it
	got, out := status(t, cmd)
	const name = "\tnlb/internal/vm/vmrun/testdata/probe [Linux " + kernel + "]\t"
	if got != 1 || !strings.Contains(out, "\nok  "+name) || !regexp.MustCompile(`\nFAIL`+regexp.QuoteMeta(name)+`[0-9.]+s \[no tests to run\]\n`).MatchString(out) {
		t.Errorf("exit status %d, want 1\n%s", got, out)
	}
}

func TestVerdict(t *testing.T) {
	const one = "=== RUN   TestA\n--- PASS: TestA (0.0s)\nPASS\n"
	for name, c := range map[string]struct {
		run, output  string
		status       int
		word, remark string
	}{
		"passed":               {output: one, word: "ok  "},
		"passed, of many":      {run: "A", output: one, word: "ok  "},
		"failed":               {output: one, status: 1, word: "FAIL"},
		"failed before a test": {output: "no root\n", status: 2, word: "FAIL"},
		"none":                 {output: "testing: warning: no tests to run\nPASS\n", word: "FAIL", remark: " [no tests to run]"},
		"none, of many":        {run: "A", output: "testing: warning: no tests to run\nPASS\n", word: "ok  ", remark: " [no tests to run]"},
	} {
		s := settings{run: c.run}
		if word, remark := s.verdict(c.status, []byte(c.output)); word != c.word || remark != c.remark {
			t.Errorf("%s: %q, %q", name, word, remark)
		}
	}
}

func TestArguments(t *testing.T) {
	s := settings{timeout: 15 * time.Minute}
	want := []string{"-test.paniconexit0", "-test.v=true", "-test.timeout=5m0s", "-test.run=A", "-test.skip=B"}
	if diff := cmp.Diff(want, s.arguments(suitePackage{tests: "A", skip: "B"})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if diff := cmp.Diff(want[:4], s.arguments(suitePackage{tests: "A"})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestLastTest(t *testing.T) {
	for output, want := range map[string]string{
		"": "the start", "=== RUN   TestA\n--- PASS: TestA (0.0s)\n=== RUN   TestB/b\n    said": "TestB/b",
	} {
		if got := lastTest([]byte(output)); got != want {
			t.Errorf("%q: %s, want %s", output, got, want)
		}
	}
}
