package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
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
	maybeEngine()
	os.Exit(m.Run())
}

// tiny is a run of a second or two on whatever core there is.
func tiny(t *testing.T, program string) options {
	t.Helper()
	t.Setenv("TMPDIR", t.TempDir())
	return options{nlb: program, haproxy: "haproxy", nginx: "nginx", rounds: 1, seconds: 0.05, format: "json"}
}

// TestRelay measures, shortly, with the real programs. How fast is no matter
// here; that each of them works, with the right headers, is.
func TestRelay(t *testing.T) {
	program := filepath.Join(t.TempDir(), "nlb")
	if out, err := exec.Command("go", "build", "-o", program, "nlb/cmd/nlb").CombinedOutput(); err != nil {
		t.Fatalf("build nlb: %v\n%s", err, out)
	}
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), tiny(t, program), &stdout, &stderr); code != 0 {
		t.Fatalf("exit %d: %s", code, &stderr)
	}
	var r report
	if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
		t.Fatal(err)
	}
	if len(r.Quantities) != len(quantities) || len(r.Goals) != len(goals) {
		t.Fatalf("%d quantities, %d goals", len(r.Quantities), len(r.Goals))
	}
	for i, q := range r.Quantities {
		want := len(contestants)
		if quantities[i].balancer {
			want--
		}
		if len(q.Contestants) != want {
			t.Errorf("%s: %d contestants", q.Name, len(q.Contestants))
		}
		for _, c := range q.Contestants {
			if len(c.Values) != 1 || c.Min <= 0 || c.Late > 0 {
				t.Errorf("%s: %+v", q.Name, c)
			}
		}
	}
	nothingLeft(t)
}

// TestInterrupted is ^C while nlb is awaited.
func TestInterrupted(t *testing.T) {
	started := filepath.Join(t.TempDir(), "started")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if err := unix.Mkfifo(started, 0o600); err != nil {
		t.Fatal(err)
	}
	o := tiny(t, script(t, "echo >"+started+"; exec sleep 60"))
	go func() {
		_, _ = os.ReadFile(started) // until the script has been there
		cancel()
	}()
	var stdout, stderr bytes.Buffer
	if code := run(ctx, o, &stdout, &stderr); code != measure.Interrupted {
		t.Errorf("exit %d, stderr %s", code, &stderr)
	}
	nothingLeft(t)
}

func TestWhatIsMissingIsSaid(t *testing.T) {
	fails := script(t, "echo no luck >&2; exit 1")
	for _, c := range []struct {
		name   string
		change func(*options)
		want   string
	}{
		{"no nlb", func(o *options) { o.nlb = "/nowhere/nlb" }, "nlb bench: needs /nowhere/nlb: make build: "},
		{"no HAProxy", func(o *options) { o.haproxy = "/nowhere/haproxy" }, "nlb bench: needs /nowhere/haproxy: apt-get install haproxy: "},
		{"no nginx", func(o *options) { o.nginx = "/nowhere/nginx" }, "nlb bench: needs /nowhere/nginx: apt-get install nginx-light libnginx-mod-stream: "},
		{"a program that fails", func(*options) {}, "nlb bench: nlb: it has ended: no luck"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := tiny(t, fails)
			c.change(&o)
			var stdout, stderr bytes.Buffer
			if code := run(t.Context(), o, &stdout, &stderr); code != 1 {
				t.Errorf("exit %d", code)
			}
			if !strings.HasPrefix(stderr.String(), c.want) {
				t.Errorf("said %q, not %q", &stderr, c.want)
			}
			nothingLeft(t)
		})
	}
}

// TestHurry: the urgency is there, by either way, and gone again afterwards.
func TestHurry(t *testing.T) {
	self := os.Getpid()
	niceOf := func() string {
		t.Helper()
		text, err := os.ReadFile("/proc/self/autogroup")
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		group, _, err := groupNice(text)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := unix.Getpriority(unix.PRIO_PROCESS, self)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%s/%d", group, 20-raw)
	}
	for name, way := range map[string]func(int) (func(), error){"whole": hurry, "threads": hurryThreads} {
		before := niceOf()
		calm, err := way(self)
		if err != nil {
			t.Fatal(err)
		}
		during := niceOf()
		calm()
		if !strings.Contains(during, strconv.Itoa(urgency)) || niceOf() != before {
			t.Errorf("%s: %q, then %q, then %q", name, before, during, niceOf())
		}
	}
}

func TestGroupNice(t *testing.T) {
	for _, c := range []struct {
		text, nice string
		grouped    bool
		fails      bool
	}{
		{text: "/autogroup-12 nice -15\n", nice: "-15", grouped: true},
		{text: "/autogroup-3 nice 0\n", nice: "0", grouped: true},
		{text: ""}, // no autogroups, or in the kernel's own
		{text: "/autogroup nice\n", fails: true},
	} {
		nice, grouped, err := groupNice([]byte(c.text))
		if nice != c.nice || grouped != c.grouped || (err != nil) != c.fails {
			t.Errorf("%q: %q, %v, %v", c.text, nice, grouped, err)
		}
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
