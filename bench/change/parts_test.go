package change

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/bench/part"
)

// head is the beginning of an IPv4 packet with so many words of options.
func head(options int) []byte {
	b := make([]byte, 20+4*options)
	b[0] = 0x45 + byte(options)
	copy(b[12:], []byte{203, 0, 113, 9, 10, 1, 0, 3})
	return append(b, 0xc3, 0x50, 0, 80, 0x01, 0x02, 0x03, 0x04)
}

func TestDecode(t *testing.T) {
	want := syn{netip.MustParseAddrPort("203.0.113.9:50000"), netip.MustParseAddrPort("10.1.0.3:80"), 0x01020304}
	for _, options := range []int{0, 1, 10} {
		if got, ok := decode(head(options)); !ok || got != want {
			t.Errorf("%d options: %v, %v", options, got, ok)
		}
		for n := range head(options) {
			if got, ok := decode(head(options)[:n]); ok {
				t.Errorf("%d bytes with %d options are %v", n, options, got)
			}
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(head(0))
	f.Add(head(10))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, ok := decode(b)
		if !ok {
			return
		}
		tcp := int(b[0]&0x0f) * 4
		if s.to.Port() != binary.BigEndian.Uint16(b[tcp+2:]) || s.from.Addr() != netip.AddrFrom4([4]byte(b[12:16])) {
			t.Errorf("%x is %v", b, s)
		}
	})
}

// TestWireCountsFlows: a SYN that is repeated is none, and neither is one to
// somebody else.
func TestWireCountsFlows(t *testing.T) {
	w := &wire{seen: make(map[syn]bool), sent: make(map[netip.Addr]*arrivals)}
	a, b := targets()[0], targets()[1]
	at := func(second int64, to netip.Addr, number uint32) {
		w.note(syn{netip.MustParseAddrPort("203.0.113.9:50000"), netip.AddrPortFrom(to, 80), number}, time.Unix(second, 0))
	}
	at(1, a, 1)
	w.forget(a)
	at(2, a, 2)
	at(3, b, 3)
	at(4, a, 1) // again
	at(5, a, 4)
	at(6, b, 5)
	at(7, b, 6)
	want := arrivals{n: 2, first: time.Unix(2, 0), last: time.Unix(5, 0), at: 4}
	if diff := cmp.Diff(want, *w.of(a), cmp.AllowUnexported(arrivals{})); diff != "" {
		t.Error(diff)
	}
	if w.others(a) != 2 || w.others(targets()[2]) != 6 {
		t.Errorf("%d and %d flows elsewhere", w.others(a), w.others(targets()[2]))
	}
}

func TestPSS(t *testing.T) {
	const text = "00400000-7fff rollup\nRss:  900 kB\nPss:  %s\nPss_Dirty: 12 kB\n"
	for value, want := range map[string]int64{"123 kB": 123 << 10, "0 kB": 0} {
		if got, err := pss(fmt.Appendf(nil, text, value)); err != nil || got != want {
			t.Errorf("%q: %d, %v", value, got, err)
		}
	}
	for _, value := range []string{"", "kB", "-1 kB", "x kB", "12 MB", "99999999999999 kB"} {
		if got, err := pss(fmt.Appendf(nil, text, value)); err == nil {
			t.Errorf("%q: %d", value, got)
		}
	}
}

func TestMiddle(t *testing.T) {
	for _, c := range []struct {
		all  []time.Duration
		want time.Duration
	}{{[]time.Duration{3}, 3}, {[]time.Duration{9, 1, 4}, 4}, {[]time.Duration{8, 1, 2, 4}, 3}} {
		if got := middle(c.all); got != c.want {
			t.Errorf("%v: %v", c.all, got)
		}
	}
}

// TestPlanWithout leaves the plan that it is made of as it was.
func TestPlanWithout(t *testing.T) {
	p := sizes[0].plan()
	less := p.without(50, 9)
	if !less.again || less.changed != 50 || less.gone != targets()[9] || len(less.services[50].targets) != 9 || len(less.services[49].targets) != 10 {
		t.Errorf("%+v", less)
	}
	if diff := cmp.Diff(targets(), p.services[50].targets, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}

// TestRulesetOfAChange: the hand-written ones replace their table, kube-proxy's
// has what has changed alone.
func TestRulesetOfAChange(t *testing.T) {
	p := plan{services: []service{{80, targets()[:2]}, {81, targets()[:2]}}}
	change, node := p.without(1, 1), netip.MustParseAddr("10.0.1.1")
	kube, minimal := way{kubeProxy: true}, way{}
	const want = `flush chain ip kube-proxy service-bench/s1/tcp/p81
add rule ip kube-proxy service-bench/s1/tcp/p81 ip daddr 198.51.100.10 ip saddr != 203.0.113.0/24 jump mark-for-masquerade
add rule ip kube-proxy service-bench/s1/tcp/p81 numgen random mod 1 vmap { 0 : goto endpoint-bench/s1/tcp/p81__10.1.0.1/80 }
delete chain ip kube-proxy endpoint-bench/s1/tcp/p81__10.1.0.2/80
`
	if diff := cmp.Diff(want, kube.ruleset(change, node)); diff != "" {
		t.Error(diff)
	}
	if got := minimal.ruleset(change, node); !strings.HasPrefix(got, "delete table ip minimal\ntable ip minimal {") || strings.Count(got, "10.1.0.2") != 1 {
		t.Error(got)
	}
	if got := minimal.ruleset(p, node); strings.Contains(got, "delete") || strings.Contains(got, "masquerade") {
		t.Error(got)
	}
	hides := way{masquerade: true}
	if got := hides.ruleset(p, node); strings.Count(got, "masquerade") != 1 {
		t.Error(got)
	}
}

// TestSetups: each has what it takes to do the same again, by the names of
// addresses.
func TestSetups(t *testing.T) {
	for _, name := range Part.Contestants {
		s := Part.Setups[name]
		if len(s.Commands) == 0 || !strings.Contains(s.Config, "T7") || !strings.Contains(s.Config, "VIP") {
			t.Errorf("%s: %+v", name, s)
		}
		if strings.Contains(s.Config, "10.1.0.") || strings.Contains(s.Config, "198.51.100.10") {
			t.Errorf("%s has addresses: %s", name, s.Config)
		}
	}
}

// TestEstimate: less takes less time, and nothing takes none.
func TestEstimate(t *testing.T) {
	all := part.Options{Contestants: Part.Contestants, Metrics: []string{Death, DeathFailed, Reload, ReloadFailed, Apply, Memory}}
	some := part.Options{Contestants: Part.Contestants, Metrics: []string{Reload}}
	long, _ := Part.Estimate(all)
	short, _ := Part.Estimate(some)
	none, around := Part.Estimate(part.Options{})
	all.Quick = true
	quick, aroundQuick := Part.Estimate(all)
	if long <= short || short <= 0 || none != 0 || around != 0 || quick >= long || aroundQuick != 0 {
		t.Errorf("%v, %v, %v, %v, %v, %v", long, short, none, around, quick, aroundQuick)
	}
}
