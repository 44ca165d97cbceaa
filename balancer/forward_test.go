package balancer

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

var (
	now = time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)

	netipText = []cmp.Option{
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	}
)

func TestForward(t *testing.T) {
	spec := &Spec{
		SourceAddresses: []netip.Addr{addr("10.0.0.3"), addr("10.0.0.2"), addr("10.0.0.3")},
		VIPs: []VIP{
			{Address: addr("2001:db8::10")},
			{Address: addr("198.51.100.11"), Interface: "lo"},
			{Address: addr("198.51.100.10"), Interface: "eth0"},
		},
		Listeners: []Listener{
			{Name: "six", VIP: addr("2001:db8::10"), Protocol: TCP, Port: 443, TCPIdleTimeout: time.Minute,
				Forward: []WeightedGroup{{"b", 1}}, Allow: prefixes("0.0.0.0/0")},
			{Name: "four", VIP: addr("198.51.100.10"), Protocol: TCPUDP, Port: 53, TCPIdleTimeout: time.Minute,
				Forward: []WeightedGroup{{"b", 0}, {"a", 3}}, Allow: prefixes("203.0.113.128/25", "::/0", "203.0.113.0/25")},
		},
		TargetGroups: []TargetGroup{
			{Name: "b", ClientIP: HairpinSNAT, HairpinSubnet: true, Stickiness: StickySourceIP, Targets: []Target{
				{Address: addr("2001:db8:1::11"), Port: 53, Weight: 2},
				{Address: addr("10.0.2.11"), Port: 53, Weight: 1, Colocated: prefixes("10.244.1.0/24", "2001:db8:244::/64")},
			}},
			{Name: "a", ClientIP: Preserve, AvoidSelf: true, Targets: []Target{
				{Address: addr("10.0.1.12"), Port: 53, Weight: 0},
				{Address: addr("10.0.1.11"), Port: 53, Weight: 1},
			}},
			{Name: "idle", ClientIP: SNAT, Targets: []Target{{Address: addr("10.0.9.9"), Port: 1, Weight: 1}}},
		},
	}
	seen := View{
		Key: HashKey{1},
		Now: now,
		Routes: map[netip.Addr]Route{
			addr("2001:db8:1::11"): {Source: addr("2001:db8:1::2"), Interface: "eth2", Subnet: netip.MustParsePrefix("2001:db8:1::/64")},
			addr("10.0.1.11"):      {Source: addr("10.0.1.11"), Interface: "lo", Local: true},
			addr("10.0.2.11"):      {Source: addr("10.0.2.2"), Interface: "eth1", Subnet: netip.MustParsePrefix("10.0.2.0/24")},
			addr("10.0.1.12"):      {Source: addr("10.0.1.2"), Interface: "eth1"},
		},
	}
	want := &Desired{
		Table: &Table{
			Key:     HashKey{1},
			VIPs:    []netip.Addr{addr("198.51.100.10"), addr("198.51.100.11"), addr("2001:db8::10")},
			Sources: []netip.Addr{addr("10.0.0.2"), addr("10.0.0.3")},
			Services: []VirtualService{
				{Name: "four", Address: addr("198.51.100.10"), Protocols: []uint8{6, 17}, Port: 53, IdleTimeout: time.Minute,
					Allow: prefixes("203.0.113.0/24"), Pools: []WeightedPool{{"a", 3}, {"b", 0}}, Sticky: true},
				{Name: "six", Address: addr("2001:db8::10"), Protocols: []uint8{6}, Port: 443, IdleTimeout: time.Minute,
					Allow: nil, Pools: []WeightedPool{{"b", 1}}, Sticky: true},
			},
			Pools: []Pool{
				{Name: "a", Protocols: []uint8{6, 17}, ClientIP: Preserve, AvoidSelf: true, Destinations: []Destination{
					{Address: addr("10.0.1.11"), Port: 53, Weight: 1, Domain: prefixes("10.0.1.11/32")},
					{Address: addr("10.0.1.12"), Port: 53, Weight: 0, Domain: prefixes("10.0.1.12/32")},
				}},
				{Name: "b", Protocols: []uint8{6, 17}, ClientIP: HairpinSNAT, Sticky: true, Destinations: []Destination{
					{Address: addr("10.0.2.11"), Port: 53, Weight: 1, Domain: prefixes("10.0.2.0/24", "10.244.1.0/24")},
					{Address: addr("2001:db8:1::11"), Port: 53, Weight: 2, Domain: prefixes("2001:db8:1::/64"), Source: addr("2001:db8:1::2")},
				}},
			},
		},
		Bound: []VIP{
			{Address: addr("198.51.100.10"), Interface: "eth0"},
			{Address: addr("198.51.100.11"), Interface: "lo"},
		},
		Forwarding4: true, Forwarding6: true,
		Egress: []string{"eth1", "eth2"},
	}
	if diff := cmp.Diff(want, Forward(spec, seen), netipText...); diff != "" {
		t.Error(diff)
	}
}

func TestForwardNeedsNoForwardingToItself(t *testing.T) {
	seen := View{Routes: map[netip.Addr]Route{addr("10.0.1.11"): {Source: addr("198.51.100.10"), Interface: "lo", Local: true}}}
	got := Forward(webSpec(1), seen)
	if got.Forwarding4 || got.Forwarding6 || len(got.Egress) > 0 {
		t.Errorf("forwarding %v %v, egress %v", got.Forwarding4, got.Forwarding6, got.Egress)
	}
	if s := got.Table.Pools[0].Destinations[0].Source; s.IsValid() {
		t.Errorf("the VIP %v became a source", s)
	}
	if !Forward(webSpec(1), View{}).Forwarding4 {
		t.Error("a target without a known route is presumed local")
	}
}

func TestTargetStates(t *testing.T) {
	const (
		up, down = Healthy, Unhealthy
		new      = Initial
	)
	for _, c := range []struct {
		name     string
		limits   FailOpen
		weights  []int
		states   []State
		failOpen bool
		shares   []int
	}{
		{"fresh start refuses nothing", FailOpen{1, 0}, []int{1, 2}, []State{new, new}, false, []int{1, 2}},
		{"healthy only", FailOpen{1, 0}, []int{1, 2, 3}, []State{up, down, new}, false, []int{1, 0, 0}},
		{"none is healthy", FailOpen{1, 0}, []int{1, 2}, []State{down, down}, true, []int{1, 2}},
		{"the first verdict is bad", FailOpen{1, 0}, []int{1, 2}, []State{down, new}, true, []int{1, 2}},
		{"limits off", FailOpen{}, []int{1, 2}, []State{down, down}, false, []int{0, 0}},
		{"limits off, fresh start", FailOpen{}, []int{1, 2}, []State{new, new}, false, []int{1, 2}},
		{"below the count", FailOpen{2, 0}, []int{1, 1, 1}, []State{up, down, down}, true, []int{1, 1, 1}},
		{"at the count", FailOpen{2, 0}, []int{1, 1, 1}, []State{up, up, down}, false, []int{1, 1, 0}},
		{"below the percentage", FailOpen{0, 67}, []int{1, 1, 1}, []State{up, up, down}, true, []int{1, 1, 1}},
		{"at the percentage", FailOpen{0, 66}, []int{1, 1, 1}, []State{up, up, down}, false, []int{1, 1, 0}},
		{"weight 0 counts for nothing", FailOpen{1, 0}, []int{0, 1}, []State{up, down}, true, []int{0, 1}},
		{"weight 0 is no verdict", FailOpen{1, 0}, []int{0, 1}, []State{up, new}, false, []int{0, 1}},
		{"draining never takes flows", FailOpen{1, 0}, []int{1, 1}, []State{Draining, down}, true, []int{0, 1}},
		{"no targets", FailOpen{1, 0}, nil, nil, false, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := webSpec(len(c.weights))
			g := &spec.TargetGroups[0]
			g.FailOpen = c.limits
			g.DeregistrationDelay.Timeout = time.Minute
			seen := View{Health: HealthView{}, Drains: Drains{}, Now: now}
			for i, s := range c.states {
				g.Targets[i].Weight = c.weights[i]
				key := TargetKey{Group: "web", AddrPort: g.Targets[i].AddrPort()}
				if s == Draining {
					seen.Drains[key] = Drain{Since: now, Until: now.Add(g.DeregistrationDelay.Timeout)}
				} else {
					seen.Health[key] = Health{State: s, Since: now}
				}
			}
			got := Targets(spec, seen)[0]
			if got.FailOpen.Open != c.failOpen {
				t.Errorf("fail-open %v, want %v", got.FailOpen.Open, c.failOpen)
			}
			var shares []int
			for i, s := range got.Targets {
				shares = append(shares, s.Share)
				if s.State != c.states[i] {
					t.Errorf("target %d is %v, want %v", i, s.State, c.states[i])
				}
			}
			if diff := cmp.Diff(c.shares, shares); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// A target keeps its hashes while only its health is against it.
func TestVerdictsMoveNoHash(t *testing.T) {
	const up, down, new = Healthy, Unhealthy, Initial
	for _, c := range []struct {
		name    string
		weights []int
		states  []State
		kept    []int
		change  func(*TargetGroup)
	}{
		{"all are healthy", []int{1, 2}, []State{up, up}, []int{0, 0}, nil},
		{"one failed", []int{1, 2, 1}, []State{up, down, up}, []int{0, 2, 0}, nil},
		{"one is new", []int{1, 2, 1}, []State{up, new, up}, []int{0, 2, 0}, nil},
		{"half failed", []int{1, 2, 1}, []State{down, up, down}, []int{1, 0, 1}, nil},
		{"most failed", []int{1, 2, 1}, []State{down, down, up}, []int{1, 2, 0}, nil},
		{"weight 0", []int{0, 1}, []State{down, up}, []int{0, 0}, nil},
		{"fail-open", []int{1, 1}, []State{down, down}, []int{0, 0}, nil},
		{"a second choice is dealt by health", []int{1, 1, 1}, []State{up, down, up}, []int{0, 0, 0}, func(g *TargetGroup) {
			g.ClientIP, g.AvoidSelf = Preserve, true
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := webSpec(len(c.weights))
			g := &spec.TargetGroups[0]
			if c.change != nil {
				c.change(g)
			}
			seen := View{Health: HealthView{}, Now: now}
			for i, s := range c.states {
				g.Targets[i].Weight = c.weights[i]
				seen.Health[TargetKey{Group: "web", AddrPort: g.Targets[i].AddrPort()}] = Health{State: s, Since: now}
			}
			var kept []int
			for _, d := range Forward(spec, seen).Table.Pools[0].Destinations {
				kept = append(kept, d.Kept)
			}
			if diff := cmp.Diff(c.kept, kept); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestTargetLife(t *testing.T) {
	const timeout, interval = 300 * time.Second, 10 * time.Second
	failed := unhealthy(now)
	draining := failed
	draining.State = UnhealthyDraining
	for _, c := range []struct {
		name      string
		health    Health
		drained   bool
		terminate bool
		idle      bool
		after     time.Duration
		want      Health
		until     time.Duration
	}{
		{name: "nothing known", want: Health{State: Initial, Reason: ReasonInitialHealthChecking}},
		{name: "healthy", health: healthy(now), want: healthy(now)},
		{name: "unhealthy, flows drain", health: failed, after: interval - 1, want: draining, until: interval},
		{name: "unhealthy, flows drained", health: failed, after: interval, want: failed},
		{name: "unhealthy, flows ended at once", health: failed, terminate: true, want: failed},
		{name: "deregistered", health: healthy(now), drained: true, after: timeout - 1,
			want: Health{State: Draining, Reason: ReasonDeregistrationInProgress, Since: now}, until: timeout},
		{name: "deregistration ended", health: healthy(now), drained: true, after: timeout,
			want: Health{State: Unused, Reason: ReasonNotRegistered, Since: now.Add(timeout)}},
		{name: "no listener", health: healthy(now), drained: true, idle: true,
			want: Health{State: Unused, Reason: ReasonNotInUse, Description: "no listener forwards to the target group"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := webSpec(1)
			spec.TargetGroups[0].Unhealthy = UnhealthyAction{ConnectionTermination: c.terminate, DrainingInterval: interval}
			spec.TargetGroups[0].DeregistrationDelay.Timeout = timeout
			if c.idle {
				spec.Listeners = nil
			}
			key := webKey("10.0.1.11")
			seen := View{Health: HealthView{key: c.health}, Now: now.Add(c.after)}
			if c.drained {
				seen.Drains = Drains{key: newDrain(&spec.TargetGroups[0], now)}
			}
			got := Targets(spec, seen)[0].Targets[0]
			if diff := cmp.Diff(c.want, got.Health); diff != "" {
				t.Error(diff)
			}
			if want := now.Add(c.until); c.until > 0 && !got.Until.Equal(want) || c.until == 0 && !got.Until.IsZero() {
				t.Errorf("until %v", got.Until)
			}
		})
	}
}

func TestSources(t *testing.T) {
	spec := &Spec{
		SourceAddresses: []netip.Addr{addr("2001:db8::2"), addr("10.0.0.2"), addr("10.0.0.3")},
		VIPs:            []VIP{{Address: addr("198.51.100.10")}},
	}
	for _, c := range []struct{ configured, target, want string }{
		{"", "10.0.1.11", "10.0.0.2"},
		{"", "2001:db8:1::11", "2001:db8::2"},
		{"10.0.0.9", "10.0.1.11", "10.0.0.9"},
		{"10.0.0.9", "2001:db8:1::11", "2001:db8::2"},
		{"198.51.100.10", "10.0.1.11", "10.0.0.2"}, // never a VIP
	} {
		g := &TargetGroup{}
		if c.configured != "" {
			g.HealthCheck.Source = addr(c.configured)
		}
		if got := spec.ProbeSource(g, addr(c.target)); got != addr(c.want) {
			t.Errorf("source %q towards %s: %v, want %s", c.configured, c.target, got, c.want)
		}
	}
	if got := new(Spec).ProbeSource(&TargetGroup{}, addr("10.0.1.11")); got.IsValid() {
		t.Errorf("without source addresses: %v", got)
	}
}

func TestAggregate(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		// A /24 and what is in it, so that every address can be asked for.
		drawn := rapid.SliceOf(rapid.Custom(func(t *rapid.T) netip.Prefix {
			a := netip.AddrFrom4([4]byte{10, 0, 0, rapid.Byte().Draw(t, "host")})
			return netip.PrefixFrom(a, rapid.IntRange(24, 32).Draw(t, "bits"))
		})).Draw(t, "prefixes")
		got := Aggregate(drawn)
		for host := range 256 {
			a := netip.AddrFrom4([4]byte{10, 0, 0, byte(host)})
			if covers(got, a) != covers(drawn, a) {
				t.Fatalf("%v and %v differ on %v", got, drawn, a)
			}
		}
		for i := 1; i < len(got); i++ {
			if got[i-1].Compare(got[i]) >= 0 || got[i-1].Overlaps(got[i]) {
				t.Fatalf("%v: not sorted or overlapping", got)
			}
			if _, ok := halves(got[i-1], got[i]); ok {
				t.Fatalf("%v: not merged", got)
			}
		}
	})
}

func covers(prefixes []netip.Prefix, a netip.Addr) bool {
	for _, p := range prefixes {
		if p.Contains(a) {
			return true
		}
	}
	return false
}
