package traps

import (
	"go.uber.org/zap"

	"nlb/balancer"
	"nlb/balancer/ipvs"
)

// Probe says what the kernel lacks of a dataplane, in nlb's own words; nil if it
// has all. It may load modules, and changes nothing.
func Probe(d balancer.Dataplane) error {
	if d != balancer.IPVS {
		return nil
	}
	p := ipvs.New("", zap.NewNop())
	if err := p.Probe(); err != nil {
		return err
	}
	return p.Close()
}

// notByIPVS has the scenarios that IPVS has no cure for, with the reason.
var notByIPVS = map[string]string{
	hairpinAvoidSelf.Name: "IPVS cannot leave the client out of its choice, so nlb refuses avoid_self (hairpin_snat cures it)",
}

// besidesIPVS has the scenarios whose cure is none of the dataplane's affair, with
// what it is instead. Flows that take part in them go by IPVS nevertheless.
var besidesIPVS = map[string]string{
	vipOnDummyRefused.Name:        "which hosts have the VIP is the network's affair",
	vipExposesHost.Name:           "the guard is the same rules of nftables with both",
	healthCheckVIPSource.Name:     "health checks go past both",
	proxyProtocolServerFirst.Name: "the relay has the port to itself, and IPVS no service for it",
}

// note is what there is to say of a scenario with a dataplane.
func note(sc Scenario, d balancer.Dataplane) string {
	if d != balancer.IPVS || besidesIPVS[sc.Name] == "" {
		return ""
	}
	return "the dataplane makes no difference to this cure: " + besidesIPVS[sc.Name]
}
