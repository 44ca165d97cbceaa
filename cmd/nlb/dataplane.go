package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"time"

	"go.uber.org/zap"

	"nlb/balancer"
)

// dataplaneNotes say what becomes of flows when the dataplane changes, and what
// IPVS does otherwise than the file says. The Spec in force may be nil.
func dataplaneNotes(inForce, wanted *balancer.Spec) (notes []string) {
	if inForce != nil && inForce.Dataplane != wanted.Dataplane {
		stay := "established ones stay"
		if inForce.Dataplane == balancer.IPVS {
			stay = "UDP flows choose anew; established TCP flows stay"
		}
		notes = append(notes, fmt.Sprintf("the dataplane changes from %s to %s, which takes new flows; %s with %s until they end",
			inForce.Dataplane, wanted.Dataplane, stay, inForce.Dataplane))
	}
	if wanted.Dataplane == balancer.IPVS {
		notes = append(notes, idleNotes(wanted)...)
	}
	return notes
}

// idleNotes name the listeners whose idle timeout IPVS does not keep: it has one
// for all, and forgets no flow before any listener would.
func idleNotes(spec *balancer.Spec) (notes []string) {
	var timeouts []time.Duration
	for _, l := range spec.Listeners {
		if l.Protocol != balancer.UDP {
			timeouts = append(timeouts, l.TCPIdleTimeout)
		}
	}
	if len(timeouts) == 0 {
		return nil
	}
	longest := slices.MaxFunc(timeouts, cmp.Compare)
	for _, l := range spec.Listeners {
		if l.Protocol != balancer.UDP && l.TCPIdleTimeout < longest {
			notes = append(notes, fmt.Sprintf("listener %s: tcp_idle_timeout is %s, but IPVS has one for all and remembers flows for %s, the longest",
				l.Name, l.TCPIdleTimeout, longest))
		}
	}
	return notes
}

func printDataplaneNotes(w io.Writer, inForce, wanted *balancer.Spec) error {
	for _, note := range dataplaneNotes(inForce, wanted) {
		if _, err := fmt.Fprintln(w, "# note:", note); err != nil {
			return err
		}
	}
	return nil
}

func logDataplaneNotes(log *zap.Logger, inForce, wanted *balancer.Spec) {
	for _, note := range dataplaneNotes(inForce, wanted) {
		log.Warn(note)
	}
}
