package report

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// judged is a run of two contestants that has some values by metric and case, of
// the first and then of the second.
func judged(t *testing.T, goals ...Goal) *Run {
	t.Helper()
	var b strings.Builder
	w, err := NewWriter(&b, Header{
		Start: time.Unix(1e9, 0), Mode: Full, Rounds: 5,
		Contestants: []Contestant{{Name: "ours", Role: NLB}, {Name: "theirs", Role: Peer}},
		Metrics: []Metric{
			{Name: "rate", Unit: "packets/s", Better: More},
			{Name: "cost", Unit: "ns", Better: Less, Cases: []string{"small", "large"}, Rounds: 3},
			{Name: "tail", Unit: "ms", Better: Less, PrintedOnly: true},
		},
		Goals: goals,
	})
	if err != nil {
		t.Fatal(err)
	}
	for round := 1; round <= 5; round++ {
		for contestant, value := range map[string]float64{"ours": 97, "theirs": 100} {
			if err := w.Measure(Measurement{round, "rate", "", contestant, value, "packets/s"}); err != nil {
				t.Fatal(err)
			}
		}
	}
	for round := 1; round <= 3; round++ {
		for cas, value := range map[string]float64{"small": 100, "large": 106 + float64(round)/10} {
			if err := w.Measure(Measurement{round, "cost", cas, "ours", value, "ns"}); err != nil {
				t.Fatal(err)
			}
		}
	}
	run, err := Read(strings.NewReader(b.String()))
	if err != nil {
		t.Fatal(err)
	}
	return run
}

func TestJudge(t *testing.T) {
	ours, theirs := GoalRow{Contestant: "ours"}, GoalRow{Contestant: "theirs"}
	small, large := GoalRow{"small", "ours"}, GoalRow{"large", "ours"}
	run := judged(t,
		Goal{"rate", ours, theirs, 0.97},
		Goal{"rate", ours, theirs, 0.98},
		Goal{"cost", large, small, 1.07},
		Goal{"cost", large, small, 1.05},
		Goal{"cost", large, GoalRow{"small", "theirs"}, 1}, // not measured
	)
	got := make(map[float64]string)
	for _, j := range run.Judge() {
		got[j.Limit] = j.Verdict()
	}
	want := map[float64]string{0.97: "met", 0.98: "short", 1.07: "met", 1.05: "short"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("verdicts (-want +got):\n%s", diff)
	}
	text := strings.Join(strings.Fields(string(filesOf(t, run)["report.md"])), " ")
	for _, row := range []string{
		"| rate | ours | theirs | at least 0.98 | 0.970 | 0.970 .. 0.970 | short |",
		"| cost | ours, large | ours, small | at most 1.07 | 1.062 |",
	} {
		if !strings.Contains(text, row) {
			t.Errorf("the report does not have %q:\n%s", row, text)
		}
	}
	if strings.Contains(text, "3 of 5 rounds") {
		t.Error("it misses rounds that were not planned")
	}
}

func TestBadGoals(t *testing.T) {
	ours := GoalRow{Contestant: "ours"}
	for want, g := range map[string]Goal{
		`header: goals[0]: metric: the header has no "speed"`:              {"speed", ours, ours, 1},
		`header: goals[0]: case: the header has no "" for "cost"`:          {"cost", ours, ours, 1},
		`header: goals[0]: contestant: the header has no "him"`:            {"rate", ours, GoalRow{Contestant: "him"}, 1},
		`header: goals[0]: metric: "tail" is only printed`:                 {"tail", ours, ours, 1},
		`header: goals[0]: limit: 0 is no ratio`:                           {"rate", ours, ours, 0},
		`header: metrics[0].rounds: 9 is not between 0 and the header's 5`: {},
	} {
		h := Header{
			Start: time.Unix(1e9, 0), Mode: Full, Rounds: 5, Contestants: []Contestant{{Name: "ours", Role: NLB}},
			Metrics: []Metric{{Name: "rate", Unit: "1", Better: More}, {Name: "cost", Unit: "1", Better: Less, Cases: []string{"small"}}, {Name: "tail", Unit: "1", Better: Less, PrintedOnly: true}},
			Goals:   []Goal{g},
		}
		if g == (Goal{}) {
			h.Goals, h.Metrics[0].Rounds = nil, 9
		}
		if _, err := NewWriter(new(strings.Builder), h); err == nil || err.Error() != want {
			t.Errorf("%v, not %s", err, want)
		}
	}
}

// TestCounted: where chance has no part, one round says all.
func TestCounted(t *testing.T) {
	a, b := &Row{values: map[int]float64{1: 3}}, &Row{Contestant: &Contestant{Name: "b"}, values: map[int]float64{1: 2}}
	for _, counted := range []bool{true, false} {
		m := &Metric{Better: Less, Counted: counted}
		r := ratio(m, a, b)
		want := Unclear
		if counted {
			want = Behind
		}
		if r.Noisy() == counted || m.Standing(r) != want {
			t.Errorf("counted %v: noisy %v, %s", counted, r.Noisy(), m.Standing(r))
		}
	}
}
