package nft

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"nlb/balancer"
)

// Names of what stands beside IPVS.
const (
	chainArrived = "arrived"
	chainChosen  = "chosen"

	mapDestinations = "destinations" // from a service and a destination of it to the target's number
	mapNumbered     = "numbered"     // from a target's number to its chain
)

// priorityArrived is past IPVS in the input hook, which is at 98 and 99
// (NF_IP_PRI_NAT_SRC - 1 in ip_vs_core.c).
const priorityArrived = 101

// A companion is the ruleset's part that depends on who chooses, where that is
// IPVS. It remembers as the renderer does.
type companion struct {
	pools map[string]*renderedPool
	// byName has the pools of the Table that is being rendered.
	byName map[string]*balancer.Pool
	// services are those whose destinations are known, with what they depend on.
	services map[string]*serviceDestinations
}

// A serviceDestinations is one service's part of the map of destinations.
type serviceDestinations struct {
	service balancer.VirtualService
	pools   []*renderedPool
	elems   []Elem // sorted
}

// render writes the targets' chains and what finds the target that IPVS chose.
func (c *companion) render(rs *Ruleset, t *balancer.Table, n *numbers) {
	c.byName = t.PoolsByName()
	before := c.pools
	c.pools = make(map[string]*renderedPool, len(t.Pools))
	numbered := &Set{Name: mapNumbered, kind: targetKind}
	for i := range t.Pools {
		p := before[t.Pools[i].Name].accompanying(&t.Pools[i], n)
		c.pools[p.pool.Name] = p
		p.addTo(rs)
		for _, d := range p.balanced() {
			numbered.Elems = append(numbered.Elems, Elem{
				Key: string(native32(markOf(p.numbers[d], 0))), Goto: targetChainName(p.numbers[d], p.pool.Name),
			})
		}
	}
	rs.addSet(numbered.sort())
	c.renderDestinations(rs, t)
	rs.addChain(&Chain{Name: chainChosen, Rules: chosenRules()})
	rs.addChain(&Chain{
		Name: chainArrived, Base: &Base{Type: "filter", Hook: unix.NF_INET_LOCAL_IN, Priority: priorityArrived},
		Rules: arrivedRules(),
	})
}

// --- pools -------------------------------------------------------------------------

// accompanying is r, which may be nil, if that is what became of such a pool, else
// a new one.
func (r *renderedPool) accompanying(p *balancer.Pool, n *numbers) *renderedPool {
	nums := n.of(p)
	if r != nil && slices.Equal(r.numbers, nums) && r.pool.Same(p) {
		return r
	}
	out := &renderedPool{pool: *p, numbers: nums, chosen: true, targets: make(map[targetFacts]*renderedTarget)}
	for _, f := range families {
		mine := p.Usable(f.bits)
		if p.OnlyRelays(mine) {
			out.renderRelayed(f)
			continue
		}
		for _, d := range mine {
			out.addTarget(f, r, d, "", false)
		}
	}
	return out
}

// renderRelayed writes the chain that a service goes to if all of its pools are
// relayed. Where the kernel has something to choose from, IPVS does.
func (r *renderedPool) renderRelayed(f *family) {
	if !r.pool.Relays() {
		return
	}
	c := &Chain{Name: poolChain(r.pool.Name, f)}
	if takesRelayed(&r.pool) {
		c.Rules = append(c.Rules, toRelay(f))
	}
	c.Rules = append(c.Rules, rule(func(b *ruleBuilder) { b.dropAs(counterNoTarget) }))
	r.chains = append(r.chains, c)
}

// balanced lists the pool's destinations, by index, that IPVS may choose.
func (r *renderedPool) balanced() (ds []int) {
	for d := range r.pool.Destinations {
		if r.pool.ClientIPOf(&r.pool.Destinations[d]) != balancer.ProxyProtocolV2 {
			ds = append(ds, d)
		}
	}
	return ds
}

// --- services ----------------------------------------------------------------------

// serviceRule is the last of a listener's chain. It leaves a flow to IPVS, unless
// there is nothing to choose for that now. Then the relay takes it: with groups that
// are relayed only, as if there were no IPVS; else with the destinations that count in
// IPVS, too. Or nobody does: IPVS itself would answer with an ICMP error.
func (c *companion) serviceRule(rs *Ruleset, t *balancer.Table, svc *balancer.VirtualService, f *family) Rule {
	var balanced, relays bool
	for _, w := range svc.Pools {
		if w.Weight == 0 {
			continue
		}
		p := c.pools[w.Pool]
		relays = relays || slices.ContainsFunc(p.pool.Usable(f.bits), func(d int) bool {
			return relaysTo(&p.pool, &p.pool.Destinations[d])
		})
		balanced = balanced || slices.ContainsFunc(p.balanced(), func(d int) bool {
			dest := &p.pool.Destinations[d]
			return dest.Weight > 0 && familyOf(dest.Address) == f
		})
	}
	switch {
	case balanced:
		return leaveTo(awaiting, f)
	case svc.OnlyRelayed(c.byName):
		return poolRule(rs, t, svc, f)
	case relays:
		return toRelay(f)
	}
	return rule(func(b *ruleBuilder) { b.dropAs(counterNoTarget) })
}

// renderDestinations writes the maps of all destinations that a service has,
// those without weight too: IPVS goes on with flows that conntrack has forgotten.
func (c *companion) renderDestinations(rs *Ruleset, t *balancer.Table) {
	before := c.services
	c.services = make(map[string]*serviceDestinations, len(t.Services))
	lists := map[*family][][]Elem{}
	for i := range t.Services {
		s := before[t.Services[i].Name].of(&t.Services[i], c.pools)
		c.services[s.service.Name] = s
		if f := familyOf(s.service.Address); len(s.elems) > 0 {
			lists[f] = append(lists[f], s.elems)
		}
	}
	for _, f := range families {
		s := &Set{Name: mapDestinations + f.name, kind: destinationKinds[f], Elems: slices.Concat(lists[f]...)}
		rs.addSet(s.sort())
	}
}

// of is s, which may be nil, if it is what becomes of such a service, else a new
// one.
//
// Two of the service's pools may have the same destination, and the packet does
// not tell which of them IPVS meant: it counts for the first by name, one that has
// a weight before one that has none.
func (s *serviceDestinations) of(svc *balancer.VirtualService, rendered map[string]*renderedPool) *serviceDestinations {
	order := slices.Clone(svc.Pools)
	slices.SortFunc(order, func(a, b balancer.WeightedPool) int {
		return cmp.Or(cmp.Compare(min(b.Weight, 1), min(a.Weight, 1)), cmp.Compare(a.Pool, b.Pool))
	})
	pools := make([]*renderedPool, len(order))
	for i, w := range order {
		pools[i] = rendered[w.Pool]
	}
	if s != nil && slices.Equal(s.pools, pools) && s.service.Address == svc.Address && s.service.Port == svc.Port &&
		slices.Equal(s.service.Protocols, svc.Protocols) {
		return s
	}
	out := &serviceDestinations{service: *svc, pools: pools}
	for _, proto := range svc.Protocols {
		out.add(proto)
	}
	slices.SortFunc(out.elems, compareElems)
	return out
}

// add adds what IPVS may choose for one of the service's protocols. A relayed
// destination is the service itself, where the relay listens.
func (s *serviceDestinations) add(proto uint8) {
	service := netip.AddrPortFrom(s.service.Address, s.service.Port)
	known := make(map[netip.AddrPort]bool)
	add := func(to netip.AddrPort, number uint16) {
		if !known[to] {
			known[to] = true
			s.elems = append(s.elems, Elem{Key: destinationKey(service, proto, to), Data: string(native32(uint32(number)))})
		}
	}
	for _, p := range s.pools {
		if proto == balancer.ProtoTCP && p.pool.Relays() {
			add(service, relayed)
		}
		for _, d := range p.balanced() {
			if dest := p.pool.Destinations[d]; dest.Address.BitLen() == service.Addr().BitLen() {
				add(dest.AddrPort(), p.numbers[d])
			}
		}
	}
}

var destinationKinds = map[*family]*kind{ip4: destinationKind(ip4), ip6: destinationKind(ip6)}

// destinationKind is a map from a service and a destination to a number. It fits
// the registers: 44 of 64 bytes with IPv6.
func destinationKind(f *family) *kind {
	service := serviceKind(f, false)
	return &kind{
		name:    service.name + " . " + f.addrName() + " . inet_service : mark",
		keyType: concat(f.addrType, typeProto, typeService, f.addrType, typeService), keyLen: service.keyLen + 4*f.addrRegs + 4,
		dataType: typeMark, dataLen: 4,
		key: func(b []byte) string {
			to := b[service.keyLen:]
			n := len(to) - 4
			return fmt.Sprintf("%s . %s . %d", service.key(b[:service.keyLen]), addrText(to[:n]), binary.BigEndian.Uint16(to[n:]))
		},
	}
}

func destinationKey(service netip.AddrPort, proto uint8, to netip.AddrPort) string {
	b := append([]byte(serviceKey(service, proto)), to.Addr().AsSlice()...)
	return string(append(binary.BigEndian.AppendUint16(b, to.Port()), 0, 0))
}

// --- rules -------------------------------------------------------------------------

// chosenRules find the target that IPVS chose, by the service that the flow began
// at and by where its packet goes now. The target's number goes into the mark, in
// place of awaiting, and its chain does the rest. A destination that is not in the
// map was added by somebody else, and gets nothing.
func chosenRules() []Rule {
	rules := eachFamily(func(b *ruleBuilder, f *family) {
		b.say("ct mark set")
		b.family(f)
		b.destination(f)
		b.lookup(mapDestinations+f.name, 0, reg(0).number())
		b.ctMarkMerge()
		b.say("map @%s << %d", mapDestinations+f.name, markShift)
	})
	return append(rules,
		rule(func(b *ruleBuilder) {
			b.loadCT(unix.NFT_CT_MARK, 0)
			b.bitwise(0, native32(TargetMask), native32(0))
			b.say("ct mark & 0x%08x", TargetMask)
			b.vmap(mapNumbered, 0)
		}),
		rule(func(b *ruleBuilder) { b.ctMarkTarget(relayed); b.returns() }),
		rule(func(b *ruleBuilder) { b.dropAs(counterNoTarget) }),
	)
}

// destination loads what the flow was for at first, and what its packet is for
// now.
func (b *ruleBuilder) destination(f *family) {
	at := reg(f.addrRegs)
	b.loadCTOriginal(f.ctDst, 0)
	b.loadMeta(unix.NFT_META_L4PROTO, at)
	b.loadCTOriginal(unix.NFT_CT_PROTO_DST, at+1)
	b.loadDest(f, at+2)
	b.loadDestPort(at + 2 + reg(f.addrRegs))
	b.say("ct original %s daddr . meta l4proto . ct original proto-dst . %s daddr . th dport", f.ip, f.ip)
}

// chosenWanted comes first where flows leave this host, or go on within it, past
// IPVS, which may have taken what was left to the relay: it goes by the address
// alone, has connections that conntrack has forgotten, and changes before these rules
// or after them. A new flow that is for no VIP any more is not the relay's; answers
// of the relay, to clients on this host, are of flows that are not new.
func chosenWanted() []Rule {
	taken := eachFamily(func(b *ruleBuilder, f *family) {
		b.ctMarkTarget(relayed)
		b.ctState(ctNew, "new")
		b.destNotInSet(f, vipsName(f))
		b.ctMarkSet(MarkMask, markOf(awaiting, 0))
	})
	return append(taken, rule(func(b *ruleBuilder) { b.ctMarkTarget(awaiting); b.jump(chainChosen) }))
}

// arrivedRules meet what is left when IPVS has sent on what goes to other hosts:
// flows to a destination on this host, of which the relay is one, and flows that
// IPVS did not take, for instance because somebody removed what it had. Those are
// still addressed to the VIP, and never get at a socket of this host. ICMP errors
// about flows are left to the kernel.
func arrivedRules() []Rule {
	rules := append(chosenWanted(), rule(func(b *ruleBuilder) { b.ctMarkTarget(relayed); b.accept() }))
	return append(rules, eachFamily(func(b *ruleBuilder, f *family) {
		b.ctMarkAny(TargetMask)
		b.ctOriginal()
		b.ctState(ctNew|ctEstablished, "new,established")
		b.destInSet(f, vipsName(f))
		b.dropAs(counterNoTarget)
	})...)
}

// guardFlows let a VIP's packets pass that are of a flow of ours and still
// addressed to the VIP: the relay's, and those that IPVS has yet to rewrite.
//
// TCP flows that IPVS began stay with it when nftables takes over: their segments
// pass. One that begins a connection does not, as it would get at a socket that
// listens here if IPVS has forgotten the flow. Nor do UDP flows, which end, and
// begin anew when their entries are removed. Flows that nftables began have been
// rewritten before they come here, whoever chooses now.
func guardFlows(d balancer.Dataplane) []Rule {
	if d == balancer.IPVS {
		return []Rule{rule(func(b *ruleBuilder) { b.ctMarkAny(TargetMask); b.returns() })}
	}
	return []Rule{
		rule(func(b *ruleBuilder) { b.ctMarkTarget(relayed); b.returns() }),
		rule(func(b *ruleBuilder) {
			b.l4proto(unix.IPPROTO_TCP)
			b.tcpSYN(unix.NFT_CMP_NEQ, "!=")
			b.ctMarkAny(TargetMask)
			b.returns()
		}),
	}
}
