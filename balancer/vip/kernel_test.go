package vip

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/arp"
	"github.com/mdlayher/ndp"
	"github.com/mdlayher/netlink"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/internal/nstest"
	"nlb/internal/wait"
)

func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }

// patience bounds every wait for the kernel.
const patience = 20 * time.Second

func run(t *testing.T, words string) string {
	t.Helper()
	args := strings.Fields(words)
	out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", words, err, out)
	}
	return string(out)
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	wait.Until(t, patience, what, ok, func() string { return run(t, "ip -d addr") })
}

// eth0 makes eth0, up, with the far end of its cable, wire0, up as well.
func eth0(t *testing.T) {
	t.Helper()
	run(t, "ip link add eth0 type veth peer name wire0")
	t.Cleanup(func() { _ = exec.Command("ip", "link", "del", "eth0").Run() })
	run(t, "ip link set wire0 up")
	run(t, "ip link set eth0 up")
	eventually(t, "carrier", func() bool { return strings.Contains(run(t, "ip link show eth0"), "LOWER_UP") })
}

func desired(vips ...balancer.VIP) *balancer.Desired { return &balancer.Desired{Bound: vips} }

// converge plans and applies both parts in their order and returns the lines.
func converge(t *testing.T, want *balancer.Desired, parts ...balancer.Part) []string {
	t.Helper()
	lines := []string{}
	for _, p := range parts {
		plan, err := p.Plan(t.Context(), want)
		if err != nil {
			t.Fatalf("%s: plan: %v", p.Name(), err)
		}
		lines = append(lines, plan.Lines()...)
		if err := p.Apply(t.Context(), plan); err != nil {
			t.Fatalf("%s: apply: %v", p.Name(), err)
		}
	}
	return lines
}

func parts(t *testing.T) []balancer.Part {
	log := zaptest.NewLogger(t)
	return []balancer.Part{NewWithdrawer(log), NewAnnouncer(log)}
}

// shown is what ip(8) says of the addresses of a link, one a line, without
// link-local ones.
func shown(t *testing.T, ifname string) []string {
	t.Helper()
	lines := []string{}
	for line := range strings.Lines(run(t, "ip -d -o addr show dev "+ifname)) {
		if strings.Contains(line, "scope link") || strings.Contains(line, " 127.0.0.1/8 ") || strings.Contains(line, " ::1/128 ") {
			continue
		}
		line = line[strings.Index(line, "inet"):]
		line, _, _ = strings.Cut(line, `\`)
		lines = append(lines, strings.Join(strings.Fields(line), " "))
	}
	return lines
}

// withoutProto drops what ip(8) says of the protocol, which old ones do not.
func withoutProto(lines []string) []string {
	re := regexp.MustCompile(` proto \S+`)
	for i, l := range lines {
		lines[i] = re.ReplaceAllString(l, "")
	}
	return lines
}

func TestBind(t *testing.T) {
	eth0(t)
	run(t, "ip addr add 10.0.0.2/24 dev eth0")
	want := desired(wantVIP("198.51.100.10", "eth0"), wantVIP("2001:db8::10", "eth0"), wantVIP("198.51.100.11", "lo"))

	if got := converge(t, want, parts(t)...); len(got) != 3 {
		t.Errorf("the first pass did %q", got)
	}
	wantShown := []string{
		"inet 198.51.100.10/32 metric 7236706 scope host eth0:nlb",
		"inet 10.0.0.2/24 scope global eth0",
		"inet6 2001:db8::10/128 metric 7236706 scope global nodad deprecated noprefixroute",
	}
	if d := cmp.Diff(wantShown, withoutProto(shown(t, "eth0"))); d != "" {
		t.Errorf("addresses of eth0 (-want +got):\n%s", d)
	}
	have, err := addresses()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range have {
		if ours := a.Prefix.IsSingleIP() && !a.Prefix.Addr().IsLoopback(); a.Ours != ours {
			t.Errorf("%v: Ours = %v", a, a.Ours)
		}
	}
	if got := legacyAddress(t, "eth0"); got != "10.0.0.2" {
		t.Errorf("SIOCGIFADDR says %s", got)
	}
	if got := run(t, "ip -6 route show table main"); strings.Contains(got, "2001:db8::10") {
		t.Errorf("a prefix route was made:\n%s", got)
	}

	// New parts, as after a restart, adopt; nil removes all that is ours.
	if got := converge(t, want, parts(t)...); len(got) != 0 {
		t.Errorf("a restart did %q", got)
	}
	if got := converge(t, nil, parts(t)...); len(got) != 3 {
		t.Errorf("clear did %q", got)
	}
	if d := cmp.Diff([]string{"inet 10.0.0.2/24 scope global eth0"}, shown(t, "eth0")); d != "" {
		t.Errorf("addresses of eth0 after clear (-want +got):\n%s", d)
	}
}

// legacyAddress is the IPv4 address of an interface for programs that know only
// one.
func legacyAddress(t *testing.T, ifname string) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	ifr, err := unix.NewIfreq(ifname)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFADDR, ifr); err != nil {
		t.Fatal(err)
	}
	ip, err := ifr.Inet4Addr()
	if err != nil {
		t.Fatal(err)
	}
	return net.IP(ip).String()
}

// TestOldKernel: kernels before 5.18 drop the protocol, and ip(8) of Debian 12
// does not send it, so what it adds is what an old kernel keeps of ours.
func TestOldKernel(t *testing.T) {
	eth0(t)
	run(t, fmt.Sprintf("ip addr add 198.51.100.10/32 dev eth0 metric %d", Metric))
	run(t, fmt.Sprintf("ip addr add 2001:db8::10/128 dev eth0 nodad noprefixroute metric %d", Metric))
	run(t, "ip addr add 198.51.100.11/32 dev eth0 metric 100")
	want := []string{"ip addr del 198.51.100.10/32 dev eth0", "ip addr del 2001:db8::10/128 dev eth0"}
	if d := cmp.Diff(want, converge(t, nil, parts(t)...)); d != "" {
		t.Errorf("clear (-want +got):\n%s", d)
	}
}

func TestForeignAddressIsLeftAlone(t *testing.T) {
	eth0(t)
	run(t, "ip addr add 198.51.100.10/24 dev eth0")
	run(t, "ip addr add 2001:db8::10/64 dev eth0 nodad")
	before := shown(t, "eth0")
	core, logs := observer.New(zap.InfoLevel)
	w, a := NewWithdrawer(zap.New(core)), NewAnnouncer(zap.New(core))
	want := desired(wantVIP("198.51.100.10", "eth0"), wantVIP("2001:db8::10", "eth0"))
	for range 3 {
		if got := converge(t, want, w, a); len(got) != 0 {
			t.Errorf("did %q", got)
		}
	}
	if got := logs.FilterMessageSnippet("left to them").Len(); got != 2 {
		t.Errorf("said it %d times for two addresses", got)
	}
	converge(t, nil, w, a)
	if d := cmp.Diff(before, shown(t, "eth0")); d != "" {
		t.Errorf("addresses (-before +after):\n%s", d)
	}
}

func TestMove(t *testing.T) {
	eth0(t)
	ps := parts(t)
	converge(t, desired(wantVIP("198.51.100.10", "eth0"), wantVIP("2001:db8::10", "eth0")), ps...)

	// The new interface is not there: the old one keeps the address.
	want := desired(wantVIP("198.51.100.10", "lo"), wantVIP("2001:db8::10", "eth9"))
	plan, err := ps[1].Plan(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	err = ps[1].Apply(t.Context(), plan)
	if err == nil || err.Error() != "add 2001:db8::10/128 to eth9: there is no such interface" {
		t.Errorf("error is %v", err)
	}
	if got := shown(t, "eth0"); len(got) != 1 || !strings.HasPrefix(got[0], "inet6 2001:db8::10") {
		t.Errorf("eth0 has %q", got)
	}
	if got := shown(t, "lo"); len(got) != 1 || !strings.HasPrefix(got[0], "inet 198.51.100.10") {
		t.Errorf("lo has %q", got)
	}
	converge(t, nil, ps...)
}

func TestLinkDown(t *testing.T) {
	eth0(t)
	run(t, "ip link set eth0 down")
	ps := parts(t)
	want := desired(wantVIP("198.51.100.10", "eth0"), wantVIP("198.51.100.11", "lo"))
	plan, err := ps[1].Plan(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	err = ps[1].Apply(t.Context(), plan)
	if err == nil || err.Error() != "add 198.51.100.10/32 to eth0: the interface is down (ip link set eth0 up)" {
		t.Errorf("error is %v", err)
	}
	if got := shown(t, "lo"); len(got) != 1 {
		t.Errorf("the VIP of lo did not get its address: %q", got)
	}
	run(t, "ip link set eth0 up")
	converge(t, want, ps...)
	if got := shown(t, "eth0"); len(got) != 1 {
		t.Errorf("eth0 has %q", got)
	}
	converge(t, nil, ps...)
}

func TestIPv6Off(t *testing.T) {
	eth0(t)
	run(t, "sysctl -qw net.ipv6.conf.eth0.disable_ipv6=1")
	a := NewAnnouncer(zaptest.NewLogger(t))
	plan, err := a.Plan(t.Context(), desired(wantVIP("2001:db8::10", "eth0")))
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Apply(t.Context(), plan); err == nil || !strings.Contains(err.Error(), "disable_ipv6") {
		t.Errorf("error is %v", err)
	}
}

func TestCancelledApplyStops(t *testing.T) {
	eth0(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, p := range parts(t) {
		plan := Plan{Add: []Address{address("198.51.100.10/32", "eth0", true)}, Remove: []Address{address("198.51.100.11/32", "eth0", true)}}
		if err := p.Apply(ctx, plan); err == nil {
			t.Errorf("%s: no error", p.Name())
		}
	}
	if got := shown(t, "eth0"); len(got) != 0 {
		t.Errorf("eth0 has %q", got)
	}
}

// TestNeverASource: not even an interface without any other address lends a VIP
// to connections of our own.
func TestNeverASource(t *testing.T) {
	eth0(t)
	run(t, "ip route add 10.0.0.0/24 dev eth0")
	run(t, "ip -6 route add 2001:db8:1::/64 dev eth0")
	converge(t, desired(wantVIP("198.51.100.10", "eth0"), wantVIP("198.51.100.11", "lo"), wantVIP("2001:db8::10", "eth0")), parts(t)...)
	if got := run(t, "ip route get 10.0.0.9"); strings.Contains(got, "198.51.100") {
		t.Errorf("IPv4 source is a VIP: %s", got)
	}
	run(t, "ip -6 addr add 2001:db8:2::2/64 dev lo nodad")
	if got := run(t, "ip route get 2001:db8:1::9"); !strings.Contains(got, "src 2001:db8:2::2") {
		t.Errorf("IPv6 source is not the other address: %s", got)
	}
	run(t, "ip -6 addr del 2001:db8:2::2/64 dev lo")
	converge(t, nil, parts(t)...)
}

// TestAnswers: a neighbour in another namespace resolves and reaches the VIPs.
func TestAnswers(t *testing.T) {
	const ns = "nlb-vip-test-peer"
	eth0(t)
	run(t, "ip netns add "+ns)
	t.Cleanup(func() {
		if out, err := exec.Command("ip", "netns", "del", ns).CombinedOutput(); err != nil {
			t.Errorf("remove the namespace: %v %s", err, out)
		}
	})
	run(t, "ip link set wire0 netns "+ns)
	for _, words := range []string{
		"addr add 203.0.113.9/24 dev wire0", "addr add 2001:db8:3::9/64 dev wire0 nodad", "link set wire0 up",
		"route add 198.51.100.10/32 dev wire0", "route add 2001:db8::10/128 dev wire0",
	} {
		run(t, "ip -n "+ns+" "+words)
	}
	run(t, "ip route add 203.0.113.0/24 dev eth0")
	run(t, "ip route add 2001:db8:3::/64 dev eth0")
	ps := parts(t)
	converge(t, desired(wantVIP("198.51.100.10", "eth0"), wantVIP("2001:db8::10", "eth0")), ps...)
	for _, vip := range []string{"198.51.100.10", "2001:db8::10"} {
		ln, err := net.Listen("tcp", net.JoinHostPort(vip, "80"))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = ln.Close() }()
		run(t, fmt.Sprintf("ip netns exec %s timeout 10 bash -c :</dev/tcp/%s/80", ns, vip))
	}
}

// frames captures what arrives at wire0 with the given EtherType.
func frames(t *testing.T, ethertype uint16) <-chan []byte {
	t.Helper()
	wire, err := net.InterfaceByName("wire0")
	if err != nil {
		t.Fatal(err)
	}
	proto := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, ethertype))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(proto))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: wire.Index}); err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "wire0")
	out := make(chan []byte, 100)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			buf := make([]byte, 2048)
			n, err := file.Read(buf)
			if errors.Is(err, unix.ENETDOWN) {
				continue // said once; frames come again when the link is up
			}
			if err != nil {
				return
			}
			out <- buf[:n]
		}
	}()
	t.Cleanup(func() { _ = file.Close(); <-done })
	return out
}

// announcement is what a frame tells neighbours, empty if it is something else.
func announcement(frame []byte) string {
	ethernet := fmt.Sprintf("%s > %s ", net.HardwareAddr(frame[6:12]), net.HardwareAddr(frame[0:6]))
	packet := frame[14:]
	if binary.BigEndian.Uint16(frame[12:]) == unix.ETH_P_ARP {
		var p arp.Packet
		if p.UnmarshalBinary(packet) != nil {
			return ""
		}
		return ethernet + fmt.Sprintf("%v %s is at %s, for %s at %s",
			p.Operation, p.SenderIP, p.SenderHardwareAddr, p.TargetIP, p.TargetHardwareAddr)
	}
	if len(packet) < 44 || packet[6] != unix.IPPROTO_ICMPV6 || packet[40] != 136 {
		return ""
	}
	src, dst := netip.AddrFrom16([16]byte(packet[8:24])), netip.AddrFrom16([16]byte(packet[24:40]))
	msg, err := ndp.ParseMessage(packet[40:])
	if err != nil {
		return ""
	}
	sum, err := ndp.MarshalMessageChecksum(msg, src, dst)
	if err != nil || !bytes.Equal(sum, packet[40:]) {
		return "bad checksum"
	}
	na := msg.(*ndp.NeighborAdvertisement)
	return ethernet + fmt.Sprintf("%s > %s hop limit %d: %s is at %s router %v solicited %v override %v", src, dst, packet[7],
		na.TargetAddress, na.Options[0].(*ndp.LinkLayerAddress).Addr, na.Router, na.Solicited, na.Override)
}

// hears waits for n announcements that mention addr and returns them.
func hears(t *testing.T, ch <-chan []byte, addr string, n int) []string {
	t.Helper()
	deadline := time.After(patience)
	var got []string
	for len(got) < n {
		select {
		case f := <-ch:
			if s := announcement(f); strings.Contains(s, " "+addr+" ") {
				got = append(got, s)
			}
		case <-deadline:
			t.Fatalf("heard %d announcements of %s, want %d: %q", len(got), addr, n, got)
		}
	}
	return got
}

func TestAnnounce(t *testing.T) {
	eth0(t)
	ifi, err := net.InterfaceByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	mac := ifi.HardwareAddr.String()
	arps, nas := frames(t, unix.ETH_P_ARP), frames(t, unix.ETH_P_IPV6)
	ps := parts(t)
	want := desired(wantVIP("198.51.100.10", "eth0"), wantVIP("2001:db8::10", "eth0"))
	converge(t, want, ps...)

	wantARP := []string{
		mac + " > ff:ff:ff:ff:ff:ff OperationRequest 198.51.100.10 is at " + mac + ", for 198.51.100.10 at 00:00:00:00:00:00",
		mac + " > ff:ff:ff:ff:ff:ff OperationReply 198.51.100.10 is at " + mac + ", for 198.51.100.10 at " + mac,
	}
	if d := cmp.Diff(wantARP, hears(t, arps, "198.51.100.10", 2)); d != "" {
		t.Errorf("ARP (-want +got):\n%s", d)
	}
	na := func(router bool) []string {
		return []string{fmt.Sprintf("%s > 33:33:00:00:00:01 2001:db8::10 > ff02::1 hop limit 255: 2001:db8::10 is at %s router %v solicited false override true",
			mac, mac, router)}
	}
	if d := cmp.Diff(na(false), hears(t, nas, "2001:db8::10", 1)); d != "" {
		t.Errorf("NA (-want +got):\n%s", d)
	}

	// A restart adopts without a word; what is heard next is the marker that
	// comes after it.
	converge(t, want, parts(t)...)
	run(t, "sysctl -qw net.ipv6.conf.eth0.forwarding=1")
	want.Bound = append(want.Bound, wantVIP("198.51.100.12", "eth0"))
	converge(t, want, ps...)
	for s := ""; !strings.Contains(s, "198.51.100.12"); {
		if s = announcement(<-arps); strings.Contains(s, "198.51.100.10") {
			t.Errorf("adoption was announced: %s", s)
		}
	}
	// Away and back, now as a router.
	converge(t, desired(), ps...)
	converge(t, desired(wantVIP("2001:db8::10", "eth0")), ps...)
	if d := cmp.Diff(na(true), hears(t, nas, "2001:db8::10", 1)); d != "" {
		t.Errorf("NA of a router (-want +got):\n%s", d)
	}
	converge(t, nil, ps...)
}

// TestQuietLinks: nobody is told where nobody resolves.
func TestQuietLinks(t *testing.T) {
	eth0(t)
	run(t, "ip link set eth0 arp off")
	arps := frames(t, unix.ETH_P_ARP)
	ps := parts(t)
	converge(t, desired(wantVIP("198.51.100.10", "eth0"), wantVIP("198.51.100.11", "lo")), ps...)
	run(t, "ip link set eth0 arp on")
	converge(t, desired(wantVIP("198.51.100.12", "eth0")), ps...)
	for s := ""; !strings.Contains(s, "198.51.100.12"); {
		if s = announcement(<-arps); strings.Contains(s, "198.51.100.10") {
			t.Errorf("announced on a link without ARP: %s", s)
		}
	}
	converge(t, nil, ps...)
}

// watch runs a.Watch until the test ends and counts its calls.
func watch(t *testing.T, a *Announcer) *atomic.Int64 {
	t.Helper()
	var calls atomic.Int64
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.Watch(ctx, func() { calls.Add(1) }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Watch: %v", err)
		}
		goleak.VerifyNone(t, goleak.IgnoreCurrent())
	})
	// It is listening as soon as it reacts to a link that comes.
	eventually(t, "watching", func() bool {
		run(t, "ip link add probe0 type veth peer name probe1")
		run(t, "ip link del probe0")
		return calls.Load() > 0
	})
	return &calls
}

func TestWatch(t *testing.T) {
	eth0(t)
	a := NewAnnouncer(zaptest.NewLogger(t))
	want := desired(wantVIP("198.51.100.10", "eth0"), wantVIP("2001:db8::10", "eth0"))
	converge(t, want, a)
	calls := watch(t, a)

	events := []struct{ name, do, undo string }{
		{"IPv4 address removed", "ip addr del 198.51.100.10/32 dev eth0", ""},
		{"IPv6 address removed", "ip addr del 2001:db8::10/128 dev eth0", ""},
		{"link up", "ip link set eth0 up", "ip link set eth0 down"},
		{"link renamed", "ip link set eth0 name eth1", "ip link set eth0 down"},
		{"link added", "ip link add br0 type bridge", ""},
	}
	for _, e := range events {
		if e.undo != "" {
			run(t, e.undo)
		}
		before := calls.Load()
		run(t, e.do)
		eventually(t, e.name, func() bool { return calls.Load() > before })
	}
	run(t, "ip link del br0")
	run(t, "ip link set eth1 name eth0")
}

// TestRepeats: the announcement is repeated, and made again when the carrier
// returns.
func TestRepeats(t *testing.T) {
	eth0(t)
	arps := frames(t, unix.ETH_P_ARP)
	a := NewAnnouncer(zaptest.NewLogger(t))
	watch(t, a)
	converge(t, desired(wantVIP("198.51.100.10", "eth0")), a)
	hears(t, arps, "198.51.100.10", 2*transmissions)

	run(t, "ip link set wire0 down")
	eventually(t, "no carrier", func() bool { return strings.Contains(run(t, "ip link show eth0"), "NO-CARRIER") })
	run(t, "ip link set wire0 up")
	hears(t, arps, "198.51.100.10", 2*transmissions)
	converge(t, nil, parts(t)...)
}

// TestLostEvents: when the kernel drops notifications, everything may have
// changed.
func TestLostEvents(t *testing.T) {
	eth0(t)
	conn, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{Groups: groups})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetReadBuffer(1); err != nil { // the kernel's minimum
		t.Fatal(err)
	}
	batch := filepath.Join(t.TempDir(), "batch")
	var lines strings.Builder
	for i := range 200 {
		fmt.Fprintf(&lines, "addr add 10.9.0.%d/32 dev eth0\n", i+1)
	}
	if err := os.WriteFile(batch, []byte(lines.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "ip -batch "+batch)

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	called := false
	err = NewAnnouncer(zaptest.NewLogger(t)).follow(ctx, conn, func() {
		called = true
		cancel()
		_ = conn.SetReadDeadline(time.Unix(1, 0))
	})
	if err != nil || !called {
		t.Errorf("follow: called %v, error %v", called, err)
	}
}

func FuzzParseAddress(f *testing.F) {
	for _, p := range []string{"198.51.100.10/32", "2001:db8::10/128"} {
		m, err := addMessage(1, address(p, "eth0", true))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(m.Data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		a, _, err := parseAddress(data)
		if err == nil && !a.Prefix.IsValid() {
			t.Errorf("%x is %v", data, a)
		}
	})
}

func FuzzParseLink(f *testing.F) {
	k, err := dial()
	if err != nil {
		f.Fatal(err)
	}
	defer k.close()
	msgs, err := k.dump(unix.RTM_GETLINK, make([]byte, unix.SizeofIfInfomsg))
	if err != nil {
		f.Fatal(err)
	}
	for _, m := range msgs {
		f.Add(m.Data)
	}
	f.Fuzz(func(_ *testing.T, data []byte) {
		l, err := parseLink(data)
		if err == nil {
			_ = l.announces()
		}
	})
}

// TestParseAddMessage: what we send is what we recognise, in the kernel's place
// for everything.
func TestParseAddMessage(t *testing.T) {
	for _, p := range []string{"198.51.100.10/32", "2001:db8::10/128"} {
		m, err := addMessage(7, address(p, "eth0", true))
		if err != nil {
			t.Fatal(err)
		}
		a, index, err := parseAddress(m.Data)
		if err != nil || index != 7 || a != address(p, "", true) {
			t.Errorf("%s: %v on %d, error %v", p, a, index, err)
		}
	}
}
