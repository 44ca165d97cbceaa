package doctor

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"

	"nlb/balancer"
)

func isIPv6(a netip.Addr) bool { return a.Is6() }

func (f *Facts) vipAddrs() (all []netip.Addr) {
	for _, v := range f.vips() {
		all = append(all, v.Address)
	}
	return all
}

func pathChecks() []Check {
	return []Check{
		{
			ID: "link-down", Role: Balancer, Severity: Error,
			Seeks:       "the interface of a VIP, or the one in whose subnet a target is, is down",
			Consequence: "No packet enters or leaves by this interface.",
			Cure:        "ip link set IF up",
			look:        linkDown,
		},
		{
			ID: "target-unreachable", Role: Balancer, Severity: Error,
			Seeks:       "there is no route to a target",
			Consequence: "Its health checks fail, and under fail-open the flows it is given time out.",
			Cure:        "by hand: a route to it",
			look:        targetUnreachable,
		},
		{
			ID: "mtu", Role: Balancer, Severity: Notice,
			Seeks:       "the interface to a target takes smaller packets than one that the default route leaves by",
			Consequence: "Large packets of clients are answered with ICMP errors, and flows hang where a firewall drops those.",
			Cure:        "ip link set IF mtu N",
			look:        smallerMTU,
		},
	}
}

// behindDown is the link, not up, in whose subnet the address is.
func (f *Facts) behindDown(a netip.Addr) (Link, bool) {
	for _, l := range f.Links {
		if !l.Up && slices.ContainsFunc(l.Addresses, func(p netip.Prefix) bool { return !p.IsSingleIP() && p.Contains(a) }) {
			return l, true
		}
	}
	return Link{}, false
}

func linkDown(f *Facts) (all []symptom) {
	why := map[string]string{}
	for _, v := range f.vips() {
		if l, ok := f.link(v.Interface); ok && !l.Up {
			why[l.Name] = "the interface of " + v.Address.String()
		}
	}
	for _, t := range f.targets() {
		if l, ok := f.behindDown(t.Address); ok {
			why[l.Name] = "in the subnet of " + t.Address.String()
		}
	}
	for _, l := range f.Links {
		if why[l.Name] != "" {
			all = append(all, found(fmt.Sprintf("%s is down, %s", l.Name, why[l.Name]), Command{"ip", "link", "set", l.Name, "up"}))
		}
	}
	return all
}

func targetUnreachable(f *Facts) (all []symptom) {
	for _, r := range f.Routes {
		if _, down := f.behindDown(r.To); r.Reachable || down {
			continue
		}
		all = append(all, symptom{what: "no route to " + r.To.String(), advice: fmt.Sprintf("ip route add %s via GATEWAY", single(r.To))})
	}
	return all
}

func smallerMTU(f *Facts) (all []symptom) {
	for _, ipv6 := range []bool{false, true} {
		widest := Link{}
		for _, d := range f.Defaults {
			if l, ok := f.link(d.Interface); ok && d.IPv6 == ipv6 && l.MTU > widest.MTU {
				widest = l
			}
		}
		for _, ifname := range f.egress(ipv6) {
			if l, ok := f.link(ifname); ok && l.MTU < widest.MTU && f.forwards(ipv6) {
				all = append(all, found(fmt.Sprintf("the MTU of %s is %d, that of %s %d", l.Name, l.MTU, widest.Name, widest.MTU),
					Command{"ip", "link", "set", l.Name, "mtu", strconv.Itoa(widest.MTU)}))
			}
		}
	}
	return all
}

func addressChecks() []Check {
	return []Check{
		{
			ID: "vip-unbound", Role: Balancer, Severity: Error,
			Seeks:       "a VIP is on no interface, though the configuration names one for it or has a relayed listener on it",
			Consequence: "Nobody answers for the address on the link, and nothing sent to it can end here.",
			Cure:        "ip address add VIP/32 dev IF (nlb serve binds those with an interface)",
			look:        vipUnbound,
		},
		{
			ID: "vip-elsewhere", Role: Balancer, Severity: Error,
			Seeks:       "a VIP is on another interface than the configuration names",
			Consequence: "It is announced, and its clients are expected, on the wrong link.",
			Cure:        "ip address delete VIP/LEN dev OTHER",
			look:        vipElsewhere,
		},
		{
			ID: "vip-duplicate", Role: Balancer, Severity: Error,
			Seeks:       "another host answers ARP for a VIP (only looked for with --arp)",
			Consequence: "Clients reach one or the other, whichever answered last.",
			Cure:        "by hand: take the VIP from the other host",
			look:        vipDuplicate,
		},
		{
			ID: "vip-as-source", Role: Balancer, Severity: Warning,
			Seeks:       "the kernel sends from a VIP when a program here connects to a target",
			Consequence: "A target that has the VIP bound itself drops these packets as its own, and flows of this host look like a client's that is the balancer.",
			Cure:        "IPv4: bind the VIP with its full length (ip address delete VIP/LEN, ip address add VIP/32); IPv6: ip address change VIP/LEN dev IF preferred_lft 0",
			look:        vipAsSource,
		},
		{
			ID: "source-not-local", Role: Balancer, Severity: Error,
			Seeks:       "an address of source_addresses, or a health check's source, is not on this host",
			Consequence: "Health checks cannot be sent from it, and replies of targets to it do not arrive here.",
			Cure:        "ip address add SOURCE/32 dev IF",
			look:        sourceNotLocal,
		},
	}
}

func addressAdd(a netip.Addr, ifname string) Command {
	c := Command{"ip", "address", "add", single(a).String(), "dev", ifname}
	if a.Is6() {
		c = append(c, "nodad") // usable at once
	}
	return c
}

// vipAdd binds a VIP as nlb serve does: never chosen as a source, and without
// the wait for duplicates, since a VIP moves.
func vipAdd(a netip.Addr, ifname string) Command {
	c := addressAdd(a, ifname)
	if a.Is6() {
		c = append(c, "preferred_lft", "0")
	}
	return c
}

func addressDelete(p netip.Prefix, ifname string) Command {
	return Command{"ip", "address", "delete", p.String(), "dev", ifname}
}

func vipUnbound(f *Facts) (all []symptom) {
	relayed := f.relayedListeners()
	for _, v := range f.vips() {
		ends := slices.ContainsFunc(relayed, func(l balancer.Listener) bool { return l.VIP == v.Address })
		if len(f.holders(v.Address)) > 0 || v.Interface == "" && !ends {
			continue
		}
		ifname := v.Interface
		if ifname == "" {
			ifname = "lo"
		}
		what := fmt.Sprintf("%s is on no interface", v.Address)
		if _, exists := f.link(ifname); !exists {
			all = append(all, symptom{what: fmt.Sprintf("%s, and there is no %s", what, ifname), advice: "name an interface of this host in vips"})
			continue
		}
		all = append(all, found(what, vipAdd(v.Address, ifname)))
	}
	return all
}

func vipElsewhere(f *Facts) (all []symptom) {
	for _, v := range f.vips() {
		holders := f.holders(v.Address)
		right := slices.ContainsFunc(holders, func(l Link) bool { return l.Name == v.Interface })
		for _, l := range holders {
			if v.Interface == "" || l.Name == v.Interface {
				continue
			}
			p, _ := l.prefixOf(v.Address)
			cure := []Command{addressDelete(p, l.Name)}
			if _, exists := f.link(v.Interface); exists && !right {
				cure, right = append(cure, vipAdd(v.Address, v.Interface)), true
			}
			all = append(all, found(fmt.Sprintf("%s is on %s, and belongs on %s", p, l.Name, v.Interface), cure...))
		}
	}
	return all
}

func vipDuplicate(f *Facts) (all []symptom) {
	for _, d := range f.Duplicates {
		all = append(all, symptom{
			what:   fmt.Sprintf("%s answered for %s on %s", d.HardwareAddr, d.VIP, d.Interface),
			advice: "on the host with this hardware address: ip address delete " + single(d.VIP).String(),
		})
	}
	return all
}

func vipAsSource(f *Facts) (all []symptom) {
	done := map[netip.Addr]bool{}
	for _, r := range f.Routes {
		if r.Local || done[r.Source] || !slices.Contains(f.vipAddrs(), r.Source) {
			continue
		}
		done[r.Source] = true
		s := symptom{what: fmt.Sprintf("%s is reached by %s from the VIP %s", r.To, r.Interface, r.Source)}
		if s.cure = f.rebind(r); s.cure == nil {
			s.advice = fmt.Sprintf("give %s an address of its own, and name it as the src of the route", r.Interface)
		}
		all = append(all, s)
	}
	return all
}

// rebind makes the source of a route an address that the kernel does not choose,
// if there is another on the link that keeps the route alive.
func (f *Facts) rebind(r Route) []Command {
	l, ok := f.link(r.Interface)
	vip, bound := l.prefixOf(r.Source)
	if !ok || !bound || !slices.ContainsFunc(l.Addresses, func(p netip.Prefix) bool {
		return p.Addr() != vip.Addr() && !slices.Contains(f.vipAddrs(), p.Addr()) && p.Contains(r.next())
	}) {
		return nil
	}
	if r.Source.Is6() {
		// The length of its prefix would not help: the address that resembles the
		// destination most is chosen, unless it is deprecated (RFC 6724, section 5,
		// rules 3 and 8).
		return []Command{{"ip", "address", "change", vip.String(), "dev", l.Name, "preferred_lft", "0"}}
	}
	if vip.IsSingleIP() {
		return nil // a route names it as its source
	}
	return []Command{
		// Or the others of the subnet go with the first one.
		set(conf4(l.Name, confPromote), "1"), addressDelete(vip, l.Name), vipAdd(r.Source, l.Name),
	}
}

// next is who gets the packets on the link.
func (r Route) next() netip.Addr {
	if r.Gateway.IsValid() {
		return r.Gateway
	}
	return r.To
}

func sourceNotLocal(f *Facts) (all []symptom) {
	if f.Spec == nil {
		return nil
	}
	wanted := map[netip.Addr]string{}
	for _, a := range f.Spec.SourceAddresses {
		wanted[a] = "source_addresses"
	}
	for _, g := range f.Spec.TargetGroups {
		if g.HealthCheck.Source.IsValid() {
			wanted[g.HealthCheck.Source] = "the health check of " + g.Name
		}
	}
	for _, a := range slices.SortedFunc(maps.Keys(wanted), netip.Addr.Compare) {
		if len(f.holders(a)) > 0 {
			continue
		}
		all = append(all, found(fmt.Sprintf("%s of %s is on no interface", a, wanted[a]), addressAdd(a, f.homeOf(a))))
	}
	return all
}

// homeOf is the interface that an address belongs on: one with its subnet, else
// the first that leads to targets, else the loopback.
func (f *Facts) homeOf(a netip.Addr) string {
	for _, l := range f.Links {
		if slices.ContainsFunc(l.Addresses, func(p netip.Prefix) bool { return p.Contains(a) }) {
			return l.Name
		}
	}
	for _, ifname := range f.egress(a.Is6()) {
		return ifname
	}
	return "lo"
}

func flowChecks() []Check {
	return []Check{
		{
			ID: "return-path", Role: Balancer, Severity: Error,
			Seeks:       "a target that sees clients' addresses has three flows or more from outside its subnet, and none was answered",
			Consequence: "Its replies do not return through this host, so that every client times out.",
			Cure:        "on the target: nlb doctor --target --lb ADDRESS; or client_ip: snat",
			look:        returnPath,
		},
		{
			ID: "undeclared-colocated", Role: Balancer, Severity: Warning,
			Seeks:       "a client in the /24 or /64 of its target, not declared as colocated, has flows, and none was answered",
			Consequence: "The target answers this client directly, past the balancer, and the client refuses the answer.",
			Cure:        "client_ip: hairpin_snat with colocated: [CLIENT], or hairpin_subnet: true",
			look:        undeclaredColocated,
		},
	}
}

// fewFlows is how many flows may lack an answer before their target is under
// suspicion: one or two may have begun just now.
const fewFlows = 3

// Lengths of the prefixes that neighbours share most often.
const neighbour4, neighbour6 = 24, 64

func neighbours(a, b netip.Addr) bool {
	bits := neighbour4
	if a.Is6() {
		bits = neighbour6
	}
	p, err := a.Prefix(bits)
	return err == nil && p.Contains(b)
}

func returnPath(f *Facts) (all []symptom) {
	answered, unanswered := map[netip.Addr]int{}, map[netip.Addr]int{}
	for _, s := range f.Flows {
		answered[s.Target] += s.Answered
		if !neighbours(s.Client, s.Target) {
			unanswered[s.Target] += s.Unanswered
		}
	}
	for _, target := range f.clientKeepers() {
		if answered[target] > 0 || unanswered[target] < fewFlows {
			continue
		}
		source := "ADDRESS"
		if r, ok := f.routeTo(target); ok && r.Source.IsValid() {
			source = r.Source.String()
		}
		all = append(all, symptom{
			what:   fmt.Sprintf("%d flows to %s, none of them answered", unanswered[target], target),
			advice: fmt.Sprintf("on %s: nlb doctor --target --lb %s; or client_ip: snat for it", target, source),
		})
	}
	return all
}

// clientKeepers are the targets that see clients' addresses, sorted.
func (f *Facts) clientKeepers() (addrs []netip.Addr) {
	for _, t := range f.targetsWhere(wantedTarget.keepsClient) {
		addrs = append(addrs, t.Address)
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs)
}

func undeclaredColocated(f *Facts) (all []symptom) {
	keepers := f.clientKeepers()
	for _, s := range f.Flows {
		if s.Answered > 0 || s.Unanswered == 0 || !slices.Contains(keepers, s.Target) ||
			!neighbours(s.Client, s.Target) || f.declared(s.Client, s.Target) {
			continue
		}
		all = append(all, symptom{
			what:   fmt.Sprintf("%d flows from %s to its neighbour %s, none of them answered", s.Unanswered, s.Client, s.Target),
			advice: fmt.Sprintf("client_ip: hairpin_snat for %s, with colocated: [%q], or hairpin_subnet: true if all its subnet may call", s.Target, single(s.Client)),
		})
	}
	return all
}

// declared reports that the client is in the target's hairpin domain.
func (f *Facts) declared(client, target netip.Addr) bool {
	for _, t := range f.targets() {
		if t.Address == target && (client == target || t.group.HairpinSubnet ||
			slices.ContainsFunc(t.Colocated, func(p netip.Prefix) bool { return p.Contains(client) })) {
			return true
		}
	}
	return false
}
