package vip

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"nlb/balancer"
)

func address(prefix, ifname string, ours bool) Address {
	return Address{Prefix: netip.MustParsePrefix(prefix), Interface: ifname, Ours: ours}
}

func wantVIP(addr, ifname string) balancer.VIP {
	return balancer.VIP{Address: netip.MustParseAddr(addr), Interface: ifname}
}

func TestDiff(t *testing.T) {
	tests := []struct {
		name               string
		have               []Address
		want               []balancer.VIP
		withdraw, announce []string
	}{
		{name: "nothing"},
		{
			name: "first start",
			have: []Address{address("10.0.0.2/24", "eth0", false)},
			want: []balancer.VIP{wantVIP("2001:db8::10", "eth0"), wantVIP("198.51.100.10", "lo")},
			announce: []string{
				"ip addr add 198.51.100.10/32 dev lo label lo:nlb scope host metric 7236706 proto 0x6e",
				"ip addr add 2001:db8::10/128 dev eth0 preferred_lft 0 nodad noprefixroute metric 7236706 proto 0x6e",
			},
		},
		{
			name: "a long interface name leaves no room for a label",
			want: []balancer.VIP{wantVIP("198.51.100.10", "enp0s31f6.100"), wantVIP("198.51.100.10", "eth0.100abc")},
			announce: []string{
				"ip addr add 198.51.100.10/32 dev enp0s31f6.100 scope host metric 7236706 proto 0x6e",
				"ip addr add 198.51.100.10/32 dev eth0.100abc label eth0.100abc:nlb scope host metric 7236706 proto 0x6e",
			},
		},
		{
			name: "restart adopts",
			have: []Address{address("198.51.100.10/32", "eth0", true)},
			want: []balancer.VIP{wantVIP("198.51.100.10", "eth0")},
		},
		{
			name: "a VIP that is not bound by us is not asked for",
			want: []balancer.VIP{wantVIP("198.51.100.10", "")},
		},
		{
			name:     "a VIP that is no longer bound by us goes",
			have:     []Address{address("198.51.100.10/32", "eth0", true)},
			want:     []balancer.VIP{wantVIP("198.51.100.10", "")},
			withdraw: []string{"ip addr del 198.51.100.10/32 dev eth0"},
		},
		{
			name: "somebody else's address serves, with any prefix length",
			have: []Address{address("198.51.100.10/24", "eth0", false)},
			want: []balancer.VIP{wantVIP("198.51.100.10", "eth0")},
		},
		{
			name:     "somebody else's address on another interface does not",
			have:     []Address{address("198.51.100.10/24", "eth1", false)},
			want:     []balancer.VIP{wantVIP("198.51.100.10", "eth0")},
			announce: []string{"ip addr add 198.51.100.10/32 dev eth0 label eth0:nlb scope host metric 7236706 proto 0x6e"},
		},
		{
			name: "clear removes what is ours and nothing else",
			have: []Address{
				address("10.0.0.2/24", "eth0", false),
				address("198.51.100.10/32", "eth0", true),
				address("198.51.100.11/32", "lo", true),
				address("2001:db8::10/128", "eth0", true),
				address("2001:db8::11/128", "eth0", false),
			},
			withdraw: []string{
				"ip addr del 198.51.100.10/32 dev eth0",
				"ip addr del 198.51.100.11/32 dev lo",
				"ip addr del 2001:db8::10/128 dev eth0",
			},
		},
		{
			name: "a move makes before it breaks",
			have: []Address{address("198.51.100.10/32", "eth0", true)},
			want: []balancer.VIP{wantVIP("198.51.100.10", "eth1")},
			announce: []string{
				"ip addr add 198.51.100.10/32 dev eth1 label eth1:nlb scope host metric 7236706 proto 0x6e",
				"ip addr del 198.51.100.10/32 dev eth0",
			},
		},
		{
			name: "a move that was interrupted is completed",
			have: []Address{
				address("198.51.100.10/32", "eth0", true),
				address("198.51.100.10/32", "eth1", true),
			},
			want:     []balancer.VIP{wantVIP("198.51.100.10", "eth1")},
			announce: []string{"ip addr del 198.51.100.10/32 dev eth0"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			withdraw, announce := Diff(tt.have, tt.want)
			if d := cmp.Diff(append([]string{}, tt.withdraw...), withdraw.Lines()); d != "" {
				t.Errorf("withdraw (-want +got):\n%s", d)
			}
			if d := cmp.Diff(append([]string{}, tt.announce...), announce.Lines()); d != "" {
				t.Errorf("announce (-want +got):\n%s", d)
			}
			if withdraw.Empty() != (len(tt.withdraw) == 0) || announce.Empty() != (len(tt.announce) == 0) {
				t.Errorf("Empty() = %v, %v", withdraw.Empty(), announce.Empty())
			}
		})
	}
}

// TestDiffConverges: whatever there was, one pass leaves every wanted VIP bound
// where it is wanted, nothing of ours elsewhere, and nothing of others touched.
func TestDiffConverges(t *testing.T) {
	addr := rapid.SampledFrom([]string{"198.51.100.10", "198.51.100.11", "2001:db8::10"})
	ifname := rapid.SampledFrom([]string{"lo", "eth0", "eth1"})
	rapid.Check(t, func(t *rapid.T) {
		have := rapid.SliceOfDistinct(rapid.Custom(func(t *rapid.T) Address {
			a := bound(wantVIP(addr.Draw(t, "have"), ifname.Draw(t, "on")))
			a.Ours = rapid.Bool().Draw(t, "ours")
			return a
		}), func(a Address) string { return a.Prefix.String() + a.Interface }).Draw(t, "have")
		want := rapid.SliceOfDistinct(rapid.Custom(func(t *rapid.T) balancer.VIP {
			return wantVIP(addr.Draw(t, "want"), ifname.Draw(t, "on"))
		}), func(v balancer.VIP) netip.Addr { return v.Address }).Draw(t, "want")

		withdraw, announce := Diff(have, want)
		after := slices.Clone(have)
		for _, p := range []Plan{withdraw, announce} {
			after = append(after, p.Add...)
			for _, r := range p.Remove {
				if !r.Ours {
					t.Fatalf("removes %v, which is not ours", r)
				}
				after = slices.DeleteFunc(after, func(a Address) bool { return a == r })
			}
			// At no point is a wanted VIP that was bound bound nowhere.
			for _, v := range want {
				on := func(a Address) bool { return a.Prefix.Addr() == v.Address }
				if slices.ContainsFunc(have, on) && !slices.ContainsFunc(after, on) {
					t.Fatalf("%v is bound nowhere", v)
				}
			}
		}
		if w, a := Diff(after, want); !w.Empty() || !a.Empty() {
			t.Fatalf("after one pass there is more to do: %q %q", w.Lines(), a.Lines())
		}
	})
}

func TestSchedule(t *testing.T) {
	var (
		t0 = time.Unix(0, 0)
		at = func(d time.Duration) time.Time { return t0.Add(d) }
		a  = address("198.51.100.10/32", "eth0", true)
		b  = address("198.51.100.11/32", "eth0", true)
		s  = newSchedule()
	)
	if _, ok := s.next(t0); ok {
		t.Error("an empty schedule has a next announcement")
	}
	s.add(nil, 3, t0)
	if len(s.wake) != 0 {
		t.Error("adding nothing wakes")
	}
	s.add([]Address{a}, 2, at(time.Second))
	s.add([]Address{b}, 3, t0)
	if len(s.wake) != 1 {
		t.Error("adding does not wake")
	}
	steps := []struct {
		now  time.Duration
		want []Address
		wait time.Duration // -1: nothing is left
	}{
		{0, []Address{b}, time.Second},
		{500 * time.Millisecond, nil, 500 * time.Millisecond},
		{time.Second, []Address{a, b}, time.Second},
		{1900 * time.Millisecond, nil, 100 * time.Millisecond},
		{5 * time.Second, []Address{a, b}, -1}, // late: once, not once per missed turn
	}
	for _, step := range steps {
		got := s.take(at(step.now))
		slices.SortFunc(got, compare)
		if d := cmp.Diff(step.want, got, cmp.Comparer(func(x, y netip.Prefix) bool { return x == y })); d != "" {
			t.Errorf("at %v (-want +got):\n%s", step.now, d)
		}
		wait, ok := s.next(at(step.now))
		if !ok {
			wait = -1
		}
		if wait != step.wait {
			t.Errorf("at %v the next is in %v, want %v", step.now, wait, step.wait)
		}
	}
}
