package main

import (
	"context"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/balancer/explain"
	"nlb/balancer/host"
	"nlb/balancer/nft"
)

// meetForeign takes a flow's first packet through the chains of others, along the way
// that the answer says. Of several ways it takes the likeliest, and is not sure of
// anything beyond the choice.
func meetForeign(ctx context.Context, dataplane balancer.Dataplane, q explain.Question, a *explain.Answer) ([]explain.Foreign, error) {
	chains, err := nft.ReadForeign()
	if err != nil {
		return nil, err
	}
	routes, err := host.NewRouter().Routes(ctx, []netip.Addr{a.Target.Address}, func(netip.Addr) bool { return false })
	if err != nil {
		return nil, err
	}
	local, err := hasAddress(q.Client.Addr())
	if err != nil {
		return nil, err
	}
	to := routes[a.Target.Address]
	w := foreignWay{chains: chains, sure: true}
	first := nft.Packet{Protocol: q.Protocol, Source: q.Client, Destination: q.Destination, Hook: unix.NF_INET_PRE_ROUTING}
	if local {
		first.Hook = unix.NF_INET_LOCAL_OUT
	}
	if a.SYNProxy && !local {
		if first, err = w.prove(first); err != nil {
			return nil, err
		}
	}
	w.meet(first, nft.BeforeDNAT, true)
	w.sure = a.DependsOn == ""
	switch {
	case a.Rewrites[len(a.Rewrites)-1].By == explain.ByRelay:
		w.relay(first, a, to.Interface)
	case dataplane == balancer.IPVS:
		w.ipvs(first, a, to.Interface)
	default:
		w.forward(first, a, to.Interface, to.Local)
	}
	return w.found, nil
}

// hasAddress reports whether an address is this host's.
func hasAddress(a netip.Addr) (bool, error) {
	own, err := net.InterfaceAddrs()
	return slices.ContainsFunc(own, func(n net.Addr) bool {
		p, err := netip.ParsePrefix(n.String())
		return err == nil && p.Addr().WithZone("") == a
	}), err
}

// A foreignWay is the way of a packet, hook by hook, up to where it ends.
type foreignWay struct {
	chains *nft.Foreign
	found  []explain.Foreign
	sure   bool // of the way
	ended  bool
}

func (w *foreignWay) meet(p nft.Packet, span nft.Span, nat bool) {
	if w.ended {
		return
	}
	for _, f := range w.chains.Walk(p, span, nat) {
		certain := f.Certain && w.sure
		w.found = append(w.found, explain.Foreign{Where: f.Where, Does: f.Does, Ends: f.Ends(), Certain: certain})
		w.ended = w.ended || certain && f.Ends()
	}
}

// prove is the way of a client's handshake to the SYN proxy, and returns the SYN that the
// kernel then makes as the first packet of the flow.
func (w *foreignWay) prove(p nft.Packet) (nft.Packet, error) {
	made := p
	made.Hook = unix.NF_INET_LOCAL_OUT
	bound, err := hasAddress(p.Destination.Addr())
	if err != nil {
		return made, err
	}
	p.Untracked = true
	w.meet(p, nft.AllOfHook, false)
	p.Hook = unix.NF_INET_FORWARD
	if bound {
		p.Hook = unix.NF_INET_LOCAL_IN
	}
	w.meet(p, nft.AllOfHook, false)
	return made, nil
}

// forward is the way of a packet that gets another destination. Chains of type nat are
// not asked once we have translated.
func (w *foreignWay) forward(p nft.Packet, a *explain.Answer, out string, toHost bool) {
	p.Destination = a.Target.AddrPort()
	w.meet(p, nft.AfterDNAT, false)
	local := p.Hook == unix.NF_INET_LOCAL_OUT
	p.Out = out
	if !toHost && !local {
		p.Hook = unix.NF_INET_FORWARD
		w.meet(p, nft.AllOfHook, false)
	}
	if !toHost || local {
		p = w.leave(p, a)
	}
	if toHost {
		p.Hook, p.Out = unix.NF_INET_LOCAL_IN, ""
		w.meet(p, nft.AllOfHook, false)
	}
}

// leave is the last hook of a packet that leaves, which has the source that it gets
// there from then on.
func (w *foreignWay) leave(p nft.Packet, a *explain.Answer) nft.Packet {
	p.Hook = unix.NF_INET_POST_ROUTING
	w.meet(p, nft.BeforeSNAT, true)
	last := a.Rewrites[len(a.Rewrites)-1]
	ours := last.By == explain.BySNAT
	if ours && last.SourceAfter.IsValid() {
		p.Source = netip.AddrPortFrom(last.SourceAfter.Addr(), 0)
	}
	w.meet(p, nft.AfterSNAT, !ours)
	return p
}

// ipvs is the way of a packet that IPVS takes from the input hook and sends on by the
// output hook (ip_vs_nat_xmit in the kernel's ip_vs_xmit.c), whoever sent it.
func (w *foreignWay) ipvs(p nft.Packet, a *explain.Answer, out string) {
	w.meet(p, nft.AfterDNAT, false)
	p.Hook = unix.NF_INET_LOCAL_IN
	w.meet(p, nft.BeforeIPVS, false)
	p.Destination, p.Out, p.Hook = a.Target.AddrPort(), out, unix.NF_INET_LOCAL_OUT
	w.meet(p, nft.AllOfHook, false)
	w.leave(p, a)
}

// relay is the way of two: the client's connection to here, and the relay's to the
// target.
func (w *foreignWay) relay(p nft.Packet, a *explain.Answer, out string) {
	w.meet(p, nft.AfterDNAT, false)
	p.Hook = unix.NF_INET_LOCAL_IN
	w.meet(p, nft.AllOfHook, false)
	source := a.Rewrites[len(a.Rewrites)-1].SourceAfter
	if !source.IsValid() {
		return // one of several, or the kernel's choice
	}
	p.Source, p.Destination, p.Out, p.Hook = source, a.Target.AddrPort(), out, unix.NF_INET_LOCAL_OUT
	w.meet(p, nft.AllOfHook, true)
	p.Hook = unix.NF_INET_POST_ROUTING
	w.meet(p, nft.AllOfHook, true)
}
