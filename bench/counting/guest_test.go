package counting

import (
	"errors"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nlb/bench/part"
	"nlb/bench/report"
)

// program is nlb's, as make build-static builds it.
const program = "../../bin/nlb-static"

// needsStatic skips in a test binary that could not be a guest's first process.
func needsStatic(t *testing.T) {
	t.Helper()
	info, ok := debug.ReadBuildInfo()
	if !ok || !slices.Contains(info.Settings, debug.BuildSetting{Key: "CGO_ENABLED", Value: "0"}) {
		t.Skip("needs a test binary that needs no libraries: make test-instructions builds it with CGO_ENABLED=0")
	}
}

// TestGuestPart runs a round of the race's part, for some of its contestants.
func TestGuestPart(t *testing.T) {
	needsStatic(t)
	t.Parallel()
	o := part.Options{
		Programs: part.Programs{part.NLB: program},
		// HAProxy is in the race, but not here; the last is for a full run alone.
		Contestants: []string{part.Direct, part.PlainHAProxy, part.Preserve, part.IPVS},
		Metrics:     append(Metrics()[:2:2], "something else"),
		Quick:       true,
	}
	r, err := Part.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	var got recorder
	if err := r.Round(t.Context(), 1, &got); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	got.check(t, Metrics()[:2], []string{part.Direct, part.Preserve})
}

// A recorder keeps what it is given.
type recorder struct {
	measured []report.Measurement
	notes    []report.Note
}

func (r *recorder) Measure(m report.Measurement) error {
	r.measured = append(r.measured, m)
	return nil
}

func (r *recorder) Note(n report.Note) error {
	r.notes = append(r.notes, n)
	return nil
}

// check compares what was measured with what should have been; a packet takes
// some thousand instructions.
func (r *recorder) check(t *testing.T, metrics, contestants []string) {
	t.Helper()
	type pair struct{ metric, contestant string }
	want, got := make(map[pair]bool), make(map[pair]bool)
	for _, m := range metrics {
		for _, c := range contestants {
			want[pair{m, c}] = true
		}
	}
	for _, m := range r.measured {
		got[pair{m.Metric, m.Contestant}] = true
		if m.Round != 1 || m.Unit != unit || m.Value < 1000 || m.Value > 1e6 {
			t.Errorf("measured %+v", m)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" || len(got) != len(r.measured) {
		t.Errorf("%d measurements: %s", len(r.measured), diff)
	}
	if len(r.notes) != 1 {
		t.Errorf("notes: %+v", r.notes)
	}
}

func TestPartHasItsContestants(t *testing.T) {
	for _, name := range Part.Contestants {
		if !slices.ContainsFunc(part.Contestants, func(c part.Contestant) bool { return c.Name == name }) {
			t.Errorf("bench/part has no %q", name)
		}
		if s := Part.Setups[name]; len(s.Commands) == 0 && name != part.Direct {
			t.Errorf("%s: no setup", name)
		}
	}
	for _, name := range quick {
		if !slices.Contains(Part.Contestants, name) {
			t.Errorf("%s is in quick runs alone", name)
		}
	}
}

// TestPartWantsNothing needs no nlb and boots nothing where nothing is wanted.
func TestPartWantsNothing(t *testing.T) {
	o := part.Options{Contestants: []string{part.PlainHAProxy}, Metrics: Metrics()}
	if round, around := Part.Estimate(o); round != 0 || around != 0 {
		t.Errorf("takes %v and %v", round, around)
	}
	r, err := Part.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	var got recorder
	if err := errors.Join(r.Round(t.Context(), 1, &got), r.Close()); err != nil || len(got.measured) > 0 {
		t.Errorf("measured %v: %v", got.measured, err)
	}
}

// TestPartSaysWhatIsMissing has no nlb.
func TestPartSaysWhatIsMissing(t *testing.T) {
	o := part.Options{
		Programs:    part.Programs{part.NLB: filepath.Join(t.TempDir(), "nlb")},
		Contestants: []string{part.Direct}, Metrics: Metrics(),
	}
	if _, err := Part.Open(t.Context(), o); err == nil || !strings.HasPrefix(err.Error(), "needs nlb itself, linked statically") {
		t.Error(err)
	}
}

func TestEstimate(t *testing.T) {
	o := part.Options{Contestants: Part.Contestants, Metrics: Metrics()}
	full, _ := Part.Estimate(o)
	o.Quick = true
	short, _ := Part.Estimate(o)
	if short >= full || short <= bootTime {
		t.Errorf("%v in full, %v quickly", full, short)
	}
}
