package traffic

import (
	"runtime"
	"testing"
	"time"
)

func TestRunDelay(t *testing.T) {
	for _, c := range []struct {
		text string
		want time.Duration
		ok   bool
	}{
		{"52 1500 3\n", 1500, true},
		{"0 0 0\n", 0, true},
		{"52 1500\n", 0, false},
		{"52 much 3\n", 0, false},
		{"", 0, false},
	} {
		got, err := runDelay(c.text)
		if got != c.want || (err == nil) != c.ok {
			t.Errorf("%q: %v, %v", c.text, got, err)
		}
	}
}

// TestClockCountsNoMoreThanWhatPassed has no helpers, so that the correction
// can only be a subtraction.
func TestClockCountsNoMoreThanWhatPassed(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	began := time.Now()
	c, err := newClock(nil)
	if err != nil {
		t.Fatal(err)
	}
	worked, err := c.worked()
	if passed := time.Since(began); err != nil || worked > passed {
		t.Errorf("worked %v of %v, %v", worked, passed, err)
	}
}
