package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"nlb/balancer"
	"nlb/balancer/events"
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

// establishedKey is the namespace's own timeout of established TCP flows.
const establishedKey = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established"

// leastEstablished is how long that has to be for a flowtable: entries that leave
// it get no more than that, and are told by having more time left than any
// listener's timeout (balancer.IdleKeeper). An hour is for what the flowtable
// takes off and for the time until they are looked at.
const leastEstablished = balancer.LongestIdle + time.Hour

// keepsEstablished fails if the timeout in that file is too short for a flowtable.
func keepsEstablished(path string) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("flowtable: %w (connection tracking is not loaded: modprobe nf_conntrack)", err)
	}
	seconds, err := strconv.Atoi(strings.TrimSpace(string(content)))
	if err != nil {
		return fmt.Errorf("flowtable: %s: %w", path, err)
	}
	if least := int(leastEstablished.Seconds()); seconds < least {
		return fmt.Errorf("flowtable: the idle timeouts of listeners cannot be kept while net.netfilter.nf_conntrack_tcp_timeout_established is %d "+
			"(set it to %d at least, 432000 is the kernel's default, or flowtable: false)", seconds, least)
	}
	return nil
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
		log.Warn(note, events.ConfigNote.Field())
	}
}
