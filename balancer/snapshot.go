package balancer

import (
	"net/netip"
	"time"
)

// A Snapshot is what a Reconciler had in its hands after a pass. It and all it
// leads to are never modified.
type Snapshot struct {
	// Spec is in force; Desired is what it comes to; Groups is where the
	// targets stand, with every Since filled in.
	Spec    *Spec
	Desired *Desired
	Groups  []TargetGroupStatus
	// Generation counts the Specs that were put in force.
	Generation uint64
	// Held says that the kernel was seen to hold Desired. Err is what is wrong:
	// why it does not, or that Desired follows from routes of some time ago, since
	// there are no others.
	Held bool
	Err  error
	// Passed is when the pass ended; a Reconciler that lives makes one per resync.
	Passed time.Time
	// Converged is when the kernel was last seen to hold what it should, and
	// Took how long it took to look and to make it so.
	Converged time.Time
	Took      time.Duration
	// Writes counts the Plans that were carried out, Repairs those among them
	// that undid somebody else's change, Failures the passes that failed.
	Writes, Repairs, Failures uint64
	// Latency says how long verdicts took to reach the kernel.
	Latency Latency
}

// A current is what follows from the Snapshot of the moment, derived once from
// each. Who walks the flows of a host takes seconds, in which passes go on: a flow
// that began after one of them cannot be judged by what was before it. It is not
// safe for concurrent use.
type current[T any] struct {
	reconciler *Reconciler
	derive     func(*Snapshot) T
	from       *Snapshot
	derived    T
}

// get needs a first pass that is over. Ok is false while it is not known whether
// the kernel holds what the Snapshot says.
func (c *current[T]) get() (derived T, ok bool) {
	changing := c.reconciler.changing.Load() // before the Snapshot: a pass that ends in between shows there
	if s := c.reconciler.Snapshot(); s != c.from {
		c.from, c.derived = s, c.derive(s)
	}
	return c.derived, !changing && c.from.Held
}

// SourceFor is the address that flows of ours towards a target are given where
// no source address is configured; the zero Addr when none is known.
func (r *Reconciler) SourceFor(target netip.Addr) netip.Addr {
	s := r.Snapshot()
	if s == nil {
		return netip.Addr{}
	}
	for i := range s.Desired.Table.Pools {
		for _, d := range s.Desired.Table.Pools[i].Destinations {
			if d.Address == target {
				return d.Source
			}
		}
	}
	return netip.Addr{}
}
