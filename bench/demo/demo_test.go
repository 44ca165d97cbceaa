package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"nlb/bench/lab"
	"nlb/bench/measure"
)

func TestMain(m *testing.M) {
	lab.MaybeRunAgent()
	os.Exit(m.Run())
}

// A terminal that the demo has to fit in.
const rows, columns = 45, 100

func TestDemo(t *testing.T) {
	program := filepath.Join(t.TempDir(), "nlb")
	if out, err := exec.Command("go", "build", "-o", program, "nlb/cmd/nlb").CombinedOutput(); err != nil {
		t.Fatalf("build nlb: %v\n%s", err, out)
	}
	t.Setenv("TMPDIR", t.TempDir())
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), program, &stdout, &stderr); code != 0 {
		t.Errorf("exit %d", code)
	}
	t.Logf("\n%s%s", &stdout, &stderr)
	if n := strings.Count(stdout.String(), "\n"); n > rows {
		t.Errorf("%d lines do not fit on a screen of %d", n, rows)
	}
	for line := range strings.Lines(stdout.String()) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > columns {
			t.Errorf("%d columns do not fit on a screen of %d: %s", n, columns, line)
		}
	}
	if left, err := os.ReadDir(os.Getenv("TMPDIR")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestInterrupted is ^C while the scene is built.
func TestInterrupted(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	// It never answers, so the demo waits for it.
	program := script(t, "exec sleep 60")
	var stdout, stderr bytes.Buffer
	if code := run(ctx, program, &stdout, &stderr); code != measure.Interrupted {
		t.Errorf("exit %d, stderr %s", code, &stderr)
	}
	if left, err := os.ReadDir(os.Getenv("TMPDIR")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestWhatIsMissingIsSaid(t *testing.T) {
	for _, c := range []struct{ name, program, want string }{
		{"no program", "/nowhere/nlb", "nlb demo needs nlb itself: make build: "},
		{"a program that fails", script(t, "echo no luck >&2; exit 1"), "\nnlb demo: nlb serve has ended: no luck"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			if code := run(t.Context(), c.program, &stdout, &stderr); code != 1 {
				t.Errorf("exit %d", code)
			}
			if !strings.HasPrefix(stderr.String(), c.want) {
				t.Errorf("said %q, not %q", &stderr, c.want)
			}
		})
	}
}

func script(t *testing.T, body string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "nlb")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestParseCounters(t *testing.T) {
	const text = `table inet nlb {
	counter hairpin_drops {
		comment "a client is its own target"
		packets 4 bytes 240
	}
	counter t7.web {
		packets 0 bytes 0
	}
}
`
	if diff := cmp.Diff(map[string]int{"hairpin_drops": 4, "t7.web": 0}, parseCounters(text)); diff != "" {
		t.Error(diff)
	}
}

func TestBar(t *testing.T) {
	for _, c := range []struct {
		n, most int
		want    string
	}{{0, 8, ""}, {8, 8, "████"}, {4, 8, "██"}, {5, 8, "██▌"}, {1, 32, "▏"}, {1, 0, "████"}} {
		if got := bar(c.n, c.most, 4); got != c.want {
			t.Errorf("%d of %d: %q, not %q", c.n, c.most, got, c.want)
		}
	}
}

func TestRowSaysWhatIsWrong(t *testing.T) {
	var b bytes.Buffer
	want := expect(nil, lab.Timeout)
	got := append([]string{"10.0.1.1"}, want[1:]...)
	failed := row(newScreen(&b), "hairpin", "preserve", got, want, "")
	if diff := cmp.Diff([]string{"hairpin, preserve, TCP, IPv4: 10.0.1.1 instead of timeout"}, failed); diff != "" {
		t.Error(diff)
	}
}
