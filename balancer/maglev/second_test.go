package maglev

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func notSelf(a, b int) bool { return a != b }

// TestSecondSpreads takes the slots of each target in turn: their second
// choices must fall on all others by weight.
func TestSecondSpreads(t *testing.T) {
	entries := targets(6, 1, 2, 3)
	slots := build(1, Base, entries)
	second := Second(slots, notSelf)
	share := counts(slots, len(entries))
	for own := range entries {
		got := make([]int, len(entries))
		for s, b := range second {
			if slots[s] == int32(own) {
				got[b]++
			}
		}
		for b := range entries {
			if b == own {
				if got[b] != 0 {
					t.Errorf("%d slots of target %d have it as their second choice", got[b], own)
				}
				continue
			}
			want := float64(share[own]) * float64(share[b]) / float64(len(slots)-share[own])
			// A binomial count: five standard deviations.
			if d := float64(got[b]) - want; d*d > 25*want {
				t.Errorf("second choices of target %d on %d: %d, want about %.0f", own, b, got[b], want)
			}
		}
	}
}

func TestSecondIsStable(t *testing.T) {
	entries := targets(10, 1)
	less := without(entries, 9)
	size := Size(Base, 10)
	before := Second(Build(testKey(1), Base, size, entries), notSelf)
	after := Second(Build(testKey(1), Base, size, less), notSelf)
	moved := 0
	for s := range before {
		if before[s] != after[s] {
			moved++
		}
	}
	// A tenth lose their second choice, a tenth their first, and with it
	// perhaps the second.
	if got := float64(moved) / float64(size); got > 0.17 {
		t.Errorf("removing a tenth of the targets moves %.2f of the second choices", got)
	}
}

func TestSecondOf(t *testing.T) {
	tests := map[string]struct {
		slots  []int32
		differ func(a, b int) bool
		want   []int32
	}{
		"empty":              {nil, notSelf, []int32{}},
		"alone":              {[]int32{4, 4}, notSelf, []int32{-1, -1}},
		"only one other":     {[]int32{0, 7, 0}, notSelf, []int32{7, 0, 7}},
		"same host":          {[]int32{0, 1, 0, 1}, func(a, b int) bool { return a/2 != b/2 }, []int32{-1, -1, -1, -1}},
		"one on other host":  {[]int32{0, 1, 2, 1, 0, 1}, func(a, b int) bool { return a/2 != b/2 && b == 2 }, []int32{2, 2, -1, 2, 2, 2}},
		"even with own true": {[]int32{3, 3, 5}, func(int, int) bool { return true }, []int32{5, 5, 3}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, Second(tt.slots, tt.differ)); diff != "" {
				t.Errorf("Second (-want +got):\n%s", diff)
			}
		})
	}
}
