package main

import (
	"bytes"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/bench/measure"
)

// made are samples of so many connections in a second of the core, of which the
// balancer had half.
func made(connections ...float64) []sample {
	s := make([]sample, len(connections))
	for i, n := range connections {
		s[i].connections = window{n, 2 * time.Second, time.Second, time.Second / 2}
	}
	return s
}

func summary(median, least, most float64) measure.Summary {
	return measure.Summary{Median: median, Min: least, Max: most}
}

func TestWindow(t *testing.T) {
	began := time.Now()
	before := reading{began, 3 * time.Second, time.Second}
	now := reading{began.Add(4 * time.Second), 5 * time.Second, 2 * time.Second}
	var w window
	w.add(before.until(now, 500_000))
	w.add(before.until(now, 500_000))
	if w.rate() != 250_000 || w.wall() != 125_000 || w.cost() != 2 {
		t.Errorf("%+v: %v, %v, %v", w, w.rate(), w.wall(), w.cost())
	}
}

func TestQuantity(t *testing.T) {
	who := []contestant{{name: "router"}, {name: "slow"}, {name: "fast"}}
	all := samples{made(1500, 3000), made(1000, 1900), made(1001, 2100)}
	rate, cost := quantities[0], quantities[3]
	want := []contestantReport{
		{Name: "router", Values: []float64{1500, 3000}, Summary: summary(2250, 1500, 3000)},
		{Name: "slow", Values: []float64{1000, 1900}, Summary: summary(1450, 1000, 1900)},
		{Name: "fast", Values: []float64{1001, 2100}, Summary: summary(1550.5, 1001, 2100), BoundedByGenerator: true},
	}
	if diff := cmp.Diff(want, rate.report(who, all).Contestants); diff != "" {
		t.Error(diff)
	}
	if got := cost.report(who, all).Contestants; len(got) != 2 || got[0].Values[0] != 500 {
		t.Errorf("the cost of balancers alone: %+v", got)
	}
}

// TestGoal: the median decides, of ratios within a round, and nothing is rounded
// in nlb's favour.
func TestGoal(t *testing.T) {
	of := func(own, other []float64) []quantityReport {
		return []quantityReport{{Name: "q", Contestants: []contestantReport{{Name: nlb, Values: own}, {Name: haproxy, Values: other}}}}
	}
	for _, c := range []struct {
		name       string
		goal       goal
		own, other []float64
		met        bool
		rounds     int
		shown      string
	}{
		{"more", goal{"q", haproxy, 1.05, atLeast}, []float64{110, 104, 53}, []float64{100, 100, 50}, true, 2, "1.060"},
		{"just enough", goal{"q", haproxy, 1.5, atLeast}, []float64{150}, []float64{100}, true, 1, "1.500"},
		{"not quite", goal{"q", haproxy, 1.05, atLeast}, []float64{104.99}, []float64{100}, false, 0, "1.049"},
		{"as much", goal{"q", haproxy, 1, atMost}, []float64{100}, []float64{100}, true, 1, "1.000"},
		{"hardly more", goal{"q", haproxy, 1, atMost}, []float64{100.01}, []float64{100}, false, 0, "1.001"},
		{"as much is not below", goal{"q", haproxy, 1, below}, []float64{100}, []float64{100}, false, 0, "1.000"},
		{"below", goal{"q", haproxy, 1, below}, []float64{99.91}, []float64{100}, true, 1, "1.000"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := c.goal.report(of(c.own, c.other))
			if shown := c.goal.show(r.Ratio.Median); r.Met != c.met || r.Rounds != c.rounds || shown != c.shown {
				t.Errorf("met %v, in %d rounds, shown %s", r.Met, r.Rounds, shown)
			}
		})
	}
}

// TestGoalsNameWhatIsMeasured: a goal with another name would be of nothing.
func TestGoalsNameWhatIsMeasured(t *testing.T) {
	known := map[string]bool{}
	for _, q := range quantities {
		known[q.name] = true
	}
	for _, c := range contestants {
		known[c.name] = true
	}
	for _, g := range goals {
		if !known[g.quantity] || !known[g.against] {
			t.Errorf("%+v", g)
		}
	}
	if contestants[0].start != nil {
		t.Errorf("%s has a balancer", contestants[0].name)
	}
}

func TestTable(t *testing.T) {
	g := goal{"rate", haproxy, 1.05, atLeast}
	r := report{Kernel: "6.1", Core: 3, Rounds: 2, Seconds: 0.5, Load: "0.10 before, 1.00 after",
		Quantities: []quantityReport{{Name: "rate", decimals: 1, Contestants: []contestantReport{
			{Name: "router", Summary: summary(2000, 1990, 2010)},
			{Name: nlb, Summary: summary(1000, 990, 1010), Late: 3},
			{Name: haproxy, Summary: summary(1900, 1890, 1910), BoundedByGenerator: true},
		}}},
		Goals: []goalReport{
			{Quantity: "rate", Against: haproxy, Wanted: ">= 1.05", Ratio: summary(1.0999, 1, 1.2), Rounds: 1, Met: true, goal: &g},
			{Quantity: "rate", Against: haproxy, Wanted: ">= 1.05", Ratio: summary(0.9, 0.8, 1), BoundedByGenerator: true, goal: &g},
		},
	}
	const want = `Linux 6.1, core 3, 2 rounds of 0.5 s for each load, load average 0.10 before, 1.00 after.
nlb has its nftables table, and connections tracked for it unless it says otherwise; all others have neither.

rate
           median  min .. max
  router   2000.0  1990.0 .. 2010.0
  nlb      1000.0  990.0 .. 1010.0   3 without a response
  HAProxy  1900.0  1890.0 .. 1910.0  bounded by the generator

goals, as ratios within a round
        against  wanted   median  min .. max      rounds
  rate  HAProxy  >= 1.05  1.099   1.000 .. 1.200  1 of 2  met
  rate  HAProxy  >= 1.05  0.900   0.800 .. 1.000  0 of 2  missed, bounded by the generator
`
	var b bytes.Buffer
	if err := measure.Write(&b, "table", &r); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
}
