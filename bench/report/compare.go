package report

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"

	"nlb/bench/measure"
)

// A Comparison is what is different in a new run. Its JSON form is that of its
// fields, and stable, but for more of them.
type Comparison struct {
	Old string `json:"old"` // when it began
	New string `json:"new"`
	// Threshold is the least part of a ratio that it has to change by.
	Threshold float64 `json:"threshold"`
	// Differences are those between machines, settings and contestants: each may
	// explain a change.
	Differences []Difference `json:"differences"`
	// Regressions is how many changes of nlb's contestants are for the worse.
	Regressions int      `json:"regressions"`
	Changes     []Change `json:"changes"`
	// Missing is what only the old run can compare, Added what only the new one
	// can. What neither can, having no ratio to a baseline, is Unrelated.
	Missing   []Place `json:"missing"`
	Added     []Place `json:"added"`
	Unrelated []Place `json:"unrelated"`
}

// A Place is a row of a table.
type Place struct {
	Metric     string `json:"metric"`
	Case       string `json:"case,omitempty"`
	Contestant string `json:"contestant"`
	Role       Role   `json:"role"`
}

// A Difference is a circumstance that was another one.
type Difference struct {
	What string `json:"what"`
	Old  string `json:"old"`
	New  string `json:"new"`
}

// A Change is a row that both runs have.
type Change struct {
	Place
	// Old and New are ratios to the baseline.
	Old *Ratio `json:"old"`
	New *Ratio `json:"new"`
	// Change is how much larger the new median is, as a part of the old one. It
	// depends on the metric which sign is the better one: see Verdict.
	Change  float64 `json:"change"`
	Verdict Verdict `json:"verdict"`
	Noisy   bool    `json:"noisy,omitempty"` // one of the ratios is
}

// A Verdict is what became of a row.
type Verdict string

// A row is Worse or Better if its median has changed by the threshold or more,
// and each median is outside the other run's spread, from the least to the most
// of its rounds. Of the same thing measured twice, without a threshold, chance
// alone makes one row worse in 10 with 3 rounds, in 42 with 5, in 172 with 7 and
// in 695 with 9: that many are the orders in which the rounds of both can be. A
// quick run is therefore not to be compared with much trust. With fewer than
// EnoughRounds rounds a row is Unsure.
const (
	Same   Verdict = "same"
	Better Verdict = "better"
	Worse  Verdict = "worse"
	Unsure Verdict = "unsure"
)

// ErrNothingInCommon is for runs of which no row can be compared.
var ErrNothingInCommon = errors.New("the runs have no ratio in common")

// CompareRuns compares the ratios to the baseline, by metric, case and
// contestant; not the values, because machines differ. The threshold is a part
// of a ratio, such as 0.03.
func CompareRuns(old, now *Run, threshold float64) (*Comparison, error) {
	c := &Comparison{
		Old: old.Header.Start.UTC().Format(timeForm), New: now.Header.Start.UTC().Format(timeForm),
		Threshold: threshold, Differences: differences(old, now),
		Missing: []Place{}, Added: []Place{}, Unrelated: []Place{}, // in JSON not null
	}
	olds, news := placed(old), placed(now)
	for _, o := range olds {
		n, ok := find(news, o)
		switch {
		case o.ratio == nil && (!ok || n.ratio == nil):
			c.Unrelated = append(c.Unrelated, o.Place)
		case !ok || n.ratio == nil:
			c.Missing = append(c.Missing, o.Place)
		case o.ratio == nil:
			c.Added = append(c.Added, o.Place)
		default:
			c.add(newChange(o, n, threshold))
		}
	}
	for _, n := range news {
		switch _, ok := find(olds, n); {
		case ok:
		case n.ratio == nil && slices.Contains(c.Unrelated, n.Place):
		case n.ratio == nil:
			c.Unrelated = append(c.Unrelated, n.Place)
		default:
			c.Added = append(c.Added, n.Place)
		}
	}
	if len(c.Changes) == 0 {
		return nil, ErrNothingInCommon
	}
	return c, nil
}

const timeForm = "2006-01-02 15:04:05 MST"

// A placedRatio is a row that can be compared if it has a ratio.
type placedRatio struct {
	Place
	metric *Metric
	ratio  *Ratio
}

// placed are a run's rows that are not its baseline or only printed.
func placed(r *Run) []placedRatio {
	var all []placedRatio
	for _, t := range r.Tables() {
		for i := range t.Rows {
			row := &t.Rows[i]
			if t.Metric.PrintedOnly || row.Contestant.Role == Baseline {
				continue
			}
			p := Place{t.Metric.Name, t.Case, row.Contestant.Name, row.Contestant.Role}
			all = append(all, placedRatio{p, t.Metric, row.ToBaseline})
		}
	}
	return all
}

// find finds the same row. A metric in another unit is another metric.
func find(all []placedRatio, p placedRatio) (placedRatio, bool) {
	i := slices.IndexFunc(all, func(o placedRatio) bool {
		return o.Place == p.Place && o.metric.Unit == p.metric.Unit && o.metric.Better == p.metric.Better
	})
	if i < 0 {
		return placedRatio{}, false
	}
	return all[i], true
}

func newChange(o, n placedRatio, threshold float64) Change {
	c := Change{
		Place: n.Place, Old: o.ratio, New: n.ratio, Change: n.ratio.Median/o.ratio.Median - 1,
		Verdict: Same, Noisy: o.ratio.Noisy() || n.ratio.Noisy(),
	}
	switch {
	case o.ratio.few() || n.ratio.few():
		c.Verdict = Unsure
	case math.Abs(c.Change) < threshold || o.ratio.spans(n.ratio.Median) || n.ratio.spans(o.ratio.Median):
	case n.metric.better(n.ratio.Median, o.ratio.Median):
		c.Verdict = Better
	default:
		c.Verdict = Worse
	}
	return c
}

// spans says whether a value is within the spread.
func (s *Spread) spans(v float64) bool { return s.Min <= v && v <= s.Max }

func (c *Comparison) add(ch Change) {
	c.Changes = append(c.Changes, ch)
	if ch.Verdict == Worse && ch.Role == NLB {
		c.Regressions++
	}
}

// differences are those of the headers, and whether a run is incomplete.
func differences(old, now *Run) []Difference {
	all := []Difference{}
	add := func(what string, o, n any) {
		if a, b := fmt.Sprint(o), fmt.Sprint(n); a != b {
			all = append(all, Difference{what, a, b})
		}
	}
	o, n := &old.Header, &now.Header
	add("CPU", o.Machine.CPU, n.Machine.CPU)
	add("cores", o.Machine.Cores, n.Machine.Cores)
	add("core of everything", o.Machine.Core, n.Machine.Core)
	add("bytes of RAM", o.Machine.RAMBytes, n.Machine.RAMBytes)
	add("kernel", o.Machine.Kernel, n.Machine.Kernel)
	add("mode", o.Mode, n.Mode)
	add("rounds", o.Rounds, n.Rounds)
	add("complete", old.End != nil, now.End != nil)
	for _, name := range union(slices.Sorted(maps.Keys(o.Flags)), slices.Sorted(maps.Keys(n.Flags))) {
		add("flag "+name, value(o.Flags, name), value(n.Flags, name))
	}
	return append(append(all, metricDifferences(o, n)...), contestantDifferences(o, n)...)
}

// value is a flag's, and tells an empty one from none.
func value(flags map[string]string, name string) string {
	if v, ok := flags[name]; ok {
		return fmt.Sprintf("%q", v)
	}
	return "none"
}

// union is a, and then what only b has.
func union(a, b []string) []string {
	return append(a, slices.DeleteFunc(b, func(s string) bool { return slices.Contains(a, s) })...)
}

// metricDifferences are those of metrics that both have; others show in rows.
func metricDifferences(o, n *Header) (all []Difference) {
	for _, a := range o.Metrics {
		for _, b := range n.Metrics {
			if was, is := a.meaning(), b.meaning(); a.Name == b.Name && was != is {
				all = append(all, Difference{"metric " + a.Name, was, is})
			}
		}
	}
	return all
}

func (m *Metric) meaning() string {
	if m.PrintedOnly {
		return m.Unit + ", printed only"
	}
	return fmt.Sprintf("%s, %s is better", m.Unit, m.Better)
}

// contestantDifferences are those of contestants that both have.
func contestantDifferences(o, n *Header) (all []Difference) {
	for _, a := range o.Contestants {
		i := slices.IndexFunc(n.Contestants, func(b Contestant) bool { return a.Name == b.Name })
		if i < 0 {
			continue
		}
		b := n.Contestants[i]
		for _, f := range []struct{ what, old, now string }{
			{"version", a.Version, b.Version},
			{"role", string(a.Role), string(b.Role)},
			{"job", a.Job, b.Job},
			{"commands", strings.Join(a.Commands, "; "), strings.Join(b.Commands, "; ")},
			{"configuration", a.Config, b.Config},
		} {
			if f.old != f.now {
				all = append(all, Difference{f.what + " of " + a.Name, f.old, f.now})
			}
		}
	}
	return all
}

// Table writes it for people: the verdict first, with what may explain it.
func (c *Comparison) Table(w io.Writer) error {
	if _, err := fmt.Fprintf(w, "%s\nold: %s\nnew: %s\n", c.headline(), c.Old, c.New); err != nil {
		return err
	}
	if len(c.Differences) > 0 {
		rows := [][]string{{"", "old", "new"}}
		for _, d := range c.Differences {
			rows = append(rows, []string{"  " + d.What, short(d.Old), short(d.New)})
		}
		if err := measure.WriteSection(w, "The runs differ in more than time", rows); err != nil {
			return err
		}
	}
	rows := [][]string{{"", "case", "contestant", "old", "min .. max", "new", "min .. max", "change", "", ""}}
	for _, ch := range c.Changes {
		rows = append(rows, ch.cells())
	}
	if err := measure.WriteSection(w, "Ratios to the baseline", rows); err != nil {
		return err
	}
	for _, s := range []struct {
		title  string
		places []Place
	}{
		{"Only the old run can compare", c.Missing},
		{"Only the new run can compare", c.Added},
		{"Not compared, as there is no baseline", c.Unrelated},
	} {
		if err := writePlaces(w, s.title, s.places); err != nil {
			return err
		}
	}
	return nil
}

func (c *Comparison) headline() string {
	counts := make(map[Verdict]int)
	peers := 0
	for _, ch := range c.Changes {
		switch {
		case ch.Role == NLB:
			counts[ch.Verdict]++
		case ch.Verdict == Better || ch.Verdict == Worse:
			peers++
		}
	}
	text := fmt.Sprintf("nlb: %d worse, %d better, %d the same by less than %g %% or within the spreads, %d with too few rounds.",
		counts[Worse], counts[Better], counts[Same], 100*c.Threshold, counts[Unsure])
	if peers > 0 {
		text += fmt.Sprintf("\n%d of the peers' ratios have changed as well: perhaps it is not nlb that has.", peers)
	}
	return text
}

func (c *Change) cells() []string {
	noisy := ""
	if c.Noisy {
		noisy = "noisy"
	}
	return []string{
		"  " + c.Metric, c.Case, c.Contestant, median(c.Old), fmt.Sprintf("%.3f .. %.3f", c.Old.Min, c.Old.Max),
		median(c.New), fmt.Sprintf("%.3f .. %.3f", c.New.Min, c.New.Max), fmt.Sprintf("%+.1f %%", 100*c.Change), string(c.Verdict), noisy,
	}
}

func writePlaces(w io.Writer, title string, places []Place) error {
	if len(places) == 0 {
		return nil
	}
	var rows [][]string
	for _, p := range places {
		rows = append(rows, []string{"  " + p.Metric, p.Case, p.Contestant})
	}
	return measure.WriteSection(w, title, rows)
}

// short is text for a cell: its first line, and not all of a long one.
func short(s string) string {
	const most = 60
	text := []rune(oneLine(s))
	if len(text) > most {
		return string(text[:most]) + "…"
	}
	return string(text)
}
