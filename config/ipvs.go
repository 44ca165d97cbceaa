package config

import (
	"fmt"
	"net/netip"

	"nlb/balancer"
)

// checkIPVS reports what IPVS cannot do: its schedulers know nothing of a client
// but its address and port, and a virtual service has a destination once.
func (c *checker) checkIPVS() {
	if !c.Dataplane.OK || c.Dataplane.V != balancer.IPVS.String() {
		return
	}
	if f := c.Flowtable; f.OK && f.V {
		c.r.add(f.place, "true, but the answers of flows that a flowtable has would pass by IPVS", "false, or dataplane: nftables")
	}
	for i := range c.TargetGroups {
		if avoid := c.TargetGroups[i].AvoidSelf; avoid.OK && avoid.V {
			c.r.add(avoid.place, "true, but IPVS cannot leave the client out of its choice",
				"false, client_ip: hairpin_snat, or dataplane: nftables")
		}
	}
	for i := range c.Listeners {
		c.checkShared(&c.Listeners[i])
	}
}

// checkShared reports groups of a listener that share a target of the kernel's.
// What is relayed is no destination of IPVS.
func (c *checker) checkShared(l *rawListener) {
	of := make(map[netip.AddrPort]string)
	for i := range l.Forward {
		f := &l.Forward[i]
		g, ok := c.groups[f.TargetGroup.V]
		if !ok || !f.TargetGroup.OK {
			continue
		}
		for j := range g.Targets {
			t := &g.Targets[j]
			port := t.port(g)
			if !t.Address.OK || port == 0 || !t.forwarded(g) || l.VIP.OK && !sameFamily(t.Address.V, l.VIP.V) {
				continue
			}
			at := netip.AddrPortFrom(t.Address.V, port)
			if first, ok := of[at]; ok && first != g.Name.V {
				c.r.add(f.TargetGroup.place, fmt.Sprintf("%s is a target of %s too, and IPVS has a destination once in a service", at, quote(first)),
					"other targets, or dataplane: nftables")
				break
			}
			of[at] = g.Name.V
		}
	}
}

// forwarded reports whether it is the kernel that sends flows to a target of g.
func (t *rawTarget) forwarded(g *rawTargetGroup) bool {
	mode := g.ClientIP
	if t.ClientIP.Written {
		mode = t.ClientIP
	}
	return mode.OK && mode.V != balancer.ProxyProtocolV2
}
