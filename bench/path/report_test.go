package main

import (
	"bytes"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"nlb/bench/measure"
)

// turns are samples of one second each, half of which others had the core.
func turns(received ...int) []sample {
	s := make([]sample, len(received))
	for i, n := range received {
		s[i] = sample{sent: n, received: n, passed: 2 * time.Second, worked: time.Second, around: time.Second}
	}
	return s
}

func summary(median, least, most float64) measure.Summary {
	return measure.Summary{Median: median, Min: least, Max: most}
}

// TestCostMore: 10 ms for one thing are 5 ms more than 5 ms, in nanoseconds.
func TestCostMore(t *testing.T) {
	if got := costMore(100, 200); got != 5e6 {
		t.Errorf("%g", got)
	}
}

func TestCompare(t *testing.T) {
	ways := []way{{name: "router"}, {name: "minimal"}, {name: "nlb", against: "minimal"}}
	all := samples{turns(2000, 1000), turns(1000, 500), turns(900, 475)}
	all[2][0].sent++
	all[2][1].daemon = time.Second / 2
	want := []wayReport{
		{
			Name: "router", Rates: []float64{2000, 1000}, Rate: summary(1500, 1000, 2000),
			WallRate: summary(750, 500, 1000),
		},
		{
			Name: "minimal", Rates: []float64{1000, 500}, Rate: summary(750, 500, 1000),
			WallRate: summary(375, 250, 500), AddedNS: summary(750e3, 500e3, 1000e3),
		},
		{
			Name: "nlb", Rates: []float64{900, 475}, Rate: summary(687.5, 475, 900),
			WallRate: summary(343.75, 237.5, 450), Lost: 1, Daemon: 0.25,
			AddedNS: summary(1e9*(1/900.-1/2000.+1/475.-1/1000.)/2, 1e9*(1/900.-1/2000.), 1e9*(1/475.-1/1000.)),
			Against: "minimal", Ratio: new(summary(0.925, 0.9, 0.95)),
		},
	}
	if diff := cmp.Diff(want, compare(ways, all), cmpopts.EquateApprox(1e-9, 0)); diff != "" {
		t.Error(diff)
	}
}

func TestBoundedByGenerator(t *testing.T) {
	ways := []way{{name: "router"}, {name: "slow"}, {name: "fast"}}
	got := compare(ways, samples{turns(1100), turns(1000), turns(1001)})
	for i, want := range []bool{false, false, true} {
		if got[i].BoundedByGenerator != want {
			t.Errorf("%s: %v", got[i].Name, got[i].BoundedByGenerator)
		}
	}
}

func TestTable(t *testing.T) {
	r := report{Kernel: "6.1", Core: 3, Rounds: 2, Seconds: 0.5, Metrics: []metricReport{{"packets", []wayReport{
		{Name: "router", Rate: summary(1200000, 1100000, 1300000)},
		{Name: "minimal", Rate: summary(800000, 790000, 810000), AddedNS: summary(417, 400, 430), Lost: 7},
		{Name: "nlb", Rate: summary(792000, 780000, 800000), AddedNS: summary(430, 420, 440), Against: "minimal",
			Ratio: new(summary(0.99, 0.985, 0.991)), BoundedByGenerator: true},
	}}}}
	const want = `Linux 6.1, core 3, 2 rounds of 0.5 s. Rates are per second that the core worked on them.

packets
           median   min .. max          added    ratio  min .. max      to
  router   1200000  1100000 .. 1300000  -
  minimal  800000   790000 .. 810000    +417 ns                                  7 lost
  nlb      792000   780000 .. 800000    +430 ns  0.990  0.985 .. 0.991  minimal  bounded by the generator
`
	var b bytes.Buffer
	if err := measure.Write(&b, "table", &r); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
}
