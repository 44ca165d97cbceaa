package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/bench/measure"
)

func TestMain(m *testing.M) {
	lab.MaybeRunAgent()
	os.Exit(m.Run())
}

// TestPath measures, shortly, with the real nlb. How fast is no matter here.
func TestPath(t *testing.T) {
	program := filepath.Join(t.TempDir(), "nlb")
	if out, err := exec.Command("go", "build", "-o", program, "nlb/cmd/nlb").CombinedOutput(); err != nil {
		t.Fatalf("build nlb: %v\n%s", err, out)
	}
	t.Setenv("TMPDIR", t.TempDir())
	var stdout, stderr bytes.Buffer
	o := options{program: program, rounds: 2, seconds: 0.01, format: "json"}
	if code := run(t.Context(), o, &stdout, &stderr); code != 0 {
		t.Fatalf("exit %d: %s", code, &stderr)
	}
	var r report
	if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
		t.Fatal(err)
	}
	if len(r.Metrics) != len(metrics) {
		t.Fatalf("%d metrics", len(r.Metrics))
	}
	for _, m := range r.Metrics {
		if len(m.Ways) != len(ways) {
			t.Errorf("%s: %d ways", m.Name, len(m.Ways))
		}
		for _, w := range m.Ways {
			if len(w.Rates) != o.rounds || w.Rate.Min <= 0 || (w.Ratio == nil) != (w.Against == "") {
				t.Errorf("%s: %+v", m.Name, w)
			}
		}
	}
	nothingLeft(t)
}

// TestInterrupted is ^C while nlb is awaited.
func TestInterrupted(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	started := filepath.Join(t.TempDir(), "started")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if err := unix.Mkfifo(started, 0o600); err != nil {
		t.Fatal(err)
	}
	program := script(t, "echo >"+started+"; exec sleep 60")
	go func() {
		_, _ = os.ReadFile(started) // until the script has been there
		cancel()
	}()
	var stdout, stderr bytes.Buffer
	if code := run(ctx, options{program: program, rounds: 1, seconds: 0.01, format: "table"}, &stdout, &stderr); code != measure.Interrupted {
		t.Errorf("exit %d, stderr %s", code, &stderr)
	}
	nothingLeft(t)
}

func TestWhatIsMissingIsSaid(t *testing.T) {
	for _, c := range []struct{ name, program, want string }{
		{"no program", "/nowhere/nlb", "nlb bench: needs nlb itself: make build: "},
		{"a program that fails", script(t, "echo no luck >&2; exit 1"), "nlb bench: nlb preserve: nlb serve has ended: no luck"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv("TMPDIR", t.TempDir())
			var stdout, stderr bytes.Buffer
			if code := run(t.Context(), options{program: c.program, rounds: 1, seconds: 0.01, format: "table"}, &stdout, &stderr); code != 1 {
				t.Errorf("exit %d", code)
			}
			if !strings.HasPrefix(stderr.String(), c.want) {
				t.Errorf("said %q, not %q", &stderr, c.want)
			}
			nothingLeft(t)
		})
	}
}

func TestWaysAreComparedWithEarlierOnes(t *testing.T) {
	seen := map[string]bool{"": true}
	for _, w := range ways {
		if !seen[w.against] {
			t.Errorf("%s is compared with %q, which has not been measured", w.name, w.against)
		}
		seen[w.name] = true
	}
}

func nothingLeft(t *testing.T) {
	t.Helper()
	if left, err := os.ReadDir(os.TempDir()); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	left, err := filepath.Glob("/run/netns/nlb-" + strconv.Itoa(os.Getpid()) + "-*")
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
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
