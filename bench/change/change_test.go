package change

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/bench/measure"
	"nlb/bench/part"
	"nlb/bench/part/parttest"
	"nlb/bench/report"
)

func TestMain(m *testing.M) {
	lab.MaybeRunAgent()
	os.Exit(m.Run())
}

// programs are those to measure, nlb as it is here.
func programs(t *testing.T) part.Programs {
	t.Helper()
	return part.Programs{part.NLB: parttest.BuildNLB(t), part.HAProxy: "haproxy", part.Nginx: "nginx", part.NFT: "nft"}
}

// kinds has one of each kind that differs from the others in what is done.
var kinds = []string{part.KubeProxy, part.Preserve, part.MinimalSNAT, part.Relay, part.SendProxy, part.NginxProxy}

// TestRound measures everything once, with the real programs. How much is no
// matter here; that it is something, for all that can be measured, is.
func TestRound(t *testing.T) {
	o := part.Options{Programs: programs(t), Quick: true, Contestants: kinds}
	for _, m := range Part.Metrics {
		o.Metrics = append(o.Metrics, m.Name)
	}
	t.Setenv("TMPDIR", t.TempDir())
	run := round(t, o)
	type cell struct{ metric, cas, contestant string }
	got := make(map[cell]float64)
	for _, m := range run.Measurements {
		got[cell{m.Metric, m.Case, m.Contestant}] = m.Value
		t.Logf("%-45s %-22s %-32s %9.1f %s", m.Metric, m.Case, m.Contestant, m.Value, m.Unit)
	}
	for _, n := range run.Notes {
		t.Logf("%s, %s, %s: %s", n.Metric, n.Case, n.Contestant, n.Text)
	}
	for _, m := range Part.Metrics {
		for _, w := range ways {
			for _, c := range casesOf(m) {
				value, there := got[cell{m.Name, c, w.name}]
				want := slices.Contains(kinds, w.name) && w.measures(m.Name) && c != idle && !strings.HasPrefix(c, "1,000 x 10")
				switch {
				case there != want:
					t.Errorf("%s, case %q, of %s: measured %v, want %v", m.Name, c, w.name, there, want)
				case want && !m.PrintedOnly && value < 0.1, value < 0:
					t.Errorf("%s, case %q, of %s: %g %s", m.Name, c, w.name, value, m.Unit)
				}
			}
		}
	}
	parttest.NothingLeft(t)
}

// TestHold: the connections are open when the memory is read, which grows by
// them.
func TestHold(t *testing.T) {
	w := ways[slices.IndexFunc(ways, func(w way) bool { return w.name == part.NginxProxy })]
	s, err := newSite(w, part.Programs{part.Nginx: "nginx"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.close(); err != nil {
			t.Error(err)
		}
	}()
	got, err := s.hold(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	open := 0
	for _, f := range s.ends {
		if f == nil { // a target's
			open++
		}
	}
	if open != idleFlows || got.empty <= 0 || got.full <= got.empty {
		t.Errorf("%d connections, %d bytes before and %d with them", open, got.empty, got.full)
	}
}

func casesOf(m part.Metric) []string {
	if len(m.Cases) == 0 {
		return []string{""}
	}
	return m.Cases
}

// TestOnlyWhatIsWanted has a contestant and a metric of other parts.
func TestOnlyWhatIsWanted(t *testing.T) {
	o := part.Options{Programs: programs(t), Quick: true, Contestants: []string{part.MinimalDNAT, part.Direct}, Metrics: []string{ReloadFailed, "another"}}
	t.Setenv("TMPDIR", t.TempDir())
	run := round(t, o)
	want := report.Measurement{Round: 1, Metric: ReloadFailed, Contestant: part.MinimalDNAT, Unit: "per 1,000 reloads"}
	if len(run.Measurements) != 1 {
		t.Fatalf("measured %v", run.Measurements)
	}
	got := run.Measurements[0]
	got.Value = 0
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	parttest.NothingLeft(t)
}

// TestInterrupted is ^C while a contestant is awaited.
func TestInterrupted(t *testing.T) {
	started := filepath.Join(t.TempDir(), "started")
	if err := unix.Mkfifo(started, 0o600); err != nil {
		t.Fatal(err)
	}
	o := part.Options{Programs: part.Programs{part.NLB: parttest.Script(t, "echo >"+started+"; exec sleep 60")}, Contestants: []string{part.SNAT}, Metrics: []string{Death}}
	t.Setenv("TMPDIR", t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		_, _ = os.ReadFile(started) // until the script has been there
		cancel()
	}()
	runner, err := Part.Open(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	if err := runner.Round(ctx, 2, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if err := runner.Close(); err != nil {
		t.Error(err)
	}
	parttest.NothingLeft(t)
}

func TestMissingProgramIsSaid(t *testing.T) {
	_, err := Part.Open(t.Context(), part.Options{Contestants: []string{part.SendProxy}})
	if err == nil || !strings.HasPrefix(err.Error(), "HAProxy send-proxy-v2: needs haproxy: apt-get install haproxy: ") {
		t.Errorf("error %v", err)
	}
}

// TestFailureSaysWhatTheProgramSaid has a program that ends at once.
func TestFailureSaysWhatTheProgramSaid(t *testing.T) {
	s, err := newSite(ways[slices.IndexFunc(ways, func(w way) bool { return w.name == part.Preserve })],
		part.Programs{part.NLB: parttest.Script(t, "echo no luck >&2; exit 1")})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.close(); err != nil {
			t.Error(err)
		}
	}()
	p := trafficPlan(1)
	_, err = s.start(t.Context(), p, p.services[0])
	if !errors.Is(err, measure.ErrEnded) || !strings.HasSuffix(err.Error(), "\nno luck") {
		t.Errorf("error %v", err)
	}
}

// round opens the part, does a round, and reads what a file of it would have.
func round(t *testing.T, o part.Options) *report.Run {
	t.Helper()
	header := report.Header{Start: time.Now(), Mode: report.Quick, Rounds: 1}
	for _, m := range Part.Metrics {
		header.Metrics = append(header.Metrics, m.Metric)
	}
	for _, c := range part.Contestants {
		header.Contestants = append(header.Contestants, report.Contestant{Name: c.Name, Role: c.Role, Job: c.Job})
	}
	var file bytes.Buffer
	w, err := report.NewWriter(&file, header)
	if err != nil {
		t.Fatal(err)
	}
	runner, err := Part.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := runner.Round(t.Context(), 1, w); err != nil {
		t.Fatal(err)
	}
	t.Logf("the round took %v", time.Since(began).Round(time.Second/10))
	if err := runner.Close(); err != nil {
		t.Error(err)
	}
	run, err := report.Read(&file)
	if err != nil {
		t.Fatal(err)
	}
	return run
}
