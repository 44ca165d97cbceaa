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

// TestPairwiseIgnoresTheMachine has a machine that is slower in every round: the
// medians are of different rounds, the ratio is not.
func TestPairwiseIgnoresTheMachine(t *testing.T) {
	a := []float64{100, 50, 25}
	b := []float64{200, 100, 50}
	if diff := cmp.Diff(Summary{0.5, 0.5, 0.5}, pairwise(a, b, ratio)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(Summary{1e7, 5e6, 2e7}, pairwise(a, b, costMore)); diff != "" {
		t.Error(diff)
	}
}
