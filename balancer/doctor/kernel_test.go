package doctor

import (
	"encoding/json"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"nlb/config"
	"nlb/internal/nstest"
)

func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }

// A healthy balancer: clients beyond out0, targets beyond in0, and everything
// as nlb serve leaves it.
const healthyBalancer = `
link set lo up
address add 203.0.113.2/24 dev out0
address add 2001:db8:f::2/64 dev out0 nodad
address add 198.51.100.10/32 dev out0
address add 2001:db8:77::10/128 dev out0 nodad
address add 10.0.1.2/24 dev in0
address add 2001:db8:1::2/64 dev in0 nodad
link set out0 up
link set in0 up
route add default via 203.0.113.254 dev out0
route add default via 2001:db8:f::fe dev out0
`

var healthyBalancerSysctls = []string{
	"net.ipv6.conf.all.forwarding=1", "net.ipv4.ip_forward=1", "net.netfilter.nf_conntrack_acct=1",
	"net.ipv4.conf.all.send_redirects=0", "net.ipv4.conf.in0.send_redirects=0", "net.ipv4.conf.out0.send_redirects=0",
	"net.ipv6.conf.in0.keep_addr_on_down=1",
}

const healthyConfig = `
source_addresses: [10.0.1.2]
vips:
  - {address: 198.51.100.10, interface: out0}
  - {address: "2001:db8:77::10", interface: out0}
listeners:
  - {name: web, vip: 198.51.100.10, protocol: TCP, port: 80, forward: [{target_group: web}]}
  - {name: web6, vip: "2001:db8:77::10", protocol: TCP, port: 80, forward: [{target_group: web6}]}
  - {name: mail, vip: 198.51.100.10, protocol: TCP, port: 25, forward: [{target_group: mail}]}
target_groups:
  - {name: web, protocol: TCP, port: 8080, client_ip: hairpin_snat, targets: [{address: 10.0.1.11}, {address: 10.0.1.12}]}
  - {name: web6, protocol: TCP, port: 8080, client_ip: preserve, targets: [{address: "2001:db8:1::11"}]}
  - {name: mail, protocol: TCP, port: 2525, client_ip: proxy_protocol_v2, targets: [{address: 10.0.1.13}]}
`

// A healthy target: the balancer is 10.0.1.2 beyond in0, and its way to clients;
// out0 leads elsewhere.
const healthyTarget = `
link set lo up
address add 10.0.1.11/24 dev in0
address add 10.0.9.11/24 dev out0
link set in0 up
link set out0 up
route add default via 10.0.1.2 dev in0
`

var healthyTargetSysctls = []string{
	"net.ipv4.conf.all.accept_redirects=0", "net.ipv4.conf.in0.accept_redirects=0",
}

// A host is a network namespace of the test's thread, with another one beyond
// both of its links.
type host struct {
	t          *testing.T
	here, peer int // namespaces
	question   Question
}

// newHost moves the test's goroutine to a thread and a namespace of its own.
// The thread ends with the goroutine, as it is never unlocked, and the
// namespaces end with the thread and the descriptors.
func newHost(t *testing.T, addresses string, sysctls []string) *host {
	t.Helper()
	runtime.LockOSThread()
	h := &host{t: t}
	h.peer = h.unshare()
	h.here = h.unshare()
	for _, name := range []string{"out0", "in0"} {
		h.run("ip link add " + name + " type veth peer name " + name + "p")
		link, err := netlink.LinkByName(name + "p")
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkSetNsFd(link, h.peer); err != nil {
			t.Fatal(err)
		}
		h.beyond("ip link set " + name + "p up")
	}
	h.run("ip -batch - <<'END'\n" + addresses + "END")
	h.run("sysctl -q -w " + strings.Join(sysctls, " "))
	return h
}

func (h *host) unshare() (fd int) {
	h.t.Helper()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		h.t.Fatal(err)
	}
	fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

func (h *host) run(script string) {
	h.t.Helper()
	if out, err := exec.CommandContext(h.t.Context(), "sh", "-e", "-c", script).CombinedOutput(); err != nil {
		h.t.Fatalf("%s: %v\n%s", script, err, out)
	}
}

// beyond runs a script on the other side of the links.
func (h *host) beyond(script string) {
	h.t.Helper()
	if err := unix.Setns(h.peer, unix.CLONE_NEWNET); err != nil {
		h.t.Fatal(err)
	}
	defer func() {
		if err := unix.Setns(h.here, unix.CLONE_NEWNET); err != nil {
			h.t.Fatal(err)
		}
	}()
	h.run(script)
}

func (h *host) read() *Facts {
	h.t.Helper()
	f, err := Read(h.t.Context(), h.question, "nlb")
	if err != nil {
		h.t.Fatal(err)
	}
	return f
}

func balancerHost(t *testing.T, text string) *host {
	t.Helper()
	c, err := config.Parse("test.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	h := newHost(t, healthyBalancer, healthyBalancerSysctls)
	h.question = Question{Role: Balancer, Spec: c.Spec}
	return h
}

func targetHost(t *testing.T) *host {
	t.Helper()
	h := newHost(t, healthyTarget, healthyTargetSysctls)
	h.question = Question{
		Role: Target, Balancers: []netip.Addr{netip.MustParseAddr("10.0.1.2")}, Clients: DefaultClients(),
		VIPs: []netip.Addr{netip.MustParseAddr("198.51.100.10")}, Port: 8080,
	}
	return h
}

func ids(findings []Finding) []string {
	var all []string
	for _, f := range findings {
		all = append(all, f.Check)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// A mistake is seeded into a healthy host. One finding must name it, its cure
// must run, and then nothing is found any more.
type mistake struct {
	id, name string
	// seed is a script; edit changes what is asked, in pairs of old and new text
	// of the configuration.
	seed string
	edit []string
	// asked changes the question of a target.
	asked func(*Question)
	// byHand follows the advice of a finding that has no commands.
	byHand string
	// severity is that of the finding if it is not the check's.
	severity Severity
}

var balancerMistakes = []mistake{
	{id: "ip-forward", seed: "sysctl -w net.ipv4.ip_forward=0"},
	{id: "ip6-forward", seed: "sysctl -w net.ipv6.conf.all.forwarding=0"},
	{id: "interface-forwarding", seed: "sysctl -w net.ipv4.conf.in0.forwarding=0"},
	{id: "ipv6-disabled", seed: "sysctl -w net.ipv6.conf.in0.disable_ipv6=1"},
	{
		id: "rp-filter", name: "of the interface", edit: []string{"198.51.100.10, interface: out0", "198.51.100.10, interface: in0"},
		seed: "ip address delete 198.51.100.10/32 dev out0; ip address add 198.51.100.10/32 dev in0; sysctl -w net.ipv4.conf.in0.rp_filter=1",
	},
	{
		id: "rp-filter", name: "of all", edit: []string{"198.51.100.10, interface: out0", "198.51.100.10, interface: in0"},
		seed: "ip address delete 198.51.100.10/32 dev out0; ip address add 198.51.100.10/32 dev in0; sysctl -w net.ipv4.conf.all.rp_filter=1",
	},
	{id: "accept-ra", seed: "ip -6 route delete default; ip -6 route add default via fe80::1 dev out0 proto ra; sysctl -w net.ipv6.conf.out0.accept_ra=1"},
	{id: "send-redirects", name: "of the interface", seed: "sysctl -w net.ipv4.conf.in0.send_redirects=1"},
	{id: "send-redirects", name: "of all", seed: "sysctl -w net.ipv4.conf.all.send_redirects=1"},
	{id: "accept-redirects", seed: "sysctl -w net.ipv4.conf.all.accept_redirects=1 net.ipv4.conf.in0.accept_redirects=1"},
	{id: "route-localnet", seed: "sysctl -w net.ipv4.conf.in0.route_localnet=1"},
	{id: "bridge-netfilter", seed: "ip link add br0 type bridge; sysctl -w net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1"},
	{id: "conntrack-accounting", seed: "sysctl -w net.netfilter.nf_conntrack_acct=0"},
	{id: "conntrack-events", seed: "sysctl -w net.netfilter.nf_conntrack_events=0"},
	{id: "conntrack-loose", seed: "sysctl -w net.netfilter.nf_conntrack_tcp_loose=0"},
	{id: "conntrack-liberal", seed: "sysctl -w net.netfilter.nf_conntrack_tcp_be_liberal=1"},
	{id: "port-range", seed: "sysctl -w net.ipv4.ip_local_port_range='32768 40000'"},
	{id: "listen-backlog", seed: "sysctl -w net.core.somaxconn=128"},
	{id: "link-down", seed: "ip link set in0 down"},
	{id: "target-unreachable", seed: "ip route add blackhole 10.0.1.11/32", byHand: "ip route delete blackhole 10.0.1.11/32"},
	{id: "mtu", seed: "ip link set in0 mtu 1400"},
	{id: "vip-unbound", name: "with an interface", seed: "ip address delete 2001:db8:77::10/128 dev out0"},
	{
		id: "vip-unbound", name: "relayed", edit: []string{"198.51.100.10, interface: out0", "198.51.100.10"},
		seed: "ip address delete 198.51.100.10/32 dev out0",
	},
	{
		id: "vip-unbound", name: "no such interface", edit: []string{"198.51.100.10, interface: out0", "198.51.100.10, interface: wan0"},
		seed: "ip address delete 198.51.100.10/32 dev out0", byHand: "ip link add wan0 type veth; ip link set wan0 up; ip address add 198.51.100.10/32 dev wan0",
	},
	{id: "vip-elsewhere", name: "too", seed: "ip address add 198.51.100.10/32 dev lo"},
	{id: "vip-elsewhere", name: "only", seed: "ip address delete 198.51.100.10/32 dev out0; ip address add 198.51.100.10/24 dev in0"},
	{
		id: "vip-as-source", name: "IPv4", edit: []string{"198.51.100.10, interface: out0", "198.51.100.10, interface: in0", "10.0.1.1", "198.51.100.1", "[10.0.1.2]", "[198.51.100.2]"},
		seed: "ip address flush dev in0; ip address add 198.51.100.10/24 dev in0; ip address add 198.51.100.2/24 dev in0; ip address delete 198.51.100.10/32 dev out0; ip address add 2001:db8:1::2/64 dev in0 nodad",
	},
	{
		id: "vip-as-source", name: "IPv6", edit: []string{"2001:db8:77::10\", interface: out0", "2001:db8:1::10\", interface: in0", "2001:db8:77::10", "2001:db8:1::10"},
		seed: "ip address delete 2001:db8:77::10/128 dev out0; ip address add 2001:db8:1::10/128 dev in0 nodad",
	},
	{
		id: "vip-as-source", name: "named by the route", seed: "ip route change 10.0.1.0/24 dev in0 src 198.51.100.10",
		byHand: "ip route change 10.0.1.0/24 dev in0 src 10.0.1.2",
	},
	{id: "source-not-local", edit: []string{"[10.0.1.2]", "[10.0.1.2, 10.0.1.3]"}},
	{id: "foreign-drop", name: "forward policy", seed: "nft 'table inet fw { chain forward { type filter hook forward priority 0; policy drop; ct state established,related accept; }; }'"},
	{id: "foreign-drop", name: "forward policy of IPv6", seed: "nft 'table ip6 fw { chain forward { type filter hook forward priority 0; policy drop; }; }'"},
	{id: "foreign-drop", name: "replies", seed: "nft 'table inet fw { chain forward { type filter hook forward priority 0; iifname in0 ip saddr 10.0.1.0/24 tcp sport 8080 drop; }; }'"},
	{id: "foreign-drop", name: "in a chain that is jumped to", seed: "nft 'table inet fw { chain targets { ip daddr 10.0.1.12 reject; }; chain forward { type filter hook forward priority 0; oifname in0 jump targets; }; }'"},
	{id: "foreign-drop", name: "relay", seed: "nft 'table inet fw { chain input { type filter hook input priority 0; policy drop; ct state established,related accept; iif lo accept; ip daddr 198.51.100.10 tcp dport 22 accept; }; }'", severity: Warning},
	{id: "foreign-drop", name: "relay for certain", seed: "nft 'table inet fw { chain input { type filter hook input priority 0; policy drop; ct state established,related accept; }; }'"},
	{id: "foreign-drop", name: "health checks", seed: "nft 'table inet fw { chain output { type filter hook output priority 0; oifname in0 tcp dport 8000-9000 drop; }; }'"},
	{id: "foreign-drop", name: "before the choice", seed: "nft 'table ip fw { chain early { type filter hook prerouting priority raw; tcp dport 80 drop; }; }'"},
	{id: "foreign-drop", name: "a set without the port", seed: "nft 'table inet fw { chain input { type filter hook input priority 0; policy drop; ct state { established, related } accept; tcp dport { 22, 80-90 } accept; }; }'"},
	{id: "foreign-drop", name: "a set with a target", seed: "nft 'table inet fw { set bad { type ipv4_addr; flags interval; elements = { 10.0.1.12-10.0.1.20, 10.9.0.0/16 }; }; chain forward { type filter hook forward priority 0; ip daddr @bad drop; }; }'"},
	{id: "foreign-drop", name: "all but a set", seed: "nft 'table inet fw { chain forward { type filter hook forward priority 0; oifname in0 tcp dport != { 80, 443 } drop; }; }'"},
	{id: "foreign-drop", name: "ports up to the last", seed: "nft 'table inet fw { chain forward { type filter hook forward priority 0; oifname { in0, in1 } tcp dport { 22, 1024-65535 } drop; }; }'"},
	{
		id: "foreign-drop", name: "unless a set of two fields says otherwise", severity: Warning,
		seed: "nft 'table ip fw { chain forward { type filter hook forward priority 0; policy drop; ct direction reply accept; ip daddr . tcp dport { 10.0.1.11 . 8080, 10.0.1.12 . 8080 } accept; }; }'",
	},
	{
		id: "foreign-drop", name: "unless a set says otherwise", severity: Warning,
		seed: "nft 'table ip fw { chain forward { type filter hook forward priority 0; policy drop; ip daddr { 10.0.1.11, 10.0.1.12 } accept; }; }'",
	},
	{id: "foreign-snat", seed: "nft 'table ip nat { chain post { type nat hook postrouting priority srcnat; oifname in0 masquerade; }; }'"},
	{id: "foreign-dnat", seed: "nft 'table ip nat { chain pre { type nat hook prerouting priority -110; ip daddr 198.51.100.10 tcp dport 80 dnat to 10.0.1.99; }; }'"},
	{id: "foreign-notrack", name: "arrivals", seed: "nft 'table ip raw { chain pre { type filter hook prerouting priority raw; tcp dport 80 notrack; }; }'"},
	{id: "foreign-notrack", name: "replies", seed: "nft 'table ip raw { chain pre { type filter hook prerouting priority raw; iifname in0 notrack; }; }'"},
}

var targetMistakes = []mistake{
	{id: "target-lb-unreachable", seed: "ip route add unreachable 10.0.1.2/32", byHand: "ip route delete unreachable 10.0.1.2/32"},
	{id: "target-lb-local", seed: "ip address add 10.0.1.2/32 dev lo"},
	{id: "target-vip-bound", seed: "ip address add 198.51.100.10/32 dev lo"},
	{id: "target-return-path", seed: "ip route replace default via 10.0.9.1 dev out0"},
	{
		id: "target-rp-filter", seed: "ip route replace default via 10.0.9.1 dev out0; ip route add 10.0.7.2/32 via 10.0.1.1 dev in0; sysctl -w net.ipv4.conf.in0.rp_filter=1",
		asked: func(q *Question) { q.Balancers = []netip.Addr{netip.MustParseAddr("10.0.7.2")} },
	},
	{
		id: "target-return-path", name: "IPv6",
		seed: "ip address add 2001:db8:1::11/64 dev in0 nodad; ip address add 2001:db8:9::11/64 dev out0 nodad; " +
			"ip -6 route add default via 2001:db8:9::1 dev out0; sysctl -w net.ipv6.conf.in0.accept_redirects=0",
		asked: func(q *Question) { q.Balancers = []netip.Addr{netip.MustParseAddr("2001:db8:1::2")} },
	},
	{
		id: "target-redirects", name: "IPv6",
		seed:  "ip address add 2001:db8:1::11/64 dev in0 nodad; ip -6 route add default via 2001:db8:1::2 dev in0; sysctl -w net.ipv6.conf.in0.accept_redirects=1",
		asked: func(q *Question) { q.Balancers = []netip.Addr{netip.MustParseAddr("2001:db8:1::2")} },
	},
	{id: "target-redirects", name: "IPv4", seed: "sysctl -w net.ipv4.conf.in0.accept_redirects=1"},
	{id: "target-drop", name: "policy", seed: "nft 'table inet fw { chain input { type filter hook input priority 0; policy drop; ct state established accept; }; }'"},
	{id: "target-drop", name: "replies", seed: "nft 'table inet fw { chain output { type filter hook output priority 0; tcp sport 8080 reject; }; }'"},
	{id: "target-masquerade", seed: "nft 'table ip nat { chain post { type nat hook postrouting priority srcnat; ip daddr != 10.0.0.0/8 oifname in0 masquerade; }; }'"},
}

func TestHealthyHostsHaveNoFindings(t *testing.T) {
	t.Parallel()
	t.Run("balancer", func(t *testing.T) {
		t.Parallel()
		h := balancerHost(t, healthyConfig)
		// A firewall that lets everything of ours pass is healthy too.
		h.run(`nft 'table inet fw {
			chain forward { type filter hook forward priority 0; policy drop; ct state established,related accept; ct status dnat accept; }
			chain input { type filter hook input priority 0; policy drop; ct state established,related accept; iifname lo accept; tcp dport { 22, 25, 80-443 } accept; }
			set blocked { type ipv4_addr; flags interval; elements = { 192.0.2.0/24, 10.0.9.0-10.0.10.5 }; }
			set seen { type ipv4_addr; flags dynamic,timeout; timeout 1m; }
			chain early { type filter hook prerouting priority raw; ip saddr @blocked drop; ip daddr @blocked drop; ip daddr @seen drop; }
			chain post { type nat hook postrouting priority srcnat; ip saddr 10.0.1.0/24 oifname out0 masquerade; }
		}'`)
		if d := cmp.Diff([]string(nil), ids(Diagnose(h.read()))); d != "" {
			t.Error(d)
		}
	})
	t.Run("target", func(t *testing.T) {
		t.Parallel()
		if d := cmp.Diff([]string(nil), ids(Diagnose(targetHost(t).read()))); d != "" {
			t.Error(d)
		}
	})
}

func TestMistakesAreFoundAndCured(t *testing.T) {
	t.Parallel()
	for role, mistakes := range map[Role][]mistake{Balancer: balancerMistakes, Target: targetMistakes} {
		for _, m := range mistakes {
			t.Run(strings.TrimSuffix(m.id+"/"+m.name, "/"), func(t *testing.T) {
				t.Parallel()
				m.test(t, role)
			})
		}
	}
}

func (m mistake) test(t *testing.T, role Role) {
	var h *host
	if role == Balancer {
		h = balancerHost(t, strings.NewReplacer(m.edit...).Replace(healthyConfig))
	} else {
		h = targetHost(t)
	}
	if m.asked != nil {
		m.asked(&h.question)
	}
	if m.seed != "" {
		h.run(m.seed)
	}
	facts := h.read()
	findings := Diagnose(facts)
	if d := cmp.Diff([]string{m.id}, ids(findings)); d != "" {
		t.Fatalf("found (-want +got):\n%s\n%s", d, Script(findings))
	}
	roundTrip(t, facts)
	check := Checks()[slices.IndexFunc(Checks(), func(c Check) bool { return c.ID == m.id })]
	for _, f := range findings {
		want := check.Severity
		if m.severity != "" {
			want = m.severity
		}
		if f.Severity != want {
			t.Errorf("%s is %s, not %s", f.What, f.Severity, want)
		}
	}
	if m.byHand != "" {
		if cures := Cures(findings); len(cures) > 0 || findings[0].Advice == "" {
			t.Errorf("wants no commands, and an advice: %v", findings)
		}
		h.run(m.byHand)
	} else {
		// As a whole, the way --fix prints it.
		h.run(Script(findings))
	}
	if d := cmp.Diff([]string(nil), ids(Diagnose(h.read()))); d != "" {
		t.Errorf("found after the cure (-want +got):\n%s\n%s", d, Script(findings))
	}
}

// roundTrip checks that facts which went through JSON say the same.
func roundTrip(t *testing.T, f *Facts) {
	t.Helper()
	text, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	var back Facts
	if err := json.Unmarshal(text, &back); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(Diagnose(f), Diagnose(&back), cmpopts.EquateEmpty()); d != "" {
		t.Errorf("after JSON (-before +after):\n%s", d)
	}
}

func TestProbeFindsAnotherHostWithTheVIP(t *testing.T) {
	t.Parallel()
	h := balancerHost(t, healthyConfig)
	probed := func() *Facts {
		f := h.read()
		if err := Probe(t.Context(), f, 300*time.Millisecond); err != nil {
			t.Fatal(err)
		}
		return f
	}
	if f := probed(); len(f.Duplicates) != 0 {
		t.Fatalf("nobody has it, and %v answered", f.Duplicates)
	}
	// Linux answers on any link, unless told not to.
	h.beyond("sysctl -w net.ipv4.conf.all.arp_ignore=1; ip link set out0p address 02:00:00:00:00:99; ip address add 198.51.100.10/32 dev out0p")
	findings := Diagnose(probed())
	if d := cmp.Diff([]string{"vip-duplicate"}, ids(findings)); d != "" {
		t.Fatal(d)
	}
	if want := "02:00:00:00:00:99 answered for 198.51.100.10 on out0"; findings[0].What != want {
		t.Errorf("says %q, not %q", findings[0].What, want)
	}
	h.beyond("ip address delete 198.51.100.10/32 dev out0p")
	if d := cmp.Diff([]string(nil), ids(Diagnose(probed()))); d != "" {
		t.Error(d)
	}
}

// TestReadChangesNothing compares all that the doctor could have touched.
func TestReadChangesNothing(t *testing.T) {
	t.Parallel()
	h := balancerHost(t, healthyConfig)
	look := func() string {
		out, err := exec.Command("sh", "-c", "sysctl -a -r '^net.(ipv[46].conf|netfilter|ipv4.ip_|bridge)' 2>/dev/null | grep -v count; ip address; ip route show table all; nft list ruleset").Output()
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	before := look()
	h.read()
	if d := cmp.Diff(before, look()); d != "" {
		t.Error(d)
	}
}

// TestLargeSetsAreNotRead leaves a doubt, and no list of thousands in the facts.
func TestLargeSetsAreNotRead(t *testing.T) {
	t.Parallel()
	h := balancerHost(t, healthyConfig)
	var elements []string
	for i := range maxElements + 1 {
		elements = append(elements, netip.AddrFrom4([4]byte{10, 8, byte(i >> 8), byte(i)}).String())
	}
	h.run("nft -f - <<'END'\ntable ip fw { set good { type ipv4_addr; elements = { " + strings.Join(elements, ",") +
		" }; }; chain forward { type filter hook forward priority 0; policy drop; ip daddr @good accept; }; }\nEND")
	facts := h.read()
	if c := facts.Chains[0].Rules[0].Conditions[0]; c.Set != "good" || c.Listed || len(c.Ranges) > 0 {
		t.Errorf("%s has %d elements, listed: %v", c.Set, len(c.Ranges), c.Listed)
	}
	findings := Diagnose(facts)
	if len(findings) != 1 || findings[0].Check != "foreign-drop" || findings[0].Severity != Warning {
		t.Errorf("found %v", findings)
	}
}
