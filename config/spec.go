package config

import (
	"net/netip"
	"strings"
	"time"

	"nlb/balancer"
)

// spec is what a file without problems asks for, in the order of the file.
func (f *rawFile) spec() *balancer.Spec {
	// Auto is nftables: that does all that a file can ask for, and IPVS needs it
	// too, so that no kernel has only the other.
	dataplane := balancer.NFTables
	if f.Dataplane.V == balancer.IPVS.String() {
		dataplane = balancer.IPVS
	}
	return &balancer.Spec{
		Dataplane:       dataplane,
		SourceAddresses: each(f.SourceAddresses, (*rawAddress).value),
		Flowtable:       f.Flowtable.V,
		UntrackedRelay:  !f.Relay.Conntrack.V,
		VIPs: each(f.VIPs, func(v *rawVIP) balancer.VIP {
			return balancer.VIP{Address: v.Address.V, Interface: v.Interface.V}
		}),
		Listeners:    each(f.Listeners, (*rawListener).spec),
		TargetGroups: each(f.TargetGroups, (*rawTargetGroup).spec),
	}
}

// each maps a list; an empty one to nil, so that "no key" and "[]" are equal.
func each[R, T any](raw []R, f func(*R) T) []T {
	var out []T
	for i := range raw {
		out = append(out, f(&raw[i]))
	}
	return out
}

func (v *value[T, F]) value() T { return v.V }

func prefixes(raw []rawPrefix) []netip.Prefix { return each(raw, (*rawPrefix).value) }

func (l *rawListener) spec() balancer.Listener {
	return balancer.Listener{
		Name:     l.Name.V,
		VIP:      l.VIP.V,
		Protocol: l.Protocol.V,
		Port:     l.Port.V,
		Forward: each(l.Forward, func(f *rawForward) balancer.WeightedGroup {
			return balancer.WeightedGroup{TargetGroup: f.TargetGroup.V, Weight: f.Weight.V}
		}),
		TCPIdleTimeout: l.TCPIdleTimeout.V,
		Allow:          prefixes(l.Allow),
		SYNProxy:       l.synProxy(),
		SourceLimit:    l.sourceLimit(),
	}
}

// synProxy is the zero value while the proxy is off, whatever else the file says.
func (l *rawListener) synProxy() balancer.SYNProxy {
	p := &l.SYNProxy
	if !p.Enabled.V {
		return balancer.SYNProxy{}
	}
	return balancer.SYNProxy{MSS: uint16(p.MSS.V), WindowScale: uint8(p.WindowScale.V), Timestamps: p.Timestamps.V}
}

// sourceLimit is the zero value without a limit.
func (l *rawListener) sourceLimit() balancer.SourceLimit {
	if l.MaxConnectionsPerSource.V == 0 {
		return balancer.SourceLimit{}
	}
	return balancer.SourceLimit{Flows: uint32(l.MaxConnectionsPerSource.V), Prefix: l.sourcePrefixLength()}
}

func (g *rawTargetGroup) spec() balancer.TargetGroup {
	return balancer.TargetGroup{
		Name:          g.Name.V,
		Protocol:      g.Protocol.V,
		Port:          g.Port.V,
		ClientIP:      g.ClientIP.V,
		AvoidSelf:     g.AvoidSelf.V,
		HairpinSubnet: g.HairpinSubnet.V,
		Stickiness:    g.Stickiness.V,
		DeregistrationDelay: balancer.DeregistrationDelay{
			Timeout:               g.DeregistrationDelay.Timeout.V,
			ConnectionTermination: g.connectionTermination(),
		},
		Unhealthy: balancer.UnhealthyAction{
			ConnectionTermination: g.Unhealthy.ConnectionTermination.V,
			DrainingInterval:      g.Unhealthy.DrainingInterval.V,
		},
		FailOpen: balancer.FailOpen{
			MinimumHealthyCount:      g.FailOpen.MinimumHealthyCount.V,
			MinimumHealthyPercentage: g.FailOpen.MinimumHealthyPercentage.V,
		},
		ProxyProtocol: balancer.ProxyProtocol{
			UniqueID: g.ProxyProtocol.UniqueID.V,
			CRC32C:   g.ProxyProtocol.CRC32C.V,
		},
		HealthCheck: g.HealthCheck.spec(),
		Passive:     g.PassiveHealthCheck.spec(),
		Targets: each(g.Targets, func(t *rawTarget) balancer.Target {
			return balancer.Target{
				Address: t.Address.V, Port: t.port(g), Weight: t.Weight.V,
				ClientIP: t.clientIP(g), Colocated: prefixes(t.Colocated),
			}
		}),
	}
}

func (h *rawHealthCheck) spec() balancer.HealthCheck {
	return balancer.HealthCheck{
		Protocol:           h.Protocol.V,
		Port:               h.Port.V,
		Path:               h.Path.V,
		Host:               h.Host.V,
		Matcher:            h.Matcher.V,
		Interval:           h.Interval.V,
		Timeout:            h.timeout(),
		HealthyThreshold:   h.HealthyThreshold.V,
		UnhealthyThreshold: h.UnhealthyThreshold.V,
		Source:             h.Source.V,
		ProxyProtocolLocal: h.ProxyProtocol.V == "local",
		VerifyTLS:          h.VerifyTLS.V,
		ServerName:         h.ServerName.V,
		TrustedRoots:       h.trustedRoots,
	}
}

// spec is the zero value while the check is off, whatever else the file says:
// its numbers may wait there for the day it is turned on.
func (p *rawPassiveHealthCheck) spec() balancer.PassiveCheck {
	if !p.Enabled.V {
		return balancer.PassiveCheck{}
	}
	return balancer.PassiveCheck{MaxFailures: p.MaxFailures.V, Hold: p.Hold.V, MaxHold: p.MaxHold.V}
}

// short prints a duration as an operator would: 5m and not 5m0s.
func short(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}
