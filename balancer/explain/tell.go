package explain

import (
	"net/netip"
	"slices"

	"nlb/balancer"
)

// tell puts an outcome into words.
func (e *Explainer) tell(q Question, o outcome) Outcome {
	out := Outcome{Verdict: o.verdict, Reason: o.reason, Hairpin: o.hairpin, Rewrites: []Rewrite{}}
	if o.service != nil {
		out.Listener = o.service.Name
		out.SYNProxy = q.Protocol == balancer.ProtoTCP && o.service.SYNProxy.On()
		out.Limit = limit(q.Client.Addr(), o.service.SourceLimit)
	}
	if o.pool != nil {
		out.TargetGroup, out.ClientIP = o.pool.Name, o.pool.ClientIP.String()
	}
	if o.to != nil {
		out.Target, out.ClientIP = endpoint(o.to), o.pool.ClientIPOf(o.to).String()
	}
	if o.kept != nil {
		out.Avoided = endpoint(o.kept)
	}
	if o.hairpin {
		out.HairpinKind = e.hairpinKind(q.Client.Addr(), o.fate)
	}
	switch {
	case o.verdict != Forward:
		return out
	case e.sourced(q, o.fate) && len(o.sources) == 0 && !o.relayed:
		out.Verdict, out.Reason = Drop, ReasonNoSource
		return out
	case !e.sourced(q, o.fate):
		out.TargetSees = q.Client.Addr().String()
	case len(o.sources) == 1:
		out.TargetSees = o.sources[0].String()
	default:
		for _, a := range o.sources {
			out.TargetSeesOneOf = append(out.TargetSeesOneOf, a.String())
		}
	}
	out.Rewrites = e.rewrites(q, o)
	if o.relayed {
		out.HeaderClient = endText(e.arriving(flowOf(q), o.service))
	}
	return out
}

// limit is nil without one.
func limit(client netip.Addr, l balancer.SourceLimit) *Limit {
	if !l.On() {
		return nil
	}
	return &Limit{l.Flows, netip.PrefixFrom(client, l.Prefix).Masked()}
}

func endpoint(d *balancer.Destination) *Endpoint { return &Endpoint{d.Address, d.Port} }

// rewrites are what the addresses go through. SNAT keeps the client's port where it
// is free at the new address; the relay's is the kernel's choice.
func (e *Explainer) rewrites(q Question, o outcome) []Rewrite {
	source := netip.AddrPort{}
	if len(o.sources) == 1 {
		source = netip.AddrPortFrom(o.sources[0], 0)
	}
	first := Rewrite{
		By: ByDNAT, SourceBefore: q.Client, DestinationBefore: q.Destination,
		SourceAfter: q.Client, DestinationAfter: o.to.AddrPort(),
	}
	if o.relayed {
		first.By, first.SourceAfter = ByRelay, source
		arriving := e.arriving(flowOf(q), o.service)
		if arriving == q.Client {
			return []Rewrite{first}
		}
		before := Rewrite{
			By: BySNAT, SourceBefore: q.Client, DestinationBefore: q.Destination, SourceAfter: arriving, DestinationAfter: q.Destination,
		}
		first.SourceBefore = arriving
		return []Rewrite{before, first}
	}
	if !e.sourced(q, o.fate) {
		return []Rewrite{first}
	}
	if source.IsValid() {
		source = netip.AddrPortFrom(source.Addr(), q.Client.Port())
	}
	return []Rewrite{first, {
		By: BySNAT, SourceBefore: first.SourceAfter, DestinationBefore: first.DestinationAfter,
		SourceAfter: source, DestinationAfter: first.DestinationAfter,
	}}
}

// Meets says what chains of others do to the flow. One that certainly drops it makes
// that the answer.
func (a *Answer) Meets(found []Foreign) {
	a.Foreign = found
	i := slices.IndexFunc(found, func(f Foreign) bool { return f.Certain && f.Ends })
	if i < 0 || a.Verdict != Forward {
		return
	}
	a.Verdict, a.Reason, a.Rewrites = Drop, "foreign chain: "+found[i].Where, []Rewrite{}
	a.TargetSees, a.TargetSeesOneOf, a.HeaderClient, a.DependsOn, a.Possible = "", nil, "", "", nil
}
