package healthcheck

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestTracker(t *testing.T) {
	tests := map[string]struct {
		healthy, unhealthy int
		answers            string // + success, - failure
		want               string // state after each: i, h, u
	}{
		"first success admits":                 {5, 2, "+", "h"},
		"success after a failure admits":       {5, 2, "-+", "ih"},
		"failures take a new target out":       {5, 2, "--", "iu"},
		"one failure takes it out":             {5, 1, "-", "u"},
		"a success between starts over":        {5, 2, "+-+-+--", "hhhhhhu"},
		"recovery takes the healthy threshold": {3, 2, "--+++", "iuuuh"},
		"a failure delays recovery":            {3, 2, "--++-+++", "iuuuuuuh"},
		"down, up and down again":              {2, 2, "+--++--", "hhuuhhu"},
		"thresholds below one are one":         {0, -1, "+-+", "huh"},
		"two returns are on trust":             {1, 1, "+-+-+-", "huhuhu"},
		"then it takes twice the successes":    {1, 1, "+-+-+-+-++", "huhuhuuuuh"},
		"each relapse doubles":                 {1, 1, "+-+-+-++-++++", "huhuhuuhuuuuh"},
		"at most the largest threshold":        {6, 1, "+-++++++-++++++-++++++++++", "huuuuuuhuuuuuuhuuuuuuuuuuh"},
		"who stays is trusted again":           {1, 1, "+-+-+-++" + strings.Repeat("+", relapse-1) + "-+", "huhuhuuh" + strings.Repeat("h", relapse-1) + "uh"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			tracker := NewTracker(tt.healthy, tt.unhealthy)
			var got strings.Builder
			for _, answer := range tt.answers {
				before := tracker.State()
				next, changed := tracker.Observe(answer == '+')
				if changed != (next.State() != before) {
					t.Errorf("changed is %v from %v to %v", changed, before, next.State())
				}
				tracker = next
				got.WriteString(tracker.State().String()[:1])
			}
			if diff := cmp.Diff(tt.want, got.String()); diff != "" {
				t.Errorf("states (-want +got):\n%s", diff)
			}
		})
	}
}

// TestTrackerAgainstHistory compares with the rule said over the whole history:
// a state is left when the last threshold answers, all since it was entered,
// speak against it. What a relapse needs is more, which the table above says.
func TestTrackerAgainstHistory(t *testing.T) {
	const healthy, unhealthy, length = 3, 2, 12
	for history := range 1 << length {
		tracker, state, entered := NewTracker(healthy, unhealthy), Initial, 0
		needed, returns := healthy, 0
		for i := range length {
			tracker, _ = tracker.Observe(history>>i&1 == 1)
			run := func(bit, n int) bool {
				for j := i; j > i-n; j-- {
					if j < entered || history>>j&1 != bit {
						return false
					}
				}
				return true
			}
			was := state
			switch {
			case state == Initial && run(1, 1), state == Unhealthy && run(1, needed):
				state = Healthy
			case state != Unhealthy && run(0, unhealthy):
				state = Unhealthy
			}
			if state != was {
				if state == Unhealthy && returns > 1 { // within relapse: the history is shorter
					needed = min(2*healthy, steadfast)
				}
				if was == Unhealthy {
					returns++
				}
				entered = i + 1
			}
			if tracker.State() != state {
				t.Fatalf("history %012b, answer %d: %v, want %v", history, i, tracker.State(), state)
			}
		}
	}
}
