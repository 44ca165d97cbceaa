package main

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"time"

	"nlb/balancer"
	"nlb/balancer/conntrack"
	"nlb/balancer/control"
	"nlb/balancer/nft"
	"nlb/proxyproto/worker"
)

var errNoPass = errors.New("the daemon stops before its first pass")

// A flowNamer knows what listeners and modes flows belong to.
type flowNamer struct {
	listeners map[serviceName]string
	modes     map[balancer.TargetKey]balancer.ClientIP
}

// A serviceName is what a listener answers on, by one of its protocols.
type serviceName struct {
	protocol uint8
	vip      netip.AddrPort
}

func newFlowNamer(t *balancer.Table) flowNamer {
	n := flowNamer{make(map[serviceName]string), make(map[balancer.TargetKey]balancer.ClientIP)}
	for _, s := range t.Services {
		for _, proto := range s.Protocols {
			n.listeners[serviceName{proto, netip.AddrPortFrom(s.Address, s.Port)}] = s.Name
		}
	}
	for i := range t.Pools {
		p := &t.Pools[i]
		for j := range p.Destinations {
			d := &p.Destinations[j]
			n.modes[balancer.TargetKey{Group: p.Name, AddrPort: d.AddrPort()}] = p.ClientIPOf(d)
		}
	}
	return n
}

// Flows implements control.Daemon. Connections of the relay are the relay's to tell:
// conntrack knows their halves at best.
func (d *daemon) Flows(ctx context.Context, show func(*control.Flow) error) error {
	s := d.reconciler.Snapshot()
	if s == nil {
		return errNoPass
	}
	n := newFlowNamer(s.Desired.Table)
	relayed, err := d.kernel.relay.Flows(ctx)
	if err != nil && !errors.Is(err, worker.ErrNotRunning) {
		return err
	}
	now := time.Now()
	for i := range relayed {
		if err := show(n.relayed(&relayed[i], now)); err != nil {
			return err
		}
	}
	return d.kernel.flows.flows.Each(ctx, func(f conntrack.Flow) error {
		mark := nft.Mark(f.Mark)
		if mark.Relayed() {
			return nil
		}
		to, known := d.kernel.flows.dataplane.TargetOf(mark)
		if !known {
			to = balancer.TargetKey{AddrPort: f.Reply.Src}
		}
		return show(n.tracked(&f, to))
	})
}

// tracked is a flow that the kernel forwards to a target.
func (n flowNamer) tracked(f *conntrack.Flow, to balancer.TargetKey) *control.Flow {
	mark, left := nft.Mark(f.Mark), f.Timeout.Seconds()
	flow := n.named(control.Flow{
		Client: f.Original.Src, VIP: f.Original.Dst, Target: to.AddrPort, TargetSees: f.Reply.Dst,
		Hairpin: mark.Hairpin(), State: stateOf(f), Dataplane: dataplaneOf(f).String(), IdleLeftSeconds: &left,
	}, uint8(f.Protocol), to)
	if f.Accounted {
		bytes, packets := f.Original.Bytes+f.Reply.Bytes, f.Original.Packets+f.Reply.Packets
		flow.Bytes, flow.Packets = &bytes, &packets
	}
	return flow
}

func (n flowNamer) relayed(f *worker.Flow, now time.Time) *control.Flow {
	age, bytes := now.Sub(f.Since).Seconds(), f.Bytes
	state := "relayed"
	if !f.Source.IsValid() {
		state = "dialing"
	}
	return n.named(control.Flow{
		Client: f.Client, VIP: f.VIP, Target: f.Target, TargetSees: f.Source,
		State: state, Dataplane: "relay", AgeSeconds: &age, Bytes: &bytes, ClientIP: balancer.ProxyProtocolV2.String(),
	}, balancer.ProtoTCP, f.To)
}

// named fills in what the addresses and the target tell.
func (n flowNamer) named(f control.Flow, protocol uint8, to balancer.TargetKey) *control.Flow {
	f.Protocol = protocolWord(protocol)
	f.Listener = n.listeners[serviceName{protocol, f.VIP}]
	f.TargetGroup = to.Group
	if mode, ok := n.modes[to]; ok && f.ClientIP == "" {
		f.ClientIP = mode.String()
	}
	return &f
}

func protocolWord(protocol uint8) string {
	if protocol == balancer.ProtoUDP {
		return balancer.UDP.String()
	}
	return balancer.TCP.String()
}

func stateOf(f *conntrack.Flow) string {
	switch {
	case f.Protocol == conntrack.TCP:
		return strings.ToLower(f.TCPState.String())
	case f.Status.SeenReply():
		return "replied"
	}
	return "unreplied"
}

// dataplaneOf is who rewrites a flow of ours: NAT shows in its status, and what IPVS
// does only in its addresses.
func dataplaneOf(f *conntrack.Flow) balancer.Dataplane {
	if !f.Status.DNATed() && f.Reply.Src != f.Original.Dst {
		return balancer.IPVS
	}
	return balancer.NFTables
}
