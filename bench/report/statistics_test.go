package report

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"nlb/bench/measure"
)

func spread(median, least, most, q1, q3 float64) Spread {
	return Spread{measure.Summary{Median: median, Min: least, Max: most}, q1, q3}
}

// TestSpreadOf has the quartiles that R's quantile() has by default.
func TestSpreadOf(t *testing.T) {
	for _, c := range []struct {
		name   string
		values []float64
		want   Spread
	}{
		{"nothing", nil, Spread{}},
		{"one", []float64{3}, spread(3, 3, 3, 3, 3)},
		{"two", []float64{5, 1}, spread(3, 1, 5, 2, 4)},
		{"three", []float64{5, 1, 2}, spread(2, 1, 5, 1.5, 3.5)},
		{"four", []float64{4, 3, 2, 1}, spread(2.5, 1, 4, 1.75, 3.25)},
		{"five", []float64{10, 50, 30, 20, 40}, spread(30, 10, 50, 20, 40)},
		{"an outlier moves no quartile", []float64{5, 5, 5, 5, 500}, spread(5, 5, 500, 5, 5)},
	} {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, SpreadOf(c.values)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// valued is a run of values by contestant, in rounds from 1; 0 is none.
func valued(m Metric, who []Contestant, values ...[]float64) *Run {
	m.Name, m.Unit = "m", "u"
	r := &Run{Header: Header{Contestants: who, Metrics: []Metric{m}}}
	for i, of := range values {
		for n, v := range of {
			r.Header.Rounds = max(r.Header.Rounds, n+1)
			if v != 0 {
				r.Measurements = append(r.Measurements, Measurement{Round: n + 1, Metric: "m", Contestant: who[i].Name, Value: v, Unit: "u"})
			}
		}
	}
	return r
}

var (
	direct = Contestant{Name: "direct", Role: Baseline}
	own    = Contestant{Name: "nlb", Role: NLB}
	peerA  = Contestant{Name: "A", Role: Peer}
	peerB  = Contestant{Name: "B", Role: Peer}
	other  = Contestant{Name: "other", Role: Peer, Job: "another"}
)

// marks are what a row is marked with.
type marks struct {
	Name                     string
	Rounds                   int
	ToBaseline, ToPeer       *Ratio
	BestPeer, Bounded, Noisy bool
}

func TestTables(t *testing.T) {
	ratioTo := func(to string, rounds int, median, least, most, q1, q3 float64) *Ratio {
		return &Ratio{to, rounds, spread(median, least, most, q1, q3), EnoughRounds}
	}
	equal := func(to string, rounds int, v float64) *Ratio { return ratioTo(to, rounds, v, v, v, v, v) }
	for _, c := range []struct {
		name string
		run  *Run
		want []marks
	}{
		{
			"a machine that slows down changes no ratio",
			valued(Metric{Better: More, Limited: true}, []Contestant{direct, own, peerA, peerB},
				[]float64{100, 80, 40}, []float64{50, 40, 20}, []float64{80, 64, 32}, []float64{25, 20, 10}),
			[]marks{
				{Name: "direct", Rounds: 3},
				{Name: "nlb", Rounds: 3, ToBaseline: equal("direct", 3, 0.5), ToPeer: equal("A", 3, 0.625)},
				{Name: "A", Rounds: 3, ToBaseline: equal("direct", 3, 0.8), BestPeer: true, Bounded: true},
				{Name: "B", Rounds: 3, ToBaseline: equal("direct", 3, 0.25), ToPeer: equal("A", 3, 0.3125)},
			},
		}, {
			"less is better",
			valued(Metric{Better: Less, Limited: true}, []Contestant{direct, own, peerA, peerB},
				[]float64{10, 10, 10}, []float64{15, 15, 15}, []float64{40, 40, 40}, []float64{12.5, 12.5, 12.5}),
			[]marks{
				{Name: "direct", Rounds: 3},
				{Name: "nlb", Rounds: 3, ToBaseline: equal("direct", 3, 1.5), ToPeer: equal("B", 3, 1.2)},
				{Name: "A", Rounds: 3, ToBaseline: equal("direct", 3, 4), ToPeer: equal("B", 3, 3.2)},
				{Name: "B", Rounds: 3, ToBaseline: equal("direct", 3, 1.25), BestPeer: true, Bounded: true},
			},
		}, {
			"who does another job is no peer",
			valued(Metric{Better: More}, []Contestant{own, other}, []float64{1, 1, 1}, []float64{2, 2, 2}),
			[]marks{{Name: "nlb", Rounds: 3}, {Name: "other", Rounds: 3, BestPeer: true}},
		}, {
			"only rounds that both have",
			valued(Metric{Better: More}, []Contestant{direct, own}, []float64{0, 8, 4, 2}, []float64{1, 4, 2, 1}),
			[]marks{{Name: "direct", Rounds: 3}, {Name: "nlb", Rounds: 4, ToBaseline: equal("direct", 3, 0.5)}},
		}, {
			"no round that both have",
			valued(Metric{Better: More, Limited: true}, []Contestant{direct, own}, []float64{0, 8}, []float64{1}),
			[]marks{{Name: "direct", Rounds: 1}, {Name: "nlb", Rounds: 1}},
		}, {
			"few rounds are noisy",
			valued(Metric{Better: More}, []Contestant{direct, own}, []float64{4, 4}, []float64{2, 2}),
			[]marks{{Name: "direct", Rounds: 2}, {Name: "nlb", Rounds: 2, ToBaseline: equal("direct", 2, 0.5), Noisy: true}},
		}, {
			"quartiles far apart are noisy",
			valued(Metric{Better: More}, []Contestant{direct, own}, []float64{100, 100, 100}, []float64{100, 94, 106}),
			[]marks{{Name: "direct", Rounds: 3}, {Name: "nlb", Rounds: 3, ToBaseline: ratioTo("direct", 3, 1, 0.94, 1.06, 0.97, 1.03), Noisy: true}},
		}, {
			"quartiles not so far apart are not",
			valued(Metric{Better: More}, []Contestant{direct, own}, []float64{100, 100, 100}, []float64{100, 96, 104}),
			[]marks{{Name: "direct", Rounds: 3}, {Name: "nlb", Rounds: 3, ToBaseline: ratioTo("direct", 3, 1, 0.96, 1.04, 0.98, 1.02)}},
		}, {
			"printed, not compared",
			valued(Metric{Better: Less, PrintedOnly: true, Limited: true}, []Contestant{direct, own, peerA}, []float64{1, 1, 1}, []float64{1, 1, 1}, []float64{1, 1, 1}),
			[]marks{{Name: "direct", Rounds: 3}, {Name: "nlb", Rounds: 3}, {Name: "A", Rounds: 3}},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []marks
			for _, r := range c.run.Tables()[0].Rows {
				got = append(got, marks{r.Contestant.Name, r.Rounds, r.ToBaseline, r.ToPeer, r.BestPeer, r.Bounded, r.Noisy()})
			}
			if diff := cmp.Diff(c.want, got, cmpopts.EquateApprox(1e-12, 0)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestStanding(t *testing.T) {
	for _, c := range []struct {
		better Direction
		rounds int
		q1, q3 float64
		want   Standing
	}{
		{More, 3, 1.01, 1.2, Ahead},
		{More, 3, 1, 1.2, Level},
		{More, 3, 0.99, 1.2, Level},
		{More, 3, 0.9, 0.99, Behind},
		{Less, 3, 0.9, 0.99, Ahead},
		{Less, 3, 0.9, 1.01, Level},
		{Less, 3, 1.01, 1.2, Behind},
		{More, 2, 1.01, 1.2, Unclear},
	} {
		m := Metric{Better: c.better}
		if got := m.Standing(&Ratio{Rounds: c.rounds, Enough: EnoughRounds, Spread: Spread{Q1: c.q1, Q3: c.q3}}); got != c.want {
			t.Errorf("%+v: %s", c, got)
		}
	}
}
