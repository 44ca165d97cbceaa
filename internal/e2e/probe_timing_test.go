package e2e

import (
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"nlb/bench/lab"
	"nlb/internal/wait"
)

const (
	// The health check of TestDeadTargetTiming.
	probeInterval  = time.Second
	probeTimeout   = time.Second
	probeThreshold = 2 // failures, and successes
	// probeReaction is how soon new flows follow the verdict of a health check.
	probeReaction = 100 * time.Millisecond
	// probeNoise is what a machine that is busy with other tests may add; the
	// figures themselves are logged.
	probeNoise = 2 * time.Second
)

// A probeDeath is a way for a target to fail and to come back.
type probeDeath struct {
	name   string
	die    func(*testing.T, *lab.Node, *lab.Listeners)
	revive func(*testing.T, *lab.Node)
	// silence is how long a probe of the dead target waits before it has failed.
	silence time.Duration
}

var probeDeaths = []probeDeath{{
	name: "refuses",
	die: func(t *testing.T, _ *lab.Node, open *lab.Listeners) {
		if err := open.Close(); err != nil {
			t.Fatal(err)
		}
	},
	revive: func(t *testing.T, n *lab.Node) { serveOn(t, n, lab.Serve{Ports: []uint16{targetPort}}) },
}, {
	name: "black hole",
	die: func(t *testing.T, n *lab.Node, _ *lab.Listeners) {
		must(t, n, "nft", "table inet hole { chain in { type filter hook input priority 0; tcp dport 8080 drop; }; }")
	},
	revive:  func(t *testing.T, n *lab.Node) { must(t, n, "nft", "delete table inet hole") },
	silence: probeTimeout,
}}

// TestDeadTargetTiming has a client that opens new flows all the time while a
// target dies and comes back, and looks on the target's own link for the last one
// and the first one that it was given.
func TestDeadTargetTiming(t *testing.T) {
	t.Parallel()
	for _, death := range probeDeaths {
		t.Run(death.name, func(t *testing.T) {
			t.Parallel()
			probeTiming(t, death)
		})
	}
}

func probeTiming(t *testing.T, death probeDeath) {
	top := routed(t, lab.Options{Clients: 2})
	serveOn(t, top.Targets[0], lab.Serve{Ports: []uint16{targetPort}})
	mortal := top.Targets[1]
	open := serveOn(t, mortal, lab.Serve{Ports: []uint16{targetPort}})
	web := pool("web", "TCP", "preserve", targetPort, targets(top.Targets...))
	web.HealthCheck = map[string]any{
		"interval": probeInterval.String(), "timeout": probeTimeout.String(),
		"healthy_threshold": probeThreshold, "unhealthy_threshold": probeThreshold,
	}
	d := serving(t, top, config{
		Sources: sources(top), VIPs: both(),
		Listeners: listen("web", "TCP", webPort, "web"),
		Groups:    []group{web},
	})
	seen := capture(t, mortal, "eth0")
	for _, f := range families {
		// Two flows in 10 ms, half of which are the mortal's. Those that it swallows
		// are given up soon, so that the flow of flows does not dry up.
		churn, err := top.Clients[0].Agent().Churn(soon(t), lab.Churn{Interval: 10 * time.Millisecond,
			Call: lab.Call{Network: "tcp", Dst: f.at(webPort), Parallel: 4, Timeout: 40 * time.Millisecond}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = churn.Close() })
		client := f.addr(top.Clients[0])
		if _, err := seen.Wait(soon(t), func(p lab.Packet) bool { return probeOpens(p) && p.Src == client }); err != nil {
			t.Fatal("the mortal target gets no flows:", err)
		}
	}

	died := time.Now()
	death.die(t, mortal, open)
	d.waitHealthy("web", 2) // the other one, by both families
	const later = 10_000
	for _, f := range families {
		got := call(t, top.Clients[1], lab.Call{Network: "tcp", Dst: f.at(webPort), N: later / len(families), Parallel: 8})
		if got.ByWho[top.Targets[0].Name] != later/len(families) {
			t.Errorf("after the death, IPv%s: %v", f.name, got)
		}
	}
	while := packets(t, seen, probeOpens)
	revived := time.Now()
	death.revive(t, mortal)
	d.waitHealthy("web", 4)
	for _, f := range families {
		client := f.addr(top.Clients[0])
		wait.For(t, limit, "flows of the revived target, IPv"+f.name, func() error {
			flows := probeFirsts(packets(t, seen, func(p lab.Packet) bool { return probeOpens(p) && p.Src == client }))
			_, err := probeNth(flows, revived, 1)
			return err
		})
	}
	all := packets(t, seen, probeOpens)
	met := packets(t, seen, probeMeets)

	const bound = probeThreshold * probeInterval
	for _, f := range families {
		from := func(n *lab.Node, packets []lab.Packet) []lab.Packet {
			return slices.DeleteFunc(slices.Clone(packets), func(p lab.Packet) bool { return p.Src != f.addr(n) })
		}
		if leaked := from(top.Clients[1], while); len(leaked) > 0 {
			t.Errorf("IPv%s: %d of %d later flows reached the dead target, the last %v after its death",
				f.name, len(leaked), later/len(families), leaked[len(leaked)-1].Time.Sub(died))
		}
		probes := probeFirsts(from(top.LB, all))
		flows := probeFirsts(from(top.Clients[0], all))
		pause := time.Duration(0)
		for i, p := range probes[1:] {
			pause = max(pause, p.Time.Sub(probes[i].Time))
		}
		t.Logf("IPv%s: at most %v from one probe to the next", f.name, pause.Round(time.Millisecond))

		last := flows[len(flows)-1]
		for _, p := range flows {
			if p.Time.Before(revived) {
				last = p
			}
		}
		verdict, err := probeNth(probes, died, probeThreshold)
		if err != nil {
			t.Fatal(err)
		}
		probeInTime(t, "IPv"+f.name+": last flow", last.Time.Sub(died), bound+death.silence, last.Time.Sub(verdict.Add(death.silence)))

		first, err := probeNth(flows, revived, 1)
		if err != nil {
			t.Fatal(err)
		}
		// A probe that began in the black hole may still be answered, by its second SYN.
		if verdict, err = probeNth(probeFirsts(from(top.LB, met)), revived, probeThreshold); err != nil {
			t.Fatal(err)
		}
		probeInTime(t, "IPv"+f.name+": first flow", first.Sub(revived), bound, first.Sub(verdict))

		repeated := 0
		for _, p := range from(top.Clients[0], while) {
			if p.Time.After(last.Time) {
				repeated++
			}
		}
		// A client that takes the port of a connection that it gave up, or repeats its
		// SYN, has a flow that conntrack knows.
		t.Logf("IPv%s: %d SYNs of earlier 4-tuples reached the dead target after its last flow", f.name, repeated)
	}
}

// probeInTime judges how long after an event a target got its last or first flow,
// and how long after the probe that decided it.
func probeInTime(t *testing.T, what string, after, bound, afterProbe time.Duration) {
	t.Helper()
	t.Logf("%s %v after the event, of %v that the health check may take; %v after the deciding probe",
		what, after.Round(time.Millisecond), bound, afterProbe.Round(time.Millisecond))
	if after > bound+probeReaction+probeNoise {
		t.Errorf("%s: %v after the event, want at most %v", what, after, bound+probeReaction)
	}
	if afterProbe > probeReaction+probeNoise {
		t.Errorf("%s: %v after the deciding probe, want at most %v", what, afterProbe, probeReaction)
	}
}

// probeOpens holds for the first segment of a connection to a target. A host's has
// options (RFC 9293, 3.7.1); a header alone is the balancer's own, which makes the
// ends of a flow speak that it is about to cut.
func probeOpens(p lab.Packet) bool {
	const header = 20
	bare := header + 20
	if p.Src.Is6() {
		bare = header + 40
	}
	return p.DstPort == targetPort && p.Flags&(lab.SYN|lab.ACK) == lab.SYN && p.Length > bare
}

// probeMeets holds for what follows the answer of a target: it has been met.
func probeMeets(p lab.Packet) bool {
	return p.DstPort == targetPort && p.Flags&(lab.SYN|lab.ACK|lab.RST) == lab.ACK
}

// probeFirsts leaves out the segments that repeat an earlier 4-tuple. To a SYN of
// such a one no choice may be made, as conntrack may still know it.
func probeFirsts(segments []lab.Packet) []lab.Packet {
	type tuple struct{ from, to netip.AddrPort }
	known := map[tuple]bool{}
	return slices.DeleteFunc(slices.Clone(segments), func(p lab.Packet) bool {
		key := tuple{p.From(), p.To()}
		was := known[key]
		known[key] = true
		return was
	})
}

// probeNth is when the nth of the packets after begin was seen.
func probeNth(all []lab.Packet, begin time.Time, n int) (time.Time, error) {
	for _, p := range all {
		if !p.Time.After(begin) {
			continue
		}
		if n--; n == 0 {
			return p.Time, nil
		}
	}
	return time.Time{}, errors.New("too few packets")
}
