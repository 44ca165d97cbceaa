// Package explain says what becomes of a flow that nobody has sent: which listener
// takes it, which target gets it, what is rewritten on the way, or why it is
// dropped. It reads a balancer.Table and repeats the choices of the rules that a
// dataplane makes of it, by the same hashes over the same slots (package maglev),
// so that it agrees with the kernel as long as that holds the Table.
//
// An answer is about a new flow. One that has begun stays with its target.
//
//	question ──► listener ──► allow ──► group ──► slot ──► target ──► hairpin? ──► source
//	             no listener  source    (hash)    (hash)   no target  hairpin      (hash)
//	                          not allowed
//
// IPVS chooses by a hash of its own: an answer has all targets it may choose then.
package explain

import (
	"cmp"
	"net/netip"
	"slices"

	"nlb/balancer"
	"nlb/balancer/maglev"
)

// An Explainer answers questions about one Table. It remembers slots, and is not
// safe for concurrent use.
type Explainer struct {
	spec  *balancer.Spec // may be nil
	table *balancer.Table
	pools map[string]*pool
	base  int

	groupSeed, targetSeed, spareSeed, sourceSeed uint32
	// untracked are services that no rule of NAT sees.
	untracked map[*balancer.VirtualService]bool
}

// New returns an Explainer of a Table, which must not change meanwhile. The Spec that
// it was made of tells how a client shares a host with its target; nil tells less.
func New(spec *balancer.Spec, t *balancer.Table) *Explainer {
	e := &Explainer{
		spec: spec, table: t, pools: make(map[string]*pool, len(t.Pools)), base: maglev.BaseFor(len(t.Pools)),
		groupSeed:  maglev.Seed(t.Key, maglev.SeedGroup),
		targetSeed: maglev.Seed(t.Key, maglev.SeedTarget),
		spareSeed:  maglev.Seed(t.Key, maglev.SeedSpare),
		sourceSeed: maglev.Seed(t.Key, maglev.SeedSource),
	}
	if t.UntrackedRelay {
		e.untracked = make(map[*balancer.VirtualService]bool)
		for _, s := range t.RelayedOnly().Services {
			e.untracked[s] = true
		}
	}
	for i := range t.Pools {
		e.pools[t.Pools[i].Name] = &pool{Pool: &t.Pools[i], slots: make(map[int]*slots)}
	}
	return e
}

// Explain answers a question.
func (e *Explainer) Explain(q Question) Answer {
	answer := Answer{Protocol: protocolName(q.Protocol), Client: endText(q.Client), VIP: q.Destination.String()}
	outcomes, dependsOn := e.outcomes(q)
	answer.Outcome = e.tell(q, outcomes[0])
	if len(outcomes) == 1 {
		return answer
	}
	answer.DependsOn = dependsOn
	for _, o := range outcomes {
		answer.Possible = append(answer.Possible, Possible{Share: o.share, Outcome: e.tell(q, o)})
	}
	return answer
}

// endText leaves out a port that is not known.
func endText(a netip.AddrPort) string {
	if a.Port() == 0 {
		return a.Addr().String()
	}
	return a.String()
}

// A fate is what becomes of a flow, but for the source that it gets.
type fate struct {
	verdict Verdict
	reason  string
	service *balancer.VirtualService
	pool    *balancer.Pool
	to      *balancer.Destination
	hairpin bool
	snat    bool
	relayed bool
	// kept is whom the flow was kept from by avoid_self.
	kept *balancer.Destination
}

// An outcome is a fate, how likely it is, and whom the target takes for the client.
type outcome struct {
	fate
	share   float64
	sources []netip.Addr // sorted; none if nothing changes the source
}

// outcomes has one outcome, or several, the likeliest first, and what decides.
func (e *Explainer) outcomes(q Question) ([]outcome, string) {
	service, f, decided := e.admit(q)
	switch {
	case decided:
		return []outcome{{fate: f, share: 1}}, ""
	case e.table.Dataplane == balancer.IPVS && !e.onlyRelayed(service):
		return e.chosenByIPVS(q, service), DependsOnIPVS
	case q.Client.Port() != 0:
		f := e.choose(q, service)
		return []outcome{{fate: f, share: 1, sources: e.sources(q, f)}}, ""
	}
	return e.anyPort(q, service), DependsOnPort
}

// admit finds the listener, and the fate of a flow that no group gets.
func (e *Explainer) admit(q Question) (service *balancer.VirtualService, f fate, decided bool) {
	for i := range e.table.Services {
		s := &e.table.Services[i]
		if s.Address != q.Destination.Addr() || s.Port != q.Destination.Port() || !slices.Contains(s.Protocols, q.Protocol) {
			continue
		}
		if !contains(s.Allow, q.Client.Addr()) {
			return s, fate{verdict: Drop, reason: ReasonNotAllowed, service: s}, true
		}
		return s, fate{}, false
	}
	if slices.Contains(e.table.VIPs, q.Destination.Addr()) {
		return nil, fate{verdict: Drop, reason: ReasonNoListener}, true
	}
	return nil, fate{verdict: None}, true
}

func contains(prefixes []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}

// anyPort asks for each port that the client may have. That is exact, whatever
// does or does not depend on the port, and takes milliseconds.
func (e *Explainer) anyPort(q Question, s *balancer.VirtualService) []outcome {
	const ports = 1<<16 - 1
	counts, sources := make(map[fate]int), make(map[fate]map[netip.Addr]bool)
	for port := 1; port <= ports; port++ {
		q.Client = netip.AddrPortFrom(q.Client.Addr(), uint16(port))
		f := e.choose(q, s)
		counts[f]++
		if sources[f] == nil {
			sources[f] = make(map[netip.Addr]bool)
		}
		for _, a := range e.sources(q, f) {
			sources[f][a] = true
		}
	}
	var out []outcome
	for f, n := range counts {
		o := outcome{fate: f, share: float64(n) / ports}
		for a := range sources[f] {
			o.sources = append(o.sources, a)
		}
		slices.SortFunc(o.sources, netip.Addr.Compare)
		out = append(out, o)
	}
	sortOutcomes(out)
	return out
}

func sortOutcomes(out []outcome) {
	slices.SortFunc(out, func(a, b outcome) int {
		return cmp.Or(cmp.Compare(b.share, a.share), cmp.Compare(a.name(), b.name()))
	})
}

// name orders outcomes that are equally likely.
func (f fate) name() string {
	name := string(f.verdict) + f.reason
	if f.pool != nil {
		name += f.pool.Name
	}
	if f.to != nil {
		name += f.to.AddrPort().String()
	}
	return name
}

// --- the choice, as the rules of nftables make it ---------------------------------

// choose is the way of a flow that a listener takes.
func (e *Explainer) choose(q Question, s *balancer.VirtualService) fate {
	flow := flowOf(q)
	p := e.group(flow, s)
	if p == nil {
		return fate{verdict: Drop, reason: ReasonNoTarget, service: s}
	}
	f := fate{verdict: Forward, service: s, pool: p.Pool}
	mine := p.Usable(q.Destination.Addr().BitLen())
	if !slices.ContainsFunc(mine, func(d int) bool { return !p.relays(d) }) {
		return e.relay(f, flow, p)
	}
	table := e.slotsOf(p, q.Destination.Addr().BitLen())
	owner, hash := e.aim(flow, p, table)
	if len(owner) == 0 {
		return f.dropped(ReasonNoTarget)
	}
	slot := maglev.Slot(hash, len(owner))
	to := table.destinations[owner[slot]]
	if p.relays(to) {
		return e.relay(f, flow, p)
	}
	f.to = &p.Destinations[to]
	if !contains(f.to.Domain, q.Client.Addr()) {
		return f.sent(q)
	}
	if p.ClientIPOf(f.to) != balancer.Preserve || !p.avoids() {
		return f.hairpinned()
	}
	other := e.second(p, table)[slot]
	if other < 0 {
		return f.hairpinned()
	}
	f.kept = f.to
	to = table.destinations[other]
	if p.relays(to) {
		return e.relay(f, flow, p)
	}
	f.to = &p.Destinations[to]
	return f.sent(q)
}

// aim is the slots that the flow is sent by, and its hash into them: the spare ones if
// its slot is that of a destination which takes no new flows.
func (e *Explainer) aim(flow maglev.Flow, p *pool, s *slots) (owner []int32, hash uint32) {
	hash = flow.Hash(p.Sticky, e.targetSeed)
	if len(s.owner) == 0 || p.Destinations[s.destinations[s.owner[maglev.Slot(hash, len(s.owner))]]].Weight > 0 {
		return s.owner, hash
	}
	return s.spare, flow.Hash(p.Sticky, e.spareSeed)
}

func flowOf(q Question) maglev.Flow {
	return maglev.Flow{Source: q.Client, Destination: q.Destination, Protocol: q.Protocol}
}

// group is the pool that the flow's hash leads to; nil if none has a weight.
func (e *Explainer) group(flow maglev.Flow, s *balancer.VirtualService) *pool {
	total := 0
	for _, w := range s.Pools {
		total += w.Weight
	}
	if total == 0 {
		return nil
	}
	at := maglev.Slot(flow.Hash(s.Sticky, e.groupSeed), total)
	for _, w := range s.Pools {
		if at < w.Weight {
			return e.pools[w.Pool]
		}
		at -= w.Weight
	}
	panic("explain: a group hash is beyond all weights")
}

// relay is the choice of the relay: among the relayed destinations of the VIP's
// family, or of the other one if none of those takes flows, the first one from the
// hash's own slot on.
func (e *Explainer) relay(f fate, flow maglev.Flow, p *pool) fate {
	f.relayed = true
	if flow.Protocol != balancer.ProtoTCP {
		return f.dropped(ReasonNoTarget) // the relay has connections only
	}
	flow.Source = e.arriving(flow, f.service)
	if !flow.Source.IsValid() {
		return f.dropped(ReasonNoSource)
	}
	bits := flow.Destination.Addr().BitLen()
	for _, b := range []int{bits, otherFamily(bits)} {
		table := e.slotsOf(p, b)
		takes := func(d int) bool { return p.relays(d) && p.Destinations[d].Weight > 0 }
		if !slices.ContainsFunc(table.destinations, takes) {
			continue
		}
		owner, hash := e.aim(flow, p, table)
		at := maglev.From(owner, hash, func(i int32) bool { return takes(table.destinations[i]) })
		f.to = &p.Destinations[table.destinations[at]]
		return f
	}
	return f.dropped(ReasonNoTarget)
}

// arriving is whom the relay takes for the client. That is the client, unless it is on
// this host and calls from a VIP: then it gets a source on its way, as at any target;
// none if there is none.
func (e *Explainer) arriving(flow maglev.Flow, s *balancer.VirtualService) netip.AddrPort {
	if e.untracked[s] || !slices.Contains(e.table.VIPs, flow.Source.Addr()) {
		return flow.Source
	}
	own := e.ownSources(flow.Source.Addr().BitLen())
	if len(own) == 0 {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(own[e.sourceSlot(flow, len(own))], flow.Source.Port())
}

// ownSources are the SNAT pool of a family.
func (e *Explainer) ownSources(bits int) (own []netip.Addr) {
	for _, a := range e.table.Sources {
		if a.BitLen() == bits {
			own = append(own, a)
		}
	}
	return own
}

// sourceSlot is which of so many sources a flow gets, by the addresses and ports that it
// has once its destination is rewritten.
func (e *Explainer) sourceSlot(flow maglev.Flow, n int) int {
	return maglev.Slot(flow.Hash(false, e.sourceSeed), n)
}

func otherFamily(bits int) int {
	if bits == 32 {
		return 128
	}
	return 32
}

func (f fate) dropped(reason string) fate {
	f.verdict, f.reason = Drop, reason
	return f
}

// sent goes to a target that is not on the client's host.
func (f fate) sent(q Question) fate {
	f.snat = f.pool.ClientIPOf(f.to) == balancer.SNAT
	return f
}

// hairpinned is the fate of a client on its target's host. Where the client is to
// be avoided and there is nowhere else to go, it gets a source of the balancer.
func (f fate) hairpinned() fate {
	f.hairpin = true
	if f.pool.ClientIPOf(f.to) == balancer.Preserve && !f.pool.AvoidSelf {
		return f.dropped(ReasonHairpin)
	}
	f.snat = true
	return f
}

// sources are what the target may take for the client's address; none if that is
// the client's own.
func (e *Explainer) sources(q Question, f fate) []netip.Addr {
	if f.verdict != Forward {
		return nil
	}
	// A client on this host that calls from a VIP would be a stranger to targets
	// that have the VIP too.
	if !f.snat && !f.relayed && !slices.Contains(e.table.VIPs, q.Client.Addr()) {
		return nil
	}
	own := e.ownSources(f.to.Address.BitLen())
	switch {
	case len(own) == 0 && f.to.Source.IsValid():
		return []netip.Addr{f.to.Source}
	case len(own) < 2 || f.relayed || q.Client.Port() == 0: // the relay takes turns
		return own
	}
	// What is hashed has been rewritten once.
	flow := maglev.Flow{Source: q.Client, Destination: f.to.AddrPort(), Protocol: q.Protocol}
	return []netip.Addr{own[e.sourceSlot(flow, len(own))]}
}

// sourced reports whether the flow gets a source of the balancer.
func (e *Explainer) sourced(q Question, f fate) bool {
	return f.verdict == Forward && (f.snat || f.relayed || slices.Contains(e.table.VIPs, q.Client.Addr()))
}

// --- pools ---------------------------------------------------------------------------

// A pool is a balancer.Pool with the slots of each family, by its bits.
type pool struct {
	*balancer.Pool
	slots map[int]*slots
}

// slots are dealt among the destinations of a family, which they name by their
// index in destinations.
type slots struct {
	destinations []int
	owner        []int32
	spare        []int32 // dealt among those that take new flows
	second       []int32
}

func (p *pool) relays(d int) bool {
	return p.ClientIPOf(&p.Destinations[d]) == balancer.ProxyProtocolV2
}

// avoids reports whether clients on a target's host are sent elsewhere.
func (p *pool) avoids() bool { return p.AvoidSelf && p.ClientIP == balancer.Preserve }

func (e *Explainer) slotsOf(p *pool, bits int) *slots {
	if p.slots[bits] != nil {
		return p.slots[bits]
	}
	s := &slots{}
	var entries, takers []maglev.Entry
	for i := range p.Destinations {
		d := &p.Destinations[i]
		if d.Address.BitLen() == bits {
			s.destinations = append(s.destinations, i)
			entries = append(entries, maglev.Entry{Name: d.AddrPort().String(), Weight: d.Dealt()})
			takers = append(takers, maglev.Entry{Name: d.AddrPort().String(), Weight: d.Weight})
		}
	}
	s.owner = maglev.Build(e.table.Key, e.base, maglev.Size(e.base, len(entries)), entries)
	spare := maglev.Spare(e.base)
	s.spare = maglev.Build(e.table.Key, spare, maglev.SpareSize(spare, len(takers)), takers)
	p.slots[bits] = s
	return s
}

func (e *Explainer) second(p *pool, s *slots) []int32 {
	if s.second == nil {
		s.second = maglev.Second(s.owner, func(a, b int) bool {
			return !p.Destinations[s.destinations[a]].SharesHost(&p.Destinations[s.destinations[b]])
		})
	}
	return s.second
}
