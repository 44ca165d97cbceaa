package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"nlb/bench/report"
)

// write writes a run in which nlb has a ratio to direct routing.
func write(t *testing.T, ratio float64) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "run.jsonl")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w, err := report.NewWriter(f, report.Header{
		Start: time.Date(2026, 10, 14, 12, 30, 0, 0, time.UTC), Mode: report.Full, Rounds: 3,
		Contestants: []report.Contestant{{Name: "direct", Role: report.Baseline}, {Name: "nlb", Role: report.NLB}},
		Metrics:     []report.Metric{{Name: "rate", Unit: "1/s", Better: report.More}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for round := 1; round <= 3; round++ {
		for who, v := range map[string]float64{"direct": 1000, "nlb": 1000 * ratio} {
			if err := w.Measure(report.Measurement{Round: round, Metric: "rate", Contestant: who, Value: v, Unit: "1/s"}); err != nil {
				t.Fatal(err)
			}
		}
	}
	return name
}

func TestRun(t *testing.T) {
	fast, slow := write(t, 0.8), write(t, 0.76)
	none := filepath.Join(t.TempDir(), "none.jsonl")
	bad := filepath.Join(t.TempDir(), "bad.jsonl")
	if err := os.WriteFile(bad, []byte("no run\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		args []string
		code int
		// What each of the two has to say; empty for nothing at all.
		stdout, stderr string
	}{
		{"the same", []string{fast, fast}, 0, "nlb: 0 worse, 0 better, 1 the same", ""},
		{"worse", []string{fast, slow}, 1, "nlb: 1 worse", ""},
		{"better", []string{slow, fast}, 0, "nlb: 0 worse, 1 better", ""},
		{"less than asked for", []string{"-threshold", "6", fast, slow}, 0, "nlb: 0 worse", ""},
		{"worse, as JSON", []string{"-o", "json", fast, slow}, 1, `"regressions": 1`, ""},
		{"help", []string{"--help"}, 0, "usage: compare", ""},
		{"one file", []string{fast}, 2, "", "compare: needs two files, has 1\n\nusage"},
		{"unknown format", []string{"-o", "xml", fast, slow}, 2, "", `-o: "xml" is neither table nor json`},
		{"no threshold", []string{"-threshold", "NaN", fast, slow}, 2, "", "-threshold: NaN is not between 0 and 100"},
		{"unknown flag", []string{"-x", fast, slow}, 2, "", "flag provided but not defined: -x"},
		{"no such file", []string{fast, none}, 2, "", none},
		{"no run", []string{bad, fast}, 2, "", bad + ": line 1: is not a header"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			if code := run(c.args, &stdout, &stderr); code != c.code {
				t.Errorf("exit code %d instead of %d", code, c.code)
			}
			for _, s := range []struct{ name, want, got string }{{"stdout", c.stdout, stdout.String()}, {"stderr", c.stderr, stderr.String()}} {
				if !strings.Contains(s.got, s.want) || s.want == "" && s.got != "" {
					t.Errorf("%s: %q\nwant: %q", s.name, s.got, s.want)
				}
			}
			if len(c.args) > 2 && c.args[1] == "json" && !json.Valid(stdout.Bytes()) {
				t.Error("it is not JSON")
			}
		})
	}
}
