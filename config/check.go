package config

import (
	"fmt"
	"net/netip"
	"slices"

	"nlb/balancer"
)

// check reports what is wrong between values that are right by themselves. A
// value that could not be read was reported already and takes part in nothing.
func (f *rawFile) check(r *report) {
	c := &checker{rawFile: f, r: r, vips: make(map[netip.Addr]place), groups: make(map[string]*rawTargetGroup)}
	c.checkVIPs()
	c.checkSources()
	c.checkGroups()
	c.checkListeners()
	c.checkIPVS()
}

type checker struct {
	*rawFile
	r      *report
	vips   map[netip.Addr]place
	groups map[string]*rawTargetGroup
	// Whether vips and groups lack entries that could not be read. What is not
	// in them may then be right all the same.
	vipsUnsure, groupsUnsure bool
}

func (c *checker) checkVIPs() {
	c.vipsUnsure = c.broken["vips"]
	for _, v := range c.VIPs {
		if !v.Address.OK {
			c.vipsUnsure = true
			continue
		}
		if first, ok := c.vips[v.Address.V]; ok {
			c.r.add(v.Address.place, v.Address.V.String()+" is listed twice", alreadyOn(first))
			continue
		}
		c.vips[v.Address.V] = v.Address.place
	}
}

func alreadyOn(first place) string { return fmt.Sprintf("it is already on line %d", first.Line) }

// notVIP reports a VIP that is used as something else.
func (c *checker) notVIP(a rawAddress, why, want string) {
	if !a.OK {
		return
	}
	if _, ok := c.vips[a.V]; ok {
		c.r.add(a.place, a.V.String()+" is a VIP; "+why, want)
	}
}

func (c *checker) checkSources() {
	seen := make(map[netip.Addr]place)
	for _, a := range c.SourceAddresses {
		if !a.OK {
			continue
		}
		if first, ok := seen[a.V]; ok {
			c.r.add(a.place, a.V.String()+" is listed twice", alreadyOn(first))
			continue
		}
		seen[a.V] = a.place
		c.notVIP(a, "a target that has the VIP bound itself drops packets from it", "an address of this host that is no VIP")
	}
}

// unique reports a name that an earlier item has, and returns whether it is new.
func (c *checker) unique(seen map[string]place, n rawName) bool {
	if !n.OK {
		return false
	}
	if first, ok := seen[n.V]; ok {
		c.r.add(n.place, quote(n.V)+" is taken", alreadyOn(first))
		return false
	}
	seen[n.V] = n.place
	return true
}

// ---- listeners ----

// An endpoint is what only one listener can have.
type endpoint struct {
	vip    netip.Addr
	number uint8 // IP protocol
	port   uint16
}

func (c *checker) checkListeners() {
	names := make(map[string]place)
	endpoints := make(map[endpoint]*rawListener)
	for i := range c.Listeners {
		l := &c.Listeners[i]
		c.unique(names, l.Name)
		c.checkListenerVIP(l)
		c.checkEndpoint(l, endpoints)
		c.checkAllow(l)
		c.checkForward(l)
		c.checkSYNProxy(l)
		c.checkSourceLimit(l)
	}
}

func (c *checker) checkListenerVIP(l *rawListener) {
	if _, ok := c.vips[l.VIP.V]; ok || !l.VIP.OK || c.vipsUnsure {
		return
	}
	want := "add it to vips"
	if known := c.vipList(); len(known) > 0 {
		want += ", or use " + list(known)
	}
	c.r.add(l.VIP.place, l.VIP.V.String()+" is not in vips", want)
}

// most bounds how many choices a message lists.
const most = 8

func (c *checker) vipList() []string {
	var known []string
	for _, v := range c.VIPs[:min(len(c.VIPs), most)] {
		known = append(known, v.Address.V.String())
	}
	return known
}

func (c *checker) checkEndpoint(l *rawListener, taken map[endpoint]*rawListener) {
	if !l.VIP.OK || !l.Protocol.OK || !l.Port.OK {
		return
	}
	reported := false
	for _, number := range l.Protocol.V.Numbers() {
		e := endpoint{l.VIP.V, number, l.Port.V}
		first, ok := taken[e]
		switch {
		case !ok:
			taken[e] = l
		case !reported:
			c.r.add(l.Port.place,
				fmt.Sprintf("%s %s is taken by the %s listener on line %d", l.Protocol.V, netip.AddrPortFrom(e.vip, e.port), first.Protocol.V, first.Line),
				"another port, protocol or VIP")
			reported = true
		}
	}
}

// checkAllow refuses a list that lets nobody in: an IPv6 VIP has no IPv4 clients.
func (c *checker) checkAllow(l *rawListener) {
	if !l.VIP.OK || l.broken["allow"] || len(l.Allow) == 0 {
		return
	}
	for _, p := range l.Allow {
		if !p.OK || sameFamily(p.V.Addr(), l.VIP.V) {
			return
		}
	}
	c.r.add(l.at("allow"), "has no "+family(l.VIP.V)+" prefix, so that nobody could reach "+l.VIP.V.String(), "a prefix of the VIP's family")
}

func (c *checker) checkForward(l *rawListener) {
	if l.broken["forward"] {
		return
	}
	seen := make(map[string]place)
	total, sure := 0, true
	for i := range l.Forward {
		f := &l.Forward[i]
		total += f.Weight.V
		sure = sure && f.Weight.OK
		if !f.TargetGroup.OK {
			continue
		}
		if first, ok := seen[f.TargetGroup.V]; ok {
			c.r.add(f.TargetGroup.place, quote(f.TargetGroup.V)+" is listed twice", alreadyOn(first))
			continue
		}
		seen[f.TargetGroup.V] = f.TargetGroup.place
		if g, ok := c.groups[f.TargetGroup.V]; ok {
			c.checkPair(l, f, g)
		} else {
			c.unknownGroup(f.TargetGroup)
		}
	}
	if total == 0 && sure && len(l.Forward) > 0 {
		c.r.add(l.at("forward"), "all weights are 0, so that no flow could be forwarded", "a weight of 1 or more")
	}
}

func (c *checker) unknownGroup(n rawName) {
	if c.groupsUnsure || c.r.full() {
		return
	}
	var known []string
	for _, g := range c.TargetGroups {
		known = append(known, g.Name.V)
	}
	want := didYouMean(n.V, known)
	switch {
	case want != "":
	case len(known) == 0:
		want = "target_groups is empty"
	case len(known) > most:
		want = "one of the names in target_groups"
	default:
		want = list(known)
	}
	c.r.add(n.place, "no target group is named "+quote(n.V), want)
}

// checkPair reports a group that the listener can never forward to.
func (c *checker) checkPair(l *rawListener, f *rawForward, g *rawTargetGroup) {
	if l.Protocol.OK && g.Protocol.OK && !speaks(g.Protocol.V, l.Protocol.V) {
		want := "TCP_UDP"
		if l.Protocol.V != balancer.TCPUDP {
			want = l.Protocol.V.String() + " or TCP_UDP"
		}
		c.r.add(f.TargetGroup.place, fmt.Sprintf("the listener is %s and %s is %s", l.Protocol.V, quote(g.Name.V), g.Protocol.V), "a group with protocol "+want)
	}
	if l.VIP.OK && !g.broken["targets"] && len(g.Targets) > 0 && !g.reaches(l.VIP.V) && !g.relays() {
		c.r.add(f.TargetGroup.place, fmt.Sprintf("the VIP is %s and no target of %s is", family(l.VIP.V), quote(g.Name.V)), "a target of the VIP's family")
	}
}

// speaks reports whether targets of protocol group can serve all that a
// listener of protocol wanted accepts.
func speaks(group, wanted balancer.Protocol) bool {
	return group == wanted || group == balancer.TCPUDP
}

// relays reports whether a target has, or may have, connections made by the
// relay, which are of the target's family whatever the client's is.
func (g *rawTargetGroup) relays() bool {
	return slices.ContainsFunc(g.Targets, func(t rawTarget) bool { return !t.forwarded(g) })
}

// reaches reports whether a target has, or may have, the family of a.
func (g *rawTargetGroup) reaches(a netip.Addr) bool {
	return slices.ContainsFunc(g.Targets, func(t rawTarget) bool { return !t.Address.OK || sameFamily(t.Address.V, a) })
}

func sameFamily(a, b netip.Addr) bool { return a.Is4() == b.Is4() }

func family(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

// ---- target groups ----

func (c *checker) checkGroups() {
	c.groupsUnsure = c.broken["target_groups"]
	names := make(map[string]place)
	for i := range c.TargetGroups {
		g := &c.TargetGroups[i]
		if c.unique(names, g.Name) {
			c.groups[g.Name.V] = g
		}
		c.groupsUnsure = c.groupsUnsure || !g.Name.OK
		c.checkMode(g)
		c.checkUnhealthy(g)
		c.checkHealthCheck(g)
		c.checkPassive(g)
		c.checkTargets(g)
	}
}

// checkMode reports options that the group's client_ip does not have.
func (c *checker) checkMode(g *rawTargetGroup) {
	if !g.ClientIP.OK {
		return
	}
	mode := g.ClientIP.V
	only := func(b rawBool, needs balancer.ClientIP, why string) {
		if b.OK && b.V && mode != needs {
			c.r.add(b.place, fmt.Sprintf("true, but client_ip is %s; %s", mode, why), "false, or client_ip: "+needs.String())
		}
	}
	only(g.AvoidSelf, balancer.Preserve, "a client that is its own target already works")
	only(g.HairpinSubnet, balancer.HairpinSNAT, "there is no hairpin domain to widen")
	only(g.ProxyProtocol.UniqueID, balancer.ProxyProtocolV2, "there is no header to put it in")
	only(g.ProxyProtocol.CRC32C, balancer.ProxyProtocolV2, "there is no header to put it in")
	c.checkRelayed(g.ClientIP, g)
}

// checkRelayed reports a mode that relays what cannot be relayed. Of UDP each
// datagram would need the header, which makes large ones too large for the way;
// few receivers read it.
func (c *checker) checkRelayed(mode rawClientIP, g *rawTargetGroup) {
	if mode.OK && mode.V == balancer.ProxyProtocolV2 && g.Protocol.OK && g.Protocol.V != balancer.TCP {
		c.r.add(mode.place, "proxy_protocol_v2 relays TCP only, and the group is "+g.Protocol.V.String(), "preserve, hairpin_snat or snat, or protocol: TCP")
	}
}

// checkUnhealthy refuses an interval in which nothing is left to drain, as
// ELBv2 does (target_health_state.unhealthy.draining_interval_seconds).
func (c *checker) checkUnhealthy(g *rawTargetGroup) {
	u := g.Unhealthy
	if u.ConnectionTermination.OK && u.ConnectionTermination.V && u.DrainingInterval.OK && u.DrainingInterval.V > 0 {
		c.r.add(u.DrainingInterval.place, "nothing drains while connection_termination cuts the flows", "0s, or connection_termination: false")
	}
}

func (c *checker) checkHealthCheck(g *rawTargetGroup) {
	h := &g.HealthCheck
	if g.broken["health_check"] {
		return
	}
	if h.Protocol.OK && h.Protocol.V == balancer.CheckTCP {
		c.httpOnly(h)
	}
	if h.Protocol.OK {
		c.checkTLS(h)
	}
	if h.Interval.OK && h.Timeout.OK && h.Timeout.Written && h.Timeout.V > h.Interval.V {
		c.r.add(h.Timeout.place, fmt.Sprintf("%s is longer than the interval of %s, so that probes would pile up", short(h.Timeout.V), short(h.Interval.V)), "at most the interval")
	}
	c.notVIP(h.Source, "a target that has the VIP bound itself drops probes from it", "an address of this host that is no VIP")
	if h.Source.OK && h.Source.V.IsValid() && len(g.Targets) > 0 && !g.broken["targets"] && !g.reaches(h.Source.V) {
		c.r.add(h.Source.place, fmt.Sprintf("%s is %s and no target of the group is", h.Source.V, family(h.Source.V)), "an address of the targets' family")
	}
}

// httpOnly reports what a TCP check would ignore. The defaults may be spelled
// out: they change nothing.
func (c *checker) httpOnly(h *rawHealthCheck) {
	const want = "protocol: HTTP or HTTPS, or leave the key out"
	refuse := func(at place, written, isDefault bool) {
		if written && !isDefault {
			c.r.add(at, "a TCP check sends no request", want)
		}
	}
	refuse(h.Path.place, h.Path.Written && h.Path.OK, h.Path.V == "/")
	refuse(h.Host.place, h.Host.Written && h.Host.OK, h.Host.V == "")
	refuse(h.Matcher.place, h.Matcher.Written && h.Matcher.OK, slices.Equal(h.Matcher.V, []balancer.StatusRange{{First: 200, Last: 399}}))
}

// checkTLS reports what a check without TLS, or one that verifies nothing, would
// ignore: a file that looks as if targets were authenticated had better do so.
func (c *checker) checkTLS(h *rawHealthCheck) {
	verify := h.VerifyTLS.OK && h.VerifyTLS.V
	named := h.ServerName.OK && h.ServerName.V != ""
	rooted := h.CAFile.OK && h.CAFile.V != ""
	if h.Protocol.V != balancer.CheckHTTPS {
		refuse := func(at place, written bool) {
			if written {
				c.r.add(at, "a check with protocol: "+h.Protocol.V.String()+" speaks no TLS", "protocol: HTTPS, or leave the key out")
			}
		}
		refuse(h.VerifyTLS.place, verify)
		refuse(h.ServerName.place, named)
		refuse(h.CAFile.place, rooted)
		return
	}
	if rooted && h.VerifyTLS.OK && !verify {
		c.r.add(h.CAFile.place, "without verify_tls no certificate is looked at", "verify_tls: true, or leave the key out")
	}
}

// checkPassive reports a check that would judge nothing, and a first hold that
// is beyond the longest. The latter counts while the check is off too: turning
// it on should not bring up an old mistake.
func (c *checker) checkPassive(g *rawTargetGroup) {
	p := &g.PassiveHealthCheck
	if p.Enabled.OK && p.Enabled.V && g.Protocol.OK && g.Protocol.V == balancer.UDP {
		c.r.add(p.Enabled.place, "true, but the group is UDP, where silence is no failure", "false, or protocol: TCP or TCP_UDP")
	}
	if !p.Hold.OK || !p.MaxHold.OK || p.Hold.V <= p.MaxHold.V {
		return
	}
	if p.Hold.Written {
		c.r.add(p.Hold.place, fmt.Sprintf("%s is longer than the max_hold of %s", short(p.Hold.V), short(p.MaxHold.V)), "at most max_hold, or a longer max_hold")
		return
	}
	c.r.add(p.MaxHold.place, fmt.Sprintf("%s is shorter than the hold of %s", short(p.MaxHold.V), short(p.Hold.V)), "at least hold, or a shorter hold")
}

func (c *checker) checkTargets(g *rawTargetGroup) {
	seen := make(map[netip.AddrPort]place)
	for i := range g.Targets {
		t := &g.Targets[i]
		if t.ClientIP.Written {
			c.checkRelayed(t.ClientIP, g)
		}
		c.notVIP(t.Address, "flows would come back to the balancer", "the address of the target itself")
		port := t.port(g)
		if !t.Address.OK || port == 0 {
			continue
		}
		ap := netip.AddrPortFrom(t.Address.V, port)
		if first, ok := seen[ap]; ok {
			c.r.add(t.Address.place, ap.String()+" is listed twice", alreadyOn(first))
			continue
		}
		seen[ap] = t.Address.place
	}
}
