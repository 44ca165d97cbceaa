package main

import (
	"fmt"
	"io"
	"math"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"nlb/bench/measure"
)

// headroom is how much faster than a contestant the way without any balancer
// has to be. With less, the generator is too much of what was measured.
const headroom = 1.5

// A quantity is what is made of a sample.
type quantity struct {
	name string
	of   func(*sample) float64
	// decimals are how many are shown.
	decimals int
	// limited says that the generator can limit it: see headroom.
	limited bool
	// balancer says that it is of the balancer alone: nothing, where there is none.
	balancer bool
}

const (
	connectionRate = "new connections a second of the core"
	balancerCost   = "balancer's CPU for a connection, µs"
	bulkOne        = "bulk of 1 flow, Gbit a second of the core"
	bulkEight      = "bulk of 8 flows, Gbit a second of the core"
	p50            = "p50 of 4000 requests a second, µs"
)

var quantities = []quantity{
	{name: connectionRate, of: func(s *sample) float64 { return s.connections.rate() }, limited: true},
	{name: "new connections a second that passed", of: func(s *sample) float64 { return s.connections.wall() }},
	{name: "the core's CPU for a connection, µs", of: func(s *sample) float64 { return 1e6 / s.connections.rate() }, decimals: 2},
	{name: balancerCost, of: func(s *sample) float64 { return s.connections.cost() }, decimals: 2, balancer: true},
	{name: bulkOne, of: func(s *sample) float64 { return gigabits(&s.bulk[0]) }, decimals: 2, limited: true},
	{name: bulkEight, of: func(s *sample) float64 { return gigabits(&s.bulk[1]) }, decimals: 2, limited: true},
	{name: p50, of: func(s *sample) float64 { return microseconds(s, 50) }, decimals: 1},
	{name: "p99 of 4000 requests a second, µs", of: func(s *sample) float64 { return microseconds(s, 99) }, decimals: 1},
}

func gigabits(w *window) float64 { return w.rate() * 8 / 1e9 }

func microseconds(s *sample, p int) float64 { return float64(percentile(s.latencies, p)) / 1e3 }

// A goal is what nlb has to reach against another contestant.
type goal struct {
	quantity, against string
	ratio             float64
	compare           compare
}

type compare string

const (
	atLeast compare = ">="
	atMost  compare = "<="
	below   compare = "<"
)

var goals = []goal{
	{connectionRate, haproxy, 1.05, atLeast},
	{connectionRate, haproxySplice, 1.05, atLeast},
	{balancerCost, haproxy, 1, below},
	{balancerCost, haproxySplice, 1, below},
	{bulkOne, haproxySplice, 1, atLeast},
	{bulkOne, haproxy, 1.5, atLeast},
	{bulkEight, haproxySplice, 1, atLeast},
	{bulkEight, haproxy, 1.5, atLeast},
	{p50, haproxy, 1, atMost},
	{p50, haproxySplice, 1, atMost},
}

func (g *goal) met(ratio float64) bool {
	switch g.compare {
	case atLeast:
		return ratio >= g.ratio
	case atMost:
		return ratio <= g.ratio
	}
	return ratio < g.ratio
}

// show is a ratio to three places, never rounded in nlb's favour.
func (g *goal) show(ratio float64) string {
	round := math.Ceil
	if g.compare == atLeast {
		round = math.Floor
	}
	return fmt.Sprintf("%.3f", round(ratio*1000)/1000)
}

// A report is the outcome; its JSON form is stable, but for more fields.
type report struct {
	Kernel  string  `json:"kernel"`
	Core    int     `json:"core"`
	Rounds  int     `json:"rounds"`
	Seconds float64 `json:"seconds"`
	// Load is what /proc/loadavg said before and after.
	Load       string           `json:"load"`
	Quantities []quantityReport `json:"quantities"`
	Goals      []goalReport     `json:"goals"`
}

type quantityReport struct {
	Name        string             `json:"name"`
	Contestants []contestantReport `json:"contestants"`
	decimals    int
}

type contestantReport struct {
	Name   string    `json:"name"`
	Values []float64 `json:"values"` // by round
	measure.Summary
	// Late is how many paced requests had no response, in all rounds.
	Late int `json:"late,omitempty"`
	// BoundedByGenerator says that the rate is too near that without a balancer.
	BoundedByGenerator bool `json:"bounded_by_generator"`
}

type goalReport struct {
	Quantity string          `json:"quantity"`
	Against  string          `json:"against"`
	Wanted   string          `json:"wanted"`
	Ratio    measure.Summary `json:"ratio"`
	// Rounds is in how many of the rounds the goal was met; Met is whether the
	// median does.
	Rounds int  `json:"rounds"`
	Met    bool `json:"met"`
	// BoundedByGenerator says that one of the two rates was.
	BoundedByGenerator bool `json:"bounded_by_generator"`
	goal               *goal
}

func newReport(o *options, all samples) (*report, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, err
	}
	r := &report{Kernel: unix.ByteSliceToString(u.Release[:]), Core: o.core, Rounds: o.rounds, Seconds: o.seconds}
	for _, q := range quantities {
		r.Quantities = append(r.Quantities, q.report(contestants, all))
	}
	for i := range goals {
		r.Goals = append(r.Goals, goals[i].report(r.Quantities))
	}
	return r, nil
}

// loadAverage is that of the last minute.
func loadAverage() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	one, _, _ := strings.Cut(string(text), " ")
	return one
}

// report makes a quantity of all samples. The first contestant is the one
// without a balancer.
func (q *quantity) report(who []contestant, all samples) quantityReport {
	r := quantityReport{Name: q.name, decimals: q.decimals}
	for i, c := range who {
		if q.balancer && i == 0 {
			continue
		}
		row := contestantReport{Name: c.name}
		for n := range all[i] {
			row.Values = append(row.Values, q.of(&all[i][n]))
			if q.name == p50 {
				row.Late += all[i][n].late
			}
		}
		row.Summary = measure.Summarize(row.Values)
		row.BoundedByGenerator = q.limited && i > 0 && measure.Compare(r.Contestants[0].Values, row.Values, measure.Ratio).Median < headroom
		r.Contestants = append(r.Contestants, row)
	}
	return r
}

func (g *goal) report(quantities []quantityReport) goalReport {
	r := goalReport{Quantity: g.quantity, Against: g.against, Wanted: fmt.Sprintf("%s %.2f", g.compare, g.ratio), goal: g}
	var own, other contestantReport
	for _, q := range quantities {
		for _, c := range q.Contestants {
			switch {
			case q.Name == g.quantity && c.Name == nlb:
				own = c
			case q.Name == g.quantity && c.Name == g.against:
				other = c
			}
		}
	}
	rounds := measure.Pairwise(own.Values, other.Values, measure.Ratio)
	for _, ratio := range rounds {
		if g.met(ratio) {
			r.Rounds++
		}
	}
	r.Ratio = measure.Summarize(rounds)
	r.Met = g.met(r.Ratio.Median)
	r.BoundedByGenerator = own.BoundedByGenerator || other.BoundedByGenerator
	return r
}

// Table has the quantities one after the other, and then the goals.
func (r *report) Table(w io.Writer) error {
	fmt.Fprintf(w, "Linux %s, core %d, %d rounds of %g s for each load, load average %s.\n", r.Kernel, r.Core, r.Rounds, r.Seconds, r.Load)
	fmt.Fprintln(w, "nlb has its nftables table, and connections tracked for it unless it says otherwise; all others have neither.")
	for _, q := range r.Quantities {
		if err := measure.WriteSection(w, q.Name, q.rows()); err != nil {
			return err
		}
	}
	return measure.WriteSection(w, "goals, as ratios within a round", r.goalRows())
}

func (q *quantityReport) rows() [][]string {
	rows := [][]string{{"", "median", "min .. max", ""}}
	number := func(v float64) string { return fmt.Sprintf("%.*f", q.decimals, v) }
	for _, c := range q.Contestants {
		var remarks []string
		if c.BoundedByGenerator {
			remarks = append(remarks, "bounded by the generator")
		}
		if c.Late > 0 {
			remarks = append(remarks, fmt.Sprintf("%d without a response", c.Late))
		}
		rows = append(rows, []string{"  " + c.Name, number(c.Median), number(c.Min) + " .. " + number(c.Max), strings.Join(remarks, ", ")})
	}
	return rows
}

func (r *report) goalRows() [][]string {
	rows := [][]string{{"", "against", "wanted", "median", "min .. max", "rounds", ""}}
	for _, g := range r.Goals {
		verdict := "missed"
		if g.Met {
			verdict = "met"
		}
		if g.BoundedByGenerator {
			verdict += ", bounded by the generator"
		}
		rows = append(rows, []string{
			"  " + g.Quantity, g.Against, g.Wanted, g.goal.show(g.Ratio.Median), g.goal.show(g.Ratio.Min) + " .. " + g.goal.show(g.Ratio.Max),
			fmt.Sprintf("%d of %d", g.Rounds, r.Rounds), verdict,
		})
	}
	return rows
}
