package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSummarize(t *testing.T) {
	for _, c := range []struct {
		name   string
		values []float64
		want   Summary
	}{
		{"nothing", nil, Summary{}},
		{"one", []float64{3}, Summary{3, 3, 3}},
		{"odd, unsorted", []float64{9, 1, 4}, Summary{4, 1, 9}},
		{"even", []float64{8, 1, 2, 4}, Summary{3, 1, 8}},
		{"an outlier moves the spread alone", []float64{5, 5, 5, 5, 500}, Summary{5, 5, 500}},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := append([]float64(nil), c.values...)
			if diff := cmp.Diff(c.want, summarize(c.values)); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(before, c.values); diff != "" {
				t.Errorf("the rounds are in another order now: %s", diff)
			}
		})
	}
}

// TestRatiosIgnoreTheMachine has a machine that is slower in every round: the
// values differ, the ratios do not.
func TestRatiosIgnoreTheMachine(t *testing.T) {
	if diff := cmp.Diff([]float64{0.5, 0.5, 0.5}, ratios([]float64{100, 50, 25}, []float64{200, 100, 50})); diff != "" {
		t.Error(diff)
	}
}

func TestPercentile(t *testing.T) {
	hundred := make([]int64, 100)
	for i := range hundred {
		hundred[i] = int64(i + 1)
	}
	for _, c := range []struct {
		name   string
		sorted []int64
		p      int
		want   int64
	}{
		{"nothing", nil, 50, 0},
		{"one", []int64{7}, 99, 7},
		{"lowest", hundred, 0, 1},
		{"p50 of 100", hundred, 50, 50},
		{"p99 of 100", hundred, 99, 99},
		{"p99 of 99 is the last", hundred[:99], 99, 99},
		{"p50 of 3", []int64{1, 2, 3}, 50, 2},
		{"p50 of 4 is one that was measured", []int64{1, 2, 3, 4}, 50, 2},
		{"highest", hundred, 100, 100},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := percentile(c.sorted, c.p); got != c.want {
				t.Errorf("%d, want %d", got, c.want)
			}
		})
	}
}
