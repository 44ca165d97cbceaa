package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"nlb/balancer"
)

// Names of what answers handshakes in place of targets.
const (
	chainHandshakes = "handshakes"

	setProxied = "proxied" // services whose handshakes are answered here
	mapProxies = "proxies" // and how
)

// proxied lists the services with a SYN proxy. IPVS has none: it would take the
// handshake for itself before the proxy's hook.
func proxied(t *balancer.Table) (services []*balancer.VirtualService) {
	if t.Dataplane == balancer.IPVS {
		return nil
	}
	for i := range t.Services {
		if s := &t.Services[i]; s.SYNProxy.On() && slices.Contains(s.Protocols, balancer.ProtoTCP) {
			services = append(services, s)
		}
	}
	return services
}

// renderProxies writes what is there as long as a service has a SYN proxy.
//
// A SYN to such a service is kept from connection tracking and answered with a
// cookie. The segment that returns the cookie belongs to no flow yet: it is invalid,
// or new where conntrack picks flows up in their middle
// (net.netfilter.nf_conntrack_tcp_loose, which stays as it is: the services without a
// proxy live on it after a failover). The kernel then sends a SYN of its own making,
// from the client to the VIP, through the output hook: there the flow begins, and all
// rules are asked about it as about any other.
func renderProxies(rs *Ruleset, t *balancer.Table) {
	services := proxied(t)
	if len(services) == 0 {
		return
	}
	pools := t.PoolsByName()
	for _, f := range families {
		set := &Set{Name: setProxied + f.name, kind: targetsKinds[f]}
		how := &Set{Name: mapProxies + f.name, kind: serviceKinds[f]}
		for _, s := range services {
			if familyOf(s.Address) != f {
				continue
			}
			key := serviceKey(netip.AddrPortFrom(s.Address, s.Port), balancer.ProtoTCP)
			set.Elems = append(set.Elems, Elem{Key: key})
			chain := "proxy." + s.Name
			how.Elems = append(how.Elems, Elem{Key: key, Goto: chain})
			rs.addChain(&Chain{Name: chain, Rules: proxyRules(rs, t, s, pools)})
		}
		rs.addSet(set.sort())
		rs.addSet(how.sort())
	}
	rs.addChain(untargetedChain())
	rs.addChain(&Chain{
		Name: chainHandshakes, Base: &Base{Type: "filter", Hook: unix.NF_INET_PRE_ROUTING, Priority: priorityRaw},
		Rules: eachFamily(func(b *ruleBuilder, f *family) {
			b.l4proto(unix.IPPROTO_TCP)
			b.tcpSYN(unix.NFT_CMP_EQ, "==")
			b.destServiceInSet(f, setProxied+f.name)
			b.notrack()
		}),
	})
}

// proxyRules turn away who would be turned away without a proxy too, as long as they
// can be told: a handshake that is answered and leads nowhere looks like a target that
// hangs. What is neither a SYN nor returns a cookie is for no listener.
func proxyRules(rs *Ruleset, t *balancer.Table, s *balancer.VirtualService, pools map[string]*balancer.Pool) []Rule {
	f := familyOf(s.Address)
	rules := screenRules(rs, t, s, func(name string) bool { return takesFlows(pools[name], f) })
	if s.SourceLimit.On() {
		rules = append(rules, refusedRule(s, f))
	}
	return append(rules,
		// Only a pure one is a client's first; the kernel would answer any.
		rule(func(b *ruleBuilder) { b.tcpHasSYN(); b.tcpSYN(unix.NFT_CMP_NEQ, "!="); b.dropAs(counterUnwanted) }),
		rule(func(b *ruleBuilder) { b.synproxy(s.SYNProxy) }),
		rule(func(b *ruleBuilder) { b.dropAs(counterUnwanted) }))
}

// takesFlows reports whether a pool has a target for new flows of the family.
func takesFlows(p *balancer.Pool, f *family) bool {
	return slices.ContainsFunc(p.Usable(f.bits), func(i int) bool { return p.Destinations[i].Weight > 0 })
}

// unprovenStays keeps what conntrack takes for the middle of a flow from being
// translated: it is to return a cookie.
func unprovenStays() []Rule {
	return eachFamily(func(b *ruleBuilder, f *family) {
		b.l4proto(unix.IPPROTO_TCP)
		b.tcpSYN(unix.NFT_CMP_NEQ, "!=")
		b.destServiceInSet(f, setProxied+f.name)
		b.dnatToItself(f)
	})
}

// unprovenRules lead to the proxies, in the hooks that have them, what of the packets
// to a VIP belongs to no flow.
func unprovenRules() []Rule {
	return eachFamily(func(b *ruleBuilder, f *family) {
		b.destService(f)
		b.vmap(mapProxies+f.name, 0)
	})
}

// ProbeSYNProxy says what the kernel lacks for a VirtualService with a SYNProxy; nil if
// it has all. Nothing is changed, as with ProbeFastPath.
func (d *Dataplane) ProbeSYNProxy() error {
	err := d.try(addRule{chainProbe, rule(func(b *ruleBuilder) { b.synproxy(balancer.SYNProxy{MSS: 1460}) })})
	if err == nil {
		return nil
	}
	return fmt.Errorf("syn_proxy: this kernel has no SYN proxy: %w (Linux 5.3 or later, modprobe nft_synproxy, or syn_proxy: {enabled: false})", err)
}

// ProbeSourceLimit says what the kernel lacks for one with a SourceLimit.
func (d *Dataplane) ProbeSourceLimit() error {
	set := &Set{Name: "probe", kind: clientKinds[ip4], Size: dynamicSize}
	err := d.try(addSet{set}, addRule{chainProbe, rule(func(b *ruleBuilder) {
		b.family(ip4)
		b.loadSource(ip4, 0)
		b.dynset(set.Name, func(a *attrs) { moreFlowsThan(a, 1) })
	})})
	if err == nil {
		return nil
	}
	return fmt.Errorf("max_connections_per_source: this kernel cannot count connections: %w (modprobe nft_connlimit, or max_connections_per_source: 0)", err)
}

const chainProbe = "probe"

// try has the kernel try steps, in a table that has a chain chainProbe, and drop them
// because their transaction does not end.
func (d *Dataplane) try(steps ...step) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	b := newBatch()
	for i, s := range append([]step{addTable{}, addChain{&Chain{Name: chainProbe}}}, steps...) {
		s.encode(b, i)
	}
	b.acknowledge()
	return d.sock.commit(b)
}

// --- the limit of a source --------------------------------------------------------------

// pause is how long a client at its limit is refused without being counted. A flow that
// is counted stays in the kernel's list until that is cleaned up, a few flows at a time,
// even if it was refused: a flood would make the list grow.
const pause = 100 * time.Millisecond

// Kinds of sets of clients. The kernel forgets clients without flows by itself.
var (
	clientKinds  = map[*family]*kind{ip4: clientKind(ip4, 0), ip6: clientKind(ip6, 0)}
	refusedKinds = map[*family]*kind{ip4: clientKind(ip4, pause), ip6: clientKind(ip6, pause)}
)

func clientKind(f *family, timeout time.Duration) *kind {
	k := addrKind(f, false)
	k.dynamic, k.timeout = true, timeout
	return k
}

func clientsName(s *balancer.VirtualService) string { return "clients." + s.Name }
func refusedName(s *balancer.VirtualService) string { return "refused." + s.Name }

// renderLimit writes the sets and the chain of a service's limit, and returns the rules
// for a flow's first packet. There is room for 65,535 clients at a time: the flows of
// further ones are let in, and not counted.
func renderLimit(rs *Ruleset, s *balancer.VirtualService, f *family) []Rule {
	if !s.SourceLimit.On() {
		return nil
	}
	rs.addObject(&Object{Name: counterSourceLimit, Type: objectCounter})
	rs.addSet(&Set{Name: clientsName(s), kind: clientKinds[f], Size: dynamicSize})
	rs.addSet(&Set{Name: refusedName(s), kind: refusedKinds[f], Size: dynamicSize})
	refuse := "refuse." + s.Name
	rs.addChain(&Chain{Name: refuse, Rules: []Rule{
		rule(func(b *ruleBuilder) { b.counter(counterSourceLimit) }),
		rule(func(b *ruleBuilder) {
			what := b.loadClient(f, s.SourceLimit.Prefix)
			b.dynset(refusedName(s), nil)
			b.say("add @%s { %s }", refusedName(s), what)
		}),
		rule(func(b *ruleBuilder) { b.drop() }),
	}})
	return []Rule{
		refusedRule(s, f),
		rule(func(b *ruleBuilder) {
			b.family(f)
			what := b.loadClient(f, s.SourceLimit.Prefix)
			b.dynset(clientsName(s), func(a *attrs) { moreFlowsThan(a, s.SourceLimit.Flows) })
			b.say("add @%s { %s ct count over %d }", clientsName(s), what, s.SourceLimit.Flows)
			b.goTo(refuse)
		}),
	}
}

// refusedRule drops the new flows of a client that was just found at its limit.
func refusedRule(s *balancer.VirtualService, f *family) Rule {
	return rule(func(b *ruleBuilder) {
		b.family(f)
		what := b.loadClient(f, s.SourceLimit.Prefix)
		b.inSet(refusedName(s), 0, false)
		b.say("%s @%s", what, refusedName(s))
		b.dropAs(counterSourceLimit)
	})
}

// --- expressions --------------------------------------------------------------------------

// loadClient loads the prefix of the source that counts as one client, and returns what
// nft calls it.
func (b *ruleBuilder) loadClient(f *family, bits int) (text string) {
	b.loadSource(f, 0)
	text = f.ip + " saddr"
	if bits == f.bits {
		return text
	}
	mask := maskBytes(bits, f.bits/8)
	b.bitwise(0, mask, make([]byte, len(mask)))
	return fmt.Sprintf("%s & %s", text, addrText(mask))
}

// moreFlowsThan is the statement "ct count over" of nft(8).
func moreFlowsThan(a *attrs, flows uint32) {
	const count, flags, over = 1, 2, 1 // NFTA_CONNLIMIT_COUNT, NFTA_CONNLIMIT_FLAGS, NFT_CONNLIMIT_F_INV
	a.str(unix.NFTA_EXPR_NAME, "connlimit")
	a.nest(unix.NFTA_EXPR_DATA, func(a *attrs) {
		a.u32(count, flows)
		a.u32(flags, over)
	})
}

// synproxy answers a SYN with a cookie, and makes a SYN of the segment that returns it
// (since Linux 5.3). Both are taken away, and so is what returns a wrong one.
func (b *ruleBuilder) synproxy(p balancer.SYNProxy) {
	const mssAttr, scaleAttr, flagsAttr = 1, 2, 3                     // NFTA_SYNPROXY_*
	const mss, windowScale, selectiveAck, timestamp = 1, 2, 4, 1 << 3 // NF_SYNPROXY_OPT_*
	flags, scale := uint32(mss), uint8(0)
	b.say("synproxy mss %d", p.MSS)
	if p.Timestamps {
		flags, scale = flags|windowScale|timestamp|selectiveAck, p.WindowScale
		b.say("wscale %d timestamp sack-perm", scale)
	}
	b.expr("synproxy", func(a *attrs) {
		a.put(mssAttr, binary.BigEndian.AppendUint16(nil, p.MSS))
		a.u8(scaleAttr, scale)
		a.u32(flagsAttr, flags)
	})
}
