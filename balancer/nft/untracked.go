package nft

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"nlb/balancer"
)

// Names of what keeps relayed connections out of connection tracking.
const (
	chainArriving   = "untracked_arriving"
	chainUntracked  = "untracked"
	chainWelcome    = "welcome"
	chainUntargeted = "untargeted"

	setRelayed      = "relayed"      // services whose connections are all relayed
	setRelayedDests = "relayeddests" // destinations that only the relay connects to
	setRelaySources = "relaysources" // where it connects from
	mapScreened     = "screened"     // services that turn some new connections away
)

// renderUntracked writes what only Table.UntrackedRelay brings. It is there as
// long as that is set, whether anything is relayed or not: connections outlive
// the services and destinations that they began at.
//
// Both ways of a connection are kept from tracking, or neither is: half a flow
// would be one that never got an answer.
func renderUntracked(rs *Ruleset, t *balancer.Table) {
	pools := t.PoolsByName()
	only := t.RelayedOnly()
	for _, f := range families {
		services := &Set{Name: setRelayed + f.name, kind: targetsKinds[f]}
		screened := &Set{Name: mapScreened + f.name, kind: serviceKinds[f]}
		dests := &Set{Name: setRelayedDests + f.name, kind: targetsKinds[f]}
		sources := &Set{Name: setRelaySources + f.name, kind: vipKinds[f]}
		for _, svc := range only.Services {
			if familyOf(svc.Address) != f {
				continue
			}
			key := serviceKey(netip.AddrPortFrom(svc.Address, svc.Port), balancer.ProtoTCP)
			services.Elems = append(services.Elems, Elem{Key: key})
			if rules := screenRules(rs, t, svc, func(name string) bool { return takesRelayed(pools[name]) }); len(rules) > 0 {
				name := "screen." + svc.Name
				rs.addChain(&Chain{Name: name, Rules: append(rules, rule(func(b *ruleBuilder) { b.accept() }))})
				screened.Elems = append(screened.Elems, Elem{Key: key, Goto: name})
			}
		}
		for _, d := range only.Destinations {
			if familyOf(d.Addr()) == f {
				dests.Elems = append(dests.Elems, Elem{Key: serviceKey(d, balancer.ProtoTCP)})
			}
		}
		for _, a := range only.Sources {
			if familyOf(a) == f {
				sources.Elems = append(sources.Elems, Elem{Key: string(a.AsSlice())})
			}
		}
		for _, s := range []*Set{services, screened, dests, sources} {
			rs.addSet(s.sort())
		}
	}
	rs.addChain(&Chain{Name: chainUntracked, Rules: untrackedRules()})
	rs.addChain(&Chain{Name: chainWelcome, Rules: welcomeRules()})
	rs.addChain(untargetedChain())
	rs.addChain(rawChain(chainArriving, unix.NF_INET_PRE_ROUTING, untrackedArriving()))
}

func untargetedChain() *Chain {
	return &Chain{Name: chainUntargeted, Rules: []Rule{rule(func(b *ruleBuilder) { b.dropAs(counterNoTarget) })}}
}

// untrackedArriving finds what comes from clients and targets. That a packet from a
// target is for a socket of this host is asked last: it may be the answer to
// somebody whom a masquerade gave the relay's address, or whom we did when the
// target was not relayed yet.
func untrackedArriving() []Rule {
	return slices.Concat(
		untrack(func(b *ruleBuilder, f *family) { b.destServiceInSet(f, setRelayed+f.name) }),
		untrack(func(b *ruleBuilder, f *family) {
			b.sourceServiceInSet(f, setRelayedDests+f.name)
			b.destInSet(f, setRelaySources+f.name)
			b.ownSocket()
		}),
	)
}

// untrackedLeaving finds what goes to clients and targets, and what clients and
// targets on this host send.
func untrackedLeaving() []Rule {
	return slices.Concat(
		untrack(func(b *ruleBuilder, f *family) { b.sourceServiceInSet(f, setRelayed+f.name) }),
		untrack(func(b *ruleBuilder, f *family) {
			b.destServiceInSet(f, setRelayedDests+f.name)
			b.sourceInSet(f, setRelaySources+f.name, false)
		}),
		untrack(func(b *ruleBuilder, f *family) { b.destServiceInSet(f, setRelayed+f.name) }),
		untrack(func(b *ruleBuilder, f *family) {
			b.sourceServiceInSet(f, setRelayedDests+f.name)
			b.destInSet(f, setRelaySources+f.name)
		}),
	)
}

func untrack(match func(*ruleBuilder, *family)) []Rule {
	return eachFamily(func(b *ruleBuilder, f *family) {
		match(b, f)
		b.notrack()
		b.accept()
	})
}

// relayedBefore keeps connections where they are when their service is relayed no
// more, or not only. Their packets are tracked from then on, and look like those of
// a new flow without its beginning; but there is a socket of theirs. A socket that
// is bound to all addresses is not what is meant: it would show that the host
// listens.
func relayedBefore() []Rule {
	return eachFamily(func(b *ruleBuilder, f *family) {
		b.l4proto(unix.IPPROTO_TCP)
		b.tcpSYN(unix.NFT_CMP_NEQ, "!=")
		b.destInSet(f, vipsName(f))
		b.ownSocket()
		b.ctMarkSet(MarkMask, markOf(relayed, 0))
		b.dnatToItself(f)
	})
}

// guardUntracked lets in what the relay takes of untracked packets, and errors about
// its connections, which conntrack knows nothing of and calls invalid. TCP believes
// them if they name a sequence number that is under way (RFC 5927).
func guardUntracked() []Rule {
	return []Rule{
		rule(func(b *ruleBuilder) { b.ctState(ctUntracked, "untracked"); b.jump(chainUntracked) }),
		unknownError(unix.IPPROTO_ICMP, "icmp", 3, 3),
		unknownError(unix.IPPROTO_ICMP, "icmp", 11, 12),
		unknownError(unix.IPPROTO_ICMPV6, "icmpv6", 1, 4),
	}
}

// untrackedRules welcome clients' segments, and accept the answers to clients on
// this host. The rest goes on in the guard.
func untrackedRules() []Rule {
	return slices.Concat(
		eachFamily(func(b *ruleBuilder, f *family) { b.destServiceInSet(f, setRelayed+f.name); b.goTo(chainWelcome) }),
		eachFamily(func(b *ruleBuilder, f *family) { b.sourceServiceInSet(f, setRelayed+f.name); b.accept() }),
	)
}

// welcomeRules accept clients' segments, except new connections that are turned away.
func welcomeRules() []Rule {
	rules := []Rule{rule(func(b *ruleBuilder) {
		b.l4proto(unix.IPPROTO_TCP)
		b.tcpSYN(unix.NFT_CMP_NEQ, "!=")
		b.accept()
	})}
	rules = append(rules, eachFamily(func(b *ruleBuilder, f *family) {
		b.destService(f)
		b.vmap(mapScreened+f.name, 0)
	})...)
	return append(rules, rule(func(b *ruleBuilder) { b.accept() }))
}

func unknownError(proto uint8, keyword string, first, last uint8) Rule {
	return rule(func(b *ruleBuilder) {
		b.l4proto(proto)
		b.icmpTypes(keyword, first, last)
		b.ctState(ctInvalid, "invalid")
		b.returns()
	})
}

// screenRules turn a service's new connections away as its listener's chain would:
// those it does not allow, and those whose group takes nobody. A service that
// takes all has none.
func screenRules(rs *Ruleset, t *balancer.Table, svc *balancer.VirtualService, takes func(pool string) bool) (rules []Rule) {
	f := familyOf(svc.Address)
	if !allowsAll(svc.Allow) {
		rules = append(rules, allowRule(svc, f))
	}
	empty := &Set{Name: "untargeted." + svc.Name, kind: shareKind}
	var total uint32
	taken := false
	for _, w := range svc.Pools {
		if w.Weight == 0 {
			continue
		}
		if takes(w.Pool) {
			taken = true
		} else {
			empty.Elems = append(empty.Elems, Elem{Key: bigKey(total), Goto: chainUntargeted}, Elem{Key: bigKey(total + uint32(w.Weight)), End: true})
		}
		total += uint32(w.Weight)
	}
	switch {
	case len(empty.Elems) == 0:
		return rules
	case !taken:
		return append(rules, rule(func(b *ruleBuilder) { b.goTo(chainUntargeted) }))
	}
	empty.Elems = adjoin(empty.Elems)
	rs.addSet(empty)
	return append(rules, shareRule(t, svc, f, empty.Name, total))
}

// adjoin makes one range of those that touch and have the same verdict.
func adjoin(elems []Elem) (out []Elem) {
	for _, e := range elems {
		if n := len(out); n > 0 && out[n-1].End && out[n-1].Key == e.Key {
			out = out[:n-1]
			continue
		}
		out = append(out, e)
	}
	return withZeroEnd(out)
}
