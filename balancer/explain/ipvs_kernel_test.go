package explain_test

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"go.uber.org/zap"

	"nlb/balancer"
	"nlb/balancer/explain"
	"nlb/balancer/ipvs"
	"nlb/balancer/nft"
	"nlb/internal/nstest"
)

// TestExplainAgreesWithIPVS is TestExplainAgreesWithKernel with IPVS, whose choice is
// not foretold: what came out has to be one of the outcomes that are named, with what
// is foretold for it. Whether a flow is let in at all, its listener and its hairpin
// verdict are as exact as with nftables.
//
// How often the likeliest target has it is compared with the shares as a whole.
//
// So that it can fail, an Explainer of the same table for nftables, which names one
// target, is asked as well. It has to be wrong about many.
func TestExplainAgreesWithIPVS(t *testing.T) {
	virtual := ipvs.New(t.TempDir(), zap.NewNop())
	if err := virtual.Probe(); err != nil {
		t.Skip(err)
	}
	const sites, flows = 20, 80
	c, d, seed := newCrossing(t), newDataplane(t), seedOf(t)
	for _, v := range siteVIPs {
		nstest.Own(t, v)
	}
	parts := []balancer.Part{virtual.Opener(), d, virtual.Closer()}
	apply := func(want *balancer.Desired) {
		t.Helper()
		if err := balancer.Converge(context.Background(), parts, want, func(balancer.PartPlan) {}); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		apply(nil)
		if err := virtual.Close(); err != nil {
			t.Error(err)
		}
	})
	tally, first := make(map[string]int), &likeliest{}
	known := make(map[explain.Question]bool) // IPVS would know flows of other sites
	for i := range sites {
		rng := rand.New(rand.NewPCG(seed, uint64(i)))
		s := randomSite(rng, balancer.IPVS)
		want := balancer.Forward(s.spec, s.seen)
		apply(want)
		c.compareIPVS(t, d, s, want.Table, s.questions(rng, flows, known), tally, first)
		if t.Failed() {
			t.Fatalf("configuration %d of NLB_SEED=%d", i, seed)
		}
	}
	t.Logf("%d flows: %v; of %d with a choice, %d went to the likeliest target, and %.0f were to", sites*flows, tally, first.n, first.hits, first.expected)
	for _, what := range []string{
		"forwarded", "of several", explain.ReasonNoListener, explain.ReasonNotAllowed, explain.ReasonNoTarget, explain.ReasonHairpin,
		"preserve", "hairpin_snat", "snat", "proxy_protocol_v2", "hairpin by self",
	} {
		if tally[what] == 0 {
			t.Errorf("%s: not one flow", what)
		}
	}
	if tally["mistaken"] < tally["forwarded"]/10 {
		t.Errorf("an explainer for nftables is wrong about %d only", tally["mistaken"])
	}
	if err := first.check(); err != nil {
		t.Error(err)
	}
}

// likeliest counts the flows that had a choice of targets, and went to the likeliest.
type likeliest struct {
	n, hits            int
	expected, variance float64
}

// add counts a flow that came out, and is one of several outcomes which all do so
// alike: if some are drops or the relay's, those that come out are no fair sample.
func (l *likeliest) add(a explain.Answer, got explain.Outcome) {
	if slices.ContainsFunc(a.Possible, func(p explain.Possible) bool {
		return p.Verdict != explain.Forward || p.ClientIP == balancer.ProxyProtocolV2.String()
	}) {
		return
	}
	l.n++
	if *got.Target == *a.Possible[0].Target {
		l.hits++
	}
	p := a.Possible[0].Share
	l.expected, l.variance = l.expected+p, l.variance+p*(1-p)
}

// check allows five standard deviations, and for the integers that weights become.
func (l *likeliest) check() error {
	if off := math.Abs(float64(l.hits) - l.expected); l.n == 0 || off > 5*math.Sqrt(l.variance)+0.03*float64(l.n) {
		return fmt.Errorf("of %d flows with a choice %d went to the likeliest target, want about %.0f", l.n, l.hits, l.expected)
	}
	return nil
}

// sticky are the listeners whose flows of one client have one target.
func sticky(table *balancer.Table) map[string]bool {
	pools, all := table.PoolsByName(), make(map[string]bool)
	for _, s := range table.Services {
		all[s.Name] = s.Sticky || slices.ContainsFunc(s.Pools, func(w balancer.WeightedPool) bool { return pools[w.Pool].Sticky })
	}
	return all
}

// compareIPVS sends the flows.
func (c *crossing) compareIPVS(t *testing.T, d *nft.Dataplane, s *site, table *balancer.Table, questions []explain.Question, tally map[string]int, first *likeliest) {
	t.Helper()
	seen, dropped := c.pass(t, d, questions)
	other := *table
	other.Dataplane = balancer.NFTables
	right, wrong := explain.New(s.spec, table), explain.New(s.spec, &other)
	certain, doubtful, together := make(map[string]int), 0, sticky(table)
	for i, q := range questions {
		a := right.Explain(q)
		got, came := seen[uint32(i+1)]
		fits := fitting(q, a, got, came)
		if len(fits) == 0 {
			t.Errorf("%+v: came out: %v, as %+v\nthe answer is %+v", q, came, got, a)
			continue
		}
		if disagree(q, wrong.Explain(q), got, came) != nil {
			tally["mistaken"]++
		}
		o := fits[0]
		switch {
		case len(fits) > 1 && came && !got.reset: // the relay's targets look alike
			t.Errorf("%+v: %+v came out, which is more than one outcome of %+v", q, got, a)
		case came:
			tally["forwarded"]++
		case reasons(fits) == 1:
			certain[o.Reason]++
			tally[o.Reason]++
		default:
			doubtful++
		}
		if len(a.Possible) > 1 {
			tally["of several"]++
			if came && !together[o.Listener] {
				first.add(a, o)
			}
		}
		if o.ClientIP != "" {
			tally[o.ClientIP]++
		}
		if o.Hairpin {
			tally["hairpin by "+o.HairpinKind]++
		}
	}
	for reason, n := range dropped {
		if certain[reason] > n || n > certain[reason]+doubtful {
			t.Errorf("%d were dropped with %q, and foretold were %d and %d that may", n, reason, certain[reason], doubtful)
		}
	}
}

// fitting are the outcomes of an answer that are what came of the flow.
func fitting(q explain.Question, a explain.Answer, got sighting, came bool) (fits []explain.Outcome) {
	outcomes := []explain.Outcome{a.Outcome}
	if a.DependsOn != "" {
		outcomes = nil
		for _, p := range a.Possible {
			outcomes = append(outcomes, p.Outcome)
		}
	}
	for _, o := range outcomes {
		if disagree(q, explain.Answer{Outcome: o}, got, came) == nil {
			fits = append(fits, o)
		}
	}
	return fits
}

// reasons is how many there are among the outcomes of one flow.
func reasons(outcomes []explain.Outcome) int {
	all := make(map[string]bool)
	for _, o := range outcomes {
		all[o.Reason] = true
	}
	return len(all)
}
