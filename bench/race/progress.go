package main

import (
	"fmt"
	"io"
	"time"
)

// Progress says on one line for each round how far a run is and how long it will
// take. What is left is estimated by the plan, and by how right that was so far.
type progress struct {
	w       io.Writer
	plan    *plan
	elapsed func() time.Duration
	done    time.Duration // of the plan's estimate
}

func newProgress(w io.Writer, p *plan) *progress {
	began := time.Now()
	return &progress{w: w, plan: p, elapsed: func() time.Duration { return time.Since(began) }}
}

// next says what begins; advance says that something of the estimate is done.
func (p *progress) next(what string) {
	fmt.Fprintf(p.w, "%-40s %s left\n", what, p.left().Round(time.Second))
}

func (p *progress) advance(estimated time.Duration) { p.done += estimated }

// left is the rest of the estimate, longer if the part that is done took longer. A
// tenth of all has to be done before that counts.
func (p *progress) left() time.Duration {
	all := p.plan.estimate()
	rest := max(0, all-p.done)
	if p.done < all/10 {
		return rest
	}
	return time.Duration(float64(rest) * float64(p.elapsed()) / float64(p.done))
}
