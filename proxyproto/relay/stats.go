package relay

import (
	"net/netip"
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
	// balancer.Outcomes.
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

// Stats returns the counters as they are now.
func (r *Relay) Stats() Stats {
	r.mu.Lock()
	targets := r.plan.targets
	r.mu.Unlock()
	s := Stats{
		Targets:     make(map[balancer.TargetKey]TargetStats, len(targets)),
		Connections: uint64(max(0, r.admitted.Load())), MaxConnections: r.most,
	}
	for i, l := range r.loops {
		l.mu.Lock()
		s.add(&l.machine.counts)
		for key, t := range targets {
			s.Targets[key] = s.Targets[key].plus(&t.tallies[i])
		}
		l.mu.Unlock()
	}
	return s
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

func (s TargetStats) plus(t *tally) TargetStats {
	s.Active += t.active
	s.New += t.dialed
	s.Failed += t.failed
	s.Answered += t.answered
	s.Bytes += t.bytes
	return s
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
