package relay

import (
	"maps"
	"net/netip"
	"os"
	"slices"
	"time"

	"nlb/balancer"
)

// Stats are what a Relay counted since it was made.
type Stats struct {
	// Targets has the targets of the pools that are configured.
	Targets map[balancer.TargetKey]TargetStats
	// Connections are those that there are now, MaxConnections as many as there
	// may be.
	Connections    uint64
	MaxConnections int
	// OpenFiles is how many file descriptors this process has, MaxFiles how many
	// it may have; 0 if that cannot be read.
	OpenFiles, MaxFiles int
	// Accepted connections came in. The others are among them and were reset:
	// Refused because the service does not allow the client, Failed because none
	// of the targets that were tried answered, NoTarget because there is none to
	// try, IdleTimeouts because both ends were silent.
	Accepted, Refused, Failed, NoTarget, IdleTimeouts uint64
	// Exhausted is how often a connection was reset for lack of descriptors or
	// memory, and NoPort how often a dial found no free local port at any source.
	Exhausted, NoPort uint64
}

// TargetStats are what a Relay counted for one target.
type TargetStats struct {
	// Active connections are being dialed or established.
	Active uint64
	// New counts dials; Failed and Answered how they ended, as in
	// balancer.Outcomes. A dial that ended for another reason is neither: the
	// client or the target's place in the table went first, or this host had no
	// free port, descriptor or memory for it.
	New, Failed, Answered uint64
	// Bytes were carried in both directions, without headers.
	Bytes uint64
}

// A Flow is one connection through the relay.
type Flow struct {
	// Client connected to VIP, and Source, an address of the balancer, to Target.
	// Source is zero while there is no connection to the target yet.
	Client, VIP, Source, Target netip.AddrPort
	To                          balancer.TargetKey
	Since                       time.Time // accepted
	Bytes                       uint64    // in both directions, without the header
}

// Stats returns the counters as they are now. It is asked often: a loop is held
// up only for as long as it takes to add numbers.
func (r *Relay) Stats() Stats {
	r.mu.Lock()
	targets := slices.Collect(maps.Values(r.plan.targets))
	r.mu.Unlock()
	s := Stats{
		Connections: uint64(max(0, r.admitted.Load())), MaxConnections: int(r.maxConnections.Load()),
		OpenFiles: openFiles(), MaxFiles: r.files.limit,
	}
	sums := make([]TargetStats, len(targets))
	for _, l := range r.loops {
		s.addLoop(l, targets, sums)
	}
	s.Targets = make(map[balancer.TargetKey]TargetStats, len(targets))
	for j, t := range targets {
		s.Targets[t.key] = sums[j]
	}
	return s
}

// openFiles counts the file descriptors of this process, 0 if it cannot. From Linux
// 6.2 on the size of the folder is their number (proc(5)).
func openFiles() int {
	const folder = "/proc/self/fd"
	if info, err := os.Stat(folder); err == nil && info.Size() > 0 {
		return int(info.Size())
	}
	f, err := os.Open(folder)
	if err != nil {
		return 0
	}
	defer func() { _ = f.Close() }()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return 0
	}
	return len(names) - 1 // without the folder's
}

// addLoop adds what one loop counted, for each target to the sum of the same
// index.
func (s *Stats) addLoop(l *loop, targets []*target, sums []TargetStats) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s.add(&l.machine.counts)
	for i, t := range targets {
		sums[i].add(&t.tallies[l.machine.number])
	}
}

func (s *Stats) add(c *counts) {
	s.Accepted += c.accepted
	s.Refused += c.refused
	s.Failed += c.failed
	s.NoTarget += c.noTarget
	s.IdleTimeouts += c.idle
	s.Exhausted += c.exhausted
	s.NoPort += c.noPort
}

func (s *TargetStats) add(t *tally) {
	s.Active += t.active
	s.New += t.dialed
	s.Failed += t.failed
	s.Answered += t.answered
	s.Bytes += t.bytes
}

// Flows lists the connections that there are, in no order. Those that come or go
// meanwhile may be missing.
func (r *Relay) Flows() []Flow {
	var flows []Flow
	for _, l := range r.loops {
		l.inPieces(func(from, to int) bool {
			conns := l.machine.conns
			for _, c := range conns[min(from, len(conns)):min(to, len(conns))] {
				if c.state != closed {
					flows = append(flows, l.flow(c))
				}
			}
			return to < len(conns)
		})
	}
	return flows
}

func (l *loop) flow(c *conn) Flow {
	to := c.to().key
	f := Flow{
		Client: c.peer, VIP: c.service.vip, Target: to.AddrPort, To: to,
		Since: l.relay.epoch.Add(time.Duration(c.since)), Bytes: c.up.moved + c.down.moved,
	}
	if c.state != dialing {
		f.Source = l.kernel.local(c.target.fd)
	}
	return f
}
