package report

import (
	"bytes"
	"encoding/json"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"nlb/bench/measure"
	"nlb/internal/golden"
)

func mustCompare(t rapid.TB, old, now *Run) *Comparison {
	t.Helper()
	c, err := CompareRuns(old, now, 0.03)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestRunAgainstItself has any run, however noisy, compared with itself.
func TestRunAgainstItself(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		run := example(t, rapid.Uint64().Draw(r, "seed"), rapid.Float64Range(0, 0.9).Draw(r, "noise"), unchanged)
		c, err := CompareRuns(run, run, rapid.Float64Range(0, 0.1).Draw(r, "threshold"))
		if err != nil {
			r.Fatal(err)
		}
		if changed(c) > 0 || c.Regressions > 0 || len(c.Differences)+len(c.Missing)+len(c.Added) > 0 {
			r.Errorf("%+v", c)
		}
	})
}

// TestPlanted has one place get 10 % worse or better between two runs that are
// noisy by 0.7 % either way: that and nothing else is found. The ratios of two
// such values are within 1.42 % of the true one, and so are medians, of which
// two are less than 3 % apart.
func TestPlanted(t *testing.T) {
	places := []Place{
		{"UDP packets", "listeners=1000", "nlb preserve", NLB},
		{"p50 of 4000 requests a second", "", "nlb proxy_protocol_v2", NLB},
		{"p50 of 4000 requests a second", "", "minimal DNAT", Peer},
	}
	rapid.Check(t, func(r *rapid.T) {
		at := rapid.SampledFrom(places).Draw(r, "place")
		factor := rapid.SampledFrom([]float64{0.9, 1.1}).Draw(r, "factor")
		planted := func(m Measurement) float64 {
			if m.Metric == at.Metric && m.Case == at.Case && m.Contestant == at.Contestant {
				return factor
			}
			return 1
		}
		seed := rapid.Uint64Range(0, 1<<40).Draw(r, "seed")
		c := mustCompare(r, example(t, seed, 0.007, unchanged), example(t, seed+1, 0.007, planted))
		var found []Place
		for _, ch := range c.Changes {
			if ch.Verdict == Same {
				continue
			}
			found = append(found, ch.Place)
			if worse := (factor < 1) == (at.Metric == "UDP packets"); worse != (ch.Verdict == Worse) {
				r.Errorf("%v × %g is %s", at, factor, ch.Verdict)
			}
			if want := ch.Verdict == Worse && at.Role == NLB; want != (c.Regressions == 1) {
				r.Errorf("%d regressions", c.Regressions)
			}
		}
		if diff := cmp.Diff([]Place{at}, found); diff != "" {
			r.Error(diff)
		}
	})
}

// TestNoise moves everything, by up to a third, but no ratio out of its spread:
// that is no change, however low the threshold.
func TestNoise(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		seed := rapid.Uint64Range(0, 1<<40).Draw(r, "seed")
		noise := rapid.Float64Range(0.001, 0.15).Draw(r, "noise")
		old := example(t, seed, noise, unchanged)
		to := rapid.Float64Range(0.01, 0.99)
		move := make(map[key]float64)
		for _, p := range placed(old) {
			if p.ratio != nil {
				at := p.ratio.Min + (p.ratio.Max-p.ratio.Min)*to.Draw(r, p.Contestant)
				move[key{p.Metric, p.Case, p.Contestant}] = at / p.ratio.Median
			}
		}
		now := example(t, seed, noise, func(m Measurement) float64 {
			if by, ok := move[key{m.Metric, m.Case, m.Contestant}]; ok {
				return by
			}
			return 1
		})
		c, err := CompareRuns(old, now, 0)
		if err != nil {
			r.Fatal(err)
		}
		if changed(c) > 0 || len(c.Changes) != len(move) {
			r.Errorf("%+v", c.Changes)
		}
	})
}

func TestVerdict(t *testing.T) {
	more, less := &Metric{Better: More}, &Metric{Better: Less}
	for _, c := range []struct {
		name     string
		metric   *Metric
		old, now []float64
		want     Verdict
	}{
		{"the same", more, []float64{1, 1, 1}, []float64{1, 1, 1}, Same},
		{"worse", more, []float64{1, 1.01, 0.99}, []float64{0.9, 0.91, 0.89}, Worse},
		{"better", more, []float64{0.9, 0.91, 0.89}, []float64{1, 1.01, 0.99}, Better},
		{"less is better", less, []float64{1, 1.01, 0.99}, []float64{0.9, 0.91, 0.89}, Better},
		{"less is worse", less, []float64{0.9, 0.91, 0.89}, []float64{1, 1.01, 0.99}, Worse},
		{"less than the threshold", more, []float64{1, 1, 1}, []float64{0.98, 0.98, 0.98}, Same},
		{"within the old spread", more, []float64{1, 1.01, 0.9}, []float64{0.91, 0.92, 0.91}, Same},
		{"within the new spread", more, []float64{1, 1.01, 0.99}, []float64{0.9, 1.02, 0.9}, Same},
		{"spreads that touch without the medians", more, []float64{1, 1.01, 0.93}, []float64{0.9, 0.94, 0.89}, Worse},
		{"too few rounds", more, []float64{1, 1, 1}, []float64{0.5, 0.5}, Unsure},
	} {
		t.Run(c.name, func(t *testing.T) {
			side := func(values []float64) placedRatio {
				return placedRatio{Place{}, c.metric, &Ratio{"direct", len(values), SpreadOf(values), EnoughRounds}}
			}
			if got := newChange(side(c.old), side(c.now), 0.03).Verdict; got != c.want {
				t.Error(got)
			}
		})
	}
}

// TestCompareRuns has all that can be different.
func TestCompareRuns(t *testing.T) {
	old := example(t, 1, 0.01, unchanged)
	now := example(t, 2, 0.01, func(m Measurement) float64 {
		if m.Contestant == "nlb preserve" && m.Case == "listeners=1" {
			return 0.9
		}
		if m.Contestant == "minimal DNAT" && m.Metric == "p50 of 4000 requests a second" {
			return 0.8
		}
		return 1
	})
	h := &now.Header
	h.Start = h.Start.AddDate(0, 0, 1)
	h.Machine.Kernel, h.Machine.RAMBytes, h.Mode = "6.13.0", 16<<30, Quick
	h.Flags = map[string]string{"rounds": "9", "new": ""}
	h.Contestants[1].Version, h.Contestants[1].Config = "nftables v1.1.0", "table ip other {\n}\n"
	h.Metrics[1].Better = More
	h.Metrics[0].Cases[1] = "listeners=2000"
	for i := range now.Measurements {
		if m := &now.Measurements[i]; m.Case == "listeners=1000" {
			m.Case = "listeners=2000"
		}
	}
	now.End = nil
	var table bytes.Buffer
	c := mustCompare(t, old, now)
	if err := measure.Write(&table, "table", c); err != nil {
		t.Fatal(err)
	}
	golden.Check(t, "compare.txt", table.Bytes())
	if c.Regressions != 1 {
		t.Errorf("%d regressions", c.Regressions)
	}

	var text bytes.Buffer
	if err := measure.Write(&text, "json", c); err != nil {
		t.Fatal(err)
	}
	var again *Comparison
	if err := json.Unmarshal(text.Bytes(), &again); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(c, again, cmpopts.EquateEmpty()); diff != "" {
		t.Error(diff)
	}
	if bytes.Contains(text.Bytes(), []byte("null")) {
		t.Errorf("%s", text.Bytes())
	}
}

func TestNothingInCommon(t *testing.T) {
	a := example(t, 1, 0.01, unchanged)
	b := example(t, 1, 0.01, unchanged)
	b.Measurements = nil
	for _, pair := range [][2]*Run{{a, b}, {b, a}, {b, b}} {
		if c, err := CompareRuns(pair[0], pair[1], 0.03); !errors.Is(err, ErrNothingInCommon) {
			t.Errorf("%v %+v", err, c)
		}
	}
}

// TestAnotherMeaning: a metric of the same name in another unit, or with another
// idea of what is better, is another metric.
func TestAnotherMeaning(t *testing.T) {
	const latency = "p50 of 4000 requests a second"
	rows := []Place{
		{latency, "", "minimal DNAT", Peer}, {latency, "", "nlb preserve", NLB},
		{latency, "", "HAProxy, splice-request <b>|</b>", Peer}, {latency, "", "nlb proxy_protocol_v2", NLB},
	}
	for name, change := range map[string]func(*Metric){
		"unit":      func(m *Metric) { m.Unit = "ms" },
		"direction": func(m *Metric) { m.Better = More },
	} {
		t.Run(name, func(t *testing.T) {
			now := example(t, 1, 0.01, unchanged)
			change(&now.Header.Metrics[2])
			c := mustCompare(t, example(t, 1, 0.01, unchanged), now)
			if diff := cmp.Diff([2][]Place{rows, rows}, [2][]Place{c.Missing, c.Added}); diff != "" {
				t.Error(diff)
			}
			for _, ch := range c.Changes {
				if ch.Metric == latency {
					t.Errorf("%+v", ch)
				}
			}
		})
	}
}
