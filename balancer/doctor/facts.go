package doctor

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"

	"nlb/balancer"
)

// A Role is what the host that is looked at does.
type Role string

const (
	// Balancer is a host that runs nlb.
	Balancer Role = "balancer"
	// Target is a host that serves behind one.
	Target Role = "target"
)

// A Question is what is asked about a host.
type Question struct {
	Role Role `json:"role"`
	// Spec is the configuration; nil if there is none, and then only the host
	// itself is looked at.
	Spec *balancer.Spec `json:"spec,omitempty"`
	// Balancers are the addresses of the balancer that a target gets packets
	// from. Target only.
	Balancers []netip.Addr `json:"balancers,omitempty"`
	// Clients stand for whoever calls from outside: one for each family.
	Clients []netip.Addr `json:"clients,omitempty"`
	// VIPs are the addresses that listeners answer on; those of Spec count too.
	VIPs []netip.Addr `json:"vips,omitempty"`
	// Port is where a target serves; 0 is unknown. Target only.
	Port uint16 `json:"port,omitempty"`
}

// DefaultClients stand for callers from outside in the absence of real ones.
// They belong to nobody (RFC 5737 and RFC 3849), so that the default route
// leads to them.
func DefaultClients() []netip.Addr {
	return []netip.Addr{netip.AddrFrom4([4]byte{203, 0, 113, 1}), netip.MustParseAddr("2001:db8:ffff::1")}
}

// vips lists the VIPs that are known, without repetition.
func (q *Question) vips() []balancer.VIP {
	var all []balancer.VIP
	if q.Spec != nil {
		all = append(all, q.Spec.VIPs...)
	}
	for _, a := range q.VIPs {
		if !slices.ContainsFunc(all, func(v balancer.VIP) bool { return v.Address == a }) {
			all = append(all, balancer.VIP{Address: a})
		}
	}
	return all
}

// Facts are all that was read of a host.
type Facts struct {
	Question
	// Kernel is the release, as uname -r has it.
	Kernel string `json:"kernel"`
	// Sysctls have the values of those that checks look at, by their path below
	// /proc/sys. What this kernel has not is not in it.
	Sysctls map[string]string `json:"sysctls"`
	// Neither of nf_tables, connection tracking and IPVS has to be in a kernel.
	NFTables  bool   `json:"nf_tables"`
	Conntrack bool   `json:"conntrack"`
	IPVS      bool   `json:"ipvs"`
	Links     []Link `json:"links"`
	// Defaults are the default routes of the main table.
	Defaults []DefaultRoute `json:"defaults"`
	// Routes lead to the targets; on a target to the balancers.
	Routes []Route `json:"routes"`
	// Returns lead from this target to the clients. Target only.
	Returns []Route `json:"returns,omitempty"`
	// Chains are the base chains of other tables than ours, and what they jump to.
	Chains []Chain `json:"chains"`
	// LegacyTables are those of iptables-legacy, whose rules nf_tables does not
	// show.
	LegacyTables []string `json:"legacy_tables,omitempty"`
	// Flows are the balanced ones, summed up. Balancer only.
	Flows []FlowSum `json:"flows,omitempty"`
	// Duplicates are VIPs that another host answered for when asked.
	Duplicates []Duplicate `json:"duplicates,omitempty"`
}

// A Link is an interface.
type Link struct {
	Name     string `json:"name"`
	Index    int    `json:"index"`
	Kind     string `json:"kind,omitempty"` // bridge, veth, vlan …; empty for hardware
	MTU      int    `json:"mtu"`            // bytes
	Up       bool   `json:"up"`
	Loopback bool   `json:"loopback,omitempty"`
	// HardwareAddr is as in 02:00:5e:10:00:00; empty where the link has none.
	HardwareAddr string `json:"hardware_addr,omitempty"`
	// Addresses have the length of the prefix they were bound with.
	Addresses []netip.Prefix `json:"addresses,omitempty"`
}

// A DefaultRoute is one of the main table.
type DefaultRoute struct {
	IPv6      bool   `json:"ipv6,omitempty"`
	Interface string `json:"interface"`
	// Advertised says that a router's advertisement brought it (RFC 4861).
	Advertised bool `json:"advertised,omitempty"`
}

// A Route is the kernel's answer to how an address is reached.
type Route struct {
	To netip.Addr `json:"to"`
	// From is the source that was asked for; the zero Addr leaves it open.
	From netip.Addr `json:"from,omitzero"`
	// Reachable is false when there is none, or one that refuses.
	Reachable bool   `json:"reachable"`
	Interface string `json:"interface,omitempty"`
	// Gateway is the zero Addr when To is on the link.
	Gateway netip.Addr `json:"gateway,omitzero"`
	// Source is the address that the kernel would choose.
	Source netip.Addr `json:"source,omitzero"`
	// Local says that To is an address of this host.
	Local bool `json:"local,omitempty"`
}

// A FlowSum says how many flows between two addresses there are, and whether
// they are answered.
type FlowSum struct {
	Client     netip.Addr `json:"client"`
	Target     netip.Addr `json:"target"`
	Answered   int        `json:"answered"`
	Unanswered int        `json:"unanswered"`
}

// A Duplicate is a VIP that another host has as well.
type Duplicate struct {
	VIP          netip.Addr `json:"vip"`
	Interface    string     `json:"interface"`
	HardwareAddr string     `json:"hardware_addr"`
}

// number is the value of a sysctl that is one.
func (f *Facts) number(key string) (int, bool) {
	n, err := strconv.Atoi(f.Sysctls[key])
	return n, err == nil
}

// is reports that a sysctl exists and has that value.
func (f *Facts) is(key, value string) bool { return f.Sysctls[key] == value }

func (f *Facts) link(name string) (Link, bool) {
	for _, l := range f.Links {
		if l.Name == name {
			return l, true
		}
	}
	return Link{}, false
}

// holders are the links that have the address.
func (f *Facts) holders(a netip.Addr) (found []Link) {
	for _, l := range f.Links {
		if _, ok := l.prefixOf(a); ok {
			found = append(found, l)
		}
	}
	return found
}

// prefixOf is the address as it was bound to the link.
func (l Link) prefixOf(a netip.Addr) (netip.Prefix, bool) {
	for _, p := range l.Addresses {
		if p.Addr() == a {
			return p, true
		}
	}
	return netip.Prefix{}, false
}

// defaultVia reports whether there is a default route of the family, and
// whether one leaves by the interface.
func (f *Facts) defaultVia(ipv6 bool, ifname string) (exists, here bool) {
	for _, d := range f.Defaults {
		if d.IPv6 == ipv6 {
			exists = true
			here = here || d.Interface == ifname
		}
	}
	return exists, here
}

// A wantedTarget is a target of the configuration and how its clients' address
// travels.
type wantedTarget struct {
	balancer.Target
	group    *balancer.TargetGroup
	clientIP balancer.ClientIP
}

// keepsClient says that the target answers the client's own address, and so has
// to answer by way of the balancer.
func (t wantedTarget) keepsClient() bool {
	return t.clientIP == balancer.Preserve || t.clientIP == balancer.HairpinSNAT
}

func (t wantedTarget) relayed() bool { return t.clientIP == balancer.ProxyProtocolV2 }

// targets lists those of the configuration, one for each address and port.
func (f *Facts) targets() (all []wantedTarget) {
	if f.Spec == nil {
		return nil
	}
	for i := range f.Spec.TargetGroups {
		g := &f.Spec.TargetGroups[i]
		for _, t := range g.Targets {
			all = append(all, wantedTarget{t, g, g.ClientIPOf(t)})
		}
	}
	return all
}

func (f *Facts) targetsWhere(which func(wantedTarget) bool) []wantedTarget {
	return slices.DeleteFunc(f.targets(), func(t wantedTarget) bool { return !which(t) })
}

// forwards reports whether packets of the family are forwarded to a target.
func (f *Facts) forwards(ipv6 bool) bool {
	return len(f.targetsWhere(func(t wantedTarget) bool { return !t.relayed() && t.Address.Is6() == ipv6 })) > 0
}

func (f *Facts) relays() bool { return len(f.targetsWhere(wantedTarget.relayed)) > 0 }

// relayedListeners are those with a group that has relayed targets.
func (f *Facts) relayedListeners() (found []balancer.Listener) {
	if f.Spec == nil {
		return nil
	}
	for _, l := range f.Spec.Listeners {
		if slices.ContainsFunc(f.targets(), func(t wantedTarget) bool {
			return t.relayed() && slices.ContainsFunc(l.Forward, func(w balancer.WeightedGroup) bool { return w.TargetGroup == t.group.Name })
		}) {
			found = append(found, l)
		}
	}
	return found
}

// egress lists the interfaces that lead to targets of the family (on a target,
// to the balancer), sorted.
func (f *Facts) egress(ipv6 bool) (names []string) {
	for _, r := range f.Routes {
		if r.Reachable && !r.Local && r.To.Is6() == ipv6 {
			names = append(names, r.Interface)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func (f *Facts) routeTo(a netip.Addr) (Route, bool) {
	for _, r := range f.Routes {
		if r.To == a {
			return r, true
		}
	}
	return Route{}, false
}

// client is the one that stands for callers of the family.
func (f *Facts) client(ipv6 bool) (netip.Addr, bool) {
	for _, c := range f.Clients {
		if c.Is6() == ipv6 {
			return c, true
		}
	}
	return netip.Addr{}, false
}

// single is the address as a prefix of its full length.
func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func compareRoutes(a, b Route) int {
	return cmp.Or(a.To.Compare(b.To), a.From.Compare(b.From))
}
