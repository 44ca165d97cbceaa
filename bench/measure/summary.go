package measure

import "slices"

// A Summary is the median of a metric's rounds and how far they spread.
type Summary struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

// Summarize makes the Summary of values in any order, which stay in it; of
// nothing, the zero Summary. The median of an even number is the mean of the
// middle two.
func Summarize(values []float64) Summary {
	if len(values) == 0 {
		return Summary{}
	}
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	return Summary{(sorted[(n-1)/2] + sorted[n/2]) / 2, sorted[0], sorted[n-1]}
}

// Pairwise is f of the two values of each round; a and b have equally many. A
// ratio of medians would compare rounds in which the machine was different.
func Pairwise(a, b []float64, f func(a, b float64) float64) []float64 {
	values := make([]float64, len(a))
	for i := range a {
		values[i] = f(a[i], b[i])
	}
	return values
}

// Compare summarizes f of the two values of each round, as Pairwise has them.
func Compare(a, b []float64, f func(a, b float64) float64) Summary {
	return Summarize(Pairwise(a, b, f))
}

// Ratio is a divided by b, for Pairwise and Compare.
func Ratio(a, b float64) float64 { return a / b }
