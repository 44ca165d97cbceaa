package doctor

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"nlb/balancer"
)

// Where our own base chains are: foreign ones before them see VIPs, those after
// them targets. Connection tracking comes between raw and the rest
// (enum nf_ip_hook_priorities in linux/netfilter_ipv4.h).
const (
	priorityOurDNAT   = -105
	priorityConntrack = -200
)

// A passage is one kind of packets of ours, where they pass, and what lets them.
type passage struct {
	hook string
	// first and last bound the priorities of the chains that see it.
	first, last int32
	packet      Packet
	// match says the packet in the words of nft(8), and of iptables(8).
	match, matchIPTables []string
}

const (
	lowest  = -1 << 31
	highest = 1<<31 - 1
)

func (p passage) seenBy(c *Chain) bool {
	return c.Hook == p.hook && c.Priority >= p.first && c.Priority <= p.last &&
		(c.Family == "inet" || c.Family == "ip6" == p.packet.ipv6())
}

// String says the packet for people.
func (p passage) String() string {
	k := &p.packet
	switch {
	case k.Established && k.Src.IsValid():
		return fmt.Sprintf("replies of %s", k.Src)
	case k.DstPort != 0:
		return fmt.Sprintf("%s to %s", protocolName(k.Protocol), netip.AddrPortFrom(k.Dst, k.DstPort))
	case k.Dst.IsValid():
		return fmt.Sprintf("packets of %s to %s", k.Src, k.Dst)
	}
	return fmt.Sprintf("packets of %s", k.Src)
}

func protocolName(p uint8) string {
	switch p {
	case balancer.ProtoTCP:
		return "tcp"
	case balancer.ProtoUDP:
		return "udp"
	}
	return "protocol " + strconv.Itoa(int(p))
}

func ipWord(a netip.Addr) string {
	if a.Is6() {
		return "ip6"
	}
	return "ip"
}

// Words for matches.
func translated() (nft, iptables []string) {
	return []string{"ct", "status", "dnat"}, []string{"-m", "conntrack", "--ctstate", "DNAT"}
}

func toAddr(a netip.Addr) (nft, iptables []string) {
	return []string{ipWord(a), "daddr", a.String()}, []string{"-d", a.String()}
}

func fromAddr(a netip.Addr) (nft, iptables []string) {
	return []string{ipWord(a), "saddr", a.String()}, []string{"-s", a.String()}
}

func toPort(a netip.Addr, protocol uint8, port uint16) (nft, iptables []string) {
	name, number := protocolName(protocol), strconv.Itoa(int(port))
	nft, iptables = toAddr(a)
	return append(nft, name, "dport", number), append(iptables, "-p", name, "--dport", number)
}

// byIPVS says that IPVS sends packets on. It takes them from the input hook and
// sends them through that of output, and conntrack does not call their flows
// translated.
func (f *Facts) byIPVS() bool { return f.Spec != nil && f.Spec.Dataplane == balancer.IPVS }

// through is what of a flow to a target crosses the hook, or the one that IPVS
// has instead of forward.
func (f *Facts) through(t wantedTarget, protocol uint8, hook string) passage {
	p := passage{hook: hook, first: lowest, last: highest, packet: Packet{
		Dst: t.Address, DstPort: t.Port, Protocol: protocol, Translated: !f.byIPVS(), Out: f.wayTo(t.Address),
	}}
	p.match, p.matchIPTables = translated()
	if f.byIPVS() {
		p.match, p.matchIPTables = toPort(t.Address, protocol, t.Port)
		if hook == "forward" {
			p.hook = "output"
		}
	}
	return p
}

// back is what of its replies does.
func (f *Facts) back(t wantedTarget, protocol uint8) passage {
	p := passage{hook: "forward", first: lowest, last: highest, packet: Packet{
		Src: t.Address, SrcPort: t.Port, Protocol: protocol, In: f.wayTo(t.Address),
		Translated: !f.byIPVS(), Established: true, Reply: true,
	}}
	p.match, p.matchIPTables = translated()
	if f.byIPVS() {
		p.match, p.matchIPTables = fromAddr(t.Address)
	}
	return p
}

func (f *Facts) wayTo(a netip.Addr) string {
	r, _ := f.routeTo(a)
	return r.Interface
}

// arrivals are packets to listeners, as chains before our own see them in
// prerouting.
func (f *Facts) arrivals(last int32) (all []passage) {
	if f.Spec == nil {
		return nil
	}
	for _, l := range f.Spec.Listeners {
		for _, protocol := range l.Protocol.Numbers() {
			p := passage{hook: "prerouting", first: lowest, last: last, packet: Packet{Dst: l.VIP, DstPort: l.Port, Protocol: protocol}}
			p.match, p.matchIPTables = toAddr(l.VIP)
			all = append(all, p)
		}
	}
	return all
}

// filtered lists what of ours must not be dropped.
func (f *Facts) filtered() []passage {
	all := f.arrivals(priorityOurDNAT)
	for _, t := range f.targets() {
		if !t.relayed() {
			for _, protocol := range t.group.Protocol.Numbers() {
				all = append(all, f.through(t, protocol, "forward"), f.back(t, protocol), f.through(t, protocol, "postrouting"))
			}
		}
		all = append(all, f.probe(t))
	}
	ending := f.relayedListeners()
	if f.byIPVS() {
		ending = f.Spec.Listeners
	}
	for _, l := range ending {
		for _, protocol := range l.Protocol.Numbers() {
			p := passage{hook: "input", first: lowest, last: highest, packet: Packet{Dst: l.VIP, DstPort: l.Port, Protocol: protocol}}
			p.match, p.matchIPTables = toPort(l.VIP, protocol, l.Port)
			all = append(all, p)
		}
	}
	return all
}

// probe is a health check on its way out.
func (f *Facts) probe(t wantedTarget) passage {
	port := t.group.HealthCheck.Port
	if port == 0 {
		port = t.Port
	}
	p := passage{hook: "output", first: lowest, last: highest, packet: Packet{
		Dst: t.Address, DstPort: port, Protocol: balancer.ProtoTCP, Out: f.wayTo(t.Address),
	}}
	p.match, p.matchIPTables = toPort(t.Address, balancer.ProtoTCP, port)
	return p
}

func firewallChecks() []Check {
	return []Check{
		{
			ID: "foreign-drop", Role: Balancer, Severity: Error,
			Seeks:       "a chain of another table drops packets of ours: to listeners, to and from targets, of health checks (a warning if rules that were not understood may accept them)",
			Consequence: "These packets vanish without being counted by nlb, and clients time out.",
			Cure:        "nft insert rule FAMILY TABLE CHAIN ct status dnat accept, or what else lets them pass",
			look:        foreignDrop,
		},
		{
			ID: "foreign-snat", Role: Balancer, Severity: Error,
			Seeks:       "a chain of another table gives packets to targets that should see the client another source",
			Consequence: "These targets see this host for a client.",
			Cure:        "nft insert rule FAMILY TABLE CHAIN ct status dnat accept",
			look:        foreignSNAT,
		},
		{
			ID: "foreign-dnat", Role: Balancer, Severity: Error,
			Seeks:       "a chain of another table, before ours, sends packets to a listener elsewhere",
			Consequence: "The listener never sees its clients.",
			Cure:        "nft insert rule FAMILY TABLE CHAIN ip daddr VIP accept",
			look:        foreignDNAT,
		},
		{
			ID: "foreign-notrack", Role: Balancer, Severity: Error,
			Seeks:       "a chain of another table takes packets to a listener, or replies of targets, out of connection tracking",
			Consequence: "They are not rewritten, and are lost.",
			Cure:        "nft insert rule FAMILY TABLE CHAIN ip daddr VIP accept, or ip saddr TARGET",
			look:        foreignNoTrack,
		},
		{
			ID: "iptables-legacy", Role: Balancer, Severity: Notice,
			Seeks:       "there are tables of iptables-legacy",
			Consequence: "What their rules drop or rewrite cannot be seen here.",
			Cure:        "by hand: iptables-legacy-save shows them; move them to nftables",
			look:        legacyTables,
		},
	}
}

// bites looks for base chains of the type in which a passage ends in the action.
func (f *Facts) bites(typ string, action Action, passages []passage) (all []symptom) {
	rules := rulesetOf(f.Chains)
	for i := range f.Chains {
		c := &f.Chains[i]
		if c.Type != typ || c.Hook == "" {
			continue
		}
		var hit []passage
		doubtful := true
		for _, p := range passages {
			if !p.seenBy(c) {
				continue
			}
			if o := rules.walk(c, &p.packet); o.Action == action {
				hit, doubtful = append(hit, p), doubtful && o.Doubtful
			}
		}
		if len(hit) > 0 {
			all = append(all, c.symptom(action, hit, doubtful))
		}
	}
	return all
}

// symptom says what a chain does with some packets, and the cure.
func (c *Chain) symptom(action Action, hit []passage, doubtful bool) symptom {
	s := symptom{what: fmt.Sprintf("%s (%s, priority %d): %s for %s", c, c.Hook, c.Priority, action, hit[0]), doubtful: doubtful}
	if len(hit) > 1 {
		s.what += fmt.Sprintf(" and %d more", len(hit)-1)
	}
	if doubtful {
		s.what += ", unless a rule that was not understood says otherwise"
	}
	if !plainName.MatchString(c.Table) || !plainName.MatchString(c.Name) {
		s.advice = "let them pass in this chain"
		return s
	}
	for _, p := range hit {
		if cure := c.letPass(p); !slices.ContainsFunc(s.cure, func(o Command) bool { return slices.Equal(o, cure) }) {
			s.cure = append(s.cure, cure)
		}
	}
	return s
}

// plainName are names that nft(8) takes without quotes. What else somebody
// called a table must not become part of a command.
var plainName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_/.-]*$`)

// letPass is the rule that has the chain leave the packets alone. Chains of
// iptables get one by iptables, which cannot list rules of others.
func (c *Chain) letPass(p passage) Command {
	if c.ofIPTables() {
		program := "iptables"
		if c.Family == "ip6" {
			program = "ip6tables"
		}
		return slices.Concat(Command{program, "-t", c.Table, "-I", c.Name}, p.matchIPTables, Command{"-j", "ACCEPT"})
	}
	return slices.Concat(Command{"nft", "insert", "rule", c.Family, c.Table, c.Name}, p.match, Command{"accept"})
}

func legacyTables(f *Facts) []symptom {
	if len(f.LegacyTables) == 0 {
		return nil
	}
	return []symptom{{
		what:   "in use: " + strings.Join(f.LegacyTables, ", "),
		advice: "iptables-legacy-save and ip6tables-legacy-save show their rules; iptables-nft holds them where they are seen",
	}}
}

func foreignDrop(f *Facts) []symptom { return f.bites("filter", Drop, f.filtered()) }

func foreignSNAT(f *Facts) []symptom {
	var passages []passage
	for _, t := range f.targetsWhere(wantedTarget.keepsClient) {
		for _, protocol := range t.group.Protocol.Numbers() {
			passages = append(passages, f.through(t, protocol, "postrouting"))
		}
	}
	return f.bites("nat", ToSource, passages)
}

func foreignDNAT(f *Facts) []symptom { return f.bites("nat", ToDest, f.arrivals(priorityOurDNAT)) }

func foreignNoTrack(f *Facts) []symptom {
	var passages []passage
	// Relayed connections may go untracked if the operator says so.
	if f.Spec == nil || !f.Spec.UntrackedRelay {
		passages = f.arrivals(priorityConntrack - 1)
	}
	for _, t := range f.targetsWhere(func(t wantedTarget) bool { return !t.relayed() }) {
		for _, protocol := range t.group.Protocol.Numbers() {
			p := f.back(t, protocol)
			p.hook, p.last = "prerouting", priorityConntrack-1
			p.packet.Established, p.packet.Reply, p.packet.Translated = false, false, false // nobody has looked yet
			p.match, p.matchIPTables = fromAddr(t.Address)
			passages = append(passages, p)
		}
	}
	return f.bites("filter", NoTrack, passages)
}
