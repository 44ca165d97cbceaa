package report

import (
	"fmt"
	"strings"
)

// A Goal is what the ratio of two rows should be at least, or at most if less is
// better. What one of the rows does not have measured is not judged.
type Goal struct {
	Metric string  `json:"metric"`
	Row    GoalRow `json:"row"`
	Of     GoalRow `json:"of"`
	Limit  float64 `json:"limit"`
}

// A GoalRow is a row of the metric's tables.
type GoalRow struct {
	Case       string `json:"case,omitempty"`
	Contestant string `json:"contestant"`
}

// String is the row's contestant with its case.
func (g GoalRow) String() string {
	if g.Case == "" {
		return g.Contestant
	}
	return g.Contestant + ", " + g.Case
}

// A Judgement is a goal with the ratio that was measured.
type Judgement struct {
	*Goal
	Ratio *Ratio
	Met   bool // the median is the limit or better
}

// Judge measures the run by its goals, in the order of the header. Goals without
// a ratio are not there.
func (r *Run) Judge() []Judgement {
	rows := make(map[key]*Row)
	for _, t := range r.Tables() {
		for i := range t.Rows {
			rows[key{t.Metric.Name, t.Case, t.Rows[i].Contestant.Name}] = &t.Rows[i]
		}
	}
	var all []Judgement
	for i := range r.Header.Goals {
		g := &r.Header.Goals[i]
		row, of := rows[key{g.Metric, g.Row.Case, g.Row.Contestant}], rows[key{g.Metric, g.Of.Case, g.Of.Contestant}]
		if row == nil || of == nil {
			continue
		}
		if got := ratio(r.metric(g.Metric), row, of); got != nil {
			all = append(all, Judgement{g, got, got.Median == g.Limit || r.metric(g.Metric).better(got.Median, g.Limit)})
		}
	}
	return all
}

// metric is the one with a name; nil for none.
func (r *Run) metric(name string) *Metric {
	for i := range r.Header.Metrics {
		if r.Header.Metrics[i].Name == name {
			return &r.Header.Metrics[i]
		}
	}
	return nil
}

// Verdict says in a word or two whether the goal is met.
func (j *Judgement) Verdict() string {
	var words []string
	if j.Met {
		words = append(words, "met")
	} else {
		words = append(words, "short")
	}
	if j.Ratio.Noisy() {
		words = append(words, "noisy")
	}
	return strings.Join(words, ", ")
}

// goals has those that could be judged.
func (d *document) goals(r *Run) {
	all := r.Judge()
	if len(all) == 0 {
		return
	}
	d.heading("Goals")
	rows := [][]string{{"metric", "contestant", "of", "goal", "measured", "quartiles", "verdict"}}
	for _, j := range all {
		least := "at least"
		if r.metric(j.Metric).Better == Less {
			least = "at most"
		}
		rows = append(rows, []string{
			j.Metric, j.Row.String(), j.Of.String(), fmt.Sprintf("%s %.2f", least, j.Limit),
			fmt.Sprintf("%.3f", j.Ratio.Median), fmt.Sprintf("%.3f .. %.3f", j.Ratio.Q1, j.Ratio.Q3), j.Verdict(),
		})
	}
	d.table(rows, 4, 6)
}

// checkGoals says what the header's goals are about that it does not have.
func (h *Header) checkGoals() error {
	l := newLedger(h)
	for i, g := range h.Goals {
		for _, row := range []GoalRow{g.Row, g.Of} {
			m, err := l.place(g.Metric, row.Case, row.Contestant)
			switch {
			case err != nil:
				return fmt.Errorf("goals[%d]: %w", i, err)
			case m.PrintedOnly:
				return fmt.Errorf("goals[%d]: metric: %q is only printed", i, g.Metric)
			}
		}
		if !(g.Limit > 0) {
			return fmt.Errorf("goals[%d]: limit: %g is no ratio", i, g.Limit)
		}
		if err := checkNumber(fmt.Sprintf("goals[%d].limit", i), g.Limit); err != nil {
			return err
		}
	}
	return nil
}
