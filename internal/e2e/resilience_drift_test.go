package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/bench/lab"
	"nlb/internal/wait"
)

// A tampering is what somebody does to what is ours. Its lines are commands of
// nft(8), or of a shell when they begin with a program's name and a blank.
type tampering struct {
	name   string
	script string
	// quiet is for what the kernel tells nobody: it is found by the next resync.
	quiet bool
}

const (
	// The kernel tells: 50 ms until drift is looked for, then one look and one
	// write, well within a second, which the test reports. What it asserts is
	// that nothing waited for the resync, on a busy machine and with the race
	// detector too.
	toldWithin = 5 * time.Second
	// Ten seconds until the resync, and as long for a busy machine.
	resyncWithin = 20 * time.Second
)

func tamperings() []tampering {
	const vip4, vip6 = "198.51.100.10", "2001:db8:77::10"
	nft := func(script string) tampering { return tampering{name: script, script: "nft " + script} }
	sh := func(script string) tampering { return tampering{name: script, script: script} }
	later := func(script string) tampering { return tampering{name: script, script: script, quiet: true} }
	return []tampering{
		nft("flush ruleset"),
		nft("delete table inet nlb"),
		nft("flush table inet nlb"),
		nft("delete table inet nlb; add table inet nlb { flags dormant; }"),
		nft("flush chain inet nlb prerouting"),
		nft("flush chain inet nlb postrouting"),
		nft("flush map inet nlb services4"),
		nft("flush map inet nlb services6"),
		nft("delete element inet nlb services4 { 198.51.100.10 . tcp . 80 }"),
		nft("add element inet nlb services4 { 198.51.100.10 . tcp . 22 : goto idle_350s.group4.web }"),
		nft("delete element inet nlb services4 { 198.51.100.10 . tcp . 80 }; add element inet nlb services4 { 198.51.100.10 . tcp . 80 : goto unwanted }"),
		nft("delete element inet nlb services4 { 198.51.100.10 . tcp . 80 }; add element inet nlb services4 { 198.51.100.10 . tcp . 80 : drop }"),
		nft("flush set inet nlb vips4"),
		nft("add element inet nlb vips4 { 198.51.100.99 }"),
		nft("insert rule inet nlb prerouting counter drop"),
		nft("add rule inet nlb forward drop"),
		nft("insert rule inet nlb idle_350s.group4.web drop"),
		nft("flush chain inet nlb group4.web"),
		nft("flush chain inet nlb group4.web; add rule inet nlb group4.web drop"),
		nft("flush chain inet nlb unwanted; add rule inet nlb unwanted accept"),
		nft("flush table inet nlb; delete counter inet nlb unwanted_drops"),
		nft("add chain inet nlb input { type filter hook input priority -5; policy drop; }"),
		nft("add chain inet nlb forward { type filter hook forward priority -5; policy drop; }"),
		nft("add chain inet nlb stranger { type filter hook prerouting priority -300; policy drop; }"),
		nft("add set inet nlb stranger { type ipv4_addr; }"),
		nft("add counter inet nlb stranger"),
		sh("SLOTS=$(nft list maps inet | awk '$1 == \"map\" && $2 ~ /^slots4.web/ {print $2; exit}') && nft flush map inet nlb $SLOTS"),
		sh("ip address delete " + vip4 + "/32 dev lo"),
		sh("ip address delete " + vip6 + "/128 dev vip0"),
		sh("ip address delete " + vip4 + "/32 dev lo; ip address delete " + vip6 + "/128 dev vip0; nft delete table inet nlb"),
		sh("ip address flush dev vip0"),
		sh("ip link set vip0 down; ip link set vip0 up"),
		sh("ip link set lo down; ip link set lo up"),
		sh("sysctl -qw net.ipv4.ip_forward=0"),
		sh("sysctl -qw net.ipv6.conf.all.forwarding=0"),
		later("sysctl -qw net.ipv4.conf.all.send_redirects=1"),
		later("sysctl -qw net.netfilter.nf_conntrack_acct=0"),
		later("sysctl -qw net.ipv4.conf.t1.send_redirects=1"),
	}
}

// do carries out a script on a node.
func (x tampering) do(t *testing.T, n *lab.Node) {
	t.Helper()
	if script, ok := strings.CutPrefix(x.script, "nft "); ok {
		must(t, n, "nft", strings.ReplaceAll(script, "; add ", "\nadd "))
		return
	}
	must(t, n, "sh", "-ec", x.script)
}

// Whatever somebody does to what is ours is undone: within a second where the
// kernel tells of it, at the next resync where it does not. Afterwards all is as
// it was, traffic flows, and other people's tables never changed.
func TestDriftIsRepaired(t *testing.T) {
	top := routed(t, lab.Options{Targets: 2})
	serveTargets(t, top, targetPort)
	// The IPv6 VIP is on a link, which can go down and takes its addresses with it.
	must(t, top.LB, "ip", "link", "add", "vip0", "type", "veth", "peer", "name", "vip1")
	must(t, top.LB, "ip", "link", "set", "vip0", "up")
	must(t, top.LB, "ip", "link", "set", "vip1", "up")
	// So that the daemon finds something to set, and its repair is seen.
	for _, key := range []string{"net.ipv4.conf.all.send_redirects", "net.ipv4.conf.t1.send_redirects"} {
		if err := top.LB.Sysctl(key, "1"); err != nil {
			t.Fatal(err)
		}
	}
	c := twoServices(top, top.Targets...)
	c.VIPs[1].Interface = "vip0"
	c.VIPs = append(c.VIPs, vip{netip.MustParseAddr("2001:db8:77::11"), "lo"})
	// One group for both, so that each look has half as much to read.
	c.Groups = c.Groups[:1]
	c.Groups[0].Protocol = "TCP_UDP"
	for i := range c.Listeners {
		c.Listeners[i].Forward = to("web")
	}
	d := start(t, top, c.String())
	d.waitAllHealthy()
	works(t, top, "before")
	table, sysctls, vips := d.tableWords(), d.sysctls(), d.vips()

	check := func(t *testing.T, within time.Duration) {
		t.Helper()
		var err error
		for since, first := time.Now(), true; first || err != nil && time.Since(since) < within; first = false {
			err = d.holds(table, sysctls, vips)
		}
		if err != nil {
			t.Errorf("not repaired within %v: %v", within, err)
			wait.For(t, limit, "a late repair", func() error { return d.holds(table, sysctls, vips) })
		}
		if err := d.planned(); err != nil {
			t.Error(err)
		}
		works(t, top, "after the repair")
	}
	var (
		quiet   []tampering
		slowest time.Duration
	)
	for _, x := range tamperings() {
		if x.quiet {
			quiet = append(quiet, x)
			continue
		}
		t.Run(x.name, func(t *testing.T) {
			repairs := d.status().Apply.DriftRepairsTotal
			x.do(t, top.LB)
			begun := time.Now()
			wait.For(t, limit, "a repair", func() error {
				if d.status().Apply.DriftRepairsTotal == repairs {
					return errors.New("none is counted")
				}
				return nil
			})
			slowest = max(slowest, time.Since(begun))
			check(t, toldWithin)
		})
	}
	t.Run("what the kernel does not tell", func(t *testing.T) {
		for _, x := range quiet {
			x.do(t, top.LB)
		}
		check(t, resyncWithin)
	})
	t.Logf("the slowest repair that the kernel told of began to show after %v", slowest.Round(time.Millisecond))
	if slowest > toldWithin {
		t.Errorf("that is more than %v", toldWithin)
	}
	if s := d.status().Apply; s.FailuresTotal > 0 {
		t.Logf("%d passes failed meanwhile", s.FailuresTotal)
	}
}

// holds fails unless the kernel holds what it is compared with.
func (d *daemon) holds(table []string, sysctls, vips string) error {
	d.t.Helper()
	if _, err := d.tool("nft", "list", "chain", "inet", "nlb", "input"); err != nil {
		return err
	}
	return errors.Join(
		differ("table", table, d.tableWords()),
		differ("sysctls", sysctls, d.sysctls()),
		differ("VIPs", vips, d.vips()))
}

// differ fails unless both are the same. Mostly they are, and cmp would take half a
// second to say so of all words of a table.
func differ[T any](what string, want, got T) error {
	if reflect.DeepEqual(want, got) {
		return nil
	}
	if diff := cmp.Diff(want, got); diff != "" {
		return fmt.Errorf("%s (-before +now):\n%.1500s", what, diff)
	}
	return nil
}

// sysctls are those of the balancer that nlb may set.
func (d *daemon) sysctls() string {
	d.t.Helper()
	return must(d.t, d.node, "sysctl", "net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding", "net.netfilter.nf_conntrack_acct",
		"net.ipv4.conf.all.send_redirects", "net.ipv4.conf.t1.send_redirects", "net.ipv4.conf.t2.send_redirects",
		"net.ipv4.conf.all.accept_redirects", "net.ipv4.conf.t1.forwarding", "net.ipv6.conf.t1.forwarding")
}

// vips are the addresses of the test's VIPs and where they are.
func (d *daemon) vips() string {
	d.t.Helper()
	var lines []string
	for line := range strings.Lines(must(d.t, d.node, "ip", "-o", "address", "show")) {
		if strings.Contains(line, "198.51.100.") || strings.Contains(line, "2001:db8:77::") {
			lines = append(lines, strings.Join(strings.Fields(line), " "))
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}
