package balancer

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"nlb/internal/bubble"
)

func TestLatencyBuckets(t *testing.T) {
	var l Latency
	for _, d := range []time.Duration{0, 5 * time.Millisecond, 5*time.Millisecond + 1, 100 * time.Millisecond, 5 * time.Second, time.Minute} {
		l.add(d)
	}
	want := Latency{
		Buckets: [len(LatencyBounds) + 1]uint64{0: 2, 1: 1, 4: 1, 9: 1, 10: 1},
		Count:   6, Sum: 65*time.Second + 110*time.Millisecond + 1,
	}
	if diff := cmp.Diff(want, l); diff != "" {
		t.Error(diff)
	}
}

// A verdict's way into the kernel counts from when it was passed, once, and not
// at all when it says nothing new.
func TestVerdictsAreTimed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, stop := start(Options{Parts: append(newWorld().parts(), &slowPart{takes: 30 * time.Millisecond}), Spec: webSpec(2), Log: zap.NewNop()})
		defer stop()
		synctest.Wait()
		r.SetHealth(map[TargetKey]Health{webKey("10.0.1.11"): healthy(time.Now())})
		bubble.Pass(time.Second)
		r.SetHealth(map[TargetKey]Health{webKey("10.0.1.11"): healthy(time.Now())})
		bubble.Pass(time.Second)
		l := r.Snapshot().Latency
		if l.Count != 1 || l.Sum < 30*time.Millisecond || l.Sum > 100*time.Millisecond {
			t.Errorf("%+v", l)
		}
	})
}
