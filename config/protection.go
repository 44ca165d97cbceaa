package config

import (
	"fmt"
	"slices"

	"nlb/balancer"
)

// checkSYNProxy reports a SYN proxy where the kernel can have none.
func (c *checker) checkSYNProxy(l *rawListener) {
	on := l.SYNProxy.Enabled
	if !on.OK || !on.V {
		return
	}
	if l.Protocol.OK && l.Protocol.V == balancer.UDP {
		c.r.add(on.place, "true, but the listener is UDP, which has no handshake", "false, or protocol: TCP or TCP_UDP")
	}
	// nft_synproxy.c checks all segments by nf_ip_checksum, which is IPv4's, so that those
	// of IPv6 pass only where the network card has said that they are right.
	if l.VIP.OK && l.VIP.V.Is6() {
		c.r.add(on.place, "true, but the VIP is IPv6, whose segments the kernel's SYN proxy takes for damaged: it checks them as IPv4's", "false, or an IPv4 VIP")
	}
	if c.Dataplane.OK && c.Dataplane.V == balancer.IPVS.String() {
		c.r.add(on.place, "true, but IPVS takes the handshakes", "false, or dataplane: nftables")
	}
	for i := range l.Forward {
		g, ok := c.groups[l.Forward[i].TargetGroup.V]
		if ok && l.Forward[i].TargetGroup.OK && g.relaysAny() {
			c.r.add(on.place, fmt.Sprintf("true, but %s is relayed: the relay's own socket takes the handshakes, and the kernel answers them with SYN cookies when there are too many", quote(g.Name.V)),
				"false, or another client_ip")
			return
		}
	}
}

// relaysAny reports whether the relay makes connections to a target of the group, or
// would if it had any.
func (g *rawTargetGroup) relaysAny() bool {
	relayed := func(mode rawClientIP) bool { return mode.OK && mode.V == balancer.ProxyProtocolV2 }
	return relayed(g.ClientIP) || slices.ContainsFunc(g.Targets, func(t rawTarget) bool { return t.ClientIP.Written && relayed(t.ClientIP) })
}

// checkSourceLimit reports a client that is longer than an address, and a limit of flows
// that nobody counts.
func (c *checker) checkSourceLimit(l *rawListener) {
	most, length := l.MaxConnectionsPerSource, l.SourcePrefixLength
	if length.OK && length.Written && l.VIP.OK && length.V > l.VIP.V.BitLen() {
		c.r.add(length.place, fmt.Sprintf("%d bits, and the VIP is %s", length.V, family(l.VIP.V)), fmt.Sprintf("at most %d", l.VIP.V.BitLen()))
	}
	tracked := c.Relay.Conntrack
	if !most.OK || most.V == 0 || !tracked.OK || tracked.V {
		return
	}
	if !slices.ContainsFunc(l.Forward, func(f rawForward) bool {
		g, ok := c.groups[f.TargetGroup.V]
		return !ok || !g.onlyRelays()
	}) {
		c.r.add(most.place, fmt.Sprintf("%d, but relay.conntrack is false, and conntrack is what counts the listener's connections", most.V), "0, or relay: {conntrack: true}")
	}
}

// onlyRelays reports that the kernel sends flows to no target of the group.
func (g *rawTargetGroup) onlyRelays() bool {
	if len(g.Targets) == 0 {
		return g.ClientIP.OK && g.ClientIP.V == balancer.ProxyProtocolV2
	}
	return !slices.ContainsFunc(g.Targets, func(t rawTarget) bool { return t.forwarded(g) })
}
