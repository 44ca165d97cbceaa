package main

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/bench/part"
	"nlb/bench/report"
	"nlb/internal/bubble"
)

// scripted is a part that says what it is told to.
type scripted struct {
	options part.Options
	opened  *int
	fail    error // of the second round
}

func (s *scripted) Round(ctx context.Context, n int, out part.Recorder) error {
	if n == 2 && s.fail != nil {
		return s.fail
	}
	for i, who := range []string{part.Direct, part.MinimalDNAT, part.Preserve} {
		if s.options.Wants("rate", who) {
			if err := out.Measure(report.Measurement{Round: n, Metric: "rate", Contestant: who, Value: float64(100 - i), Unit: "1/s"}); err != nil {
				return err
			}
		}
	}
	return ctx.Err()
}

func (s *scripted) Close() error { *s.opened--; return nil }

// scriptedParts are two, of which the second has a metric that takes its time.
func scriptedParts(opened *int, fail error) []part.Part {
	first := part.Part{
		Name: "first", Rounds: 5, QuickRounds: 3, Contestants: []string{part.Direct, part.MinimalDNAT, part.Preserve},
		Metrics: []part.Metric{{Metric: report.Metric{Name: "rate", Unit: "1/s", Better: report.More}, Key: "rate"}},
		Setups:  map[string]part.Setup{part.Preserve: {Commands: []string{"nlb serve"}, Config: "one\n"}},
		Goals: []report.Goal{
			{Metric: "rate", Row: report.GoalRow{Contestant: part.Preserve}, Of: report.GoalRow{Contestant: part.MinimalDNAT}, Limit: 0.97},
			{Metric: "rate", Row: report.GoalRow{Contestant: part.SNAT}, Of: report.GoalRow{Contestant: part.MinimalSNAT}, Limit: 0.97},
		},
		Estimate: func(part.Options) (round, around time.Duration) { return 2 * time.Second, 10 * time.Second },
	}
	first.Open = func(_ context.Context, o part.Options) (part.Runner, error) {
		*opened++
		return &scripted{o, opened, fail}, nil
	}
	second := first
	second.Name, second.Rounds, second.Contestants, second.Goals = "second", 2, []string{part.Relay}, nil
	second.Metrics = []part.Metric{{Metric: report.Metric{Name: "memory", Unit: "MiB", Better: report.Less}, Key: "memory"}}
	second.Setups = map[string]part.Setup{part.Preserve: {Commands: []string{"nlb serve"}, Config: "two\n"}}
	return []part.Part{first, second}
}

func TestChoose(t *testing.T) {
	type chosen struct {
		Parts       []string
		Rounds      []int
		Metrics     []string
		Contestants []string
		Estimate    time.Duration
	}
	opened := 0
	for _, tt := range []struct {
		name    string
		options options
		want    chosen
	}{
		{"all", options{}, chosen{
			[]string{"first", "second"}, []int{5, 2}, []string{"rate", "memory"},
			[]string{part.Direct, part.MinimalDNAT, part.Preserve, part.Relay}, 34 * time.Second,
		}},
		{"one metric, quick", options{metrics: []string{"rate"}, quick: true}, chosen{
			[]string{"first"}, []int{3}, []string{"rate"}, []string{part.Direct, part.MinimalDNAT, part.Preserve}, 16 * time.Second,
		}},
		{"no peers, one mode", options{modes: []string{"preserve"}, peers: []string{"none"}}, chosen{
			[]string{"first"}, []int{5}, []string{"rate"}, []string{part.Direct, part.Preserve}, 20 * time.Second,
		}},
		{"rounds", options{rounds: 9, modes: []string{"none"}}, chosen{
			[]string{"first"}, []int{9}, []string{"rate"}, []string{part.Direct, part.MinimalDNAT}, 28 * time.Second,
		}},
	} {
		p, err := choose(scriptedParts(&opened, nil), &tt.options)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		got := chosen{Metrics: p.options.Metrics, Estimate: p.estimate()}
		for _, one := range p.parts {
			got.Parts, got.Rounds = append(got.Parts, one.Name), append(got.Rounds, one.rounds)
		}
		for _, c := range p.contestants() {
			got.Contestants = append(got.Contestants, c.Name)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

func TestChooseWrong(t *testing.T) {
	opened := 0
	for want, o := range map[string]options{
		`--metrics: there is no "speed", only rate, memory`:                                                 {metrics: []string{"speed"}},
		`--modes: there is no "dsr", only preserve, hairpin_snat, snat, proxy_protocol_v2, flowtable, ipvs`: {modes: []string{"dsr"}},
		`--peers: there is no "envoy", only nftables, kube-proxy, haproxy, nginx, flowtable, ipvs`:          {peers: []string{"envoy"}},
		`nothing to measure: none of the chosen contestants is measured in memory`:                          {metrics: []string{"memory"}, modes: []string{"snat"}},
	} {
		if _, err := choose(scriptedParts(&opened, nil), &o); err == nil || err.Error() != want {
			t.Errorf("%v, not %s", err, want)
		}
	}
}

// raced runs a race of the scripted parts.
func raced(ctx context.Context, t *testing.T, fail error) (*report.Run, string, error) {
	t.Helper()
	opened := 0
	o := &options{metrics: []string{"rate"}, core: 0, programs: part.Programs{part.NLB: "true", part.NFT: "true"}}
	p, err := choose(scriptedParts(&opened, fail), o)
	if err != nil {
		t.Fatal(err)
	}
	h, err := newHeader(t.Context(), p, o, []string{"bench/run.sh", "--metrics", "rate"})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := newFolder(filepath.Join(t.TempDir(), "result"), h.Start)
	if err != nil {
		t.Fatal(err)
	}
	r, err := race(ctx, p, h, dir, io.Discard)
	if opened != 0 {
		t.Errorf("%d parts were not closed", opened)
	}
	return r, dir, err
}

func TestRace(t *testing.T) {
	r, dir, err := raced(t.Context(), t, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Measurements) != 15 || r.End == nil {
		t.Errorf("%d measurements, end %v", len(r.Measurements), r.End)
	}
	if c := r.Header.Contestants[2]; c.Config != "# first\none\n" || len(c.Commands) != 1 {
		t.Errorf("nlb was set up by %q with %q", c.Commands, c.Config)
	}
	if got := r.Judge(); len(got) != 1 || !got[0].Met {
		t.Errorf("goals: %+v", got)
	}
	var out strings.Builder
	if err := publish(dir, r, &out); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"report.md", "report.html", runFile} {
		if !strings.Contains(out.String(), filepath.Join(dir, name)) {
			t.Errorf("it does not name %s:\n%s", name, &out)
		}
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	if _, err := newFolder(dir, time.Now()); err == nil || !strings.Contains(err.Error(), "there is a run.jsonl already") {
		t.Errorf("a second run in the same folder: %v", err)
	}
}

// TestRaceBroken keeps what was measured before an error, or a signal.
func TestRaceBroken(t *testing.T) {
	broken := errors.New("the target is gone")
	r, _, err := raced(t.Context(), t, broken)
	if !errors.Is(err, broken) {
		t.Errorf("error %v", err)
	}
	if r == nil || len(r.Measurements) != 3 || r.End != nil {
		t.Errorf("run %+v", r)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if r, _, err := raced(ctx, t, nil); !errors.Is(err, context.Canceled) || r == nil || r.End != nil {
		t.Errorf("interrupted: %v, run %+v", err, r)
	}
}

func TestProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opened := 0
		p, err := choose(scriptedParts(&opened, nil), &options{})
		if err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		progress := newProgress(&out, p)
		progress.next("first, getting ready")
		bubble.Pass(20 * time.Second) // twice the estimate
		progress.advance(10 * time.Second)
		progress.next("first, round 1 of 5")
		want := "first, getting ready                     34s left\n" +
			"first, round 1 of 5                      48s left\n"
		if diff := cmp.Diff(want, out.String()); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}
