package balancer

import (
	"maps"
	"net/netip"
)

// A staleness judges which flows would go elsewhere if they began now, and have
// no way to notice: the entry of a UDP flow lives for as long as its client
// sends, whatever became of the target. A TCP flow belongs to its target and is
// never moved, unless it missed the balancer: a client that retries on an entry
// from before its listener would retry for ever.
type staleness struct {
	services map[serviceAddr]map[string]bool // pools
	vips     map[netip.Addr]bool
	// leaving has the targets whose UDP flows do not wait for a deadline.
	leaving map[TargetKey]bool
	here    map[TargetKey]bool
	by      Dataplane
	// untracked says what the Table does. The rest is empty unless entries of what
	// the relay has alone are left from another time; see leftTracked.
	untracked  bool
	relayed    map[netip.AddrPort]bool // services
	relayDests map[netip.AddrPort]bool
	sources    map[netip.Addr]bool
}

type serviceAddr struct {
	proto uint8
	at    netip.AddrPort
}

// newStaleness judges by what should hold now. Vips are those that we have, or
// had a moment ago; untracked says whether relayed connections are not tracked, or
// were not.
func newStaleness(want *Desired, vips map[netip.Addr]bool, untracked bool) *staleness {
	j := &staleness{
		services: make(map[serviceAddr]map[string]bool), vips: vips,
		leaving: make(map[TargetKey]bool), here: make(map[TargetKey]bool),
		untracked: want.Table.UntrackedRelay, by: want.Table.Dataplane,
	}
	if untracked {
		only := want.Table.RelayedOnly()
		j.relayed, j.relayDests, j.sources = make(map[netip.AddrPort]bool), setOf(only.Destinations), setOf(only.Sources)
		for _, s := range only.Services {
			j.relayed[netip.AddrPortFrom(s.Address, s.Port)] = true
		}
	}
	for _, s := range want.Table.Services {
		pools := make(map[string]bool, len(s.Pools))
		for _, p := range s.Pools {
			pools[p.Pool] = true
		}
		for _, proto := range s.Protocols {
			j.services[serviceAddr{proto, netip.AddrPortFrom(s.Address, s.Port)}] = pools
		}
	}
	for _, p := range want.Table.Pools {
		for _, d := range p.Destinations {
			key := TargetKey{Group: p.Name, AddrPort: d.AddrPort()}
			j.here[key] = true
			if d.Leaves {
				j.leaving[key] = true
			}
		}
	}
	return j
}

// equal reports whether two judge alike; other may be nil.
func (j *staleness) equal(other *staleness) bool {
	return other != nil && j.untracked == other.untracked && j.by == other.by &&
		maps.EqualFunc(j.services, other.services, maps.Equal) &&
		maps.Equal(j.vips, other.vips) && maps.Equal(j.leaving, other.leaving) && maps.Equal(j.here, other.here) &&
		maps.Equal(j.relayed, other.relayed) && maps.Equal(j.relayDests, other.relayDests) && maps.Equal(j.sources, other.sources)
}

func setOf[E comparable](list []E) map[E]bool {
	set := make(map[E]bool, len(list))
	for _, e := range list {
		set[e] = true
	}
	return set
}

// leftTracked reports whether an entry of a relayed connection has missed packets
// because they were not tracked. If the connection is tracked again, conntrack
// takes what follows for invalid, while one that it does not know is picked up.
func (j *staleness) leftTracked(f Flow) bool {
	return f.Protocol == ProtoTCP && f.Target == f.VIP &&
		(j.relayed[f.VIP] || j.relayDests[f.VIP] && j.sources[f.Client.Addr()])
}

func (j *staleness) stale(f Flow) bool {
	if j.leftTracked(f) {
		return true
	}
	pools, served := j.services[serviceAddr{f.Protocol, f.VIP}]
	switch {
	case served && !f.Ours && f.Target == f.VIP:
		return true // it was here before the listener, and goes past it
	case f.Protocol != ProtoUDP || !f.Ours || !j.vips[f.VIP.Addr()]:
		return false
	case !served || !j.here[f.To] || !pools[f.To.Group]:
		return true
	}
	// IPVS forgets flows once it has no service for them, and nobody rewrites their
	// packets any more. The other way round, conntrack goes on.
	return j.leaving[f.To] || f.By == IPVS && j.by != IPVS || f.Target != f.To.AddrPort
}
