package main

import "slices"

// A Summary is the median of a metric's rounds and how far they spread.
type Summary struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

// summarize is the zero Summary of nothing.
func summarize(values []float64) Summary {
	if len(values) == 0 {
		return Summary{}
	}
	sorted := slices.Sorted(slices.Values(values))
	return Summary{median(sorted), sorted[0], sorted[len(sorted)-1]}
}

// median is that of sorted values; of an even number, the mean of the middle two.
func median(sorted []float64) float64 {
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// pairwise summarizes f of the values of each round. A ratio of medians would
// compare rounds in which the machine was different.
func pairwise(a, b []float64, f func(a, b float64) float64) Summary {
	values := make([]float64, len(a))
	for i := range a {
		values[i] = f(a[i], b[i])
	}
	return summarize(values)
}

func ratio(a, b float64) float64 { return a / b }

// costMore is how many nanoseconds more one thing takes at the rate a than at b.
func costMore(a, b float64) float64 { return 1e9/a - 1e9/b }
