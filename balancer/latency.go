package balancer

import "time"

// LatencyBounds are the upper bounds of a Latency's buckets, inclusive. A verdict
// is to be in the kernel within 100 ms.
var LatencyBounds = [...]time.Duration{
	5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2500 * time.Millisecond, 5 * time.Second,
}

// A Latency counts verdicts by the time from when one was passed (Health.Since)
// to the end of the pass that put it into the kernel. Of verdicts about one
// target that went in together only the first counts, which waited longest.
type Latency struct {
	// Buckets count, not cumulatively, the verdicts up to each of LatencyBounds,
	// and those beyond.
	Buckets [len(LatencyBounds) + 1]uint64
	Count   uint64
	Sum     time.Duration
}

func (l *Latency) add(d time.Duration) {
	i := 0
	for i < len(LatencyBounds) && d > LatencyBounds[i] {
		i++
	}
	l.Buckets[i]++
	l.Count++
	l.Sum += d
}
