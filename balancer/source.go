package balancer

import "net/netip"

// SourceFor returns the first of the SourceAddresses that has the family of the
// target, or the zero Addr: then the route to the target decides.
func (s *Spec) SourceFor(target netip.Addr) netip.Addr {
	for _, a := range s.SourceAddresses {
		if a.BitLen() == target.BitLen() {
			return a
		}
	}
	return netip.Addr{}
}

// ProbeSource is the address that probes of a target of g come from: the health
// check's own, else the first source address of the family. The zero Addr
// leaves the choice to the route. A VIP is never the answer: a target that also
// carries the VIP would take the probe for its own and drop it.
func (s *Spec) ProbeSource(g *TargetGroup, target netip.Addr) netip.Addr {
	source := g.HealthCheck.Source
	if source.BitLen() != target.BitLen() || s.HasVIP(source) {
		source = s.SourceFor(target)
	}
	if s.HasVIP(source) {
		return netip.Addr{}
	}
	return source
}

// RoutedAddrs lists, sorted, the addresses of all targets: those of spec and those
// that have left it and drain.
func RoutedAddrs(spec *Spec, drains Drains) []netip.Addr {
	var targets []netip.Addr
	for _, g := range spec.TargetGroups {
		for _, t := range g.Targets {
			targets = append(targets, t.Address)
		}
	}
	for target, d := range drains {
		if d.Removed {
			targets = append(targets, target.AddrPort.Addr())
		}
	}
	return sortedSet(targets, netip.Addr.Compare)
}
