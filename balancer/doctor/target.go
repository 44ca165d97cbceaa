package doctor

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"nlb/balancer"
)

// The routing table, priority and protocol of deploy/target/return-route, which
// takes over what the cures of a target have done: numbers beyond those that
// distributions and routing daemons use.
const (
	returnTable    = "4700"
	returnPriority = "4700"
	returnOwner    = "78"
)

func targetChecks() []Check {
	return []Check{
		{
			ID: "target-lb-unreachable", Role: Target, Severity: Error,
			Seeks:       "there is no route to the balancer",
			Consequence: "Neither health checks nor clients get an answer.",
			Cure:        "by hand: a route to it",
			look:        balancerUnreachable,
		},
		{
			ID: "target-lb-local", Role: Target, Severity: Error,
			Seeks:       "the balancer's address is bound on this target",
			Consequence: "Packets of the balancer are dropped as martians, and answers to it never leave.",
			Cure:        "ip address delete LB/LEN dev IF",
			look:        func(f *Facts) []symptom { return f.boundHere(f.Balancers, "the balancer's address") },
		},
		{
			ID: "target-vip-bound", Role: Target, Severity: Warning,
			Seeks:       "a VIP is bound on this target",
			Consequence: "Programs here that call the VIP reach this host instead of the balancer, and health checks from the VIP are dropped.",
			Cure:        "ip address delete VIP/LEN dev IF",
			look:        func(f *Facts) []symptom { return f.boundHere(f.vipAddrs(), "the VIP") },
		},
		{
			ID: "target-return-path", Role: Target, Severity: Error,
			Seeks:       "replies to clients do not leave by the balancer, and clients' addresses are kept (preserve, hairpin_snat, or no configuration to tell)",
			Consequence: "Nobody puts the VIP back into the replies, so that clients time out.",
			Cure: "return-route of deploy/target, or the like of it: ip route replace default via LB dev IF table " + returnTable + " proto " + returnOwner +
				"; ip rule add priority " + returnPriority + " from TARGET lookup " + returnTable + " proto " + returnOwner +
				"; on a node whose pods reply: return-connmark of deploy/target",
			look: targetReturnPath,
		},
		{
			ID: "target-rp-filter", Role: Target, Severity: Error,
			Seeks:       "the interface to the balancer has strict reverse-path filtering (the larger of all and the interface is 1), and the route to clients leaves by another",
			Consequence: "Packets that keep the client's address are dropped on arrival.",
			Cure:        "sysctl -w net.ipv4.conf.IF.rp_filter=2; or return-route of deploy/target, and it stays strict",
			look:        targetReversePath,
		},
		{
			ID: "target-redirects", Role: Target, Severity: Warning,
			Seeks:       "ICMP redirects are obeyed on the interface to the balancer",
			Consequence: "A router can talk this target into answering clients past the balancer.",
			Cure:        "sysctl -w net.ipv4.conf.all.accept_redirects=0 net.ipv4.conf.IF.accept_redirects=0",
			look:        targetRedirects,
		},
		{
			ID: "target-drop", Role: Target, Severity: Error,
			Seeks:       "a chain drops packets to this target's port (only looked for with --port), or its replies",
			Consequence: "The target is unhealthy, or its clients time out.",
			Cure:        "nft insert rule FAMILY TABLE CHAIN ip daddr TARGET tcp dport PORT accept",
			look:        targetDrop,
		},
		{
			ID: "target-masquerade", Role: Target, Severity: Warning,
			Seeks:       "a chain gives what this target sends another source",
			Consequence: "A reply whose request connection tracking does not know here, as on nodes of a cluster, comes from a stranger.",
			Cure:        "nft insert rule FAMILY TABLE CHAIN ip saddr TARGET accept",
			look:        targetMasquerade,
		},
	}
}

func balancerUnreachable(f *Facts) (all []symptom) {
	for _, r := range f.Routes {
		if !r.Reachable {
			all = append(all, symptom{what: "no route to " + r.To.String(), advice: fmt.Sprintf("ip route add %s via GATEWAY", single(r.To))})
		}
	}
	return all
}

// boundHere lists addresses that this host should not have.
func (f *Facts) boundHere(addrs []netip.Addr, whose string) (all []symptom) {
	for _, a := range addrs {
		for _, l := range f.holders(a) {
			p, _ := l.prefixOf(a)
			all = append(all, found(fmt.Sprintf("%s %s is on %s", whose, p, l.Name), addressDelete(p, l.Name)))
		}
	}
	return all
}

// keepsClients reports whether this target gets packets with clients'
// addresses. It does for all that is known without a configuration.
func (f *Facts) keepsClients(self netip.Addr) bool {
	return f.Spec == nil || slices.Contains(f.clientKeepers(), self)
}

// A wayBack is the way to a client beside that to the balancer of its family.
type wayBack struct {
	balancer, client Route
}

// self is the address of this target.
func (w wayBack) self() netip.Addr { return w.balancer.Source }

// past reports that replies go past the balancer, whose address is on the link.
func (w wayBack) past() bool { return w.client.Gateway != w.balancer.To }

func (f *Facts) waysBack() (all []wayBack) {
	for _, b := range f.Routes {
		if !b.Reachable || b.Local {
			continue
		}
		for _, c := range f.Returns {
			if c.From == b.Source && !c.Local {
				all = append(all, wayBack{b, c})
			}
		}
	}
	return all
}

func targetReturnPath(f *Facts) (all []symptom) {
	for _, w := range f.waysBack() {
		// A balancer behind a router is on the way or not, and only that router
		// knows.
		if w.balancer.Gateway.IsValid() || !w.past() || !f.keepsClients(w.self()) {
			continue
		}
		ip := []string{"ip"}
		if w.self().Is6() {
			ip = append(ip, "-6")
		}
		s := found(fmt.Sprintf("%s to %s %s, not by %s", w.self(), w.client.To, w.client.way(), w.balancer.To),
			slices.Concat(ip, Command{"route", "replace", "default", "via", w.balancer.To.String(), "dev", w.balancer.Interface, "table", returnTable, "proto", returnOwner}),
			slices.Concat(ip, Command{"rule", "add", "priority", returnPriority, "from", w.self().String(), "lookup", returnTable, "proto", returnOwner}),
		)
		s.recipe = f.recipe(w)
		all = append(all, s)
	}
	return all
}

// recipe is the script that has replies leave by the balancer of a way; there is
// none if the balancer is not on the link. As the script undoes what it is not told
// of, the line has the other family too.
func (f *Facts) recipe(w wayBack) Command {
	if w.balancer.Gateway.IsValid() {
		return nil
	}
	c := Command{"return-route", "apply"}
	for _, v6 := range []bool{false, true} {
		ways := slices.DeleteFunc(append([]wayBack{w}, f.waysBack()...), func(o wayBack) bool {
			return o.self().Is6() != v6 || o.balancer.Gateway.IsValid() || o.balancer.Interface != w.balancer.Interface || !f.keepsClients(o.self())
		})
		if len(ways) > 0 {
			c = append(c, "--source", ways[0].self().String(), "--lb", ways[0].balancer.To.String())
		}
	}
	return append(c, "--dev", w.balancer.Interface)
}

// way says a route in words.
func (r Route) way() string {
	switch {
	case !r.Reachable:
		return "has no route"
	case r.Gateway.IsValid():
		return fmt.Sprintf("leaves by %s via %s", r.Interface, r.Gateway)
	}
	return "leaves by " + r.Interface + " directly"
}

// targetReversePath asks as the kernel does: the filter looks for the route back
// with this host's address as the source, so that policy rules count.
func targetReversePath(f *Facts) (all []symptom) {
	for _, w := range f.waysBack() {
		in := w.balancer.Interface
		if w.self().Is6() || !f.strict(in) || w.client.Interface == in || !f.keepsClients(w.self()) {
			continue
		}
		s := found(fmt.Sprintf("%s, and the route to %s %s", f.filterWords(in), w.client.To, w.client.way()), loosen(in))
		s.recipe = f.recipe(w)
		all = append(all, s)
	}
	return all
}

func targetRedirects(f *Facts) (all []symptom) {
	for _, ifname := range f.egress(false) {
		if !f.takesRedirects4(ifname) {
			continue
		}
		var cure []Command
		for _, key := range []string{conf4(allInterfaces, confRedirects), conf4(ifname, confRedirects)} {
			if f.is(key, "1") {
				cure = append(cure, set(key, "0"))
			}
		}
		all = append(all, found(fmt.Sprintf("%s, %s", f.says(conf4(allInterfaces, confRedirects)), f.says(conf4(ifname, confRedirects))), cure...))
	}
	for _, ifname := range f.egress(true) {
		if key := conf6(ifname, confRedirects); f.is(key, "1") && !f.is(keyForward6, "1") {
			all = append(all, found(f.says(key), set(key, "0")))
		}
	}
	return all
}

func targetDrop(f *Facts) []symptom {
	var passages []passage
	for _, b := range f.Routes {
		if !b.Reachable || b.Local || f.Port == 0 {
			continue
		}
		in := passage{hook: "input", first: lowest, last: highest, packet: Packet{
			Src: b.To, Dst: b.Source, DstPort: f.Port, Protocol: balancer.ProtoTCP, In: b.Interface,
		}}
		in.match, in.matchIPTables = toPort(b.Source, balancer.ProtoTCP, f.Port)
		out := passage{hook: "output", first: lowest, last: highest, packet: Packet{
			Src: b.Source, SrcPort: f.Port, Protocol: balancer.ProtoTCP, Established: true, Reply: true,
		}}
		sport := []string{"tcp", "sport", strconv.Itoa(int(f.Port))}
		out.match, out.matchIPTables = fromAddr(b.Source)
		out.match, out.matchIPTables = append(out.match, sport...), append(out.matchIPTables, "-p", "tcp", "--sport", sport[2])
		passages = append(passages, in, out)
	}
	return f.bites("filter", Drop, passages)
}

func targetMasquerade(f *Facts) []symptom {
	var passages []passage
	for _, w := range f.waysBack() {
		p := passage{hook: "postrouting", first: lowest, last: highest, packet: Packet{
			Src: w.self(), Dst: w.client.To, Protocol: balancer.ProtoTCP, Out: w.client.Interface,
		}}
		p.match, p.matchIPTables = fromAddr(w.self())
		passages = append(passages, p)
	}
	return f.bites("nat", ToSource, passages)
}
