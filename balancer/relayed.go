package balancer

import (
	"net/netip"
	"slices"
)

// RelayedOnly is what the relay alone has to do with: connections to Services are
// all relayed, and those from Sources to Destinations are the relay's.
type RelayedOnly struct {
	Services []*VirtualService
	// Destinations are sorted. One that a pool of a kernel mode has too is not
	// among them.
	Destinations []netip.AddrPort
	Sources      []netip.Addr // sorted
}

// RelayedOnly finds what only the relay has to do with.
func (t *Table) RelayedOnly() RelayedOnly {
	var only RelayedOnly
	theirs := make(map[netip.AddrPort]bool) // the kernel's
	for i := range t.Pools {
		p := &t.Pools[i]
		for j := range p.Destinations {
			d := &p.Destinations[j]
			if p.ClientIPOf(d) != ProxyProtocolV2 {
				theirs[d.AddrPort()] = theirs[d.AddrPort()] || slices.Contains(p.Protocols, ProtoTCP)
				continue
			}
			only.Destinations = append(only.Destinations, d.AddrPort())
			if d.Source.IsValid() && !t.hasSource(d.Address) {
				only.Sources = append(only.Sources, d.Source)
			}
		}
	}
	only.Destinations = slices.DeleteFunc(only.Destinations, func(a netip.AddrPort) bool { return theirs[a] })
	only.Destinations = sortedSet(only.Destinations, netip.AddrPort.Compare)
	only.Sources = sortedSet(append(only.Sources, t.Sources...), netip.Addr.Compare)
	pools := t.PoolsByName()
	for i := range t.Services {
		if s := &t.Services[i]; s.OnlyRelayed(pools) {
			only.Services = append(only.Services, s)
		}
	}
	return only
}

// hasSource reports whether the SNAT pool has an address of a's family.
func (t *Table) hasSource(a netip.Addr) bool {
	return slices.ContainsFunc(t.Sources, func(s netip.Addr) bool { return s.BitLen() == a.BitLen() })
}

// OnlyRelayed reports that all that s may choose, of the pools by their name, is
// relayed. Whether there is a target does not matter, since connections go on when
// the last one takes no new ones.
func (s *VirtualService) OnlyRelayed(pools map[string]*Pool) bool {
	relayed := false
	for _, w := range s.Pools {
		if w.Weight == 0 {
			continue
		}
		p := pools[w.Pool]
		if !p.Relays() || !p.OnlyRelays(p.Usable(s.Address.BitLen())) {
			return false
		}
		relayed = true
	}
	return relayed
}
