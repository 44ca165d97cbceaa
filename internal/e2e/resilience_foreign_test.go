package e2e

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nlb/bench/lab"
	"nlb/internal/wait"
)

// strangers are tables such as other programs have: of our name in another
// family, of our priorities, with NAT, with the same sets as ours.
const strangers = `
table ip nlb {
	map slots4 {
		type mark : mark
		elements = { 0x00000001 : 0x00000002, 0x00000003 : 0x00000004 }
	}
	chain prerouting {
		type nat hook prerouting priority -105; policy accept;
		ip daddr 192.0.2.80 tcp dport 80 counter dnat to 10.0.1.11:8080
	}
}
table ip6 nlb {
	chain forward {
		type filter hook forward priority -5; policy accept;
		counter comment "of somebody else"
	}
}
table ip nat {
	chain postrouting {
		type nat hook postrouting priority 100; policy accept;
		ip saddr 172.16.0.0/12 oifname "eth9" masquerade
	}
}
table inet filter {
	set blocked {
		type ipv4_addr
		flags interval
		elements = { 192.0.2.0/25, 192.0.2.200 }
	}
	counter seen { }
	chain input {
		type filter hook input priority 0; policy accept;
		ip saddr @blocked counter drop
		counter name "seen"
	}
	chain forward {
		type filter hook forward priority 0; policy accept;
		ct state established,related accept
		meta mark & 0x3fff == 0x7 accept
	}
}
table inet nlb-other {
	chain guard {
		tcp dport 22 accept
	}
}
table bridge filter {
	chain forward {
		type filter hook forward priority 0; policy accept;
		ether type arp accept
	}
}
table netdev edge {
	chain ingress {
		type filter hook ingress device "c1" priority 0; policy accept;
		ip saddr 192.0.2.66 drop
	}
}
`

// What is not ours is the same to the byte before, during and after all that we
// do, and clear takes away what is ours and nothing else.
func TestStrangersAreLeftAlone(t *testing.T) {
	top := routed(t, lab.Options{Targets: 3})
	serveTargets(t, top, targetPort)
	lb := top.LB
	feed(t, lb, strangers)
	// Addresses like ours: in the VIPs' network, and one that a listener uses as
	// its VIP but that somebody else has bound already.
	const theirs, shared = "198.51.100.77/32", "198.51.100.11/32"
	must(t, lb, "ip", "address", "add", theirs, "dev", "lo")
	must(t, lb, "ip", "address", "add", shared, "dev", "lo")
	for _, s := range []string{"net.ipv4.conf.t1.send_redirects", "net.ipv4.conf.all.send_redirects"} {
		if err := lb.Sysctl(s, "1"); err != nil {
			t.Fatal(err)
		}
	}
	// Forwarding is off, as on a host that was no router: clear must end that too.
	for _, s := range []string{"net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"} {
		if err := lb.Sysctl(s, "0"); err != nil {
			t.Fatal(err)
		}
	}
	rules := func() string { return foreign(t, lb) }
	addresses := func() string { return must(t, lb, "ip", "-o", "address", "show") }
	settings := func() string {
		return must(t, lb, "sh", "-c", "sysctl -a 2>/dev/null | grep -E '^net.(ipv4|ipv6|netfilter)' | grep -vE 'conntrack_count|stable_secret|\\.(mtu|neigh)\\.'")
	}
	before, hadAddresses, hadSettings := rules(), addresses(), settings()
	if !strings.Contains(before, "table bridge filter") || !strings.Contains(before, "of somebody else") {
		t.Fatalf("the tables are not there:\n%s", before)
	}
	same := func(when string) {
		t.Helper()
		if diff := cmp.Diff(before, rules()); diff != "" {
			t.Fatalf("%s others' tables differ:\n%s", when, diff)
		}
	}

	c := twoServices(top, top.Targets...)
	c.VIPs = append(c.VIPs, vip{lab.VIP4.Next(), "lo"})
	d := start(t, top, c.String())
	d.waitAllHealthy()
	same("after the start")
	works(t, top, "beside others' tables")

	for n := range 8 {
		if err := d.reload(change(top, n).String()); err != nil {
			t.Fatal(err)
		}
		same("after a reload")
	}
	if err := d.reload(c.String()); err != nil {
		t.Fatal(err)
	}
	for _, script := range []string{"delete table inet nlb", "flush table inet nlb"} {
		repairs := d.status().Apply.DriftRepairsTotal
		must(t, lb, "nft", script)
		wait.For(t, limit, "a repair", func() error {
			if d.status().Apply.DriftRepairsTotal == repairs {
				return errors.New("none is counted")
			}
			return d.planned()
		})
		same("after the repair of " + script)
	}
	d.kill()
	same("after a crash")
	d.start()
	same("after another start")
	d.stop()
	same("after the stop")
	works(t, top, "without a daemon")

	out := d.run("clear", "--state-dir", d.state(""))
	if out.code != 0 || out.stderr != "" {
		t.Fatalf("clear: %+v", out)
	}
	same("after clear")
	if strings.Contains(must(t, lb, "nft", "list", "tables"), "table inet nlb\n") {
		t.Error("clear left our table")
	}
	if diff := cmp.Diff(hadAddresses, addresses()); diff != "" {
		t.Errorf("clear left other addresses than before (-before +now):\n%s", diff)
	}
	if diff := cmp.Diff(hadSettings, settings()); diff != "" {
		t.Errorf("clear left other settings than before (-before +now):\n%s", diff)
	}
	// Nothing is left to do, and that is no error.
	if out := d.run("clear", "--state-dir", d.state(""), "-o", "json"); out.code != 0 || strings.TrimSpace(out.stdout) != "[]" {
		t.Errorf("clear again: %+v", out)
	}
}

// foreign are all tables but ours, without what packets count.
func foreign(t *testing.T, n *lab.Node) string {
	t.Helper()
	var all strings.Builder
	for line := range strings.Lines(must(t, n, "nft", "list", "tables")) {
		if words := strings.Fields(line); line != "table inet nlb\n" {
			all.WriteString(must(t, n, "nft", "-s", "-a", "list", "table", words[1], words[2]))
		}
	}
	return all.String()
}

// feed gives nft a script.
func feed(t *testing.T, n *lab.Node, script string) {
	t.Helper()
	cmd := n.Command(t.Context(), "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v: %s", err, out)
	}
}
