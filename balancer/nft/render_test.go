package nft

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"nlb/balancer"
	"nlb/internal/golden"
)

func renderAfresh(t *testing.T, table *balancer.Table) *Ruleset {
	t.Helper()
	n, err := newNumbers().assign(tableKeys(table))
	if err != nil {
		t.Fatal(err)
	}
	return new(renderer).render(table, n)
}

// withoutSlots leaves out what has a line for each slot.
func withoutSlots(r *Ruleset) *Ruleset {
	short := newRuleset()
	short.Chains, short.Objects = r.Chains, r.Objects
	for name, s := range r.Sets {
		if s.Slots == nil {
			short.Sets[name] = s
		}
	}
	return short
}

// otherChains is the chains that one ruleset has and the other has not, or with
// other rules.
func otherChains(all, plain *Ruleset) *Ruleset {
	short := newRuleset()
	for name, c := range all.Chains {
		if old := plain.Chains[name]; old == nil || !old.holdsRules(c) {
			short.addChain(c)
		}
	}
	return short
}

// more is otherChains and the sets that the other ruleset has not.
func more(all, plain *Ruleset) *Ruleset {
	short := otherChains(all, plain)
	for _, name := range missing(all.Sets, plain.Sets) {
		short.addSet(all.Sets[name])
	}
	return short
}

func TestRenderEverything(t *testing.T) {
	golden.Check(t, "everything.nft", withoutSlots(renderAfresh(t, everything())).String())
}

func TestRenderNothing(t *testing.T) {
	golden.Check(t, "nothing.nft", renderAfresh(t, &balancer.Table{}).String())
}

// The rules that count outcomes, in full; the rest is as in everything.nft.
func TestRenderObserved(t *testing.T) {
	all, plain := renderAfresh(t, observing()), renderAfresh(t, everything())
	golden.Check(t, "observed.nft", more(all, plain).String())
	if diff := cmp.Diff(withoutSlots(plain).Objects, withoutSlots(all).Objects); diff != "" {
		t.Error(diff)
	}
}

// relaying is everything, with a pool that is relayed, one that is in part, and
// one whose destinations are all of the other family.
func relaying() *balancer.Table {
	t := everything()
	t.Pools[3].ClientIP = balancer.ProxyProtocolV2
	t.Pools[0].Destinations = slices.Clone(t.Pools[0].Destinations)
	t.Pools[0].Destinations[1].ClientIP = balancer.ProxyProtocolV2
	t.Pools[4].ClientIP, t.Pools[4].Destinations = balancer.ProxyProtocolV2, t.Pools[4].Destinations[:1]
	return t
}

// The chains that differ because some flows are relayed; the rest is as in
// everything.nft.
func TestRenderRelayed(t *testing.T) {
	all, plain := renderAfresh(t, relaying()), renderAfresh(t, everything())
	golden.Check(t, "relayed.nft", otherChains(all, plain).String())
	for _, name := range []string{"t3.preserve", "slots4.preserve.16384"} {
		if all.Chains[name] != nil || all.Sets[name] != nil {
			t.Errorf("%s is there, though the relay chooses", name)
		}
	}
}

// protecting is everything, with SYN proxies and limits: of both families, beside UDP,
// for some clients only, with groups that have nobody, and on targets of other services.
func protecting() *balancer.Table {
	t := everything()
	t.Services[0].SYNProxy = balancer.SYNProxy{MSS: 1460, WindowScale: 7, Timestamps: true}
	t.Services[1].SYNProxy = balancer.SYNProxy{MSS: 1440}
	t.Services[1].SourceLimit = balancer.SourceLimit{Flows: 10, Prefix: 64}
	t.Services[2].SYNProxy = balancer.SYNProxy{MSS: 536, WindowScale: 14, Timestamps: true}
	t.Services[2].SourceLimit = balancer.SourceLimit{Flows: 100, Prefix: 24}
	t.Services[2].Pools = []balancer.WeightedPool{{Pool: "empty", Weight: 1}, {Pool: "hairpin", Weight: 3}}
	t.Services[3].SourceLimit = balancer.SourceLimit{Flows: 1, Prefix: 32}
	t.Services[4].SYNProxy = balancer.SYNProxy{MSS: 1460, WindowScale: 7, Timestamps: true}
	return t
}

// What protection adds, in full; the rest is as in everything.nft.
func TestRenderProtected(t *testing.T) {
	all, plain := renderAfresh(t, protecting()), renderAfresh(t, everything())
	golden.Check(t, "protected.nft", more(all, plain).String())
	if diff := cmp.Diff([]string{counterSourceLimit}, missing(all.Objects, plain.Objects)); diff != "" {
		t.Errorf("counters that are new (-want +got):\n%s", diff)
	}
}

// UDP has no handshake, and IPVS takes it before a proxy could.
func TestNoSYNProxy(t *testing.T) {
	proxy := balancer.SYNProxy{MSS: 1460, WindowScale: 7, Timestamps: true}
	for name, edit := range map[string]func(*balancer.Table){
		"UDP":  func(t *balancer.Table) { t.Services[3].SYNProxy = proxy },
		"IPVS": func(t *balancer.Table) { t.Dataplane, t.Services[0].SYNProxy = balancer.IPVS, proxy },
	} {
		want, table := everything(), everything()
		edit(table)
		want.Dataplane = table.Dataplane
		if steps := diff(renderAfresh(t, want), renderAfresh(t, table)); len(steps) > 0 {
			t.Errorf("%s: %q", name, (&Plan{steps: steps}).Lines())
		}
	}
}

// What changes when the operator's wish does: each a transaction in nft's words.
func TestDiff(t *testing.T) {
	edits := map[string]func(*balancer.Table){
		"add-listener": func(b *balancer.Table) {
			s := b.Services[0]
			s.Name, s.Port = "more", 8000
			b.Services = append(b.Services, s)
		},
		"remove-listener": func(b *balancer.Table) { b.Services = b.Services[1:] },
		"allow-others":    func(b *balancer.Table) { b.Services[2].Allow = prefixes("203.0.113.0/24") },
		"idle-timeout":    func(b *balancer.Table) { b.Services[0].IdleTimeout *= 2 },
		"change-mode":     func(b *balancer.Table) { b.Pools[3].ClientIP = balancer.SNAT },
		"one-source":      func(b *balancer.Table) { b.Sources = b.Sources[:1] },
		"remove-vip":      func(b *balancer.Table) { b.VIPs = b.VIPs[:2]; b.Services = append(b.Services[:1:1], b.Services[2:]...) },
		// Neither the slots change nor anything of the other targets.
		"verdict":       func(b *balancer.Table) { failing(&b.Pools[3], 1) },
		"group-weights": func(b *balancer.Table) { b.Services[3].Pools[0].Weight = 50 },
		"remove-colocated": func(b *balancer.Table) {
			d := append([]balancer.Destination(nil), b.Pools[2].Destinations...)
			d[0] = dest("10.0.1.11", 8080, 1)
			b.Pools[2].Destinations = d
		},
	}
	for name, edit := range edits {
		t.Run(name, func(t *testing.T) {
			before, after := everything(), everything()
			edit(after)
			n, err := newNumbers().assign(tableKeys(before))
			if err != nil {
				t.Fatal(err)
			}
			var r renderer
			have := r.render(before, n)
			n, err = n.assign(tableKeys(after))
			if err != nil {
				t.Fatal(err)
			}
			p := &Plan{steps: diff(have, r.render(after, n))}
			golden.Check(t, name+".plan", strings.Join(p.Lines(), "\n")+"\n")
		})
	}
}

// The first target whose flows are ended brings the rules that end them, the last
// one takes them along, both together with the target's own change. So do the
// first observed pool and the last with the rules that count, and protected services.
func TestDiffOfRulesOnDemand(t *testing.T) {
	active, ending := everything(), everything()
	for i := range active.Pools {
		active.Pools[i].Destinations = slices.Clone(active.Pools[i].Destinations)
		for j := range active.Pools[i].Destinations {
			active.Pools[i].Destinations[j].Terminate = false
		}
	}
	for _, tt := range []struct {
		name          string
		before, after *balancer.Table
	}{
		{"terminate", active, ending}, {"terminated", ending, active},
		{"observe", everything(), observing()}, {"unobserve", observing(), everything()},
		{"untrack", tracking(), untracking()}, {"track", untracking(), tracking()},
		{"protect", everything(), protecting()}, {"unprotect", protecting(), everything()},
	} {
		n, err := newNumbers().assign(tableKeys(tt.before))
		if err != nil {
			t.Fatal(err)
		}
		var r renderer
		p := &Plan{steps: diff(r.render(tt.before, n), r.render(tt.after, n))}
		golden.Check(t, tt.name+".plan", strings.Join(p.Lines(), "\n")+"\n")
	}
}

// failing has a health check fail a destination.
func failing(p *balancer.Pool, i int) {
	p.Destinations = slices.Clone(p.Destinations)
	d := &p.Destinations[i]
	d.Weight, d.Kept = 0, d.Weight
}

// A target that fails or returns adds and deletes elements that have no verdict: for
// one that has, the kernel would check the whole table for loops.
func TestHealthMovesNoVerdict(t *testing.T) {
	for name, table := range map[string]func() *balancer.Table{"everything": everything, "relaying": relaying} {
		healthy := table()
		n, err := newNumbers().assign(tableKeys(healthy))
		if err != nil {
			t.Fatal(err)
		}
		for i, p := range healthy.Pools {
			if p.AvoidSelf || p.Relays() && p.OnlyRelays(p.Usable(32)) || len(p.Destinations) == 0 {
				continue // has no Kept, or nobody chooses
			}
			failed := table()
			failing(&failed.Pools[i], 0)
			var r renderer
			good, bad := r.render(healthy, n), r.render(failed, n)
			for verdict, steps := range map[string][]step{"fails": diff(good, bad), "returns": diff(bad, good)} {
				what := fmt.Sprintf("%s: the first target of %s %s", name, p.Name, verdict)
				if got, want := touchedUsable(t, what, steps), fmt.Sprintf("usable4.%s.16", p.Name); got != want {
					t.Errorf("%s: %q changes, not %q", what, got, want)
				}
			}
		}
	}
}

// touchedUsable names the one set of usable targets that changes, and complains of
// steps that the kernel checks the table for.
func touchedUsable(t *testing.T, what string, steps []step) (usable string) {
	t.Helper()
	for _, s := range steps {
		var set *Set
		switch s := s.(type) {
		case addElems:
			set = s.s
		case delElems:
			set = s.s
		}
		if set == nil || set.kind.dataType == dataVerdict {
			t.Errorf("%s: %s", what, clip(s.text(), 100))
		} else if set.kind == numberKind {
			usable += set.Name
		}
	}
	return usable
}

func TestDiffOfSameIsEmpty(t *testing.T) {
	if steps := diff(renderAfresh(t, everything()), renderAfresh(t, everything())); len(steps) > 0 {
		t.Errorf("%d steps from a ruleset to itself", len(steps))
	}
}

// One target's weight touches elements, and nothing else.
func TestWeightTouchesElementsOnly(t *testing.T) {
	table := everything()
	n, err := newNumbers().assign(tableKeys(table))
	if err != nil {
		t.Fatal(err)
	}
	var r renderer
	have := r.render(table, n)
	after := everything()
	after.Pools[3].Destinations = append([]balancer.Destination(nil), after.Pools[3].Destinations...)
	after.Pools[3].Destinations[1].Weight = 0
	touches := regexp.MustCompile(`^(add|delete) element inet nlb (slots|spare)4\.preserve\.`)
	for _, line := range (&Plan{steps: diff(have, r.render(after, n))}).Lines() {
		if !touches.MatchString(line) {
			t.Errorf("unexpected: %s", clip(line, 100))
		}
	}
}

func TestPrefixElems(t *testing.T) {
	tests := []struct {
		in   []string
		want string
	}{
		{nil, ""},
		{[]string{"10.0.0.0/8"}, "10.0.0.0/8"},
		{[]string{"10.0.0.1/32", "10.0.0.2/32"}, "10.0.0.1-10.0.0.2"},
		{[]string{"10.0.0.0/8", "10.1.0.0/16"}, "10.0.0.0/8"},
		{[]string{"0.0.0.0/8", "255.0.0.0/8"}, "0.0.0.0/8, 255.0.0.0/8"},
		{[]string{"128.0.0.0/1"}, "128.0.0.0/1"},
	}
	for _, tt := range tests {
		s := &Set{kind: prefixKinds[ip4], Elems: prefixElems(balancer.Aggregate(prefixes(tt.in...)))}
		if got := strings.Join(s.elemTexts(s.Elems), ", "); got != tt.want {
			t.Errorf("%q: got %q, want %q", tt.in, got, tt.want)
		}
	}
}

func TestNumbersAreKeptAndReusedLate(t *testing.T) {
	key := func(i byte) balancer.TargetKey {
		return balancer.TargetKey{Group: "web", AddrPort: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 1, i}), 8080)}
	}
	n := newNumbers()
	assign := func(keys ...balancer.TargetKey) {
		var err error
		if n, err = n.assign(keys); err != nil {
			t.Fatal(err)
		}
	}
	assign(key(1), key(2), key(3))
	assign(key(3), key(1))
	assign(key(4), key(3), key(2))
	want := map[balancer.TargetKey]uint16{key(3): 3, key(4): 4, key(2): 5}
	if diff := cmp.Diff(want, n.byKey, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
	n.last = maxTargets
	assign(key(3), key(9))
	if n.byKey[key(9)] != 1 {
		t.Errorf("after the last number came %d", n.byKey[key(9)])
	}
}

func TestTargetChainIsItsIdentity(t *testing.T) {
	for _, k := range []balancer.TargetKey{
		{Group: "web", AddrPort: netip.MustParseAddrPort("10.0.1.11:8080")},
		{Group: "a-1", AddrPort: netip.MustParseAddrPort("[2001:db8::1]:53")},
	} {
		num, got, ok := parseTargetChain(&Chain{Name: targetChainName(7, k.Group), Comment: targetChainComment(k)})
		if !ok || num != 7 || got != k {
			t.Errorf("%v became %d %v %v", k, num, got, ok)
		}
	}
	for _, c := range []Chain{{Name: "t7.web"}, {Name: "take4"}, {Name: "t0.web", Comment: "web 10.0.0.1:1"}, {Name: "t7.web", Comment: "db 10.0.0.1:1"}} {
		if _, _, ok := parseTargetChain(&c); ok {
			t.Errorf("%v passes for a target", c)
		}
	}
}

// Whatever bytes come, the readers neither panic nor hang.
func FuzzWire(f *testing.F) {
	var a attrs
	a.nest(1, func(a *attrs) { a.str(1, "x"); a.u32(2, 7) })
	f.Add([]byte(a))
	f.Fuzz(func(t *testing.T, b []byte) {
		walk(b, func(m message) bool { m.errno(); find(m.body, 1); return true })
		holds(b, b)
		holdsList(b, b)
		parseComment(b)
		(&Set{kind: slotKind, Slots: make([]uint32, 4)}).addParsed(b)
		parseSet(find(b, 1))
		parseCount(b)
	})
}

// The rules of the fast path, and how it ends flows; the rest is as in
// everything.nft.
func TestRenderFastPath(t *testing.T) {
	table := everything()
	plain := renderAfresh(t, table)
	table.FastPath = []string{"eth0", "eth1"}
	table.Pools[0].Observed = true
	fast := renderAfresh(t, table)
	short := newRuleset()
	short.Flowtable = fast.Flowtable
	short.Chains[chainForward] = fast.Chains[chainForward]
	golden.Check(t, "fast.nft", short.String())
	for name, c := range fast.withoutFastPath().Chains {
		if slices.ContainsFunc(c.Rules, Rule.offloads) {
			t.Errorf("%s still offloads", name)
		}
	}
	if lines := (&Plan{steps: diff(fast, fast.withoutFastPath())}).Lines(); len(lines) == 0 || plain.Flowtable != nil {
		t.Error("the flowtable stays")
	}
}

// A target that is ended makes the flowtable anew; whatever else changes leaves it.
func TestPlanFastPath(t *testing.T) {
	table := func(change func(*balancer.Table)) *Ruleset {
		t := everything()
		t.FastPath = []string{"eth0", "eth1"}
		for i := range t.Pools {
			t.Pools[i].Destinations = slices.Clone(t.Pools[i].Destinations)
		}
		change(t)
		n, _ := newNumbers().assign(tableKeys(t))
		return new(renderer).render(t, n)
	}
	before := table(func(*balancer.Table) {})
	for _, c := range []struct {
		name   string
		change func(*balancer.Table)
		want   []string
	}{
		{"nothing", func(*balancer.Table) {}, nil},
		{"another weight", func(t *balancer.Table) { t.Pools[0].Destinations[1].Weight = 7 }, nil},
		{"one less is ended", func(t *balancer.Table) { t.Pools[0].Destinations[2].Terminate = false }, nil},
		{"one more is ended", func(t *balancer.Table) { t.Pools[0].Destinations[1].Terminate = true }, []string{"delete", "add"}},
		{"a link comes", func(t *balancer.Table) { t.FastPath = append(t.FastPath, "eth2") }, []string{"delete", "add"}},
		{"it is turned off", func(t *balancer.Table) { t.FastPath = nil }, []string{"delete"}},
	} {
		var got []string
		for _, line := range (&Plan{steps: diff(before, table(c.change))}).Lines() {
			if verb, rest, _ := strings.Cut(line, " "); strings.HasPrefix(rest, "flowtable") {
				got = append(got, verb)
			}
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s: %s", c.name, diff)
		}
	}
}

var clientIPs = []balancer.ClientIP{balancer.Preserve, balancer.HairpinSNAT, balancer.SNAT, balancer.ProxyProtocolV2}

// What a renderer remembers of the table before never shows.
func TestRenderedAgainAsAfresh(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		table := everything()
		n := newNumbers()
		var used renderer
		for range rapid.IntRange(2, 6).Draw(t, "tables") {
			next := *table
			table = &next
			table.Pools = slices.Clone(table.Pools)
			for i := range table.Pools {
				table.Pools[i].Destinations = slices.Clone(table.Pools[i].Destinations)
			}
			for range rapid.IntRange(0, 3).Draw(t, "changes") {
				p := &table.Pools[rapid.IntRange(0, len(table.Pools)-1).Draw(t, "pool")]
				if len(p.Destinations) == 0 {
					continue
				}
				d := &p.Destinations[rapid.IntRange(0, len(p.Destinations)-1).Draw(t, "target")]
				switch rapid.SampledFrom([]string{"fails", "weight", "mode", "own mode", "avoid_self", "moves", "host", "ends", "order", "IPVS"}).Draw(t, "what") {
				case "fails":
					d.Weight, d.Kept = d.Kept, d.Weight
				case "weight":
					d.Weight = rapid.IntRange(0, 3).Draw(t, "weight")
				case "mode":
					p.ClientIP = rapid.SampledFrom(clientIPs).Draw(t, "client_ip")
				case "own mode":
					d.ClientIP = rapid.SampledFrom(clientIPs).Draw(t, "client_ip")
				case "avoid_self":
					p.AvoidSelf = !p.AvoidSelf
				case "moves":
					d.Port++
				case "host":
					d.Domain = slices.Concat(prefixes(netip.PrefixFrom(d.Address, d.Address.BitLen()).String()), prefixes("192.0.2.0/24", "2001:db8:5::/64"))
				case "ends":
					d.Terminate = !d.Terminate
				case "order":
					slices.Reverse(p.Destinations)
				case "IPVS":
					table.Dataplane = balancer.IPVS - table.Dataplane
				}
			}
			var err error
			if n, err = n.assign(tableKeys(table)); err != nil {
				t.Fatal(err)
			}
			if steps := diff(used.render(table, n), new(renderer).render(table, n)); len(steps) > 0 {
				t.Fatalf("from the one to the other:\n%s", strings.Join((&Plan{steps: steps}).Lines(), "\n"))
			}
		}
	})
}

// Listeners that have nothing of their own share the way to their group: that of TCP
// gives flows their timeout.
func TestPlainListenersShareTheirWay(t *testing.T) {
	table := everything()
	any4 := prefixes("0.0.0.0/0")
	add := func(name string, port uint16, idle time.Duration, allow []netip.Prefix, protocols ...uint8) {
		table.Services = append(table.Services, balancer.VirtualService{
			Name: name, Address: addr("198.51.100.10"), Protocols: protocols, Port: port, IdleTimeout: idle, Allow: allow,
			Pools: []balancer.WeightedPool{{Pool: "snat", Weight: 1}, {Pool: "hairpin", Weight: 0}},
		})
	}
	add("both", 1000, time.Minute, any4, balancer.ProtoTCP, balancer.ProtoUDP)
	add("same", 1001, time.Minute, any4, balancer.ProtoTCP)
	add("patient", 1002, time.Hour, any4, balancer.ProtoTCP)
	add("guarded", 1003, time.Minute, prefixes("10.0.0.0/8"), balancer.ProtoUDP)
	rs := renderAfresh(t, table)
	services := map[string]string{}
	for _, e := range rs.Sets["services4"].Elems {
		services[e.Key] = e.Goto
	}
	for _, want := range []struct {
		port  uint16
		proto uint8
		to    string
	}{
		{1000, balancer.ProtoTCP, "idle_60s.group4.snat"},
		{1000, balancer.ProtoUDP, "group4.snat"},
		{1001, balancer.ProtoTCP, "idle_60s.group4.snat"},
		{1002, balancer.ProtoTCP, "idle_3600s.group4.snat"},
		{1003, balancer.ProtoUDP, "listener.guarded"},
	} {
		got := services[serviceKey(netip.AddrPortFrom(addr("198.51.100.10"), want.port), want.proto)]
		if got != want.to || rs.Chains[got] == nil {
			t.Errorf("port %d, protocol %d: goto %q, a chain: %t; want %q", want.port, want.proto, got, rs.Chains[got] != nil, want.to)
		}
	}
	for _, name := range []string{"both", "same", "patient"} {
		if rs.Chains[serviceChain(name)] != nil {
			t.Errorf("listener %s has a chain of its own", name)
		}
	}
}
