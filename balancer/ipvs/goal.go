package ipvs

import (
	"net/netip"
	"slices"

	"nlb/balancer"
)

// A want is what a Table asks of IPVS.
type want struct {
	services map[serviceKey]service
	// relayed has the services that the relay takes new connections of.
	relayed map[serviceKey]bool
}

// wanted translates a Table: one service for each protocol of a listener. The
// services that are only relayed need none, and no other dataplane does.
func wanted(t *balancer.Table) want {
	w := want{services: make(map[serviceKey]service), relayed: make(map[serviceKey]bool)}
	pools := t.PoolsByName()
	for i := range t.Services {
		vs := &t.Services[i]
		onlyRelayed := vs.OnlyRelayed(pools)
		for _, proto := range vs.Protocols {
			k := serviceKey{proto, netip.AddrPortFrom(vs.Address, vs.Port)}
			c := choicesOf(vs, pools, k)
			w.relayed[k] = onlyRelayed || c.share(k.at) > 0
			if t.Dataplane == balancer.IPVS && !onlyRelayed {
				w.services[k] = c.service(k, sticky(vs, pools))
			}
		}
	}
	return w
}

// sticky reports whether the client's address alone chooses. One hash of IPVS
// stands for both of the Table's, that of the pool and that of the destination.
func sticky(vs *balancer.VirtualService, pools map[string]*balancer.Pool) bool {
	return vs.Sticky || slices.ContainsFunc(vs.Pools, func(w balancer.WeightedPool) bool { return pools[w.Pool].Sticky })
}

// A choice is a destination among those of a service.
type choice struct {
	at    netip.AddrPort
	share float64
	// leaves says that its UDP flows are to be forgotten.
	leaves bool
}

// choices are sorted by address, each of which is there once.
type choices []choice

// choicesOf lists where the flows of a service may go, those without a share too.
// A pool's share is split by weight among its destinations; pools without a usable
// one have none. Whatever the relay takes is one choice: the service's own
// address, where its socket is.
func choicesOf(vs *balancer.VirtualService, pools map[string]*balancer.Pool, k serviceKey) choices {
	type pool struct {
		weight, sum int
		members     []choice
	}
	var all []pool
	var total int
	for _, wp := range vs.Pools {
		of := pools[wp.Pool]
		usable := of.Usable(vs.Address.BitLen())
		p := pool{weight: wp.Weight, members: make([]choice, 0, len(usable))}
		for _, i := range usable {
			d := &of.Destinations[i]
			at := d.AddrPort()
			if of.ClientIPOf(d) == balancer.ProxyProtocolV2 {
				if k.proto != balancer.ProtoTCP {
					continue // the relay has connections only
				}
				at = k.at
			}
			p.sum += d.Weight
			p.members = append(p.members, choice{at, float64(d.Weight), d.Leaves && d.Weight == 0})
		}
		if p.sum > 0 {
			total += p.weight
		}
		all = append(all, p)
	}
	var cs choices
	for _, p := range all {
		for _, c := range p.members {
			if c.share > 0 && total > 0 {
				c.share *= float64(p.weight) / float64(total) / float64(p.sum)
			} else {
				c.share = 0
			}
			cs = append(cs, c)
		}
	}
	return cs.merged()
}

// merged joins the choices of one address.
func (cs choices) merged() choices {
	slices.SortStableFunc(cs, func(a, b choice) int { return a.at.Compare(b.at) })
	var out choices
	for _, c := range cs {
		if n := len(out); n > 0 && out[n-1].at == c.at {
			out[n-1].share += c.share
			out[n-1].leaves = out[n-1].leaves && c.leaves
			continue
		}
		out = append(out, c)
	}
	return out
}

// share is that of the destination at an address.
func (cs choices) share(at netip.AddrPort) float64 {
	i, ok := slices.BinarySearchFunc(cs, at, func(c choice, at netip.AddrPort) int { return c.at.Compare(at) })
	if !ok {
		return 0
	}
	return cs[i].share
}

// service is the virtual service with these destinations. One of UDP whose flows
// are to be forgotten is left out: with expire_nodest_conn the kernel then drops
// the next packet of each flow and chooses anew for the one after.
func (cs choices) service(k serviceKey, sticky bool) service {
	s := newService(k, sticky)
	var shares []float64
	for _, c := range cs {
		if c.share > 0 {
			shares = append(shares, c.share)
		}
	}
	ws := weights(shares)
	for _, c := range cs {
		d := destination{at: c.at}
		switch {
		case c.share > 0:
			d.weight, ws = ws[0], ws[1:]
		case c.leaves && k.proto == balancer.ProtoUDP:
			continue
		}
		s.destinations = append(s.destinations, d)
	}
	return s
}

// goal says which services there should be, given those of ours that are: what the
// Table asks for, and what still has connections. A nil Table asks for nothing.
func goal(have []service, t *balancer.Table) []service {
	if t == nil {
		return nil
	}
	w := wanted(t)
	var to []service
	for _, s := range w.services {
		if h := findService(have, s.key); h != nil {
			s.destinations = append(s.destinations, lingering(h, &s)...)
			s.sort()
		}
		to = append(to, s)
	}
	for i := range have {
		h := &have[i]
		if _, ok := w.services[h.key]; ok {
			continue
		}
		if s, ok := leftover(h, w.relayed[h.key]); ok {
			to = append(to, s)
		}
	}
	sortServices(to)
	return to
}

// lingering lists the destinations of h that s has not, and that have established
// TCP connections: these live on, as they do in nftables, until both ends are done.
func lingering(h, s *service) []destination {
	if h.key.proto != balancer.ProtoTCP {
		return nil
	}
	var ds []destination
	for _, d := range h.destinations {
		if d.active > 0 && s.find(d.at) == nil {
			d.weight = 0
			ds = append(ds, d)
		}
	}
	return ds
}

// leftover is what stays of a service that is not asked for. Where the relay has
// the port now, new connections must get past the service to the socket. The
// relay's own keep the service too: with the destination the kernel removes their
// entries in conntrack, and rules that choose take what comes next for a new flow.
func leftover(h *service, relayed bool) (service, bool) {
	s := newService(h.key, h.flags&flagPort == 0)
	s.destinations = lingering(h, &s)
	if len(s.destinations) == 0 {
		return service{}, false
	}
	if relayed {
		own := s.find(h.key.at)
		if own == nil {
			s.destinations = append(s.destinations, destination{at: h.key.at, weight: 1})
			s.sort()
		} else {
			own.weight = 1
		}
	}
	return s, true
}

// staged is what there should be before the rules of nftables know of the change:
// what is there, the services that are new, which nobody is let in to yet, and the
// destinations of those that had nobody to take a flow, for the same reason. The
// exception is a service that the relay has had so far, to which clients come all
// the time: it begins with the relay alone, if the relay keeps a share. If not, the
// rules, which leave flows to the relay and do not know the destinations, drop what
// IPVS sends to these, and clients ask again when the rules have changed.
func staged(have, to []service) []service {
	first := slices.Clone(have)
	for _, s := range to {
		if h := findService(first[:len(have)], s.key); h != nil {
			if !h.usable() {
				*h = h.joined(s)
			}
			continue
		}
		if own := s.find(s.key.at); own != nil && own.weight > 0 {
			s.destinations = []destination{*own}
		}
		first = append(first, s)
	}
	sortServices(first)
	return first
}

// joined is a service with the destinations of another that are usable.
func (s *service) joined(o service) service {
	j := *s
	j.destinations = slices.DeleteFunc(slices.Clone(s.destinations), func(d destination) bool {
		is := o.find(d.at)
		return is != nil && is.weight > 0
	})
	for _, d := range o.destinations {
		if d.weight > 0 {
			j.destinations = append(j.destinations, d)
		}
	}
	j.sort()
	return j
}

// relays reports whether the relay may have connections, new or old.
func relays(t *balancer.Table) bool {
	return slices.ContainsFunc(t.Pools, func(p balancer.Pool) bool {
		return p.Relays() && slices.Contains(p.Protocols, balancer.ProtoTCP)
	})
}

// longestIdle is the idle timeout that suits all TCP services, in seconds, 0 if
// there are none. The kernel has one for the whole namespace.
func longestIdle(t *balancer.Table) int {
	var longest int
	for i := range t.Services {
		s := &t.Services[i]
		if slices.Contains(s.Protocols, balancer.ProtoTCP) {
			longest = max(longest, int(s.IdleTimeout.Seconds()))
		}
	}
	return longest
}
