package host

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"nlb/balancer"
)

func TestDiff(t *testing.T) {
	all := &balancer.Desired{Forwarding4: true, Forwarding6: true, Egress: []string{"eth0", "eth1.100"}}
	fresh := map[string]string{
		"net/ipv4/ip_forward":                   "0",
		"net/ipv4/conf/all/send_redirects":      "1",
		"net/ipv4/conf/eth0/send_redirects":     "1",
		"net/ipv4/conf/eth1.100/send_redirects": "0",
		"net/ipv6/conf/all/forwarding":          "0",
		"net/netfilter/nf_conntrack_acct":       "0",
		"net/ipv4/conf/all/accept_redirects":    "1",
		"net/ipv4/conf/eth0/forwarding":         "0",
		"net/ipv6/conf/eth0/forwarding":         "0",
		"net/ipv6/conf/eth0/accept_ra":          "1",
		"net/ipv6/conf/eth1.100/accept_ra":      "0",
		"net/ipv4/conf/eth1.100/forwarding":     "1",
		"net/ipv6/conf/eth1.100/forwarding":     "1",
		"net/ipv4/conf/all/forwarding":          "0",
		"net/ipv4/conf/default/forwarding":      "0",
		"net/ipv6/conf/default/forwarding":      "0",
	}
	with := func(changes map[string]string) map[string]string {
		m := maps.Clone(fresh)
		maps.Copy(m, changes)
		return m
	}
	names := []string{"all", "default", "eth0", "eth1.100"}
	tests := []struct {
		name   string
		values map[string]string
		ra     []string
		want   *balancer.Desired
		saved  []record
		lines  []string
		keep   int
	}{
		{name: "nothing", values: fresh},
		{
			name:   "only what differs",
			values: fresh,
			want:   all,
			lines: []string{
				"sysctl -w net.ipv6.conf.all.forwarding=1",
				"sysctl -w net.ipv4.ip_forward=1",
				"sysctl -w net.ipv4.conf.all.send_redirects=0",
				"sysctl -w net.ipv4.conf.eth0.send_redirects=0",
				"sysctl -w net.netfilter.nf_conntrack_acct=1",
			},
		},
		{
			name:   "an interface with a dot",
			values: with(map[string]string{"net/ipv4/conf/eth1.100/send_redirects": "1", "net/ipv4/ip_forward": "1", "net/netfilter/nf_conntrack_acct": "1"}),
			want:   &balancer.Desired{Forwarding4: true, Egress: []string{"eth1.100"}},
			lines: []string{
				"sysctl -w net.ipv4.conf.all.send_redirects=0",
				"sysctl -w net.ipv4.conf.eth1/100.send_redirects=0",
			},
		},
		{
			name:   "router advertisements first, only where they rule",
			values: fresh,
			ra:     []string{"eth0", "eth1.100"},
			want:   &balancer.Desired{Forwarding6: true},
			lines: []string{
				"sysctl -w net.ipv6.conf.eth0.accept_ra=2",
				"sysctl -w net.ipv6.conf.all.forwarding=1",
				"sysctl -w net.netfilter.nf_conntrack_acct=1",
			},
		},
		{
			name:   "accept_ra of ours stays while we forward",
			values: with(map[string]string{"net/ipv6/conf/eth0/accept_ra": "2", "net/ipv6/conf/all/forwarding": "1", "net/netfilter/nf_conntrack_acct": "1"}),
			want:   &balancer.Desired{Forwarding6: true},
			saved: []record{
				{Key: "net/ipv6/conf/eth0/accept_ra", Previous: "1", Ours: "2"},
				{Key: "net/ipv6/conf/all/forwarding", Previous: "0", Ours: "1"},
			},
			keep: 2,
		},
		{
			name:   "clear restores backwards",
			values: with(map[string]string{"net/ipv6/conf/eth0/accept_ra": "2", "net/ipv6/conf/all/forwarding": "1", "net/netfilter/nf_conntrack_acct": "1"}),
			saved: []record{
				{Key: "net/ipv6/conf/eth0/accept_ra", Previous: "1", Ours: "2"},
				{Key: "net/ipv6/conf/all/forwarding", Previous: "0", Ours: "1", Also: []setting{{"net/ipv6/conf/eth1.100/forwarding", "1"}, {"net/ipv6/conf/gone0/forwarding", "1"}, {"net/ipv6/conf/eth0/forwarding", "1"}}},
				{Key: "net/netfilter/nf_conntrack_acct", Previous: "0", Ours: "1"},
			},
			lines: []string{
				"sysctl -w net.netfilter.nf_conntrack_acct=0",
				"sysctl -w net.ipv6.conf.all.forwarding=0",
				"sysctl -w net.ipv6.conf.eth1/100.forwarding=1",
				"sysctl -w net.ipv6.conf.eth0.accept_ra=1",
			},
		},
		{
			name:   "somebody's change stays, and so does a crash before the write",
			values: fresh,
			saved:  []record{{Key: "net/ipv4/ip_forward", Previous: "0", Ours: "1"}, {Key: "net/ipv4/conf/gone0/send_redirects", Previous: "1", Ours: "0"}},
			lines:  []string{"# net.ipv4.ip_forward was changed by somebody since we set it to 1: left alone"},
		},
		{
			name:   "what is not needed any more goes, the rest stays",
			values: with(map[string]string{"net/ipv4/ip_forward": "1", "net/netfilter/nf_conntrack_acct": "1"}),
			want:   &balancer.Desired{},
			saved: []record{
				{Key: "net/ipv4/ip_forward", Previous: "0", Ours: "1"},
				{Key: "net/netfilter/nf_conntrack_acct", Previous: "0", Ours: "1"},
			},
			lines: []string{"sysctl -w net.ipv4.ip_forward=0"},
			keep:  1,
		},
		{
			name:   "a missing interface is skipped, a missing module is not",
			values: map[string]string{"net/ipv4/ip_forward": "1", "net/ipv4/conf/all/send_redirects": "0"},
			want:   &balancer.Desired{Forwarding4: true, Egress: []string{"gone0"}},
			lines:  []string{"sysctl -w net.netfilter.nf_conntrack_acct=1"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			found := state{values: tt.values, names4: names, names6: names, advertised: tt.ra}
			p := diff(found, wanted(tt.want, found, tt.saved), tt.saved)
			if d := cmp.Diff(tt.lines, p.Lines()); d != "" {
				t.Errorf("plan (-want +got):\n%s", d)
			}
			if len(p.keep) != tt.keep {
				t.Errorf("keeps %v", p.keep)
			}
			if p.Empty() != (len(tt.lines) == 0) {
				t.Errorf("Empty() = %v", p.Empty())
			}
		})
	}
}

// kernel is what the kernel does with the sysctls we write.
type kernel map[string]string

func (k kernel) write(s setting) {
	if _, exists := k[s.Key]; !exists {
		return
	}
	before := k[s.Key]
	k[s.Key] = s.Value
	if before == s.Value {
		return
	}
	names := []string{"all", "default", "eth0", "eth1"}
	for _, d := range drags(s.Key, names, names) {
		switch {
		case s.Value == "0":
			k[d.key] = d.off
		case d.off == "0":
			k[d.key] = "1"
		default:
			k[d.key] = "0"
		}
	}
}

func (k kernel) state(advertised []string) state {
	names := []string{"all", "default", "eth0", "eth1"}
	return state{values: maps.Clone(k), names4: names, names6: names, advertised: advertised}
}

// TestRestoresAfterAnyCrash: set, die after any number of writes, perhaps set
// again, then clear: everything is as it was.
func TestRestoresAfterAnyCrash(t *testing.T) {
	bit := rapid.SampledFrom([]string{"0", "1"})
	rapid.Check(t, func(t *rapid.T) {
		k := kernel{}
		keys := []string{keyForward4, keyForward6, keyAccounting, keySendRedirects("all"), "net/ipv4/conf/all/accept_redirects"}
		for _, ifname := range []string{"default", "eth0", "eth1"} {
			keys = append(keys, "net/ipv4/conf/"+ifname+"/forwarding", "net/ipv6/conf/"+ifname+"/forwarding",
				keySendRedirects(ifname), keyAcceptRA(ifname))
		}
		for _, key := range keys {
			k[key] = bit.Draw(t, key)
		}
		before := maps.Clone(k)
		want := &balancer.Desired{
			Forwarding4: rapid.Bool().Draw(t, "v4"), Forwarding6: rapid.Bool().Draw(t, "v6"),
			Egress: []string{"eth0", "eth1"},
		}
		ra := rapid.SampledFrom([][]string{nil, {"eth0"}, {"eth0", "eth1"}}).Draw(t, "ra")

		var saved []record // what is on disk
		for range rapid.IntRange(1, 3).Draw(t, "runs") {
			p := diff(k.state(ra), wanted(want, k.state(ra), saved), saved)
			if len(p.restore) > 0 {
				t.Fatalf("setting restores: %q", p.Lines())
			}
			saved = slices.Concat(p.keep, p.set)
			for _, r := range p.set[:rapid.IntRange(0, len(p.set)).Draw(t, "writes")] {
				k.write(setting{r.Key, r.Ours})
			}
		}
		clear := diff(k.state(nil), nil, saved)
		for _, r := range clear.restore {
			for _, s := range r.undo() {
				k.write(s)
			}
		}
		if d := cmp.Diff(before, k); d != "" {
			t.Fatalf("after clear (-before +after):\n%s\n%s", d, strings.Join(clear.Lines(), "\n"))
		}
		if again := diff(k.state(nil), nil, nil); !again.Empty() {
			t.Fatalf("clear is not done: %q", again.Lines())
		}
	})
}
