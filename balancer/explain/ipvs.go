package explain

import (
	"net/netip"
	"slices"

	"nlb/balancer"
)

// onlyRelayed reports whether all that the service may choose is relayed: IPVS has
// no part in it then, and the groups are chosen by rules of nftables.
func (e *Explainer) onlyRelayed(s *balancer.VirtualService) bool {
	return !slices.ContainsFunc(s.Pools, func(w balancer.WeightedPool) bool {
		p := e.pools[w.Pool]
		return w.Weight > 0 && (!p.Relays() || slices.ContainsFunc(p.Usable(s.Address.BitLen()), func(d int) bool { return !p.relays(d) }))
	})
}

// chosenByIPVS lists what IPVS may choose, each with its part of the weights. The
// relay, which is one choice of IPVS, counts by its targets. Groups without a target
// that takes flows leave their part to the others.
func (e *Explainer) chosenByIPVS(q Question, s *balancer.VirtualService) []outcome {
	var out []outcome
	total := 0
	for _, w := range s.Pools {
		p := e.pools[w.Pool]
		members, sum := e.members(q, p)
		if sum == 0 || w.Weight == 0 {
			continue
		}
		total += w.Weight
		for _, d := range members {
			f := e.balanced(q, fate{verdict: Forward, service: s, pool: p.Pool, to: &p.Destinations[d], relayed: p.relays(d)})
			share := float64(w.Weight) * float64(f.to.Weight) / float64(sum)
			out = append(out, outcome{fate: f, share: share, sources: e.sources(q, f)})
		}
	}
	for i := range out {
		out[i].share /= float64(total)
	}
	if len(out) == 0 {
		return []outcome{{fate: fate{verdict: Drop, reason: ReasonNoTarget, service: s}, share: 1}}
	}
	sortOutcomes(out)
	return out
}

// members lists the pool's destinations that may get the flow, and their weights'
// sum. UDP is never relayed.
func (e *Explainer) members(q Question, p *pool) (members []int, sum int) {
	for _, d := range p.Usable(q.Destination.Addr().BitLen()) {
		if w := p.Destinations[d].Weight; w > 0 && (q.Protocol == balancer.ProtoTCP || !p.relays(d)) {
			members, sum = append(members, d), sum+w
		}
	}
	return members, sum
}

// balanced is the fate of a flow that IPVS gave a target.
func (e *Explainer) balanced(q Question, f fate) fate {
	switch {
	case f.relayed:
		return f
	case contains(f.to.Domain, q.Client.Addr()):
		return f.hairpinned()
	}
	return f.sent(q)
}

// hairpinKind says how the client is on the target's host, as far as the Spec tells.
func (e *Explainer) hairpinKind(client netip.Addr, f fate) string {
	if client == f.to.Address {
		return Self
	}
	if e.spec == nil {
		return Colocated
	}
	for i := range e.spec.TargetGroups {
		g := &e.spec.TargetGroups[i]
		if g.Name != f.pool.Name {
			continue
		}
		for _, t := range g.Targets {
			if t.AddrPort() == f.to.AddrPort() && !contains(t.Colocated, client) {
				return Subnet
			}
		}
	}
	return Colocated
}
