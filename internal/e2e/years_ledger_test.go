package e2e

import (
	"cmp"
	"math"
	"slices"
	"testing"
	"time"

	"nlb/bench/lab"
)

// An excuse is what traffic may meet, and when, because of something that
// happened. Whatever has none is an error.
type excuse struct {
	why     string
	relayed bool     // of the relay's way, or else of the kernel's
	kind    string   // of the traffic
	who     string   // the target; any if it is empty
	errs    []string // as lab says them
	from    time.Time
	until   time.Time // zero while it goes on
}

// covers says whether it excuses a failure, which may have begun before and ended
// after. Who failed is not known of a connection that nobody answered.
func (e excuse) covers(relayed bool, kind string, f lab.Failure) bool {
	return e.relayed == relayed && e.kind == kind && slices.Contains(e.errs, f.Err) &&
		(e.who == "" || f.Who == "" || e.who == f.Who) &&
		!f.Ended.Before(e.from) && (e.until.IsZero() || !f.Began.After(e.until))
}

func TestExcuse(t *testing.T) {
	at := func(second int) time.Time { return time.Unix(int64(second), 0) }
	dead := excuse{why: "t3 died", kind: ofStreams, who: "t3", errs: []string{lab.Reset}, from: at(10), until: at(12)}
	ongoing := dead
	ongoing.until = time.Time{}
	broken := lab.Failure{Began: at(11), Ended: at(11), Err: lab.Reset, Who: "t3"}
	change := func(by func(*lab.Failure)) lab.Failure {
		f := broken
		by(&f)
		return f
	}
	for _, tt := range []struct {
		name    string
		excuse  excuse
		relayed bool
		kind    string
		failure lab.Failure
		want    bool
	}{
		{"within", dead, false, ofStreams, broken, true},
		{"by nobody known", dead, false, ofStreams, change(func(f *lab.Failure) { f.Who = "" }), true},
		{"by another target", dead, false, ofStreams, change(func(f *lab.Failure) { f.Who = "t1" }), false},
		{"in another way", dead, false, ofStreams, change(func(f *lab.Failure) { f.Err = lab.Timeout }), false},
		{"of other traffic", dead, false, ofCalls, broken, false},
		{"of the relay", dead, true, ofStreams, broken, false},
		{"that began before and ended after", dead, false, ofStreams, lab.Failure{Began: at(9), Ended: at(13), Err: lab.Reset}, true},
		{"over before", dead, false, ofStreams, lab.Failure{Began: at(8), Ended: at(9), Err: lab.Reset}, false},
		{"begun after", dead, false, ofStreams, lab.Failure{Began: at(13), Ended: at(13), Err: lab.Reset}, false},
		{"while it goes on", ongoing, false, ofStreams, lab.Failure{Began: at(99), Ended: at(99), Err: lab.Reset}, true},
	} {
		if got := tt.excuse.covers(tt.relayed, tt.kind, tt.failure); got != tt.want {
			t.Errorf("a failure %s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

// A series is what was measured of something, and when in seconds.
type series struct{ at, value []float64 }

func (s *series) add(at time.Duration, value float64) {
	s.at, s.value = append(s.at, at.Seconds()), append(s.value, value)
}

// growth is by how much the values rose from the first to the last by their trend:
// the median of the slopes of all pairs (Theil and Sen), which neither the pace of
// a garbage collector nor a burst of connections moves, up to 29 % of the values.
func (s *series) growth() float64 {
	if len(s.at) < 2 {
		return 0
	}
	slopes := make([]float64, 0, len(s.at)*(len(s.at)-1)/2)
	for i := range s.at {
		for j := range i {
			if run := s.at[i] - s.at[j]; run > 0 {
				slopes = append(slopes, (s.value[i]-s.value[j])/run)
			}
		}
	}
	return middle(slopes) * (s.at[len(s.at)-1] - s.at[0])
}

// middle is the median, of which the upper one if there are two; 0 of nothing.
func middle[T cmp.Ordered](list []T) (median T) {
	if len(list) == 0 {
		return median
	}
	sorted := slices.Sorted(slices.Values(list))
	return sorted[len(sorted)/2]
}

func TestGrowth(t *testing.T) {
	const seconds = 100
	for _, tt := range []struct {
		name string
		at   func(second int) float64
		want float64
	}{
		{"nothing changes", func(int) float64 { return 7 }, 0},
		{"a leak", func(i int) float64 { return 7 + 3*float64(i) }, 3 * (seconds - 1)},
		{"a leak below a collector's waves", func(i int) float64 { return 10*float64(i%10) + 3*float64(i) }, 3 * (seconds - 1)},
		{"a burst of a fifth of the time", func(i int) float64 {
			if i > 40 && i < 60 {
				return 1000
			}
			return 7
		}, 0},
	} {
		var s series
		for i := range seconds {
			s.add(time.Duration(i)*time.Second, tt.at(i))
		}
		if got := s.growth(); math.Abs(got-tt.want) > 0.05*tt.want+1e-9 {
			t.Errorf("%s: %g, want %g", tt.name, got, tt.want)
		}
	}
}
