package ipvs

import (
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func TestWeights(t *testing.T) {
	repeat := func(s float64, n int) (out []float64) {
		for range n {
			out = append(out, s)
		}
		return out
	}
	for _, c := range []struct {
		name   string
		shares []float64
		want   []int
	}{
		{"none", nil, nil},
		{"one", []float64{0.3}, []int{1}},
		{"alike", []float64{0.25, 0.25, 0.25, 0.25}, []int{1, 1, 1, 1}},
		{"common divisor", []float64{120, 60, 240}, []int{2, 1, 4}},
		{"a canary pool of two beside three", []float64{0.3, 0.3, 0.3, 0.05, 0.05}, []int{6, 6, 6, 1, 1}},
		{"as far as mh goes", []float64{63, 1}, []int{63, 1}},
		{"farther than mh goes", []float64{999, 1}, []int{57, 1}},
		{"6 bits would be 63 and 31", []float64{127, 64}, []int{2, 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, weights(c.shares)); diff != "" {
				t.Error(diff)
			}
		})
	}
	// 49 and 50 would need more than 4,093 slots for one round of dealing.
	for i, w := range weights(append(repeat(1./50, 50), repeat(1./49, 49)...)) {
		if w != 1 {
			t.Errorf("destination %d weighs %d", i, w)
		}
	}
}

// dealt is how mh fills its table (ip_vs_mh_populate): how many slots each has.
func dealt(weights []int) []int {
	out := make([]int, len(weights))
	for left := slots; left > 0; {
		for i, w := range weights {
			n := min(w, left)
			out[i] += n
			left -= n
		}
	}
	return out
}

func TestWeightsComeClose(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		raw := rapid.SliceOfN(rapid.IntRange(1, 256), 1, 60).Draw(t, "weights")
		shares := make([]float64, len(raw))
		var total float64
		for i, r := range raw {
			shares[i] = float64(r)
			total += shares[i]
		}
		got := weights(shares)
		var sum int
		for _, w := range got {
			sum += w
		}
		rounded, cut := deviation(got, shares, total)
		for i, n := range dealt(got) {
			if got[i] < 1 || got[i] > mostWeight {
				t.Fatalf("weight %d", got[i])
			}
			if due := slots * float64(got[i]) / float64(sum); math.Abs(float64(n)/due-1) > cut+1e-9 {
				t.Fatalf("destination %d of %v has %d slots instead of %.1f, at most %.3f was said", i, got, n, due, cut)
			}
			for j := range got {
				if raw[i] > raw[j] && got[i] < got[j] || raw[i] == raw[j] && got[i] != got[j] {
					t.Fatalf("%d and %d became %d and %d", raw[i], raw[j], got[i], got[j])
				}
			}
		}
		if rounded+cut > 0.15 {
			t.Fatalf("%v for %v: off by %.3f and %.3f", got, raw, rounded, cut)
		}
	})
}

func TestExactSharesStayExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		// Small integers in lowest terms are the weights themselves.
		raw := append(rapid.SliceOfN(rapid.IntRange(1, 8), 1, 6).Draw(t, "weights"), 1)
		unit := rapid.Float64Range(1e-6, 1e6).Draw(t, "unit")
		shares := make([]float64, len(raw))
		for i, r := range raw {
			shares[i] = float64(r) * unit
		}
		if diff := cmp.Diff(raw, weights(shares)); diff != "" {
			t.Fatal(diff)
		}
	})
}
