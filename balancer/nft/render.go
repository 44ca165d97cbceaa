package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/balancer/maglev"
)

// Names that rules and elements refer to.
const (
	chainDispatch = "dispatch"
	chainForward  = "forward"
	chainUnwanted = "unwanted"
	chainGuard    = "guard"
	chainSource   = "source"
	chainLeaving  = "leaving"

	setEnded = "ended" // targets whose flows are being ended

	chainOutcomes = "outcomes"
	chainFailure  = "failure"
	setFailed     = "failed"   // targets, with flows that they refused or left unanswered
	setAnswered   = "answered" // targets, with flows that they took
	setJudged     = "judged"   // flows that have failed

	counterUnwanted   = "unwanted_drops"    // to a VIP, but no listener's
	counterNotAllowed = "not_allowed_drops" // refused by a listener's allow list
	counterNoTarget   = "no_target_drops"   // the group has nobody to send to
	counterHairpin    = "hairpin_drops"     // a client that is its own target, preserved
	counterInvalid    = "invalid_drops"     // from a target, but of no flow we know
	counterNoSource   = "no_source_drops"   // SNAT with no address to use
	counterHairpinned = "hairpins"          // flows sourced from here because of their client
	counterReset      = "resets"            // segments of flows being ended, answered with a reset

	// counterSourceLimit is there as long as a service has a limit.
	counterSourceLimit = "source_limit_drops" // from a client that has as many flows as it may
)

var counterNames = []string{
	counterUnwanted, counterNotAllowed, counterNoTarget, counterHairpin, counterInvalid, counterNoSource, counterHairpinned, counterReset,
}

// Priorities. NAT goes just before the usual dstnat and srcnat, so that a VIP is
// a VIP before a general port forward sees it, and a hairpin has its source
// before a general masquerade gives it another. The filters go before "filter"
// for the same reason.
const (
	priorityDNAT   = -105
	prioritySNAT   = 95
	priorityFilter = -5
	// priorityRaw is before connection tracking, at -200.
	priorityRaw = -300
)

// A renderer turns Tables into Rulesets. It is a function with a memory: pools
// that did not change since the last call are not computed again, so that one
// target of ten thousand costs what one target costs.
type renderer struct {
	pools map[string]*renderedPool
	// beside has the memory of the variant for IPVS. Only one of both is used.
	beside companion
}

// render is the whole translation from virtual services to nft. Each target of
// the table has a number in n.
func (r *renderer) render(t *balancer.Table, n *numbers) *Ruleset {
	rs := newRuleset()
	last := poolRule
	if t.Dataplane == balancer.IPVS {
		r.pools = nil
		r.beside.render(rs, t, n)
		last = r.beside.serviceRule
	} else {
		r.beside = companion{}
		r.renderPools(rs, t, n)
	}
	for _, name := range counterNames {
		rs.addObject(&Object{Name: name, Type: objectCounter})
	}
	rs.addSet(hostsSet(t))
	for _, f := range families {
		rs.addSet(vipSet(t, f))
		rs.addSet(servicesMap(t, f))
		rs.addSet(targetsSet(t, f))
	}
	for i := range t.Services {
		renderService(rs, t, &t.Services[i], last)
	}
	ended := endedSet(t, n)
	if len(ended.Elems) > 0 {
		rs.addSet(ended)
	}
	observed := slices.ContainsFunc(t.Pools, func(p balancer.Pool) bool { return p.Observed })
	if observed {
		renderOutcomes(rs)
	}
	rs.Flowtable = flowtableOf(t)
	for _, c := range baseChains(t, len(ended.Elems) > 0, observed) {
		rs.addChain(c)
	}
	if t.UntrackedRelay {
		renderUntracked(rs, t)
	}
	renderProxies(rs, t)
	renderSource(rs, t, n)
	return rs
}

func tableKeys(t *balancer.Table) []balancer.TargetKey {
	total := 0
	for i := range t.Pools {
		total += len(t.Pools[i].Destinations)
	}
	keys := make([]balancer.TargetKey, 0, total)
	for i := range t.Pools {
		for j := range t.Pools[i].Destinations {
			keys = append(keys, balancer.TargetKey{Group: t.Pools[i].Name, AddrPort: t.Pools[i].Destinations[j].AddrPort()})
		}
	}
	return keys
}

// --- the skeleton ----------------------------------------------------------------

// baseChains are hooked in. Only while flows are being ended, or how they begin is
// counted, do the filters look for that: otherwise a packet has nothing to pay
// for it. The same goes for what lets untracked packets in.
func baseChains(t *balancer.Table, ending, observed bool) []*Chain {
	nat := func(name string, hook uint32, priority int32, rules ...Rule) *Chain {
		return &Chain{Name: name, Base: &Base{Type: "nat", Hook: hook, Priority: priority}, Rules: rules}
	}
	filter := func(name string, hook uint32, rules ...Rule) *Chain {
		var before []Rule
		fast := len(t.FastPath) > 0 && hook == unix.NF_INET_FORWARD
		if ending && fast {
			before = append(before, releasedRule())
		}
		if ending {
			before = append(before, endRules()...)
		}
		if fast {
			before = append(before, offloadRule())
		}
		if observed {
			before = append(before, toOutcomes(hook)...)
		}
		rules = append(before, rules...)
		return &Chain{Name: name, Base: &Base{Type: "filter", Hook: hook, Priority: priorityFilter}, Rules: rules}
	}
	toDispatch := rule(func(b *ruleBuilder) { b.jump(chainDispatch) })
	fromOutside, leaving := []Rule{toDispatch}, sourceWanted()
	var unproven []Rule
	if len(proxied(t)) > 0 {
		fromOutside, unproven = append(unprovenStays(), toDispatch), unprovenRules()
	}
	guard := guardRules(t.Dataplane, unproven)
	if t.Dataplane == balancer.IPVS {
		leaving = append(chosenWanted(), leaving...)
	}
	if t.UntrackedRelay {
		fromOutside, guard = append(relayedBefore(), fromOutside...), append(guardUntracked(), guard...)
	}
	chains := []*Chain{
		nat("prerouting", unix.NF_INET_PRE_ROUTING, priorityDNAT, fromOutside...),
		nat("output", unix.NF_INET_LOCAL_OUT, priorityDNAT,
			rule(func(b *ruleBuilder) { b.metaMarkIs(balancer.ProbeMark); b.returns() }), toDispatch),
		nat("postrouting", unix.NF_INET_POST_ROUTING, prioritySNAT, leaving...),
		filter("input", unix.NF_INET_LOCAL_IN, eachFamily(func(b *ruleBuilder, f *family) {
			b.destInSet(f, vipsName(f))
			b.jump(chainGuard)
		})...),
		filter(chainForward, unix.NF_INET_FORWARD, forwardRules(unproven)...),
		rawChain(chainLeaving, unix.NF_INET_LOCAL_OUT, leavingRules(t)),
		{Name: chainDispatch, Rules: dispatchRules()},
		{Name: chainUnwanted, Rules: unwantedRules()},
		{Name: chainGuard, Rules: guard},
	}
	if ending || observed {
		chains = append(chains, filter("outgoing", unix.NF_INET_LOCAL_OUT))
	}
	return chains
}

// rawChain is one before connection tracking.
func rawChain(name string, hook uint32, rules []Rule) *Chain {
	return &Chain{Name: name, Base: &Base{Type: "filter", Hook: hook, Priority: priorityRaw}, Rules: rules}
}

// leavingRules are of all that this host sends. The relay's packets, of which there
// are the most, end at the first.
func leavingRules(t *balancer.Table) (rules []Rule) {
	if t.UntrackedRelay {
		rules = untrackedLeaving()
	}
	return append(rules, promptRule(), redirectRule())
}

func eachFamily(fill func(*ruleBuilder, *family)) (rules []Rule) {
	for _, f := range families {
		rules = append(rules, rule(func(b *ruleBuilder) { fill(b, f) }))
	}
	return rules
}

// dispatchRules find the listener in one lookup, however many there are. What is
// for a VIP and no listener's is unwanted.
func dispatchRules() []Rule {
	toListener := eachFamily(func(b *ruleBuilder, f *family) {
		b.destService(f)
		b.vmap("services"+f.name, 0)
	})
	return append(toListener, eachFamily(func(b *ruleBuilder, f *family) {
		b.destInSet(f, vipsName(f))
		b.goTo(chainUnwanted)
	})...)
}

// unwantedRules drop a new flow silently, as NLB does. ICMP is left to the
// guard, which knows its types.
func unwantedRules() []Rule {
	return []Rule{
		rule(func(b *ruleBuilder) { b.l4proto(unix.IPPROTO_ICMP); b.returns() }),
		rule(func(b *ruleBuilder) { b.l4proto(unix.IPPROTO_ICMPV6); b.returns() }),
		rule(func(b *ruleBuilder) { b.dropAs(counterUnwanted) }),
	}
}

// guardRules decide what of a VIP's traffic the host itself may see: replies to
// flows that began here, what the relay or IPVS takes, our own prompts to the ends of such flows, errors about
// flows it knows, echo requests and neighbour discovery (ICMPv6 types 133 to 137,
// RFC 4861). Nothing else, even if a socket listens. What belongs to no flow meets the
// unproven rules before.
func guardRules(d balancer.Dataplane, unproven []Rule) []Rule {
	rules := append([]Rule{rule(func(b *ruleBuilder) { b.ctReply(); b.returns() })}, guardFlows(d)...)
	rules = append(rules, unproven...)
	return append(rules,
		rule(func(b *ruleBuilder) { b.metaMarkIs(balancer.PromptMark); b.returns() }),
		rule(func(b *ruleBuilder) { b.ctState(ctRelated, "related"); b.returns() }),
		rule(func(b *ruleBuilder) { b.l4proto(unix.IPPROTO_ICMP); b.icmpTypes("icmp", 8, 8); b.returns() }),
		rule(func(b *ruleBuilder) { b.l4proto(unix.IPPROTO_ICMPV6); b.icmpTypes("icmpv6", 128, 128); b.returns() }),
		rule(func(b *ruleBuilder) { b.l4proto(unix.IPPROTO_ICMPV6); b.icmpTypes("icmpv6", 133, 137); b.returns() }),
		rule(func(b *ruleBuilder) { b.dropAs(counterUnwanted) }),
	)
}

// forwardRules keep packets that belong to no flow from passing un-NATed: to a
// VIP, from a target without a connection (a late retransmit after the flow is
// forgotten), and a target's answer that would be taken for a new flow. That one
// would also take the place of the real flow, and the client's next question
// would be answered by a stranger. So a target cannot begin a UDP flow past us
// from the very port that it serves. All packets of our flows end at the first
// rule: they have a choice. A target may call a VIP, so that comes before the rules
// about targets; other people's flows end at the second. What is left to a VIP that is
// not bound here meets the unproven rules.
func forwardRules(unproven []Rule) []Rule {
	rules := []Rule{
		rule(func(b *ruleBuilder) { b.ctMarkAny(TargetMask); b.accept() }),
		rule(func(b *ruleBuilder) { b.ctState(ctEstablished|ctRelated, "established,related"); b.accept() }),
	}
	rules = append(rules, unproven...)
	rules = append(rules, eachFamily(func(b *ruleBuilder, f *family) {
		b.destInSet(f, vipsName(f))
		b.dropAs(counterUnwanted)
	})...)
	rules = append(rules, eachFamily(func(b *ruleBuilder, f *family) {
		b.ctState(ctNew, "new")
		b.l4proto(unix.IPPROTO_UDP)
		b.sourceServiceInSet(f, "targets"+f.name)
		b.dropAs(counterInvalid)
	})...)
	rules = append(rules, eachFamily(func(b *ruleBuilder, f *family) {
		b.ctState(ctInvalid, "invalid")
		b.sourceServiceInSet(f, "targets"+f.name)
		b.dropAs(counterInvalid)
	})...)
	return append(rules, eachFamily(func(b *ruleBuilder, f *family) {
		b.ctState(ctNew, "new")
		b.l4proto(unix.IPPROTO_TCP)
		b.tcpSYN(unix.NFT_CMP_NEQ, "!=")
		b.sourceServiceInSet(f, "targets"+f.name)
		b.dropAs(counterInvalid)
	})...)
}

// endRules answer whatever a flow's end sends with a reset. The kernel numbers it
// from the segment itself, which is what RFC 5961, section 3, wants of a reset to
// be believed, and sends it as a reply of the flow, so that NAT gives it the
// addresses that the sender knows. Resets pass: ours meets this rule again on its
// way out, and one end's own tells the other.
//
// A client that was told may begin anew from the same port before its old flow is
// forgotten. Its SYN is dropped, so that it asks again, when it can choose anew.
func endRules() []Rule {
	return []Rule{
		rule(func(b *ruleBuilder) {
			b.l4proto(unix.IPPROTO_TCP)
			b.ctMarkInSet(TargetMask, setEnded)
			b.tcpSYN(unix.NFT_CMP_EQ, "==")
			b.drop()
		}),
		rule(func(b *ruleBuilder) {
			b.l4proto(unix.IPPROTO_TCP)
			b.ctMarkInSet(TargetMask, setEnded)
			b.tcpNotRST()
			b.counter(counterReset)
			b.reset()
		}),
	}
}

// renderOutcomes writes what counts how the TCP flows of all targets begin.
func renderOutcomes(rs *Ruleset) {
	for _, name := range []string{setFailed, setAnswered} {
		rs.addSet(&Set{Name: name, kind: countKind, Size: dynamicSize})
	}
	rs.addSet(&Set{Name: setJudged, kind: flowKind, Size: dynamicSize})
	rs.addChain(&Chain{Name: chainOutcomes, Rules: outcomeRules()})
	rs.addChain(&Chain{Name: chainFailure, Rules: []Rule{failureRule()}})
}

// toOutcomes brings a filter's packets to the outcomes until their flow is
// assured, which it is with the handshake's third segment. A forwarded packet of
// an assured flow has but this one rule to pay: it is established, and accepted
// as such anyway.
//
// What this host sends to itself passes the output and the input hook: it counts
// in the first. The way out would not tell, because it is the one to the VIP,
// found before the choice was made.
func toOutcomes(hook uint32) []Rule {
	var rules []Rule
	if hook == unix.NF_INET_FORWARD {
		rules = append(rules, rule(func(b *ruleBuilder) { b.ctStatus(ctAssured, "assured", unix.NFT_CMP_NEQ); b.accept() }))
	}
	return append(rules, rule(func(b *ruleBuilder) {
		if hook != unix.NF_INET_FORWARD {
			b.ctStatus(ctAssured, "assured", unix.NFT_CMP_EQ)
		}
		b.ctMarkAny(TargetMask)
		b.ctTCP()
		if hook == unix.NF_INET_LOCAL_IN {
			b.notLooped()
		}
		b.jump(chainOutcomes)
	}))
}

// outcomeRules say what is an answer and what a failure. Only a flow's first
// packet finds it unconfirmed, since it is confirmed at the end of that packet's
// way: a SYN of a confirmed flow asks again. (Packets do not tell, as conntrack
// leaves repeated SYNs out of its accounts since 5.11.) If there was an answer, it
// got lost on the other side.
//
// A flow that conntrack picked up in its middle is reset by a target that does
// not know it: that says nothing about the target, and differs from a refusal by
// its flags. Whoever sends an ICMP error has to know the flow as the target sees
// it, so a client cannot forge one. It can repeat a SYN before the answer can be
// there, and make a failure of that; the answer follows.
func outcomeRules() []Rule {
	unreachable := func(proto uint8, keyword string, typ uint8) Rule {
		return rule(func(b *ruleBuilder) {
			b.l4proto(proto)
			b.icmpTypes(keyword, typ, typ)
			b.ctState(ctRelated, "related")
			b.ctReply()
			b.ctStatus(ctSeenReply, "seen-reply", unix.NFT_CMP_EQ)
			b.goTo(chainFailure)
		})
	}
	return []Rule{
		rule(func(b *ruleBuilder) {
			b.l4proto(unix.IPPROTO_TCP)
			b.tcpSYNACK()
			b.ctReply()
			b.countTarget(setAnswered)
		}),
		// A refusal ends the flow, which need not be remembered.
		rule(func(b *ruleBuilder) {
			b.l4proto(unix.IPPROTO_TCP)
			b.tcpRefusal()
			b.ctReply()
			b.flowNotIn(setJudged)
			b.countTarget(setFailed)
		}),
		rule(func(b *ruleBuilder) {
			b.l4proto(unix.IPPROTO_TCP)
			b.tcpSYN(unix.NFT_CMP_EQ, "==")
			b.ctOriginal()
			b.ctStatus(ctConfirmed, "confirmed", unix.NFT_CMP_NEQ)
			b.ctStatus(ctSeenReply, "seen-reply", unix.NFT_CMP_EQ)
			b.goTo(chainFailure)
		}),
		unreachable(unix.IPPROTO_ICMP, "icmp", 3),
		unreachable(unix.IPPROTO_ICMPV6, "icmpv6", 1),
	}
}

// failureRule counts a flow once, however often its client asks. It is remembered
// as long as conntrack has an unanswered flow. If there are too many to remember,
// the rest does not count: a target fails by the first few.
func failureRule() Rule {
	return rule(func(b *ruleBuilder) {
		b.flowNotIn(setJudged)
		b.addFlow(setJudged)
		b.countTarget(setFailed)
	})
}

// promptRule keeps what makes the ends of a flow speak out of connection
// tracking: it would be taken for a new flow, or for a packet of an old one.
func promptRule() Rule {
	return rule(func(b *ruleBuilder) { b.metaMarkIs(balancer.PromptMark); b.notrack() })
}

// redirectRule keeps this host from telling a target on its own segment that a
// client there can be reached directly: its answers would go past us, un-NATed.
// For IPv4 a sysctl does that, for IPv6 there is none.
func redirectRule() Rule {
	return rule(func(b *ruleBuilder) {
		b.l4proto(unix.IPPROTO_ICMPV6)
		b.icmpTypes("icmpv6", 137, 137)
		b.destInSet(ip6, hosts6)
		b.drop()
	})
}

// --- sets that list the table ----------------------------------------------------

func vipsName(f *family) string { return "vips" + f.name }

func vipSet(t *balancer.Table, f *family) *Set {
	s := &Set{Name: vipsName(f), kind: vipKinds[f]}
	for _, a := range t.VIPs {
		if familyOf(a) == f {
			s.Elems = append(s.Elems, Elem{Key: string(a.AsSlice())})
		}
	}
	return s.sort()
}

const hosts6 = "hosts6"

// hostsSet lists the targets' IPv6 addresses.
func hostsSet(t *balancer.Table) *Set {
	s := &Set{Name: hosts6, kind: vipKinds[ip6]}
	for i := range t.Pools {
		for _, d := range t.Pools[i].Destinations {
			if familyOf(d.Address) == ip6 {
				s.Elems = append(s.Elems, Elem{Key: string(d.Address.AsSlice())})
			}
		}
	}
	s.sort()
	s.Elems = slices.Compact(s.Elems)
	return s
}

// endedSet lists the targets whose TCP flows are being ended.
func endedSet(t *balancer.Table, n *numbers) *Set {
	s := &Set{Name: setEnded, kind: numberKind}
	for i := range t.Pools {
		for _, d := range t.Pools[i].Destinations {
			if d.Terminate {
				num := n.byKey[balancer.TargetKey{Group: t.Pools[i].Name, AddrPort: d.AddrPort()}]
				s.Elems = append(s.Elems, Elem{Key: string(native32(markOf(num, 0)))})
			}
		}
	}
	return s.sort()
}

func serviceKey(a netip.AddrPort, proto uint8) string {
	b := append(a.Addr().AsSlice(), proto, 0, 0, 0)
	return string(append(binary.BigEndian.AppendUint16(b, a.Port()), 0, 0))
}

func servicesMap(t *balancer.Table, f *family) *Set {
	s := &Set{Name: "services" + f.name, kind: serviceKinds[f]}
	for _, svc := range t.Services {
		if familyOf(svc.Address) != f {
			continue
		}
		for _, p := range svc.Protocols {
			s.Elems = append(s.Elems, Elem{Key: serviceKey(netip.AddrPortFrom(svc.Address, svc.Port), p), Goto: entryChain(t, &svc, p)})
		}
	}
	return s.sort()
}

// targetsSet lists where the targets answer from, for the forward chain.
func targetsSet(t *balancer.Table, f *family) *Set {
	s := &Set{Name: "targets" + f.name, kind: targetsKinds[f]}
	for i := range t.Pools {
		for j := range t.Pools[i].Destinations {
			d := &t.Pools[i].Destinations[j]
			if familyOf(d.Address) != f {
				continue
			}
			for _, p := range t.Pools[i].Protocols {
				s.Elems = append(s.Elems, Elem{Key: serviceKey(d.AddrPort(), p)})
			}
		}
	}
	s.sort()
	s.Elems = slices.Compact(s.Elems)
	return s
}

// --- listeners ---------------------------------------------------------------------

func serviceChain(name string) string { return "listener." + name }

// idleChain gives flows an idle timeout on their way to a group.
func idleChain(timeout *Object, group string) string { return timeout.Name + "." + group }

func poolChain(pool string, f *family) string { return "group" + f.name + "." + pool }

// A lastRule is what a listener's chain ends with: where a flow goes.
type lastRule = func(*Ruleset, *balancer.Table, *balancer.VirtualService, *family) Rule

// entryChain is where a listener's flows of a protocol begin. A thousand listeners of
// one group share a chain, or have none: what is not theirs alone is not in
// anybody's cache once for each of them.
func entryChain(t *balancer.Table, svc *balancer.VirtualService, proto uint8) string {
	group, plain := plainGroup(t, svc)
	switch {
	case !plain:
		return serviceChain(svc.Name)
	case proto == balancer.ProtoTCP:
		return idleChain(idleTimeout(svc), group)
	}
	return group
}

// plainGroup is the chain of the group to which all of a listener's flows go. It
// is not plain if there are several, or something to ask before.
func plainGroup(t *balancer.Table, svc *balancer.VirtualService) (group string, plain bool) {
	if t.Dataplane == balancer.IPVS || !allowsAll(svc.Allow) || svc.SourceLimit.On() {
		return "", false
	}
	for _, p := range svc.Pools {
		if p.Weight == 0 {
			continue
		}
		if plain {
			return "", false
		}
		group, plain = poolChain(p.Pool, familyOf(svc.Address)), true
	}
	return group, plain
}

// idleTimeout is that of a listener's TCP flows.
func idleTimeout(svc *balancer.VirtualService) *Object {
	seconds := uint32(svc.IdleTimeout.Seconds())
	return &Object{Name: fmt.Sprintf("idle_%ds", seconds), Type: objectCTTimeout, Established: seconds}
}

func renderService(rs *Ruleset, t *balancer.Table, svc *balancer.VirtualService, last lastRule) {
	f := familyOf(svc.Address)
	tcp := slices.Contains(svc.Protocols, balancer.ProtoTCP)
	timeout := idleTimeout(svc)
	if tcp {
		rs.addObject(timeout)
	}
	if group, plain := plainGroup(t, svc); plain {
		if tcp {
			rs.addChain(&Chain{Name: idleChain(timeout, group), Rules: []Rule{
				rule(func(b *ruleBuilder) { b.ctTimeout(timeout.Name); b.goTo(group) }),
			}})
		}
		return
	}
	c := &Chain{Name: serviceChain(svc.Name)}
	rs.addChain(c)
	if !allowsAll(svc.Allow) {
		s := &Set{Name: allowName(svc), kind: prefixKinds[f], Elems: prefixElems(svc.Allow)}
		rs.addSet(s)
		c.Rules = append(c.Rules, allowRule(svc, f))
	}
	c.Rules = append(c.Rules, renderLimit(rs, svc, f)...)
	if tcp {
		c.Rules = append(c.Rules, rule(func(b *ruleBuilder) {
			if len(svc.Protocols) > 1 {
				b.l4proto(balancer.ProtoTCP)
			}
			b.ctTimeout(timeout.Name)
		}))
	}
	c.Rules = append(c.Rules, last(rs, t, svc, f))
}

func allowName(svc *balancer.VirtualService) string { return "allow." + svc.Name }

// allowRule drops the clients that a listener does not allow.
func allowRule(svc *balancer.VirtualService, f *family) Rule {
	return rule(func(b *ruleBuilder) {
		b.sourceInSet(f, allowName(svc), true)
		b.dropAs(counterNotAllowed)
	})
}

// poolRule goes to the listener's group, chosen by weight if there are several.
func poolRule(rs *Ruleset, t *balancer.Table, svc *balancer.VirtualService, f *family) Rule {
	share := &Set{Name: "share." + svc.Name, kind: shareKind}
	var total uint32
	for _, p := range svc.Pools {
		if p.Weight == 0 {
			continue
		}
		if total > 0 {
			share.Elems = append(share.Elems, Elem{Key: bigKey(total), End: true})
		}
		share.Elems = append(share.Elems, Elem{Key: bigKey(total), Goto: poolChain(p.Pool, f)})
		total += uint32(p.Weight)
	}
	switch len(share.Elems) {
	case 0:
		return rule(func(b *ruleBuilder) { b.dropAs(counterNoTarget) })
	case 1:
		return rule(func(b *ruleBuilder) { b.goTo(share.Elems[0].Goto) })
	}
	share.Elems = append(share.Elems, Elem{Key: bigKey(total), End: true})
	rs.addSet(share.sort())
	return shareRule(t, svc, f, share.Name, total)
}

// shareRule has the verdict of the flow's share among so many.
func shareRule(t *balancer.Table, svc *balancer.VirtualService, f *family, shares string, total uint32) Rule {
	return rule(func(b *ruleBuilder) {
		b.family(f)
		b.jhash(f, svc.Sticky, total, maglev.Seed(t.Key, maglev.SeedGroup))
		b.toNetworkOrder()
		b.vmap(shares, 0)
	})
}

func bigKey(v uint32) string { return string(binary.BigEndian.AppendUint32(nil, v)) }

func allowsAll(allow []netip.Prefix) bool {
	return slices.ContainsFunc(allow, func(p netip.Prefix) bool { return p.Bits() == 0 })
}

// --- groups and targets --------------------------------------------------------------

// A renderedPool is a pool and what became of it. It is not modified.
type renderedPool struct {
	pool    balancer.Pool
	numbers []uint16
	key     balancer.HashKey
	base    int
	chains  []*Chain
	sets    []*Set
	objects []*Object
	dealt   map[*family]*dealing
	spare   map[*family]*dealing
	targets map[targetFacts]*renderedTarget
	// chosen says that IPVS chooses and rewrites.
	chosen bool
}

// A renderedTarget is what became of a target. It is not modified.
type renderedTarget struct {
	domain  []netip.Prefix
	chains  []*Chain
	sets    []*Set
	objects []*Object
}

// targetFacts are what becomes of a target of a pool, besides its domain. Its health
// is not among that: a verdict has no rule written anew.
type targetFacts struct {
	at        netip.AddrPort
	number    uint16
	mode      balancer.ClientIP
	avoidSelf bool
	second    string // the chain of the second choice; empty for none
	elsewhere bool   // there is a second choice for the target's own clients
	chosen    bool
}

// A dealing is a family's slots and what they follow from. It is not modified.
type dealing struct {
	entries  []maglev.Entry
	numbers  []uint16
	slots    []int32
	contests *maglev.Contests // the next dealing begins with them
	set      *Set
}

func (r *renderer) renderPools(rs *Ruleset, t *balancer.Table, n *numbers) {
	base := maglev.BaseFor(len(t.Pools))
	rendered := make([]*renderedPool, len(t.Pools))
	var changed []int
	for i := range t.Pools {
		p := &t.Pools[i]
		if before := r.pools[p.Name]; before.is(p, n.of(p), t.Key, base) {
			rendered[i] = before
		} else {
			changed = append(changed, i)
		}
	}
	inParallel(len(changed), func(i int) {
		p := &t.Pools[changed[i]]
		rendered[changed[i]] = r.pools[p.Name].rendered(p, n.of(p), t.Key, base)
	})
	r.pools = make(map[string]*renderedPool, len(t.Pools))
	for _, p := range rendered {
		r.pools[p.pool.Name] = p
		p.addTo(rs)
	}
}

// inParallel calls f with 0 to n-1, on all CPUs. It does one by itself: on a busy
// host another thread may be long in coming.
func inParallel(n int, f func(int)) {
	if n == 1 {
		f(0)
		return
	}
	var next atomic.Int64
	var workers sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), n) {
		workers.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				f(int(i))
			}
		})
	}
	workers.Wait()
}

func (r *renderedPool) addTo(rs *Ruleset) {
	for _, c := range r.chains {
		rs.addChain(c)
	}
	for _, s := range r.sets {
		rs.addSet(s)
	}
	for _, o := range r.objects {
		rs.addObject(o)
	}
}

// is reports whether r, which may be nil, is what becomes of such a pool.
func (r *renderedPool) is(p *balancer.Pool, nums []uint16, key balancer.HashKey, base int) bool {
	return r != nil && r.key == key && r.base == base && slices.Equal(r.numbers, nums) && r.pool.Same(p)
}

// rendered is what becomes of a pool, with what is left of r, which may be nil.
func (r *renderedPool) rendered(p *balancer.Pool, nums []uint16, key balancer.HashKey, base int) *renderedPool {
	out := &renderedPool{
		pool: *p, numbers: nums, key: key, base: base,
		dealt: make(map[*family]*dealing), spare: make(map[*family]*dealing), targets: make(map[targetFacts]*renderedTarget),
	}
	if r != nil && (r.key != key || r.base != base) {
		r = nil
	}
	for _, f := range families {
		out.renderFamily(f, r)
	}
	return out
}

// renderFamily writes the group's chain, its slots and its targets, for one
// family. A family without destinations has a chain that drops, since a
// listener may name the group all the same.
func (r *renderedPool) renderFamily(f *family, before *renderedPool) {
	p := &r.pool
	mine := p.Usable(f.bits)
	group := &Chain{Name: poolChain(p.Name, f)}
	r.chains = append(r.chains, group)
	drop := rule(func(b *ruleBuilder) { b.dropAs(counterNoTarget) })
	defer func() { group.Rules = append(group.Rules, drop) }()
	if p.OnlyRelays(mine) {
		if takesRelayed(p) {
			group.Rules = append(group.Rules, toRelay(f))
		}
		return
	}

	dealt := r.deal(f, mine, "slots", r.base, maglev.Size(r.base, len(mine)), (*balancer.Destination).Dealt, before.dealing(f))
	r.dealt[f] = dealt
	targets := r.addVerdicts(f, mine, "targets", targetChainName)
	usable := ""
	if !p.AvoidSelf {
		usable = r.addUsable(f, mine)
	}
	seed := maglev.Seed(r.key, maglev.SeedTarget)
	group.Rules = append(group.Rules, r.choose(f, dealt.set, seed, usable, targets))
	if !p.AvoidSelf && len(mine) > 1 {
		takes := func(d *balancer.Destination) int { return d.Weight }
		base := maglev.Spare(r.base)
		r.spare[f] = r.deal(f, mine, "spare", base, maglev.SpareSize(base, len(mine)), takes, before.sparing(f))
		group.Rules = append(group.Rules, r.choose(f, r.spare[f].set, maglev.Seed(r.key, maglev.SeedSpare), "", targets))
	}

	// elsewhere has the targets whose own clients can be sent to another.
	elsewhere := map[int]bool{}
	second := ""
	if p.ClientIP == balancer.Preserve && p.AvoidSelf {
		second = "second" + f.name + "." + p.Name
		others := maglev.Second(dealt.slots, func(a, b int) bool {
			return !p.Destinations[mine[a]].SharesHost(&p.Destinations[mine[b]])
		})
		for i, other := range others {
			elsewhere[mine[dealt.slots[i]]] = other >= 0
		}
		slots := r.slots(f, mine, "second", others, int(dealt.set.Size))
		r.sets = append(r.sets, slots)
		r.chains = append(r.chains, &Chain{Name: second, Rules: []Rule{
			r.choose(f, slots, seed, "", r.addVerdicts(f, mine, "others", sendChainName)), drop,
		}})
	}
	for _, d := range mine {
		r.addTarget(f, before, d, second, elsewhere[d])
	}
}

// takesRelayed reports whether the relay has a target for new flows. Where those
// of one family are all out, it takes the other's.
func takesRelayed(p *balancer.Pool) bool {
	return slices.ContainsFunc(p.Destinations, func(d balancer.Destination) bool { return relaysTo(p, &d) })
}

// relaysTo reports whether the relay may choose the destination for a new flow.
func relaysTo(p *balancer.Pool, d *balancer.Destination) bool {
	return d.Weight > 0 && p.ClientIPOf(d) == balancer.ProxyProtocolV2
}

// toRelay leaves the flow to the relay, whose socket is at the VIP, and which
// draws by the same hash from the same targets.
func toRelay(f *family) Rule { return leaveTo(relayed, f) }

// leaveTo leaves the flow to who has the number, as it is, and to nobody else's
// rules.
func leaveTo(number uint16, f *family) Rule {
	return rule(func(b *ruleBuilder) {
		b.family(f)
		b.ctMarkSet(MarkMask, markOf(number, 0))
		b.dnatToItself(f)
	})
}

// dealing is the one of a family in r, which may be nil.
func (r *renderedPool) dealing(f *family) *dealing {
	if r == nil {
		return nil
	}
	return r.dealt[f]
}

func (r *renderedPool) sparing(f *family) *dealing {
	if r == nil {
		return nil
	}
	return r.spare[f]
}

// deal adds a map from slot to target number, as before it where nothing that it
// follows from has changed. Health is not among that for the one that is dealt by
// Destination.Dealt.
func (r *renderedPool) deal(f *family, mine []int, word string, base, size int, weight func(*balancer.Destination) int, before *dealing) *dealing {
	out := &dealing{entries: make([]maglev.Entry, len(mine)), numbers: make([]uint16, len(mine))}
	for i, d := range mine {
		dest := &r.pool.Destinations[d]
		out.entries[i] = maglev.Entry{Name: dest.AddrPort().String(), Weight: weight(dest)}
		out.numbers[i] = r.numbers[d]
	}
	var contests *maglev.Contests
	if before != nil {
		contests = before.contests
	}
	if before != nil && slices.Equal(before.entries, out.entries) && slices.Equal(before.numbers, out.numbers) {
		out = before
	} else {
		out.slots, out.contests = maglev.Rebuild(r.key, base, size, out.entries, contests)
		out.set = r.slots(f, mine, word, out.slots, size)
	}
	r.sets = append(r.sets, out.set)
	return out
}

// choose leads from a hash to a target's chain by two maps, from slot to number
// and from number to chain. Two, because the kernel follows each verdict of a map
// when it checks a transaction for loops: a thousand slots a group would make
// every change wait for that. From one map to the next the number goes through
// the mark, since nft 1.0.6 dies of an assertion when it lists a rule that looks
// up what it has looked up.
//
// A number that is not in the set usable, if that is named, leads to the next rule.
func (r *renderedPool) choose(f *family, slots *Set, seed uint32, usable, verdicts string) Rule {
	return rule(func(b *ruleBuilder) {
		b.say("ct mark set")
		b.family(f)
		b.jhash(f, r.pool.Sticky, slots.Size, seed)
		b.lookup(slots.Name, 0, reg(0).number())
		b.ctMarkMerge()
		b.say("map @%s << %d", slots.Name, markShift)
		b.loadCT(unix.NFT_CT_MARK, 0)
		b.bitwise(0, native32(TargetMask), native32(0))
		b.say("ct mark & 0x%08x", TargetMask)
		if usable != "" {
			b.inSet(usable, 0, false)
			b.say("@%s", usable)
			// nft prints each match by itself, and so names again what it is about.
			b.say("ct mark & 0x%08x", TargetMask)
		}
		b.vmap(verdicts, 0)
	})
}

// addVerdicts adds the map that leads to the targets' chains: all of them, whatever
// their health. For a verdict that comes the kernel checks the whole table for loops,
// which takes the longer the more targets there are, so that health must not move any.
func (r *renderedPool) addVerdicts(f *family, mine []int, word string, chain func(uint16, string) string) string {
	s := r.roomFor(f, mine, word, targetKind)
	for _, d := range mine {
		s.Elems = append(s.Elems, Elem{Key: string(native32(markOf(r.numbers[d], 0))), Goto: chain(r.numbers[d], r.pool.Name)})
	}
	r.sets = append(r.sets, s.sort())
	return s.Name
}

// addUsable adds the set of the targets that a slot may lead to. One that only keeps
// its hashes is not in it, so that the next rule draws again, from the spare slots,
// which are dealt among those that take new flows anyway.
func (r *renderedPool) addUsable(f *family, mine []int) string {
	s := r.roomFor(f, mine, "usable", numberKind)
	for _, d := range mine {
		if r.pool.Destinations[d].Kept == 0 {
			s.Elems = append(s.Elems, Elem{Key: string(native32(markOf(r.numbers[d], 0)))})
		}
	}
	r.sets = append(r.sets, s.sort())
	return s.Name
}

// roomFor is an empty set or map of target numbers. One of a fixed size is the
// fastest there is. It doubles under another name, since it cannot change its size.
func (r *renderedPool) roomFor(f *family, mine []int, word string, k *kind) *Set {
	room := 16
	for room < len(mine) {
		room *= 2
	}
	return &Set{Name: fmt.Sprintf("%s%s.%s.%d", word, f.name, r.pool.Name, room), kind: k, Size: uint32(room)}
}

// slots is a map from slot to target number. Its name has its size in it, since a
// map cannot change its size.
func (r *renderedPool) slots(f *family, mine []int, word string, slots []int32, size int) *Set {
	s := &Set{
		Name: fmt.Sprintf("%s%s.%s.%d", word, f.name, r.pool.Name, size),
		kind: slotKind, Size: uint32(size), Slots: make([]uint32, size),
	}
	for i := range s.Slots {
		s.Slots[i] = noSlot
		if i < len(slots) && slots[i] >= 0 {
			s.Slots[i] = uint32(r.numbers[mine[slots[i]]])
		}
	}
	return s
}

// addTarget adds what becomes of a target, as before it, which may be nil, where
// nothing that it follows from has changed.
func (r *renderedPool) addTarget(f *family, before *renderedPool, i int, second string, elsewhere bool) {
	d := &r.pool.Destinations[i]
	facts := targetFacts{
		at: d.AddrPort(), number: r.numbers[i], mode: r.pool.ClientIPOf(d), avoidSelf: r.pool.AvoidSelf,
		second: second, elsewhere: elsewhere, chosen: r.chosen,
	}
	var t *renderedTarget
	if before != nil {
		t = before.targets[facts]
	}
	if t == nil || !slices.Equal(t.domain, d.Domain) {
		t = renderTarget(f, r.pool.Name, facts, d.Domain)
	}
	r.targets[facts] = t
	r.chains = append(r.chains, t.chains...)
	r.sets = append(r.sets, t.sets...)
	r.objects = append(r.objects, t.objects...)
}

// renderTarget writes the chain of a chosen target: what happens to a client on
// the target's own host, and to all others.
func renderTarget(f *family, pool string, facts targetFacts, domain []netip.Prefix) *renderedTarget {
	r := &renderedTarget{domain: domain}
	c := &Chain{
		Name:    targetChainName(facts.number, pool),
		Comment: targetChainComment(balancer.TargetKey{Group: pool, AddrPort: facts.at}),
	}
	second := facts.second
	if facts.mode == balancer.ProxyProtocolV2 {
		c.Rules = []Rule{toRelay(f)}
		r.chains = append(r.chains, c)
		if second != "" {
			r.chains = append(r.chains, &Chain{Name: sendChainName(facts.number, pool), Rules: c.Rules})
		}
		return r
	}
	flows := &Object{Name: c.Name, Type: objectCounter}
	r.chains = append(r.chains, c)
	r.objects = append(r.objects, flows)

	send := func(b *ruleBuilder, flags uint32) {
		if flags != 0 {
			b.ctMarkSet(flags, flags)
		}
		b.counter(flows.Name)
		if facts.chosen {
			b.returns()
		} else {
			b.dnat(f, facts.at)
		}
	}
	c.Rules = append(c.Rules, rule(func(b *ruleBuilder) {
		r.matchDomain(b, f, c.Name, domain)
		switch {
		case facts.mode != balancer.Preserve, facts.avoidSelf && !facts.elsewhere:
			b.counter(counterHairpinned)
			send(b, markSNAT|markHairpin)
		case facts.avoidSelf:
			b.goTo(second)
		default:
			b.dropAs(counterHairpin)
		}
	}))
	flags := uint32(0)
	if facts.mode == balancer.SNAT {
		flags = markSNAT
	}
	plain := rule(func(b *ruleBuilder) { send(b, flags) })
	if second != "" {
		// A second choice comes past the check of the first, or the chains
		// would form a loop, which the kernel refuses.
		name := sendChainName(facts.number, pool)
		r.chains = append(r.chains, &Chain{Name: name, Rules: []Rule{plain}})
		plain = rule(func(b *ruleBuilder) { b.goTo(name) })
	}
	c.Rules = append(c.Rules, plain)
	return r
}

// matchDomain matches clients on the target's host: mostly the target alone,
// else a set of its own.
func (r *renderedTarget) matchDomain(b *ruleBuilder, f *family, chain string, domain []netip.Prefix) {
	var own []netip.Prefix
	for _, p := range domain {
		if familyOf(p.Addr()) == f {
			own = append(own, p)
		}
	}
	own = balancer.Aggregate(own)
	if len(own) == 1 {
		b.family(f)
		b.sourceIs(f, own[0])
		return
	}
	s := &Set{Name: "hairpin." + chain, kind: prefixKinds[f], Elems: prefixElems(own)}
	r.sets = append(r.sets, s)
	b.sourceInSet(f, s.Name, false)
}

// --- source addresses -----------------------------------------------------------------

// sourceWanted finds the flows that get a source of ours: those whose choice said
// so, and those from this host under a VIP, which would be a stranger at a target
// that holds the VIP itself. That the flow began at a VIP is asked last, because
// most flows never get that far; those that are neither end at the first rule.
func sourceWanted() []Rule {
	rules := []Rule{rule(func(b *ruleBuilder) { b.fromElsewhere(); b.ctMarkLacks(markSNAT); b.returns() })}
	return slices.Concat(rules,
		eachFamily(func(b *ruleBuilder, f *family) {
			b.ctMarkHas(markSNAT)
			b.originalDestInSet(f, vipsName(f))
			b.goTo(chainSource + f.name)
		}),
		eachFamily(func(b *ruleBuilder, f *family) {
			b.fromThisHost()
			b.sourceInSet(f, vipsName(f), false)
			b.originalDestInSet(f, vipsName(f))
			b.goTo(chainSource + f.name)
		}))
}

// renderSource writes the chains that give a flow a source of ours.
func renderSource(rs *Ruleset, t *balancer.Table, n *numbers) {
	for _, f := range families {
		to := sourceRules(rs, t, n, f)
		rs.addChain(&Chain{Name: chainSource + f.name, Rules: append(to, rule(func(b *ruleBuilder) { b.dropAs(counterNoSource) }))})
	}
}

// sourceRules draw from the pool by a hash of the flow, or take the address that
// leads to the target.
func sourceRules(rs *Ruleset, t *balancer.Table, n *numbers, f *family) []Rule {
	var pool []netip.Addr
	for _, a := range t.Sources {
		if familyOf(a) == f {
			pool = append(pool, a)
		}
	}
	s := &Set{Name: "sources" + f.name, kind: sourceKinds[f]}
	const from = reg(4)
	switch len(pool) {
	case 1:
		return []Rule{rule(func(b *ruleBuilder) {
			b.family(f)
			b.immediate(from, pool[0].AsSlice())
			b.snatTo(f, from)
			b.say("snat %s to %s", f.ip, pool[0])
		})}
	case 0:
		s.Elems = targetSources(t, n, f)
	default:
		for i, a := range pool {
			s.Elems = append(s.Elems, Elem{Key: string(native32(uint32(i))), Data: string(a.AsSlice())})
		}
	}
	rs.addSet(s.sort())
	return []Rule{rule(func(b *ruleBuilder) {
		b.family(f)
		b.say("snat %s to", f.ip)
		if len(pool) > 0 {
			b.jhash(f, false, uint32(len(pool)), maglev.Seed(t.Key, maglev.SeedSource))
		} else {
			b.loadCT(unix.NFT_CT_MARK, 0)
			b.bitwise(0, native32(TargetMask), native32(0))
			b.say("ct mark & 0x%08x", TargetMask)
		}
		b.lookup(s.Name, 0, from.number())
		b.snatTo(f, from)
		b.say("map @%s", s.Name)
	})}
}

func targetSources(t *balancer.Table, n *numbers, f *family) (elems []Elem) {
	for i := range t.Pools {
		for j := range t.Pools[i].Destinations {
			d := &t.Pools[i].Destinations[j]
			if familyOf(d.Address) != f || !d.Source.IsValid() {
				continue
			}
			num := n.byKey[balancer.TargetKey{Group: t.Pools[i].Name, AddrPort: d.AddrPort()}]
			elems = append(elems, Elem{Key: string(native32(markOf(num, 0))), Data: string(d.Source.AsSlice())})
		}
	}
	return elems
}
