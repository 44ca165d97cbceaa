package host

import (
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/ndp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"nlb/balancer"
)

// settings is everything below net/ipv4/conf, net/ipv6/conf and the rest that
// we may touch.
func settings(t *testing.T) map[string]string {
	t.Helper()
	values := map[string]string{}
	for _, pattern := range []string{"net/ipv4/ip_forward", "net/ipv4/conf/*/*", "net/ipv6/conf/*/*", "net/netfilter/nf_conntrack_acct"} {
		paths, err := filepath.Glob(filepath.Join("/proc/sys", pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range paths {
			b, err := os.ReadFile(p)
			if err == nil { // stable_secret cannot be read before it is set
				values[strings.TrimPrefix(p, "/proc/sys/")] = strings.TrimSpace(string(b))
			}
		}
	}
	return values
}

func set(t *testing.T, key, value string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join("/proc/sys", key), []byte(value), 0o644); err != nil {
		t.Fatal(err)
	}
}

// baseline gives the namespace's own settings their values, whatever other
// tests left.
func baseline(t *testing.T) {
	t.Helper()
	for key, value := range map[string]string{
		"net/ipv4/ip_forward": "0", "net/ipv6/conf/all/forwarding": "0", "net/netfilter/nf_conntrack_acct": "0",
		"net/ipv4/conf/all/send_redirects": "1", "net/ipv4/conf/default/send_redirects": "1",
		"net/ipv4/conf/all/accept_redirects": "1",
	} {
		set(t, key, value)
	}
}

func converge(t *testing.T, s *Sysctls, want *balancer.Desired) []string {
	t.Helper()
	p, err := s.Plan(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	return p.Lines()
}

func TestSysctls(t *testing.T) {
	baseline(t)
	veth(t, "eth0")
	veth(t, "eth1.100")
	// What an administrator may have done, and turning forwarding off undoes.
	set(t, "net/ipv4/conf/eth0/forwarding", "1")
	set(t, "net/ipv6/conf/eth1.100/forwarding", "1")
	set(t, "net/ipv4/conf/all/accept_redirects", "0")
	before := settings(t)

	dir := filepath.Join(t.TempDir(), "missing", "state")
	s := NewSysctls(dir, zaptest.NewLogger(t))
	want := &balancer.Desired{Forwarding4: true, Forwarding6: true, Egress: []string{"eth0", "eth1.100", "gone0"}}
	lines := []string{
		"sysctl -w net.ipv6.conf.all.forwarding=1",
		"sysctl -w net.ipv4.ip_forward=1",
		"sysctl -w net.ipv4.conf.all.send_redirects=0",
		"sysctl -w net.ipv4.conf.eth0.send_redirects=0",
		"sysctl -w net.ipv4.conf.eth1/100.send_redirects=0",
		"sysctl -w net.netfilter.nf_conntrack_acct=1",
	}
	if d := cmp.Diff(lines, converge(t, s, want)); d != "" {
		t.Errorf("first pass (-want +got):\n%s", d)
	}
	now := settings(t)
	for key, value := range map[string]string{
		"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1", "net/netfilter/nf_conntrack_acct": "1",
		"net/ipv4/conf/all/send_redirects": "0", "net/ipv4/conf/eth1.100/send_redirects": "0",
		"net/ipv4/conf/all/route_localnet": "0",
	} {
		if now[key] != value {
			t.Errorf("%s = %s, want %s", key, now[key], value)
		}
	}
	// A restart finds nothing to do and still knows what was.
	s = NewSysctls(dir, zaptest.NewLogger(t))
	if got := converge(t, s, want); len(got) != 0 {
		t.Errorf("restart did %q", got)
	}
	// sysctl(8) understands what we print.
	for _, line := range lines {
		run(t, strings.Replace(line, "sysctl -w", "sysctl -qw", 1))
	}
	run(t, "ip link del eth0")
	converge(t, s, nil)
	after := settings(t)
	for key := range before {
		if strings.Contains(key, "/eth0/") || strings.Contains(key, "/wire-eth0/") {
			delete(before, key)
		}
	}
	if d := cmp.Diff(before, after); d != "" {
		t.Errorf("after clear (-before +after):\n%s", d)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left in the state dir: %v, %v", left, err)
	}
}

func TestSomebodyElsesValueStays(t *testing.T) {
	baseline(t)
	s := NewSysctls(t.TempDir(), zaptest.NewLogger(t))
	converge(t, s, &balancer.Desired{Forwarding4: true})
	set(t, "net/ipv4/ip_forward", "0")
	want := []string{
		"# net.ipv4.ip_forward was changed by somebody since we set it to 1: left alone",
		"sysctl -w net.netfilter.nf_conntrack_acct=0",
		"sysctl -w net.ipv4.conf.all.send_redirects=1",
	}
	if d := cmp.Diff(want, converge(t, s, nil)); d != "" {
		t.Errorf("clear (-want +got):\n%s", d)
	}
	// It is forgotten: what happens from now on is none of our business.
	set(t, "net/ipv4/ip_forward", "1")
	if got := converge(t, s, nil); len(got) != 0 {
		t.Errorf("did %q", got)
	}
	baseline(t)
}

func TestSysctlsWatch(t *testing.T) {
	baseline(t)
	s := NewSysctls(t.TempDir(), zaptest.NewLogger(t))
	flip := func() {
		set(t, "net/ipv4/ip_forward", "1")
		set(t, "net/ipv4/ip_forward", "0")
	}
	calls := watching(t, s, flip)
	before := calls.Load()
	set(t, "net/ipv6/conf/all/forwarding", "1")
	eventually(t, "IPv6 forwarding", func() bool { return calls.Load() > before })
	baseline(t)
}

// advertise sends a router advertisement out of wire-eth0, so that eth0 learns
// a default route.
func advertise(t *testing.T) {
	t.Helper()
	router, all := netip.MustParseAddr("fe80::1"), netip.MustParseAddr("ff02::1")
	wire, err := net.InterfaceByName("wire-eth0")
	if err != nil {
		t.Fatal(err)
	}
	body, err := ndp.MarshalMessageChecksum(&ndp.RouterAdvertisement{
		CurrentHopLimit: 64, RouterLifetime: 1800e9,
		Options: []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Source, Addr: wire.HardwareAddr}},
	}, router, all)
	if err != nil {
		t.Fatal(err)
	}
	packet := make([]byte, ipv6.HeaderLen)
	packet[0], packet[5], packet[6], packet[7] = ipv6.Version<<4, byte(len(body)), unix.IPPROTO_ICMPV6, ndp.HopLimit
	copy(packet[8:], router.AsSlice())
	copy(packet[24:], all.AsSlice())
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	to := &unix.SockaddrLinklayer{Protocol: 0xdd86, Ifindex: wire.Index, Halen: 6, Addr: [8]byte{0x33, 0x33, 0, 0, 0, 1}}
	if err := unix.Sendto(fd, append(packet, body...), 0, to); err != nil {
		t.Fatal(err)
	}
}

func advertisedRoute(t *testing.T) bool {
	t.Helper()
	return strings.Contains(run(t, "ip -6 route show default"), "default via fe80::1 dev eth0 proto ra")
}

// TestRouterAdvertisements: a host whose IPv6 default route is learnt keeps it
// when we make it forward. Left to itself it loses it.
func TestRouterAdvertisements(t *testing.T) {
	baseline(t)
	veth(t, "eth0")
	learn := func() { eventually(t, "a default route", func() bool { advertise(t); return advertisedRoute(t) }) }
	learn()
	set(t, "net/ipv6/conf/all/forwarding", "1")
	eventually(t, "the loss of the route", func() bool { return !advertisedRoute(t) })
	set(t, "net/ipv6/conf/all/forwarding", "0")
	learn()
	before := settings(t)

	s := NewSysctls(t.TempDir(), zaptest.NewLogger(t))
	want := []string{
		"sysctl -w net.ipv6.conf.eth0.accept_ra=2",
		"sysctl -w net.ipv6.conf.all.forwarding=1",
		"sysctl -w net.netfilter.nf_conntrack_acct=1",
	}
	if d := cmp.Diff(want, converge(t, s, &balancer.Desired{Forwarding6: true})); d != "" {
		t.Errorf("plan (-want +got):\n%s", d)
	}
	if !advertisedRoute(t) {
		t.Error("the default route is gone")
	}
	run(t, "ip -6 route del default dev eth0")
	if got := converge(t, s, &balancer.Desired{Forwarding6: true}); len(got) != 0 {
		t.Errorf("while the route was away: %q", got)
	}
	learn()
	converge(t, s, nil)
	if !advertisedRoute(t) {
		t.Error("the default route is gone after clear")
	}
	if d := cmp.Diff(before, settings(t)); d != "" {
		t.Errorf("after clear (-before +after):\n%s", d)
	}
}

func TestReadOnly(t *testing.T) {
	baseline(t)
	run(t, "mount --bind /proc/sys /proc/sys")
	t.Cleanup(func() { run(t, "umount /proc/sys") })
	run(t, "mount -o remount,bind,ro /proc/sys")

	dir := t.TempDir()
	s := NewSysctls(dir, zaptest.NewLogger(t))
	p, err := s.Plan(t.Context(), &balancer.Desired{})
	if err != nil {
		t.Fatal(err)
	}
	err = s.Apply(t.Context(), p)
	want := "sysctl -w net.netfilter.nf_conntrack_acct=1: read-only file system (set it from outside, where net.netfilter.nf_conntrack_acct=1 may be written: " +
		"on the host, or with the container runtime's option for sysctls, such as docker run --sysctl)"
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("a failure is on record: %v, %v", left, err)
	}

	// It has the right value already: nothing to write, nothing to complain of.
	run(t, "mount -o remount,bind,rw /proc/sys")
	set(t, "net/netfilter/nf_conntrack_acct", "1")
	run(t, "mount -o remount,bind,ro /proc/sys")
	if got := converge(t, s, &balancer.Desired{}); len(got) != 0 {
		t.Errorf("did %q", got)
	}
}

func TestMissingParts(t *testing.T) {
	s := NewSysctls(t.TempDir(), zaptest.NewLogger(t))
	s.root = balancer.SysctlDir(t.TempDir())
	p, err := s.Plan(t.Context(), &balancer.Desired{Forwarding6: true})
	if err != nil {
		t.Fatal(err)
	}
	want := "sysctl -w net.ipv6.conf.all.forwarding=1: no such file or directory (this kernel has IPv6 switched off: boot it without ipv6.disable=1)\n" +
		"sysctl -w net.netfilter.nf_conntrack_acct=1: no such file or directory (connection tracking is not loaded: modprobe nf_conntrack)"
	if err := s.Apply(t.Context(), p); err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

// TestRecordedBeforeTheChange: when the record cannot be written, nothing is
// changed.
func TestRecordedBeforeTheChange(t *testing.T) {
	baseline(t)
	inTheWay := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(inTheWay, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s := NewSysctls(t.TempDir(), zaptest.NewLogger(t))
	p, err := s.Plan(t.Context(), &balancer.Desired{Forwarding4: true})
	if err != nil {
		t.Fatal(err)
	}
	s.saved.Dir = inTheWay
	if err := s.Apply(t.Context(), p); err == nil {
		t.Error("no error")
	}
	if got := settings(t)["net/ipv4/ip_forward"]; got != "0" {
		t.Errorf("ip_forward = %s", got)
	}
}

func TestDamagedFileIsKept(t *testing.T) {
	for _, text := range []string{"", "{", `{"settings":[{"key":"../../etc/shadow","previous":"0","ours":"1"}]}`,
		`{"settings":[{"key":"kernel/panic","previous":"0","ours":"1"}]}`,
		`{"settings":[{"key":"net/ipv4/ip_forward","previous":"rm","ours":"1"}]}`} {
		baseline(t)
		dir := t.TempDir()
		path := filepath.Join(dir, "sysctls.json")
		core, logs := observer.New(zap.WarnLevel)
		s := NewSysctls(dir, zap.New(core))
		for _, aside := range []string{path + ".damaged", path + ".damaged.2"} {
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			if p, err := s.Plan(t.Context(), nil); err != nil || !p.Empty() {
				t.Errorf("%q: clear: %v, %v", text, p, err)
			}
			if got, err := os.ReadFile(path); err != nil || string(got) != text {
				t.Errorf("%q: planning touched the file: %q, %v", text, got, err)
			}
			set(t, "net/netfilter/nf_conntrack_acct", "0")
			converge(t, s, &balancer.Desired{})
			if got, err := os.ReadFile(aside); err != nil || string(got) != text {
				t.Errorf("%s has %q, %v", aside, got, err)
			}
		}
		if logs.Len() != 1 {
			t.Errorf("warned %d times", logs.Len())
		}
	}
}

func FuzzCheck(f *testing.F) {
	f.Add([]byte(`{"key":"net/ipv4/ip_forward","previous":"0","ours":"1","also":[{"key":"net/ipv4/conf/eth0/forwarding","value":"1"}]}`))
	f.Add([]byte(`{"key":"net/../kernel/panic","previous":"0","ours":"1"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var r record
		if json.Unmarshal(b, &r) != nil || r.check() != nil {
			return
		}
		for _, s := range r.undo() {
			if path := filepath.Join("/proc/sys", s.Key); !strings.HasPrefix(path, "/proc/sys/net/") {
				t.Errorf("%q leads to %s", s.Key, path)
			}
		}
	})
}
