package doctor

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Sysctls are named by their path below /proc/sys, where a dot in an
// interface's name is just a dot.
const (
	keyForward4    = "net/ipv4/ip_forward"
	keyForward6    = "net/ipv6/conf/all/forwarding"
	keyBridge4     = "net/bridge/bridge-nf-call-iptables"
	keyBridge6     = "net/bridge/bridge-nf-call-ip6tables"
	keyPortRange   = "net/ipv4/ip_local_port_range"
	keyBacklog     = "net/core/somaxconn"
	keyCTMax       = "net/netfilter/nf_conntrack_max"
	keyCTCount     = "net/netfilter/nf_conntrack_count"
	keyCTBuckets   = "net/netfilter/nf_conntrack_buckets"
	keyCTAccounts  = "net/netfilter/nf_conntrack_acct"
	keyCTEvents    = "net/netfilter/nf_conntrack_events"
	keyCTLoose     = "net/netfilter/nf_conntrack_tcp_loose"
	keyCTLiberal   = "net/netfilter/nf_conntrack_tcp_be_liberal"
	allInterfaces  = "all"
	confForwarding = "forwarding"
	confRPFilter   = "rp_filter"
	confSendRedir  = "send_redirects"
	confRedirects  = "accept_redirects"
	confAcceptRA   = "accept_ra"
	confLocalnet   = "route_localnet"
	confDisable6   = "disable_ipv6"
	confPromote    = "promote_secondaries"
)

// hostKeys are the sysctls of the whole host that checks look at, and confKeys
// those of each interface, by family.
var (
	hostKeys = []string{
		keyForward4, keyForward6, keyBridge4, keyBridge6, keyPortRange, keyBacklog,
		keyCTMax, keyCTCount, keyCTBuckets, keyCTAccounts, keyCTEvents, keyCTLoose, keyCTLiberal,
	}
	confKeys = map[string][]string{
		"ipv4": {confForwarding, confRPFilter, confSendRedir, confRedirects, confLocalnet},
		"ipv6": {confRedirects, confAcceptRA, confDisable6},
	}
)

func conf4(ifname, name string) string { return "net/ipv4/conf/" + ifname + "/" + name }
func conf6(ifname, name string) string { return "net/ipv6/conf/" + ifname + "/" + name }

// set is the command that sets a sysctl. There the dots of an interface's name
// are slashes (sysctl(8)).
func set(key, value string) Command {
	return Command{"sysctl", "-w", dotted(key) + "=" + value}
}

func dotted(key string) string {
	return strings.Map(func(r rune) rune {
		switch r {
		case '/':
			return '.'
		case '.':
			return '/'
		}
		return r
	}, key)
}

// says is a sysctl and its value, as sysctl(8) prints them.
func (f *Facts) says(key string) string { return dotted(key) + " = " + f.Sysctls[key] }

// wrong is a check of one sysctl that must not have a value.
func wrong(key, value, cure string, matters func(*Facts) bool) func(*Facts) []symptom {
	return func(f *Facts) []symptom {
		if !matters(f) || !f.is(key, value) {
			return nil
		}
		return []symptom{found(f.says(key), set(key, cure))}
	}
}

// strict reports that the kernel drops packets on the interface whose source it
// would not answer by the same interface (RFC 3704; the larger of the two
// settings counts, see ip-sysctl in the kernel's documentation).
func (f *Facts) strict(ifname string) bool {
	all, _ := f.number(conf4(allInterfaces, confRPFilter))
	own, _ := f.number(conf4(ifname, confRPFilter))
	return max(all, own) == 1
}

// loosen is the cure of strict: 2 is the larger one whatever the other is.
func loosen(ifname string) Command { return set(conf4(ifname, confRPFilter), "2") }

func (f *Facts) filterWords(ifname string) string {
	return fmt.Sprintf("%s, %s", f.says(conf4(allInterfaces, confRPFilter)), f.says(conf4(ifname, confRPFilter)))
}

// takesRedirects4 reports that ICMP redirects on the interface change routes
// (IN_DEV_RX_REDIRECTS in include/linux/inetdevice.h).
func (f *Facts) takesRedirects4(ifname string) bool {
	all, own := f.is(conf4(allInterfaces, confRedirects), "1"), f.is(conf4(ifname, confRedirects), "1")
	if f.is(conf4(ifname, confForwarding), "1") {
		return all && own
	}
	return all || own
}

func forwardingChecks() []Check {
	return []Check{
		{
			ID: "ip-forward", Role: Balancer, Severity: Error,
			Seeks:       "IPv4 forwarding is off, and there are IPv4 targets that are not relayed",
			Consequence: "Every packet to these targets is dropped.",
			Cure:        "sysctl -w net.ipv4.ip_forward=1 (nlb serve sets it)",
			look:        wrong(keyForward4, "0", "1", func(f *Facts) bool { return f.forwards(false) }),
		},
		{
			ID: "ip6-forward", Role: Balancer, Severity: Error,
			Seeks:       "IPv6 forwarding is off, and there are IPv6 targets that are not relayed",
			Consequence: "Every packet to these targets is dropped.",
			Cure:        "sysctl -w net.ipv6.conf.all.forwarding=1 (nlb serve sets it)",
			look:        wrong(keyForward6, "0", "1", func(f *Facts) bool { return f.forwards(true) }),
		},
		{
			ID: "interface-forwarding", Role: Balancer, Severity: Error,
			Seeks:       "IPv4 forwarding is on, but off for an interface that leads to clients or targets",
			Consequence: "Packets that arrive there, replies of targets among them, are dropped.",
			Cure:        "sysctl -w net.ipv4.conf.IF.forwarding=1",
			look:        interfaceForwarding,
		},
		{
			ID: "ipv6-disabled", Role: Balancer, Severity: Error,
			Seeks:       "there are IPv6 VIPs, and an interface that leads to clients or targets has IPv6 switched off",
			Consequence: "No IPv6 packet enters or leaves by this interface.",
			Cure:        "sysctl -w net.ipv6.conf.IF.disable_ipv6=0",
			look:        ipv6Disabled,
		},
		{
			ID: "rp-filter", Role: Balancer, Severity: Error,
			Seeks:       "a VIP is on an interface with strict reverse-path filtering (the larger of all and the interface is 1), and the default route leaves by another",
			Consequence: "Packets of clients that arrive there are dropped, because the way back to them is another interface.",
			Cure:        "sysctl -w net.ipv4.conf.IF.rp_filter=2",
			look:        reversePath,
		},
		{
			ID: "accept-ra", Role: Balancer, Severity: Error,
			Seeks:       "IPv6 forwarding is on, and the default route comes from router advertisements on an interface where accept_ra is 1",
			Consequence: "The default route is not renewed, and IPv6 clients are cut off when it expires.",
			Cure:        "sysctl -w net.ipv6.conf.IF.accept_ra=2 (nlb serve sets it)",
			look:        acceptRA,
		},
		{
			ID: "send-redirects", Role: Balancer, Severity: Warning,
			Seeks:       "ICMP redirects are sent on an interface that leads to IPv4 targets (either of all and the interface is 1)",
			Consequence: "On one arm, targets are told to answer clients directly, past the balancer.",
			Cure:        "sysctl -w net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.IF.send_redirects=0 (nlb serve sets them)",
			look:        sendRedirects,
		},
		{
			ID: "accept-redirects", Role: Balancer, Severity: Warning,
			Seeks:       "ICMP redirects are obeyed on an interface that leads to targets",
			Consequence: "Any host beside a target can draw its flows to itself.",
			Cure:        "sysctl -w net.ipv4.conf.IF.accept_redirects=0",
			look:        acceptRedirects,
		},
		{
			ID: "route-localnet", Role: Balancer, Severity: Warning,
			Seeks:       "127.0.0.0/8 is routed on an interface (route_localnet)",
			Consequence: "Services that listen on the loopback only can be reached by neighbours on the link (CVE-2020-8558).",
			Cure:        "sysctl -w net.ipv4.conf.IF.route_localnet=0",
			look:        routeLocalnet,
		},
		{
			ID: "bridge-netfilter", Role: Balancer, Severity: Warning,
			Seeks:       "this host has a bridge, and bridged packets pass the rules for routed ones (bridge-nf-call)",
			Consequence: "Packets between two ports of the bridge are balanced or dropped on the way, where no router should see them.",
			Cure:        "sysctl -w net.bridge.bridge-nf-call-iptables=0 (and -ip6tables)",
			look:        bridgeNetfilter,
		},
	}
}

// crossed lists, sorted, the interfaces that packets of clients or targets of
// the family cross here.
func (f *Facts) crossed(ipv6 bool) []string {
	names := f.egress(ipv6)
	for _, d := range f.Defaults {
		if d.IPv6 == ipv6 {
			names = append(names, d.Interface)
		}
	}
	for _, v := range f.vips() {
		if l, ok := f.link(v.Interface); ok && !l.Loopback && v.Address.Is6() == ipv6 {
			names = append(names, l.Name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func interfaceForwarding(f *Facts) (all []symptom) {
	if !f.forwards(false) || !f.is(keyForward4, "1") {
		return nil
	}
	for _, ifname := range f.crossed(false) {
		if key := conf4(ifname, confForwarding); f.is(key, "0") {
			all = append(all, found(f.says(key), set(key, "1")))
		}
	}
	return all
}

// ipv6Disabled goes by all interfaces that IPv4 uses too: a disabled one has no
// routes of IPv6 that would show that it is needed.
func ipv6Disabled(f *Facts) (all []symptom) {
	if !slices.ContainsFunc(f.vipAddrs(), isIPv6) {
		return nil
	}
	for _, ifname := range slices.Compact(slices.Sorted(slices.Values(append(f.crossed(false), f.crossed(true)...)))) {
		if key := conf6(ifname, confDisable6); f.is(key, "1") {
			all = append(all, found(f.says(key), set(key, "0")))
		}
	}
	return all
}

func reversePath(f *Facts) (all []symptom) {
	for _, v := range f.vips() {
		if v.Address.Is6() {
			continue // there is no such filter in IPv6
		}
		for _, l := range f.holders(v.Address) {
			exists, here := f.defaultVia(false, l.Name)
			if l.Loopback || !f.strict(l.Name) || !exists || here {
				continue
			}
			all = append(all, found(fmt.Sprintf("%s is on %s, where no default route leaves: %s", v.Address, l.Name, f.filterWords(l.Name)), loosen(l.Name)))
		}
	}
	return all
}

func acceptRA(f *Facts) (all []symptom) {
	if !f.is(keyForward6, "1") {
		return nil
	}
	for _, d := range f.Defaults {
		if key := conf6(d.Interface, confAcceptRA); d.IPv6 && d.Advertised && f.is(key, "1") {
			all = append(all, found(fmt.Sprintf("%s, %s", f.says(key), f.says(keyForward6)), set(key, "2")))
		}
	}
	return all
}

// sendRedirects looks at either setting, because one is enough for the kernel.
func sendRedirects(f *Facts) (all []symptom) {
	if !f.forwards(false) {
		return nil
	}
	for _, ifname := range f.egress(false) {
		var cure []Command
		for _, key := range []string{conf4(allInterfaces, confSendRedir), conf4(ifname, confSendRedir)} {
			if f.is(key, "1") {
				cure = append(cure, set(key, "0"))
			}
		}
		if len(cure) > 0 {
			all = append(all, found(fmt.Sprintf("%s, %s", f.says(conf4(allInterfaces, confSendRedir)), f.says(conf4(ifname, confSendRedir))), cure...))
		}
	}
	return all
}

func acceptRedirects(f *Facts) (all []symptom) {
	for _, ifname := range f.egress(false) {
		if key := conf4(ifname, confRedirects); f.forwards(false) && f.is(conf4(ifname, confForwarding), "1") && f.takesRedirects4(ifname) {
			all = append(all, found(fmt.Sprintf("%s, %s", f.says(conf4(allInterfaces, confRedirects)), f.says(key)), set(key, "0")))
		}
	}
	return all
}

func routeLocalnet(f *Facts) (all []symptom) {
	for _, key := range slices.Sorted(maps.Keys(f.Sysctls)) {
		if strings.HasPrefix(key, "net/ipv4/conf/") && strings.HasSuffix(key, "/"+confLocalnet) && f.is(key, "1") {
			all = append(all, found(f.says(key), set(key, "0")))
		}
	}
	return all
}

func bridgeNetfilter(f *Facts) (all []symptom) {
	if !slices.ContainsFunc(f.Links, func(l Link) bool { return l.Kind == "bridge" }) {
		return nil
	}
	for _, k := range []struct {
		key  string
		ipv6 bool
	}{{keyBridge4, false}, {keyBridge6, true}} {
		if f.forwards(k.ipv6) && f.is(k.key, "1") {
			all = append(all, found(f.says(k.key), set(k.key, "0")))
		}
	}
	return all
}
