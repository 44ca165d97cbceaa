package measure

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
			if diff := cmp.Diff(c.want, Summarize(c.values)); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(before, c.values); diff != "" {
				t.Errorf("the rounds are in another order now: %s", diff)
			}
		})
	}
}

// TestPairwiseIgnoresTheMachine has a machine that is slower in every round: the
// values differ, the ratios do not.
func TestPairwiseIgnoresTheMachine(t *testing.T) {
	if diff := cmp.Diff([]float64{0.5, 0.5, 0.5}, Pairwise([]float64{100, 50, 25}, []float64{200, 100, 50}, Ratio)); diff != "" {
		t.Error(diff)
	}
}
