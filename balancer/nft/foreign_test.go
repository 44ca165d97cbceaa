package nft

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"nlb/balancer"
)

// Chains of others are told by what they do to a packet, for sure or perhaps.
func TestForeign(t *testing.T) {
	forward := Packet{
		Protocol: balancer.ProtoTCP, Source: netip.MustParseAddrPort("203.0.113.9:40112"),
		Destination: netip.MustParseAddrPort("10.0.1.11:8080"), Out: "eth1", Hook: unix.NF_INET_FORWARD,
	}
	six := forward
	six.Source, six.Destination = netip.MustParseAddrPort("[2001:db8:99::9]:40112"), netip.MustParseAddrPort("[2001:db8:1::11]:8080")
	leaving := forward
	leaving.Hook = unix.NF_INET_POST_ROUTING
	filter := "type filter hook forward priority 0; policy accept;"
	sure := func(where, does string) Finding { return Finding{"inet fw c (forward, " + where + ")", does, true} }
	perhaps := func(where, does string) Finding { return Finding{"inet fw c (forward, " + where + ")", does, false} }
	for _, c := range []struct {
		name, table string
		packet      Packet
		want        []Finding
	}{
		{"a drop", "chain c { " + filter + "\nip daddr 10.0.1.0/24 tcp dport 8080 drop\n}", forward, []Finding{sure("handle 2", "drop")}},
		{"a drop of others", "chain c { " + filter + "\nip daddr 10.0.2.0/24 drop\ntcp dport 80 drop\nmeta l4proto udp drop\nip6 saddr ::/0 drop\n}", forward, nil},
		{"IPv6", "chain c { " + filter + "\nip6 saddr 2001:db8:99::/64 reject\n}", six, []Finding{sure("handle 2", "reject")}},
		{"a policy", "chain c { type filter hook forward priority 0; policy drop;\nct state established,related accept\n}", forward, []Finding{sure("policy", "drop")}},
		{"a policy with an exception", "chain c { type filter hook forward priority 0; policy drop;\nct state new ip saddr 203.0.113.0/24 accept\n}", forward, nil},
		{"a policy with an exception that cannot be told", "chain c { type filter hook forward priority 0; policy drop;\nmeta mark 7 accept\n}", forward, []Finding{perhaps("policy", "drop")}},
		{"a mark", "chain c { " + filter + "\nmeta mark 7 drop\n}", forward, []Finding{perhaps("handle 2", "drop")}},
		{"an interface that is known", "chain c { " + filter + "\noifname \"eth1\" drop\n}", forward, []Finding{sure("handle 2", "drop")}},
		{"an interface that is another", "chain c { " + filter + "\noifname \"eth2\" drop\n}", forward, nil},
		{"an interface that is not known", "chain c { " + filter + "\niifname \"eth0\" drop\n}", forward, []Finding{perhaps("handle 2", "drop")}},
		{"a limit", "chain c { " + filter + "\nlimit rate 1/second drop\n}", forward, []Finding{perhaps("handle 2", "drop")}},
		{"a map of states", "chain c { " + filter + "\nct state vmap { established : accept, new : drop }\n}", forward, []Finding{sure("handle 3", "drop")}},
		{"a set of ranges", "set s { type ipv4_addr; flags interval; elements = { 203.0.113.0-203.0.113.8, 203.0.113.10/31 } }\nchain c { " + filter + "\nip saddr @s drop\n}", forward, nil},
		{"not in a set", "set s { type ipv4_addr; elements = { 203.0.113.8 } }\nchain c { " + filter + "\nip saddr != @s drop\n}", forward, []Finding{sure("handle 3", "drop")}},
		{"a set that changes", "set s { type ipv4_addr; flags dynamic; }\nchain c { " + filter + "\nip saddr @s drop\n}", forward, []Finding{perhaps("handle 3", "drop")}},
		{"ports in a range", "chain c { " + filter + "\ntcp dport 8000-9000 ip saddr != 10.0.0.0/8 drop\n}", forward, []Finding{sure("handle 2", "drop")}},
		{"a jump that returns", "chain d {\ntcp dport 80 drop\nreturn\ndrop\n}\nchain c { " + filter + "\njump d\n}", forward, nil},
		{"a jump that drops", "chain d {\ntcp dport 8080 drop\n}\nchain c { " + filter + "\njump d\n}", forward, []Finding{sure("chain d, handle 3", "drop")}},
		{"a goto past the rest", "chain d {\n}\nchain c { " + filter + "\ngoto d\ndrop\n}", forward, nil},
		{"accepted before", "chain c { " + filter + "\ntcp flags syn accept\ndrop\n}", forward, nil},
		{"perhaps accepted before", "chain c { " + filter + "\nmeta mark 1 accept\ndrop\n}", forward, []Finding{perhaps("handle 3", "drop")}},
		{"another hook", "chain c { type filter hook input priority 0; policy drop; }", forward, nil},
		{
			"a masquerade", "chain c { type nat hook postrouting priority 100;\noifname \"eth1\" masquerade\n}", leaving,
			[]Finding{{"inet fw c (postrouting, handle 2)", "masquerade", true}},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			nft(t, "table inet fw {\n"+strings.ReplaceAll(c.table, "; }", ";\n}")+"\n}")
			defer nft(t, "delete table inet fw")
			f, err := ReadForeign()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, f.Walk(c.packet, AllOfHook, true)); diff != "" {
				t.Errorf("(-want +got):\n%s\n%s", diff, nftList(t, "inet fw -a"))
			}
		})
	}
}

// What is ours is nobody else's.
func TestForeignLeavesOursOut(t *testing.T) {
	d := newDataplane(t)
	converge(t, d, &balancer.Desired{Table: everything()})
	f, err := ReadForeign()
	if err != nil {
		t.Fatal(err)
	}
	if len(f.chains)+len(f.sets) > 0 {
		t.Errorf("%d chains and %d sets are read", len(f.chains), len(f.sets))
	}
}

// Whatever a rule of somebody else consists of, it is looked at and no more.
func FuzzForeignRule(f *testing.F) {
	for _, r := range []Rule{
		rule(func(b *ruleBuilder) { b.destService(ip4); b.vmap("services4", 0) }),
		rule(func(b *ruleBuilder) { b.sourceIs(ip6, netip.MustParsePrefix("2001:db8::/32")); b.drop() }),
		rule(func(b *ruleBuilder) { b.ctMarkHas(7); b.goTo("c") }),
		promptRule(), redirectRule(),
	} {
		f.Add([]byte(r.exprs))
	}
	p := Packet{
		Protocol: balancer.ProtoTCP, Source: netip.MustParseAddrPort("203.0.113.9:40112"),
		Destination: netip.MustParseAddrPort("198.51.100.10:80"), Hook: unix.NF_INET_PRE_ROUTING,
	}
	f.Fuzz(func(t *testing.T, exprs []byte) {
		c := &foreignChain{
			name: foreignName{unix.NFPROTO_INET, "fw", "c"}, base: &Base{Type: "filter", Hook: p.Hook, Drop: true},
			rules: []foreignRule{{1, exprs}},
		}
		chains := &Foreign{bases: []*foreignChain{c}, chains: map[foreignName]*foreignChain{c.name: c}}
		for _, found := range chains.Walk(p, AllOfHook, true) {
			if found.Where == "" || found.Does == "" {
				t.Errorf("%+v", found)
			}
		}
	})
}
