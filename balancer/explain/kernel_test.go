package explain_test

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/zap/zaptest"

	"nlb/balancer"
	"nlb/balancer/explain"
	"nlb/balancer/nft"
	"nlb/internal/nstest"
	"nlb/internal/wait"
)

// The tests of this package program the kernel of a namespace of their own.
func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func prefixes(s ...string) (out []netip.Prefix) {
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

// newDataplane returns one whose table goes with the test.
func newDataplane(t *testing.T) *nft.Dataplane {
	t.Helper()
	d, err := nft.New(zaptest.NewLogger(t), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		converge(t, d, nil)
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func converge(t *testing.T, d *nft.Dataplane, want *balancer.Desired) {
	t.Helper()
	p, err := d.Plan(context.Background(), want)
	if err == nil {
		err = d.Apply(context.Background(), p)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A site is a configuration, what is seen of its targets, and what may call it.
type site struct {
	spec    *balancer.Spec
	seen    balancer.View
	clients []netip.Prefix
}

var siteVIPs = []netip.Addr{addr("198.51.100.10"), addr("198.51.100.11"), addr("2001:db8:77::10")}

// randomSite draws a configuration of all that decides where a flow goes, as far as
// the dataplane has it.
func randomSite(rng *rand.Rand, d balancer.Dataplane) *site {
	pick := func(percent int) bool { return rng.IntN(100) < percent }
	s := &site{
		spec: &balancer.Spec{Dataplane: d, UntrackedRelay: pick(25)},
		seen: balancer.View{
			Health: balancer.HealthView{}, Drains: balancer.Drains{},
			Routes: map[netip.Addr]balancer.Route{}, Now: time.Unix(1_800_000_000, 0),
		},
		clients: prefixes("203.0.113.0/24", "2001:db8:99::/64"),
	}
	for i := range s.seen.Key {
		s.seen.Key[i] = byte(rng.Uint32())
	}
	for _, v := range siteVIPs {
		s.spec.VIPs = append(s.spec.VIPs, balancer.VIP{Address: v})
	}
	for _, a := range []string{"10.9.0.1", "10.9.0.2", "10.9.0.3", "2001:db8:1:9::1", "2001:db8:1:9::2"} {
		if pick(30) {
			s.spec.SourceAddresses = append(s.spec.SourceAddresses, addr(a))
		}
	}
	for i := range 2 + rng.IntN(3) {
		s.addGroup(rng, fmt.Sprint("g", i))
	}
	for i, v := range siteVIPs {
		for j, port := range []uint16{53, 80, 443} {
			if pick(75) {
				s.addListener(rng, fmt.Sprint("l", i, j), v, port)
			}
		}
	}
	return s
}

func (s *site) addGroup(rng *rand.Rand, name string) {
	pick := func(percent int) bool { return rng.IntN(100) < percent }
	g := balancer.TargetGroup{
		Name: name, Protocol: balancer.TCPUDP, ClientIP: balancer.ClientIP(1 + rng.IntN(4)),
		FailOpen: balancer.FailOpen{MinimumHealthyCount: rng.IntN(2)},
	}
	if g.ClientIP == balancer.ProxyProtocolV2 {
		g.Protocol = balancer.TCP
	}
	// IPVS has no avoid_self, and a target once in a listener.
	g.AvoidSelf = g.ClientIP == balancer.Preserve && pick(70) && s.spec.Dataplane == balancer.NFTables
	base := 8080
	if s.spec.Dataplane == balancer.IPVS {
		base += 10 * len(s.spec.TargetGroups)
	}
	g.HairpinSubnet = g.ClientIP == balancer.HairpinSNAT && pick(50)
	if pick(40) {
		g.Stickiness = balancer.StickySourceIP
	}
	for i := range max(0, rng.IntN(12)-1) {
		t := balancer.Target{Port: uint16(base + rng.IntN(3)), Weight: min(4, rng.IntN(12))}
		n := byte(11 + i)
		if pick(60) {
			t.Address = netip.AddrFrom4([4]byte{10, 0, byte(1 + rng.IntN(2)), n})
		} else {
			t.Address = addr(fmt.Sprintf("2001:db8:1::%d", n))
		}
		// Where clients are kept from their own host, several targets share one.
		if pick(30) || g.AvoidSelf {
			t.Colocated = prefixes(fmt.Sprintf("10.244.%d.0/24", rng.IntN(3)), fmt.Sprintf("2001:db8:1:f%d::/64", rng.IntN(3)))
			s.clients = append(s.clients, t.Colocated...)
		}
		if pick(10) && !g.AvoidSelf {
			t.ClientIP = balancer.ClientIP(1 + rng.IntN(3))
			if g.Protocol == balancer.TCP {
				t.ClientIP = balancer.ClientIP(1 + rng.IntN(4))
			}
		}
		g.Targets = append(g.Targets, t)
		s.see(rng, &g, t)
	}
	s.spec.TargetGroups = append(s.spec.TargetGroups, g)
}

// see draws how a target does, and how it is reached.
func (s *site) see(rng *rand.Rand, g *balancer.TargetGroup, t balancer.Target) {
	own := netip.PrefixFrom(t.Address, t.Address.BitLen())
	subnet := netip.PrefixFrom(t.Address, map[bool]int{true: 24, false: 64}[t.Address.Is4()]).Masked()
	s.clients = append(s.clients, own, subnet)
	route := balancer.Route{Interface: "out0", Subnet: subnet}
	if rng.IntN(3) > 0 {
		route.Source = crossingOut[map[bool]int{true: 0, false: 1}[t.Address.Is4()]].Addr()
	}
	s.seen.Routes[t.Address] = route
	key := balancer.TargetKey{Group: g.Name, AddrPort: t.AddrPort()}
	switch rng.IntN(6) {
	case 0:
		s.seen.Health[key] = balancer.Health{State: balancer.Unhealthy, Since: s.seen.Now.Add(-time.Hour)}
	case 1:
		s.seen.Drains[key] = balancer.Drain{Since: s.seen.Now, Until: s.seen.Now.Add(time.Hour)}
	case 2: // nothing is known yet
	default:
		s.seen.Health[key] = balancer.Health{State: balancer.Healthy, Since: s.seen.Now.Add(-time.Hour)}
	}
}

func (s *site) addListener(rng *rand.Rand, name string, vip netip.Addr, port uint16) {
	l := balancer.Listener{
		Name: name, VIP: vip, Port: port, Protocol: balancer.Protocol(1 + rng.IntN(3)), TCPIdleTimeout: time.Minute,
		Allow: prefixes("0.0.0.0/0", "::/0"),
	}
	if rng.IntN(4) == 0 {
		l.Allow = prefixes("203.0.113.0/25", "203.0.113.192/26", "10.0.1.0/24", "2001:db8:99::/65", "2001:db8:1::/64")
	}
	for _, i := range rng.Perm(len(s.spec.TargetGroups))[:1+rng.IntN(2)] {
		if g := &s.spec.TargetGroups[i]; g.Protocol == balancer.TCPUDP || l.Protocol == balancer.TCP {
			l.Forward = append(l.Forward, balancer.WeightedGroup{TargetGroup: g.Name, Weight: min(3, rng.IntN(10))})
		}
	}
	if len(l.Forward) > 0 {
		s.spec.Listeners = append(s.spec.Listeners, l)
	}
}

// question draws a flow: mostly to a listener, now and then to another port of a
// VIP, and from everywhere.
func (s *site) question(rng *rand.Rand) explain.Question {
	q := explain.Question{Protocol: []uint8{balancer.ProtoTCP, balancer.ProtoUDP}[rng.IntN(2)]}
	q.Destination = netip.AddrPortFrom(siteVIPs[rng.IntN(len(siteVIPs))], []uint16{22, 53, 80, 443}[rng.IntN(4)])
	if n := len(s.spec.Listeners); n > 0 && rng.IntN(10) > 0 {
		l := s.spec.Listeners[rng.IntN(n)]
		q.Destination = netip.AddrPortFrom(l.VIP, l.Port)
		numbers := l.Protocol.Numbers()
		q.Protocol = numbers[rng.IntN(len(numbers))]
	}
	var from []netip.Prefix
	for _, p := range s.clients {
		if p.Addr().BitLen() == q.Destination.Addr().BitLen() {
			from = append(from, p)
		}
	}
	b := from[rng.IntN(len(from))]
	if rng.IntN(3) == 0 {
		b = from[0] // somebody outside
	}
	q.Client = netip.AddrPortFrom(within8(b, byte(1+rng.IntN(254))), uint16(20000+rng.IntN(40000)))
	return q
}

// questions draws so many, none of which is known.
func (s *site) questions(rng *rand.Rand, n int, known map[explain.Question]bool) []explain.Question {
	questions := make([]explain.Question, n)
	for i := range questions {
		for questions[i] = s.question(rng); known[questions[i]]; questions[i] = s.question(rng) {
		}
		known[questions[i]] = true
	}
	return questions
}

// within8 replaces the last byte of the prefix's address, unless that is the prefix.
func within8(p netip.Prefix, last byte) netip.Addr {
	if p.IsSingleIP() {
		return p.Addr()
	}
	b := p.Addr().AsSlice()
	b[len(b)-1] = last
	a, _ := netip.AddrFromSlice(b)
	return a
}

// dropCounters are those of the reasons.
var dropCounters = map[string]string{
	explain.ReasonNoListener: "unwanted_drops", explain.ReasonNotAllowed: "not_allowed_drops", explain.ReasonNoTarget: "no_target_drops",
	explain.ReasonHairpin: "hairpin_drops", explain.ReasonNoSource: "no_source_drops",
}

// TestExplainAgreesWithKernel sends the first packets of 10,000 flows through 50
// configurations drawn at random, and compares what comes out, and which counters
// rise, with what was foretold. NLB_SEED repeats a run.
//
// So that it can fail, an Explainer with a key of its own is asked as well. It has to
// be wrong about many.
func TestExplainAgreesWithKernel(t *testing.T) {
	seed := seedOf(t)
	const sites, flows = 50, 200
	c := newCrossing(t)
	for _, v := range siteVIPs {
		nstest.Own(t, v)
	}
	d := newDataplane(t)
	tally := make(map[string]int)
	mistaken := 0
	for i := range sites {
		rng := rand.New(rand.NewPCG(seed, uint64(i)))
		s := randomSite(rng, balancer.NFTables)
		want := balancer.Forward(s.spec, s.seen)
		converge(t, d, want)
		questions := s.questions(rng, flows, make(map[explain.Question]bool))
		mistaken += c.compare(t, d, s, want.Table, questions, tally)
		if t.Failed() {
			t.Fatalf("configuration %d of NLB_SEED=%d", i, seed)
		}
	}
	t.Logf("%d flows: %v; an explainer with another key is wrong about %d", sites*flows, tally, mistaken)
	for _, what := range slices.Concat(slices.Collect(maps.Keys(dropCounters)), []string{
		"preserve", "hairpin_snat", "snat", "proxy_protocol_v2", "avoided", "hairpin by self", "hairpin by colocated", "hairpin by subnet",
	}) {
		if tally[what] == 0 {
			t.Errorf("%s: not one flow", what)
		}
	}
	if forwarded := tally["forwarded"]; mistaken < forwarded/10 {
		t.Errorf("of %d forwarded flows an explainer with another key is wrong about %d only", forwarded, mistaken)
	}
}

// seedOf is the seed of a test that draws at random.
func seedOf(t *testing.T) uint64 {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("NLB_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("NLB_SEED=%d", seed)
	return seed
}

// compare sends the flows and returns how many a wrong Explainer is wrong about.
func (c *crossing) compare(t *testing.T, d *nft.Dataplane, s *site, table *balancer.Table, questions []explain.Question, tally map[string]int) (mistaken int) {
	t.Helper()
	seen, dropped := c.pass(t, d, questions)
	wrongKey := *table
	wrongKey.Key[0] ^= 1
	right, wrong := explain.New(s.spec, table), explain.New(s.spec, &wrongKey)
	foretold := make(map[string]int)
	for i, q := range questions {
		a := right.Explain(q)
		got, came := seen[uint32(i+1)]
		if err := disagree(q, a, got, came); err != nil {
			t.Errorf("%+v: %v\nthe answer is %+v", q, err, a)
		}
		if disagree(q, wrong.Explain(q), got, came) != nil {
			mistaken++
		}
		if a.Verdict == explain.Drop {
			foretold[a.Reason]++
			tally[a.Reason]++
			continue
		}
		tally["forwarded"]++
		tally[a.ClientIP]++
		if a.Hairpin {
			tally["hairpin by "+a.HairpinKind]++
		}
		if a.Avoided != nil {
			tally["avoided"]++
		}
	}
	if !maps.Equal(foretold, dropped) {
		t.Errorf("dropped were %v, and foretold %v", dropped, foretold)
	}
	return mistaken
}

// pass sends the flows' first packets, and returns what came out by the flows' numbers,
// from 1 on, and how many were dropped for each reason. Together that is all of them.
func (c *crossing) pass(t *testing.T, d *nft.Dataplane, questions []explain.Question) (seen map[uint32]sighting, dropped map[string]int) {
	t.Helper()
	if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
		t.Fatal(err)
	}
	before := countersOf(t, d)
	for i, q := range questions {
		c.send(q.Protocol, q.Client, q.Destination, uint32(i+1))
	}
	seen, dropped = make(map[uint32]sighting), make(map[string]int)
	wait.Until(t, patience, "all packets", func() bool {
		c.collect(seen)
		now, total := countersOf(t, d), 0
		for reason, counter := range dropCounters {
			dropped[reason] = int(now[counter] - before[counter])
			total += dropped[reason]
		}
		return len(seen)+total >= len(questions)
	}, func() string { return fmt.Sprintf("%d came out, %v were dropped", len(seen), dropped) })
	maps.DeleteFunc(dropped, func(_ string, n int) bool { return n == 0 })
	return seen, dropped
}

func countersOf(t *testing.T, d *nft.Dataplane) map[string]uint64 {
	t.Helper()
	e, err := d.Events(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return e.Totals
}

// disagree says how a flow differs from its answer. SNAT may have to change the
// port; what the relay does is a matter of its own tests.
func disagree(q explain.Question, a explain.Answer, got sighting, came bool) error {
	switch {
	case a.Verdict == explain.Drop && came:
		return fmt.Errorf("%+v came out", got)
	case a.Verdict == explain.Drop:
		return nil
	case !came:
		return fmt.Errorf("nothing came out")
	case got.reset:
		if a.ClientIP != balancer.ProxyProtocolV2.String() {
			return fmt.Errorf("the relay got it")
		}
		return nil
	case a.ClientIP == balancer.ProxyProtocolV2.String():
		return fmt.Errorf("%+v came out, past the relay", got)
	case a.Target == nil || a.Target.AddrPort() != got.to:
		return fmt.Errorf("%v got it", got.to)
	case a.TargetSees != got.from.Addr().String():
		return fmt.Errorf("the target sees %v", got.from)
	}
	last := a.Rewrites[len(a.Rewrites)-1]
	snat := slices.ContainsFunc(a.Rewrites, func(r explain.Rewrite) bool { return r.By == explain.BySNAT })
	if last.DestinationAfter != got.to || last.SourceAfter.Addr() != got.from.Addr() || !snat && got.from != q.Client {
		return fmt.Errorf("%+v came out", got)
	}
	return nil
}
