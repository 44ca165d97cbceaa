package balancer

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestFailOpenDoesNotFlap(t *testing.T) {
	start := time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)
	for _, c := range []struct {
		name string
		// below is what is seen each second.
		below []bool
		want  []bool
	}{
		{"opens and closes at once", []bool{false, true, true, false, false}, []bool{false, true, true, false, false}},
		{"a second opening is held", []bool{true, false, true, false, false, false, false, false, false, false, false, false, false, false},
			[]bool{true, false, true, true, true, true, true, true, true, true, true, true, true, false}},
		{"the hold begins anew", []bool{true, false, true, false, false, false, false, false, true, false, false, false, false, false, false, false, false, false, false, false},
			[]bool{true, false, true, true, true, true, true, true, true, true, true, true, true, true, true, true, true, true, true, false}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var s FailOpenState
			var got []bool
			for i, below := range c.below {
				s = s.next(below, start.Add(time.Duration(i)*time.Second))
				got = append(got, s.Open)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	// Long after the last time, it is a first time again.
	s := FailOpenState{Since: start}.next(true, start.Add(failOpenMemory))
	if s.Held {
		t.Error("held, though the last time is forgotten")
	}
}
