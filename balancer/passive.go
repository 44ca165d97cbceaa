package balancer

import (
	"context"
)

// Outcomes count how a target's TCP flows began.
type Outcomes struct {
	// Failed flows were refused, by a reset or an ICMP error, or left without
	// an answer until the client asked again.
	Failed uint64
	// Answered flows got a SYN, ACK. A retransmission may count as another.
	Answered uint64
}

// An OutcomeCounter knows the Outcomes of the targets in observed Pools. They
// only grow while a target is installed; a target without any may be missing.
type OutcomeCounter interface {
	Outcomes(ctx context.Context) (map[TargetKey]Outcomes, error)
}
