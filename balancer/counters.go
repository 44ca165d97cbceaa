package balancer

// Counters are what a dataplane counted for one target. The totals begin when
// the target was first installed and may begin anew when the dataplane is
// rebuilt, as Prometheus counters may.
type Counters struct {
	// ActiveFlows is how many flows the target has now.
	ActiveFlows uint64
	// NewFlows is how many flows were ever sent to the target.
	NewFlows uint64
	// Bytes is what those flows carried, in both directions, IP headers included.
	Bytes uint64
	// Packets are those of Bytes. The relay moves bytes and knows none: for its
	// targets this is 0.
	Packets uint64
	// Resets is how many TCP flows have ended that saw a reset, from either end or
	// from here. The relay does not tell: for its targets this is 0.
	Resets uint64
}
