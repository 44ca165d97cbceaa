package report

import (
	"slices"

	"nlb/bench/measure"
)

// What marks a row.
const (
	// NoisySpread is how far a ratio's quartiles may be apart, as a part of its
	// median, before it is noisy. On an otherwise idle machine with everything on
	// one core, rates repeat within 1 to 6 %.
	NoisySpread = 0.05
	// EnoughRounds are as many as quartiles need to say anything.
	EnoughRounds = 3
	// Headroom is how many times a contestant's rate the baseline has to have, or
	// the contestant the baseline's cost: with less, more than two thirds of what
	// was measured would be there without any balancer.
	Headroom = 1.5
)

// A Spread is a Summary with the quartiles between which the middle half of the
// values are.
type Spread struct {
	measure.Summary
	Q1 float64 `json:"q1"`
	Q3 float64 `json:"q3"`
}

// SpreadOf makes the Spread of values in any order; of nothing, the zero Spread.
// Quartiles are linear between the values beside them: definition 7 of Hyndman
// and Fan, Sample Quantiles in Statistical Packages (1996), of which the median
// is measure's.
func SpreadOf(values []float64) Spread {
	if len(values) == 0 {
		return Spread{}
	}
	sorted := slices.Sorted(slices.Values(values))
	return Spread{measure.Summarize(values), quartile(sorted, 1), quartile(sorted, 3)}
}

// quartile is the nth quartile of sorted values.
func quartile(sorted []float64, n int) float64 {
	whole, rest := n*(len(sorted)-1)/4, n*(len(sorted)-1)%4
	if rest == 0 {
		return sorted[whole]
	}
	return sorted[whole] + (sorted[whole+1]-sorted[whole])*float64(rest)/4
}

// A Ratio is a contestant's values divided by another's, round by round.
type Ratio struct {
	To     string `json:"to"`
	Rounds int    `json:"rounds"` // in which both have a value
	Spread
	Enough int `json:"enough"` // rounds, to say anything
}

// Noisy says whether the ratio has to be taken with care: see NoisySpread and
// EnoughRounds.
func (r *Ratio) Noisy() bool {
	return r.few() || r.Q3-r.Q1 > NoisySpread*r.Median
}

// few says that there are not enough rounds.
func (r *Ratio) few() bool { return r.Rounds < r.Enough }

// enough is how many rounds of the metric are.
func (m *Metric) enough() int {
	if m.Counted {
		return 1
	}
	return EnoughRounds
}

// A Table has what was measured of a metric in one case.
type Table struct {
	Metric *Metric
	Case   string
	Rows   []Row // in the order of the header, without those not measured
}

// A Row is a contestant in a table.
type Row struct {
	Contestant *Contestant
	Rounds     int // in which it has a value
	Value      Spread
	// ToBaseline and ToPeer are nil for the baseline and the best peer
	// themselves, where there is none, and in metrics that are only printed.
	// ToPeer is to the best peer that does the same job.
	ToBaseline, ToPeer *Ratio
	// BestPeer says that the row is the best peer of its job.
	BestPeer bool
	// Bounded says that the generator is too much of the value.
	Bounded bool
	values  map[int]float64 // by round
}

// Noisy says whether one of the row's ratios is.
func (r *Row) Noisy() bool {
	return r.ToBaseline != nil && r.ToBaseline.Noisy() || r.ToPeer != nil && r.ToPeer.Noisy()
}

// Tables makes a table of each metric and case, in the order of the header, also
// of those without a row.
func (r *Run) Tables() []Table {
	values := make(map[key]map[int]float64)
	for _, m := range r.Measurements {
		k := key{m.Metric, m.Case, m.Contestant}
		if values[k] == nil {
			values[k] = make(map[int]float64)
		}
		values[k][m.Round] = m.Value
	}
	var tables []Table
	for i := range r.Header.Metrics {
		m := &r.Header.Metrics[i]
		for _, c := range m.cases() {
			t := Table{Metric: m, Case: c}
			for n := range r.Header.Contestants {
				who := &r.Header.Contestants[n]
				if v := values[key{m.Name, c, who.Name}]; v != nil {
					t.Rows = append(t.Rows, newRow(who, v))
				}
			}
			if !m.PrintedOnly {
				t.compare()
			}
			tables = append(tables, t)
		}
	}
	return tables
}

func newRow(who *Contestant, values map[int]float64) Row {
	var all []float64
	for _, v := range values {
		all = append(all, v)
	}
	return Row{Contestant: who, Rounds: len(values), Value: SpreadOf(all), values: values}
}

// compare adds the ratios to the rows.
func (t *Table) compare() {
	if n := slices.IndexFunc(t.Rows, func(r Row) bool { return r.Contestant.Role == Baseline }); n >= 0 {
		t.divide(&t.Rows[n])
	}
	best := t.bestPeers()
	for i := range t.Rows {
		row, peer := &t.Rows[i], best[t.Rows[i].Contestant.Job]
		row.BestPeer = row == peer
		if peer != nil && !row.BestPeer && row.Contestant.Role != Baseline {
			row.ToPeer = ratio(t.Metric, row, peer)
		}
	}
}

// divide divides the other rows by the baseline.
func (t *Table) divide(baseline *Row) {
	for i := range t.Rows {
		row := &t.Rows[i]
		if row == baseline {
			continue
		}
		row.ToBaseline = ratio(t.Metric, row, baseline)
		room := row.ToBaseline
		if t.Metric.Better == More {
			room = ratio(t.Metric, baseline, row)
		}
		row.Bounded = t.Metric.Limited && room != nil && room.Median < Headroom
	}
}

// bestPeers is the best peer of each job.
func (t *Table) bestPeers() map[string]*Row {
	best := make(map[string]*Row)
	for i := range t.Rows {
		row := &t.Rows[i]
		if row.Contestant.Role != Peer {
			continue
		}
		if b := best[row.Contestant.Job]; b == nil || t.Metric.better(row.Value.Median, b.Value.Median) {
			best[row.Contestant.Job] = row
		}
	}
	return best
}

// better says whether a is a better value than b.
func (m *Metric) better(a, b float64) bool {
	if m.Better == More {
		return a > b
	}
	return a < b
}

// ratio divides a by b in the rounds that both have; nil if there is none.
func ratio(m *Metric, a, b *Row) *Ratio {
	var over, under []float64
	for round, v := range a.values {
		if w, ok := b.values[round]; ok {
			over, under = append(over, v), append(under, w)
		}
	}
	if len(over) == 0 {
		return nil
	}
	return &Ratio{b.Contestant.Name, len(over), SpreadOf(measure.Pairwise(over, under, measure.Ratio)), m.enough()}
}

// A Standing is where a contestant is in comparison with another.
type Standing string

// A contestant is ahead or behind if it is in three quarters of the rounds. With
// fewer than are enough it is unclear.
const (
	Ahead   Standing = "ahead"
	Level   Standing = "level"
	Behind  Standing = "behind"
	Unclear Standing = "unclear"
)

// Standing reads a ratio of values of the metric.
func (m *Metric) Standing(r *Ratio) Standing {
	switch {
	case r.few():
		return Unclear
	case m.better(r.Q1, 1) && m.better(r.Q3, 1):
		return Ahead
	case m.better(1, r.Q1) && m.better(1, r.Q3):
		return Behind
	}
	return Level
}
