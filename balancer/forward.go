package balancer

import (
	"cmp"
	"net/netip"
	"slices"
)

// Forward decides what traffic should do. It is pure: the same arguments give
// the same, sorted, answer.
//
// Only target groups that a listener forwards to become Pools, and those with
// targets that still drain. A target that takes no new flows stays in its Pool
// with weight 0, so that its flows live on; one whose deregistration ended
// leaves, when its flows were ended if that is to be.
func Forward(spec *Spec, seen View) *Desired {
	return forward(spec, seen, Targets(spec, seen))
}

func forward(spec *Spec, seen View, groups []TargetGroupStatus) *Desired {
	byName := make(map[string]*TargetGroup, len(spec.TargetGroups))
	for i := range spec.TargetGroups {
		byName[spec.TargetGroups[i].Name] = &spec.TargetGroups[i]
	}
	want := &Desired{
		Table: &Table{
			Dataplane: spec.Dataplane,

			Key:      seen.Key,
			VIPs:     vipAddresses(spec),
			Sources:  sortedSet(spec.SourceAddresses, netip.Addr.Compare),
			Services: services(spec, byName),

			UntrackedRelay: spec.UntrackedRelay,
			FastPath:       fastPath(spec, seen),
			Pools:          pools(spec, byName, seen, groups),
		},
		Bound: boundVIPs(spec),
	}
	var egress []string
	for _, p := range want.Table.Pools {
		for _, d := range p.Destinations {
			// Without a route the target is presumed elsewhere: forwarding
			// should be on by the time the route comes.
			route := seen.Routes[d.Address]
			if route.Local {
				continue
			}
			if d.Address.Is4() {
				want.Forwarding4 = true
			} else {
				want.Forwarding6 = true
			}
			if route.Interface != "" {
				egress = append(egress, route.Interface)
			}
		}
	}
	want.Egress = sortedSet(egress, cmp.Compare[string])
	return want
}

// fastPath lists the interfaces of the fast path: all there are, because a client
// may be behind any of them. If they are more than the kernel takes, those that
// lead to targets are among them.
func fastPath(spec *Spec, seen View) []string {
	if !spec.Flowtable {
		return nil
	}
	rank := make(map[string]int)
	for _, r := range seen.Routes {
		rank[r.Interface] = -1
	}
	links := sortedSet(seen.Links, func(a, b string) int { return cmp.Or(rank[a]-rank[b], cmp.Compare(a, b)) })
	return sortedSet(links[:min(len(links), mostFastPath)], cmp.Compare[string])
}

// mostFastPath is NFT_NETDEVICE_MAX, how many interfaces a flowtable can have.
const mostFastPath = 256

func vipAddresses(spec *Spec) []netip.Addr {
	var vips []netip.Addr
	for _, v := range spec.VIPs {
		vips = append(vips, v.Address)
	}
	return sortedSet(vips, netip.Addr.Compare)
}

func boundVIPs(spec *Spec) []VIP {
	var bound []VIP
	for _, v := range spec.VIPs {
		if v.Interface != "" {
			bound = append(bound, v)
		}
	}
	slices.SortFunc(bound, func(a, b VIP) int { return a.Address.Compare(b.Address) })
	return bound
}

func services(spec *Spec, groups map[string]*TargetGroup) []VirtualService {
	var services []VirtualService
	for _, l := range spec.Listeners {
		services = append(services, service(groups, l))
	}
	slices.SortFunc(services, func(a, b VirtualService) int {
		return cmp.Or(
			a.Address.Compare(b.Address),
			cmp.Compare(a.Port, b.Port),
			slices.Compare(a.Protocols, b.Protocols),
			cmp.Compare(a.Name, b.Name))
	})
	return services
}

func service(groups map[string]*TargetGroup, l Listener) VirtualService {
	s := VirtualService{
		Name:        l.Name,
		Address:     l.VIP,
		Protocols:   l.Protocol.Numbers(),
		Port:        l.Port,
		IdleTimeout: l.TCPIdleTimeout,
		Allow:       Aggregate(ofFamily(l.VIP, l.Allow)),
		SYNProxy:    l.SYNProxy,
		SourceLimit: l.SourceLimit,
	}
	for _, f := range l.Forward {
		s.Pools = append(s.Pools, WeightedPool{Pool: f.TargetGroup, Weight: f.Weight})
		// One sticky group makes the listener's choice sticky: a client that
		// changed groups would lose its target.
		if g := groups[f.TargetGroup]; g != nil && g.Stickiness == StickySourceIP {
			s.Sticky = true
		}
	}
	slices.SortFunc(s.Pools, func(a, b WeightedPool) int { return cmp.Compare(a.Pool, b.Pool) })
	return s
}

func pools(spec *Spec, groups map[string]*TargetGroup, seen View, statuses []TargetGroupStatus) []Pool {
	used := spec.GroupsInUse()
	protocols := protocolsOf(spec)
	var pools []Pool
	for _, status := range statuses {
		g := groups[status.Name]
		if g == nil { // gone, but its targets still have flows
			g = &TargetGroup{Name: status.Name, Protocol: status.Protocol, ClientIP: status.ClientIP}
		}
		p := pool(spec, g, status, seen)
		if p.Protocols = protocols[g.Name]; p.Protocols == nil {
			p.Protocols = g.Protocol.Numbers()
		}
		if used[status.Name] || len(p.Destinations) > 0 {
			pools = append(pools, p)
		}
	}
	return pools
}

// protocolsOf lists the IP protocols in which listeners forward to each group.
func protocolsOf(spec *Spec) map[string][]uint8 {
	byGroup := make(map[string][]uint8, len(spec.TargetGroups))
	for _, l := range spec.Listeners {
		for _, f := range l.Forward {
			byGroup[f.TargetGroup] = append(byGroup[f.TargetGroup], l.Protocol.Numbers()...)
		}
	}
	for name, numbers := range byGroup {
		byGroup[name] = sortedSet(numbers, cmp.Compare[uint8])
	}
	return byGroup
}

func pool(spec *Spec, g *TargetGroup, status TargetGroupStatus, seen View) Pool {
	p := Pool{
		Name:      g.Name,
		ClientIP:  g.ClientIP,
		AvoidSelf: g.AvoidSelf,
		Sticky:    g.Stickiness == StickySourceIP,
		Observed:  g.Passive.MaxFailures > 0,

		ProxyProtocol: g.ProxyProtocol,
	}
	for _, t := range status.Targets {
		if t.State == Unused && !t.Terminate {
			continue
		}
		// The second choice of avoid_self is dealt too, and by who takes new flows.
		kept := 0
		if t.able() && t.Share == 0 && !g.AvoidSelf {
			kept = t.Target.Weight
		}
		route := seen.Routes[t.Target.Address]
		p.Destinations = append(p.Destinations, Destination{
			Address:   t.Target.Address,
			Port:      t.Target.Port,
			Weight:    t.Share,
			Kept:      kept,
			ClientIP:  t.Target.ClientIP,
			Terminate: t.Terminate,
			Leaves:    (t.Removed || t.Cut) && g.Protocol != TCP,
			Domain:    domain(g, t.Target, route),
			Source:    source(spec, t.Target.Address, route),
		})
	}
	return p
}

// domain lists what counts as the target's own host.
func domain(g *TargetGroup, t Target, route Route) []netip.Prefix {
	prefixes := append([]netip.Prefix{host(t.Address)}, t.Colocated...)
	if len(prefixes) == 1 && !g.HairpinSubnet {
		return prefixes
	}
	if g.HairpinSubnet && route.Subnet.IsValid() {
		prefixes = append(prefixes, route.Subnet)
	}
	return Aggregate(ofFamily(t.Address, prefixes))
}

// source is the address to speak to the target from, when the operator named
// none of its family.
func source(spec *Spec, target netip.Addr, route Route) netip.Addr {
	if spec.SourceFor(target).IsValid() || spec.HasVIP(route.Source) {
		return netip.Addr{}
	}
	return route.Source
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// ofFamily keeps the prefixes of the address's family: no packet can bring the
// others and the address together.
func ofFamily(a netip.Addr, prefixes []netip.Prefix) []netip.Prefix {
	var same []netip.Prefix
	for _, p := range prefixes {
		if p.Addr().BitLen() == a.BitLen() {
			same = append(same, p)
		}
	}
	return same
}

// Aggregate returns the shortest sorted list of prefixes that covers what the
// given ones cover: the kernel's interval sets refuse overlaps.
func Aggregate(prefixes []netip.Prefix) []netip.Prefix {
	var sorted []netip.Prefix
	for _, p := range prefixes {
		sorted = append(sorted, p.Masked())
	}
	// By address, then the wider first: what a prefix covers follows it.
	slices.SortFunc(sorted, netip.Prefix.Compare)
	var out []netip.Prefix
	for _, p := range sorted {
		if n := len(out); n > 0 && out[n-1].Overlaps(p) {
			continue
		}
		out = append(out, p)
		for n := len(out); n > 1; n = len(out) {
			both, ok := halves(out[n-2], out[n-1])
			if !ok {
				break
			}
			out = append(out[:n-2], both)
		}
	}
	return out
}

// halves returns the prefix that a and b are the two halves of.
func halves(a, b netip.Prefix) (netip.Prefix, bool) {
	if a.Bits() != b.Bits() || a.Bits() == 0 || a.Addr().BitLen() != b.Addr().BitLen() || a == b {
		return netip.Prefix{}, false
	}
	whole := netip.PrefixFrom(a.Addr(), a.Bits()-1).Masked()
	return whole, whole.Contains(b.Addr())
}

func sortedSet[E comparable](in []E, compare func(a, b E) int) []E {
	out := slices.Clone(in)
	slices.SortFunc(out, compare)
	return slices.Compact(out)
}
