package top

import "time"

// A figure is a number that may not be known.
type figure struct {
	value float64
	known bool
}

// read is the figure of a reading; nil is what the daemon could not count.
func read(n *uint64) figure {
	if n == nil {
		return figure{}
	}
	return figure{float64(*n), true}
}

// perSecond is how fast a counter grew between two readings. A counter that went
// back began anew in between, as balancer.Counters may: what it shows now is what
// came since then, and the least that can be said (Prometheus' rate() reckons the
// same). Nothing is known of a counter that was not read twice.
func perSecond(before, after *uint64, elapsed time.Duration) figure {
	if before == nil || after == nil || elapsed <= 0 {
		return figure{}
	}
	grown := *after
	if *after >= *before {
		grown = *after - *before
	}
	return figure{float64(grown) / elapsed.Seconds(), true}
}

// plus adds what is known of both.
func (f figure) plus(g figure) figure {
	if !g.known {
		return f
	}
	return figure{f.value + g.value, true}
}

// String has a question mark for what is not known.
func (f figure) String() string {
	if !f.known {
		return "?"
	}
	return number(f.value)
}

// less orders figures by size, the unknown before all others.
func (f figure) compare(g figure) int {
	switch {
	case f.known != g.known:
		if g.known {
			return -1
		}
		return 1
	case f.value < g.value:
		return -1
	case f.value > g.value:
		return 1
	}
	return 0
}
