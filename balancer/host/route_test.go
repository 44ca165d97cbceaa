package host

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/internal/nstest"
	"nlb/internal/wait"
)

func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }

// patience bounds every wait for the kernel.
const patience = 20 * time.Second

func run(t testing.TB, words string) string {
	t.Helper()
	args := strings.Fields(words)
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", words, err, out)
	}
	return string(out)
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	wait.Until(t, patience, what, ok, func() string { return run(t, "ip addr") })
}

// veth makes an interface that is up, with a peer named wire-….
func veth(t testing.TB, name string) {
	t.Helper()
	run(t, "ip link add "+name+" type veth peer name wire-"+name)
	t.Cleanup(func() { _ = exec.Command("ip", "link", "del", name).Run() })
	run(t, "ip link set wire-"+name+" up")
	run(t, "ip link set "+name+" up")
}

func isVIP(a netip.Addr) bool {
	return netip.MustParsePrefix("198.51.100.0/24").Contains(a) || netip.MustParsePrefix("2001:db8:ffff::/48").Contains(a)
}

func TestRoutes(t *testing.T) {
	veth(t, "eth0")
	veth(t, "eth1.100")
	veth(t, "eth2")
	for _, words := range []string{
		// eth0: both families, a gateway, VIPs in the way.
		"addr add 10.0.0.2/24 dev eth0",
		"addr add 198.51.100.10/24 dev eth0",
		"addr add 2001:db8:0:1::2/64 dev eth0 nodad",
		"addr add 2001:db8:ffff::10/64 dev eth0 nodad",
		"route add 10.1.0.0/16 via 10.0.0.1",
		"route add 10.2.0.0/16 via 10.0.0.1 src 198.51.100.10",
		"route add 10.3.0.0/16 dev eth0 src 198.51.100.10",
		"route add 10.3.0.7/32 dev eth0",
		"route add 2001:db8:0:3::/64 via 2001:db8:0:1::1",
		"route add 2001:db8:0:4::/64 dev eth0 src 2001:db8:ffff::10",
		// eth1.100: no address but a VIP, so sources come from elsewhere.
		"addr add 198.51.100.11/32 dev eth1.100",
		"route add 10.4.0.0/16 dev eth1.100 src 198.51.100.11",
		"route add 10.5.0.0/16 nexthop via 10.0.0.1 nexthop via 10.0.0.9",
		// What cannot be reached.
		"route add blackhole 10.6.0.0/24",
		"route add unreachable 10.6.1.0/24",
		"route add prohibit 10.6.2.0/24",
		"route add blackhole 2001:db8:0:6::/64",
		"route add unreachable 2001:db8:0:7::/64",
		// Policy routing: one destination leaves by a table of its own, on link.
		"addr add 10.7.255.2/32 dev eth2",
		"route add 10.7.0.0/20 dev eth2 table 77 src 10.7.255.2",
		"rule add to 10.7.0.0/16 lookup 77",
		// A default route without a gateway makes nobody a neighbour.
		"route add default dev eth2 table 78",
		"rule add to 10.8.0.0/16 lookup 78",
		// A gateway of the other family.
		"route add 10.9.0.0/16 via inet6 fe80::1 dev eth0",
	} {
		run(t, "ip "+words)
	}
	t.Cleanup(func() {
		for _, words := range []string{
			"rule del to 10.7.0.0/16 lookup 77", "rule del to 10.8.0.0/16 lookup 78",
			"route del blackhole 10.6.0.0/24", "route del unreachable 10.6.1.0/24", "route del prohibit 10.6.2.0/24",
			"route del blackhole 2001:db8:0:6::/64", "route del unreachable 2001:db8:0:7::/64",
		} {
			run(t, "ip "+words)
		}
	})

	// Each line: target, source, interface, subnet, local; or "none".
	want := `
10.0.0.11 10.0.0.2 eth0 10.0.0.0/24 false
10.0.0.2 10.0.0.2 lo - true
10.0.0.255 none
10.1.0.1 10.0.0.2 eth0 - false
10.2.0.1 10.0.0.2 eth0 - false
10.3.0.1 10.0.0.2 eth0 10.3.0.0/16 false
10.3.0.7 10.0.0.2 eth0 - false
10.4.0.1 10.0.0.2 eth1.100 10.4.0.0/16 false
10.5.0.1 10.0.0.2 eth0 - false
10.6.0.1 none
10.6.1.1 none
10.6.2.1 none
10.7.0.1 10.7.255.2 eth2 10.7.0.0/20 false
10.7.128.1 none
10.8.0.1 10.7.255.2 eth2 - false
10.9.0.1 10.0.0.2 eth0 - false
203.0.113.1 none
127.0.0.1 127.0.0.1 lo - true
2001:db8:0:1::11 2001:db8:0:1::2 eth0 2001:db8:0:1::/64 false
2001:db8:0:1::2 2001:db8:0:1::2 lo - true
2001:db8:0:3::1 2001:db8:0:1::2 eth0 - false
2001:db8:0:4::1 2001:db8:0:1::2 eth0 2001:db8:0:4::/64 false
2001:db8:0:6::1 none
2001:db8:0:7::1 none
2001:db8:0:8::1 none
`
	want = strings.TrimSpace(want)
	var targets []netip.Addr
	for line := range strings.Lines(want) {
		target, _, _ := strings.Cut(line, " ")
		targets = append(targets, netip.MustParseAddr(target))
	}
	routes, err := NewRouter().Routes(t.Context(), targets, isVIP)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, target := range targets {
		got = append(got, describe(target, routes))
	}
	if d := cmp.Diff(strings.Split(want, "\n"), got); d != "" {
		t.Errorf("routes (-want +got):\n%s", d)
	}
}

func describe(target netip.Addr, routes map[netip.Addr]balancer.Route) string {
	r, ok := routes[target]
	if !ok {
		return target.String() + " none"
	}
	subnet := "-"
	if r.Subnet.IsValid() {
		subnet = r.Subnet.String()
	}
	return fmt.Sprintf("%s %s %s %s %v", target, r.Source, r.Interface, subnet, r.Local)
}

func TestRoutesWithoutAnySource(t *testing.T) {
	veth(t, "eth0")
	run(t, "ip addr add 198.51.100.10/24 dev eth0")
	target := netip.MustParseAddr("198.51.100.77")
	routes, err := NewRouter().Routes(t.Context(), []netip.Addr{target}, isVIP)
	if err != nil {
		t.Fatal(err)
	}
	want := balancer.Route{Interface: "eth0", Subnet: netip.MustParsePrefix("198.51.100.0/24")}
	if got := routes[target]; got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestRoutesZone(t *testing.T) {
	veth(t, "eth0")
	veth(t, "eth1")
	ll := func() bool { return strings.Contains(run(t, "ip -6 addr show dev eth1 scope link -tentative"), "fe80") }
	eventually(t, "link-local address", ll)
	targets := []netip.Addr{netip.MustParseAddr("fe80::9%eth1"), netip.MustParseAddr("fe80::9%gone")}
	routes, err := NewRouter().Routes(t.Context(), targets, isVIP)
	if err != nil {
		t.Fatal(err)
	}
	if got := routes[targets[0]]; got.Interface != "eth1" || got.Subnet != netip.MustParsePrefix("fe80::/64") {
		t.Errorf("got %+v", got)
	}
	if got, ok := routes[targets[1]]; ok {
		t.Errorf("a missing interface gave %+v", got)
	}
}

func TestRoutesCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := NewRouter().Routes(ctx, []netip.Addr{netip.MustParseAddr("127.0.0.1")}, isVIP); err == nil {
		t.Error("no error")
	}
}

func TestPick(t *testing.T) {
	own := []address{
		{netip.MustParsePrefix("10.9.0.2/24"), 3},
		{netip.MustParsePrefix("198.51.100.10/32"), 2},
		{netip.MustParsePrefix("10.0.0.2/24"), 2},
		{netip.MustParsePrefix("10.0.1.2/24"), 2},
		{netip.MustParsePrefix("2001:db8::2/64"), 2},
	}
	tests := []struct {
		index      int
		next, want string
	}{
		{2, "10.0.0.1", "10.0.0.2"},
		{2, "10.0.1.1", "10.0.1.2"},
		{2, "10.0.2.1", "10.0.0.2"},
		{3, "10.0.0.1", "10.9.0.2"},
		{4, "10.0.0.1", "10.9.0.2"},
		{4, "2001:db8::1", "2001:db8::2"},
	}
	for _, tt := range tests {
		if got := pick(own, tt.index, netip.MustParseAddr(tt.next), isVIP); got.String() != tt.want {
			t.Errorf("interface %d, next hop %s: %s, want %s", tt.index, tt.next, got, tt.want)
		}
	}
	if got := pick(own[1:2], 2, netip.MustParseAddr("10.0.0.1"), isVIP); got.IsValid() {
		t.Errorf("only a VIP: %s", got)
	}
}

// BenchmarkRoutes asks for 10,000 targets, half of them on the link.
func BenchmarkRoutes(b *testing.B) {
	veth(b, "eth0")
	run(b, "ip addr add 10.0.0.2/16 dev eth0")
	run(b, "ip route add 10.1.0.0/16 via 10.0.0.1")
	targets := make([]netip.Addr, 0, 10_000)
	for i := range 5_000 {
		targets = append(targets, netip.AddrFrom4([4]byte{10, 0, byte(1 + i>>8), byte(i)}), netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}))
	}
	for b.Loop() {
		routes, err := NewRouter().Routes(b.Context(), targets, isVIP)
		if err != nil || len(routes) != len(targets) {
			b.Fatal(len(routes), err)
		}
	}
}

// watching runs w until the test ends and counts its calls. It returns when w
// reacts to the probe.
func watching(t *testing.T, w balancer.Watcher, probe func()) *atomic.Int64 {
	t.Helper()
	var calls atomic.Int64
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.Watch(ctx, func() { calls.Add(1) }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Watch: %v", err)
		}
		goleak.VerifyNone(t, goleak.IgnoreCurrent())
	})
	eventually(t, "watching", func() bool { probe(); return calls.Load() > 0 })
	return &calls
}

func TestRouterWatch(t *testing.T) {
	veth(t, "eth0")
	calls := watching(t, NewRouter(), func() {
		run(t, "ip link set eth0 mtu 1400")
		run(t, "ip link set eth0 mtu 1500")
	})
	for _, words := range []string{
		"ip addr add 10.0.0.2/24 dev eth0",
		"ip route add 10.1.0.0/16 via 10.0.0.1",
		"ip -6 route add 2001:db8::/64 dev eth0",
		"ip rule add to 10.7.0.0/16 lookup 77",
		"ip rule del to 10.7.0.0/16 lookup 77",
		"ip -6 rule add to 2001:db8::/64 lookup 77",
		"ip -6 rule del to 2001:db8::/64 lookup 77",
		"ip route del 10.1.0.0/16",
		"ip link set eth0 down",
	} {
		before := calls.Load()
		run(t, words)
		eventually(t, words, func() bool { return calls.Load() > before })
	}
}

// TestLostEvents: when the kernel drops notifications, everything may have
// changed.
func TestLostEvents(t *testing.T) {
	veth(t, "eth0")
	conn, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{Groups: routeGroups})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetReadBuffer(1); err != nil { // the kernel's minimum
		t.Fatal(err)
	}
	var lines strings.Builder
	for i := range 200 {
		fmt.Fprintf(&lines, "addr add 10.9.0.%d/32 dev eth0\n", i+1)
	}
	batch := filepath.Join(t.TempDir(), "batch")
	if err := os.WriteFile(batch, []byte(lines.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "ip -batch "+batch)

	// The loss is the first thing the socket tells.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	called := false
	err = follow(ctx, conn, func() {
		called = true
		cancel()
		_ = conn.SetReadDeadline(time.Unix(1, 0))
	})
	if err != nil || !called {
		t.Errorf("follow: called %v, error %v", called, err)
	}
}

func TestCachedRoutesDoNotMatter(t *testing.T) {
	data := func(flags byte) []byte { return []byte{unix.AF_INET6, 128, 0, 0, 254, 0, 0, 1, 0, flags, 0, 0} }
	cloned := netlink.Message{Header: netlink.Header{Type: unix.RTM_NEWROUTE}, Data: data(unix.RTM_F_CLONED >> 8)}
	proper := netlink.Message{Header: netlink.Header{Type: unix.RTM_NEWROUTE}, Data: data(0)}
	if matters([]netlink.Message{cloned}) {
		t.Error("a cached route matters")
	}
	if !matters([]netlink.Message{cloned, proper}) {
		t.Error("a route does not matter")
	}
}
