package ipvs

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/balancer"
)

// having says which services there are, and how many connections which of their
// destinations have.
func having(s service, active map[string]int) []service {
	s.destinations = slices.Clone(s.destinations)
	for i := range s.destinations {
		s.destinations[i].active = active[s.destinations[i].at.String()]
	}
	return []service{s}
}

func TestGoal(t *testing.T) {
	const vip, vip6 = "198.51.100.10:80", "[2001:db8:77::10]:80"
	tcp80 := serviceKey{balancer.ProtoTCP, at(vip)}
	leaving := dest("10.0.1.12:8080", 0)
	leaving.Leaves = true
	stickyPool := pool("web", dest("10.0.1.11:8080", 1))
	stickyPool.Sticky = true
	foreign := newService(tcp80, false)
	foreign.scheduler, foreign.flags, foreign.cookie = "rr", 0, 0
	foreign.destinations = []destination{{at: at("10.0.1.99:8080"), weight: 1}}
	two := newService(tcp80, false)
	two.destinations = []destination{{at: at("10.0.1.11:8080"), weight: 1}, {at: at("10.0.1.12:8080"), weight: 1}}
	udp := two
	udp.key.proto = balancer.ProtoUDP
	other := table(list(listener(vip, map[string]int{"web": 1})), pool("web", dest("10.0.1.11:8080", 1)))
	other.Dataplane = balancer.NFTables
	otherRelayed := table(list(listener(vip, map[string]int{"web": 1})), pool("web", relayed("10.0.1.11:8080", 1)))
	otherRelayed.Dataplane = balancer.NFTables
	busy := map[string]int{"10.0.1.12:8080": 3}
	mixed := newService(tcp80, false)
	mixed.destinations = []destination{{at: at("10.0.1.11:8080"), weight: 1}, {at: tcp80.at, weight: 1}}
	relaying := map[string]int{tcp80.at.String(): 2}

	for _, c := range []struct {
		name  string
		have  []service
		table *balancer.Table
		want  []string
	}{
		{"one service for each protocol", nil,
			table(list(listener(vip, map[string]int{"web": 1}, 6, 17)), pool("web", dest("10.0.1.11:8080", 2), dest("10.0.1.12:8080", 4))),
			[]string{
				"-A -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port",
				"-a -t 198.51.100.10:80 -r 10.0.1.11:8080 -m -w 1",
				"-a -t 198.51.100.10:80 -r 10.0.1.12:8080 -m -w 2",
				"-A -u 198.51.100.10:80 -s mh -b mh-fallback,mh-port",
				"-a -u 198.51.100.10:80 -r 10.0.1.11:8080 -m -w 1",
				"-a -u 198.51.100.10:80 -r 10.0.1.12:8080 -m -w 2",
			}},
		{"IPv6, of a pool of both families", nil,
			table(list(listener(vip6, map[string]int{"web": 1})), pool("web", dest("10.0.1.11:8080", 1), dest("[2001:db8:1::11]:8080", 1))),
			[]string{
				"-A -t [2001:db8:77::10]:80 -s mh -b mh-fallback,mh-port",
				"-a -t [2001:db8:77::10]:80 -r [2001:db8:1::11]:8080 -m -w 1",
			}},
		{"sticky by the pool", nil,
			table(list(listener(vip, map[string]int{"web": 1})), stickyPool),
			[]string{"-A -t 198.51.100.10:80 -s mh -b mh-fallback", "-a -t 198.51.100.10:80 -r 10.0.1.11:8080 -m -w 1"}},
		{"pools share by their weights, whatever their size", nil,
			table(list(listener(vip, map[string]int{"a": 90, "b": 10})),
				pool("a", dest("10.0.1.11:80", 1), dest("10.0.1.12:80", 1), dest("10.0.1.13:80", 1)),
				pool("b", dest("10.0.2.11:80", 7), dest("10.0.2.12:80", 7))),
			[]string{
				"-A -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port",
				"-a -t 198.51.100.10:80 -r 10.0.1.11:80 -m -w 6", "-a -t 198.51.100.10:80 -r 10.0.1.12:80 -m -w 6",
				"-a -t 198.51.100.10:80 -r 10.0.1.13:80 -m -w 6",
				"-a -t 198.51.100.10:80 -r 10.0.2.11:80 -m -w 1", "-a -t 198.51.100.10:80 -r 10.0.2.12:80 -m -w 1",
			}},
		{"a pool without a usable destination has no share, a pool of weight 0 neither", nil,
			table(list(listener(vip, map[string]int{"a": 90, "b": 10, "c": 0})),
				pool("a", dest("10.0.1.11:80", 0)), pool("b", dest("10.0.2.11:80", 1)), pool("c", dest("10.0.3.11:80", 1))),
			[]string{
				"-A -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port",
				"-a -t 198.51.100.10:80 -r 10.0.2.11:80 -m -w 1",
				"-a -t 198.51.100.10:80 -r 10.0.1.11:80 -m -w 0", "-a -t 198.51.100.10:80 -r 10.0.3.11:80 -m -w 0",
			}},
		{"a destination of two pools is one", nil,
			table(list(listener(vip, map[string]int{"a": 1, "b": 1})),
				pool("a", dest("10.0.1.11:80", 1), dest("10.0.1.12:80", 1)), pool("b", dest("10.0.1.11:80", 1))),
			[]string{
				"-A -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port",
				"-a -t 198.51.100.10:80 -r 10.0.1.11:80 -m -w 3", "-a -t 198.51.100.10:80 -r 10.0.1.12:80 -m -w 1",
			}},
		{"only UDP flows are forgotten", nil,
			table(list(listener(vip, map[string]int{"web": 1}, 6, 17)), pool("web", dest("10.0.1.11:8080", 1), leaving)),
			[]string{
				"-A -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port",
				"-a -t 198.51.100.10:80 -r 10.0.1.11:8080 -m -w 1", "-a -t 198.51.100.10:80 -r 10.0.1.12:8080 -m -w 0",
				"-A -u 198.51.100.10:80 -s mh -b mh-fallback,mh-port",
				"-a -u 198.51.100.10:80 -r 10.0.1.11:8080 -m -w 1",
			}},
		{"relayed only: none", nil,
			table(list(listener(vip, map[string]int{"web": 1})), pool("web", relayed("10.0.1.11:8080", 1))), nil},
		{"relayed in part: the relay's share goes to its socket", nil,
			table(list(listener(vip, map[string]int{"web": 1})), pool("web", dest("10.0.1.11:8080", 1), relayed("10.0.1.12:8080", 1), relayed("10.0.1.13:8080", 1))),
			[]string{
				"-A -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port",
				"-a -t 198.51.100.10:80 -r 10.0.1.11:8080 -m -w 1", "-a -t 198.51.100.10:80 -r 198.51.100.10:80 -m -w 2",
			}},
		{"another dataplane: none", nil, other, nil},
		{"clear: none, whatever has connections", having(two, busy), nil, nil},
		{"a destination that left lingers while it has connections", having(two, busy),
			table(list(listener(vip, map[string]int{"web": 1})), pool("web", dest("10.0.1.11:8080", 1))),
			[]string{
				"-A -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port",
				"-a -t 198.51.100.10:80 -r 10.0.1.11:8080 -m -w 1", "-a -t 198.51.100.10:80 -r 10.0.1.12:8080 -m -w 0",
			}},
		{"and not without", having(two, nil),
			table(list(listener(vip, map[string]int{"web": 1})), pool("web", dest("10.0.1.11:8080", 1))),
			[]string{"-A -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port", "-a -t 198.51.100.10:80 -r 10.0.1.11:8080 -m -w 1"}},
		{"a service lingers", having(two, busy), table(nil),
			[]string{"-A -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port", "-a -t 198.51.100.10:80 -r 10.0.1.12:8080 -m -w 0"}},
		{"a service lingers when the dataplane changes", having(two, busy), other,
			[]string{"-A -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port", "-a -t 198.51.100.10:80 -r 10.0.1.12:8080 -m -w 0"}},
		{"a service lingers and lets connections through to the relay", having(two, busy),
			table(list(listener(vip, map[string]int{"web": 1})), pool("web", relayed("10.0.1.11:8080", 1))),
			[]string{
				"-A -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port",
				"-a -t 198.51.100.10:80 -r 198.51.100.10:80 -m -w 1", "-a -t 198.51.100.10:80 -r 10.0.1.12:8080 -m -w 0",
			}},
		{"the same under another dataplane", having(two, busy), otherRelayed,
			[]string{
				"-A -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port",
				"-a -t 198.51.100.10:80 -r 198.51.100.10:80 -m -w 1", "-a -t 198.51.100.10:80 -r 10.0.1.12:8080 -m -w 0",
			}},
		{"and lingers with the relay's connections alone", having(mixed, relaying), otherRelayed,
			[]string{"-A -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port", "-a -t 198.51.100.10:80 -r 198.51.100.10:80 -m -w 1"}},
		{"until these are over", having(mixed, nil), otherRelayed, nil},
		{"UDP does not linger", having(udp, busy), table(nil), nil},
		{"what somebody made of ours is put right", having(foreign, nil),
			table(list(listener(vip, map[string]int{"web": 1})), pool("web", dest("10.0.1.11:8080", 1))),
			[]string{"-A -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port", "-a -t 198.51.100.10:80 -r 10.0.1.11:8080 -m -w 1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, describe(goal(c.have, c.table))); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestTransition(t *testing.T) {
	k := serviceKey{balancer.ProtoTCP, at("198.51.100.10:80")}
	of := func(k serviceKey, ds ...destination) []service {
		s := newService(k, false)
		s.destinations = ds
		return []service{s}
	}
	d := func(a string, weight int) destination { return destination{at: at(a), weight: weight} }
	direct := d("10.0.1.11:80", 1)
	direct.method = 3
	capped := d("10.0.1.11:80", 1)
	capped.upper, capped.lower = 10, 5
	rr := of(k, d("10.0.1.11:80", 1))
	rr[0].scheduler, rr[0].flags = "rr", 0
	for _, c := range []struct {
		name     string
		from, to []service
		want     []string
	}{
		{"same", of(k, d("10.0.1.11:80", 1)), of(k, d("10.0.1.11:80", 1)), nil},
		{"additions, raises, cuts, removals", of(k, d("10.0.1.11:80", 1), d("10.0.1.12:80", 5), d("10.0.1.13:80", 1)),
			of(k, d("10.0.1.11:80", 2), d("10.0.1.12:80", 1), d("10.0.1.14:80", 1)), []string{
				"ipvsadm -e -t 198.51.100.10:80 -r 10.0.1.11:80 -m -w 2",
				"ipvsadm -a -t 198.51.100.10:80 -r 10.0.1.14:80 -m -w 1",
				"ipvsadm -e -t 198.51.100.10:80 -r 10.0.1.12:80 -m -w 1",
				"ipvsadm -d -t 198.51.100.10:80 -r 10.0.1.13:80",
			}},
		{"another service", of(k, d("10.0.1.11:80", 1)), of(serviceKey{balancer.ProtoUDP, k.at}, d("10.0.1.11:80", 1)), []string{
			"ipvsadm -A -u 198.51.100.10:80 -s mh -b mh-fallback,mh-port",
			"ipvsadm -a -u 198.51.100.10:80 -r 10.0.1.11:80 -m -w 1",
			"ipvsadm -D -t 198.51.100.10:80",
		}},
		{"another scheduler", rr, of(k, d("10.0.1.11:80", 1)), []string{"ipvsadm -E -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port"}},
		{"another way of forwarding", of(k, direct), of(k, d("10.0.1.11:80", 1)), []string{"ipvsadm -e -t 198.51.100.10:80 -r 10.0.1.11:80 -m -w 1"}},
		{"thresholds", of(k, capped), of(k, d("10.0.1.11:80", 1)), []string{"ipvsadm -e -t 198.51.100.10:80 -r 10.0.1.11:80 -m -w 1"}},
		{"SCTP of somebody on a VIP", of(serviceKey{132, k.at}), nil, []string{"ipvsadm -D --sctp-service 198.51.100.10:80"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []string
			for _, s := range transition(c.from, c.to) {
				got = append(got, s.line())
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// A service that the relay had alone begins with the relay's share, since clients
// come while it is being made.
func TestStaged(t *testing.T) {
	to := goal(nil, table(list(listener("198.51.100.10:80", map[string]int{"web": 1})),
		pool("web", dest("10.0.1.11:8080", 1), relayed("10.0.1.12:8080", 3))))
	want := []string{
		"-A -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port",
		"-a -t 198.51.100.10:80 -r 198.51.100.10:80 -m -w 3",
	}
	if diff := cmp.Diff(want, describe(staged(nil, to))); diff != "" {
		t.Error(diff)
	}
}

// A service that had nobody has its destinations before the rules let clients in: a
// SYN that finds none is refused. One that had somebody waits for the rules, which do
// not know the new ones yet.
func TestStagedWithoutDestination(t *testing.T) {
	k := serviceKey{balancer.ProtoTCP, at("198.51.100.10:80")}
	to := goal(nil, table(list(listener("198.51.100.10:80", map[string]int{"web": 1})),
		pool("web", dest("10.0.1.11:8080", 2), dest("10.0.1.12:8080", 1), dest("10.0.1.13:8080", 0))))
	add := "-A -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port"
	line := func(host, weight int) string {
		return fmt.Sprintf("-a -t 198.51.100.10:80 -r 10.0.1.%d:8080 -m -w %d", host, weight)
	}
	for _, c := range []struct {
		name string
		have []destination
		want []string
	}{
		{"empty", nil, []string{add, line(11, 2), line(12, 1)}},
		{"all leave", []destination{{at: at("10.0.1.10:8080")}, {at: at("10.0.1.11:8080")}}, []string{add, line(11, 2), line(12, 1), line(10, 0)}},
		{"one stays", []destination{{at: at("10.0.1.10:8080"), weight: 1}}, []string{add, line(10, 1)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			have := newService(k, false)
			have.destinations = c.have
			from := []service{have}
			if diff := cmp.Diff(c.want, describe(staged(from, to))); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(c.have, from[0].destinations, cmp.AllowUnexported(destination{}), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
				t.Errorf("what was found has changed:\n%s", diff)
			}
		})
	}
}

func TestLongestIdle(t *testing.T) {
	long := listener("198.51.100.10:80", nil)
	long.IdleTimeout = 6000 * time.Second
	udp := listener("198.51.100.10:53", nil, balancer.ProtoUDP)
	udp.IdleTimeout = 9000 * time.Second
	if got := longestIdle(table(list(listener("198.51.100.10:81", nil), long, udp))); got != 6000 {
		t.Errorf("%d s", got)
	}
	if got := longestIdle(table(list(udp))); got != 0 {
		t.Errorf("%d s without TCP", got)
	}
}

// BenchmarkPlan is what one pass decides for a thousand listeners with ten targets
// each, when nothing has changed.
func BenchmarkPlan(b *testing.B) {
	var services []balancer.VirtualService
	var pools []balancer.Pool
	for i := range 1000 {
		name := fmt.Sprint("pool", i)
		p := pool(name)
		for j := range 10 {
			p.Destinations = append(p.Destinations, dest(fmt.Sprintf("10.0.1.%d:8080", 11+j), 1+j%3))
		}
		pools = append(pools, p)
		services = append(services, listener(fmt.Sprintf("198.51.100.10:%d", 1000+i), map[string]int{name: 1}))
	}
	t := table(services, pools...)
	have := goal(nil, t)
	for b.Loop() {
		if n := len(transition(have, goal(have, t))); n > 0 {
			b.Fatal(n)
		}
	}
}
