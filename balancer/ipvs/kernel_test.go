package ipvs

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"nlb/balancer"
	"nlb/internal/nstest"
	"nlb/internal/wait"
)

// The tests of this package program the kernel of a namespace of their own.
func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }

// kernelRig is a Dataplane over the kernel, whose services and settings are gone
// afterwards.
func kernelRig(t *testing.T) (*Dataplane, *module) {
	t.Helper()
	d := New(t.TempDir(), zap.NewNop())
	if err := d.Probe(); errors.Is(err, ErrNoIPVS) {
		t.Skip("this kernel has no IPVS (module ip_vs)")
	} else if err != nil {
		t.Fatal(err)
	}
	m := d.kernel.(*module)
	t.Cleanup(func() {
		if err := m.handle.Flush(); err != nil {
			t.Error(err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d, m
}

func everything(serviceKey, uint32) bool { return true }

func observed(t *testing.T, m *module, ours func(serviceKey, uint32) bool) state {
	t.Helper()
	s, err := m.observe(ours)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// local puts addresses on the loopback.
func local(t *testing.T, addresses ...string) {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range addresses {
		a, err := netlink.ParseAddr(s)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.AddrReplace(lo, a); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
}

// Without IPVS nothing is wrong until it is asked for. This one is for kernels
// that have none.
func TestKernelWithoutIPVS(t *testing.T) {
	d := New(t.TempDir(), zaptest.NewLogger(t))
	if err := d.Probe(); err == nil {
		t.Log("this kernel has IPVS: there is nothing to refuse")
		return
	} else if !errors.Is(err, ErrNoIPVS) {
		t.Fatal(err)
	}
	to := web(dest("10.0.1.11:8080", 1))
	for _, p := range []balancer.Part{d.Opener(), d.Closer()} {
		if _, err := p.Plan(t.Context(), desired(to)); !errors.Is(err, ErrNoIPVS) {
			t.Errorf("%v", err)
		}
	}
	to.Dataplane = balancer.NFTables
	for _, idle := range []*balancer.Table{nil, to} {
		if lines := converge(t, d, idle); lines != nil {
			t.Errorf("%q", lines)
		}
	}
}

func TestKernelRoundTrip(t *testing.T) {
	d, m := kernelRig(t)
	before := observed(t, m, everything).settings
	sticky := listener("[2001:db8:77::10]:80", map[string]int{"web": 1})
	sticky.Sticky = true
	to := table(list(listener(vip, map[string]int{"web": 3, "more": 1}, 6, 17), sticky),
		pool("web", dest("10.0.1.11:8080", 1), dest("10.0.1.12:8080", 2), dest("[2001:db8:1::11]:8080", 1)),
		pool("more", dest("10.0.2.11:8080", 0), dest("10.0.2.12:8080", 1), relayed("10.0.2.13:8080", 1)))
	converge(t, d, to)
	if diff := cmp.Diff(describe(goal(nil, to)), describe(observed(t, m, everything).services)); diff != "" {
		t.Error(diff)
	}
	if lines := converge(t, d, to); lines != nil {
		t.Errorf("not read back as written: %q", lines)
	}
	to.Pools[0].Destinations[0].Weight = 0
	to.Pools[0].Destinations = append(to.Pools[0].Destinations[:1], to.Pools[0].Destinations[2:]...)
	to.Services[1].Sticky = false
	to.Services[0].IdleTimeout = 10 * time.Minute
	converge(t, d, to)
	now := observed(t, m, everything)
	if diff := cmp.Diff(describe(goal(nil, to)), describe(now.services)); diff != "" {
		t.Error(diff)
	}
	want := map[string]int{
		settingConntrack: 1, settingExpire: 1, settingSloppy: 0, settingReuse: 1, timeoutTCP: 600, timeoutUDP: 120,
	}
	if diff := cmp.Diff(want, now.settings); diff != "" {
		t.Error(diff)
	}
	converge(t, d, nil)
	now = observed(t, m, everything)
	if diff := cmp.Diff(before, now.settings); diff != "" || len(now.services) > 0 {
		t.Errorf("%q is left, and settings differ:\n%s", describe(now.services), diff)
	}
}

func TestKernelOwnership(t *testing.T) {
	d, m := kernelRig(t)
	theirs := service{key: serviceKey{6, at("192.0.2.1:80")}, scheduler: "rr", netmask: 0xffffffff}
	theirs6 := service{key: serviceKey{17, at("[2001:db8:99::1]:53")}, scheduler: "wlc", netmask: 128}
	orphan := newService(serviceKey{6, at("[2001:db8:77::99]:80")}, false)
	onVIP := service{key: serviceKey{6, at("198.51.100.10:22")}, scheduler: "rr", netmask: 0xffffffff}
	for _, s := range []service{theirs, theirs6, orphan, onVIP} {
		if err := m.write(step{op: addService, of: s}); err != nil {
			t.Fatal(err)
		}
		d := destination{at: netip.AddrPortFrom(s.key.at.Addr().Next(), 8080), weight: 70}
		if err := m.write(step{op: addDestination, of: s, dest: d}); err != nil {
			t.Fatal(err)
		}
	}
	if s := findService(observed(t, m, everything).services, orphan.key); s == nil || s.cookie != cookie {
		t.Fatalf("the kernel does not keep the cookie: %+v", s)
	}
	foreign := []string{
		"-A -t 192.0.2.1:80 -s rr", "-a -t 192.0.2.1:80 -r 192.0.2.2:8080 -m -w 70",
		"-A -u [2001:db8:99::1]:53 -s wlc", "-a -u [2001:db8:99::1]:53 -r [2001:db8:99::2]:8080 -m -w 70",
	}
	to := web(dest("10.0.1.11:8080", 1))
	converge(t, d, to)
	want := slices.Concat(foreign[:2], describe(goal(nil, to)), foreign[2:])
	if diff := cmp.Diff(want, describe(observed(t, m, everything).services)); diff != "" {
		t.Error(diff)
	}
	converge(t, d, nil)
	if diff := cmp.Diff(foreign, describe(observed(t, m, everything).services)); diff != "" {
		t.Error(diff)
	}
}

func TestKernelRefuses(t *testing.T) {
	_, m := kernelRig(t)
	six := newService(serviceKey{6, at("[2001:db8:77::10]:80")}, false)
	if err := m.write(step{op: addService, of: six}); err != nil {
		t.Fatal(err)
	}
	nowhere, unknown, unmasked := newService(serviceKey{6, at("[2001:db8:77::11]:80")}, false), six, six
	unknown.key.at, unknown.scheduler = nowhere.key.at, "nonesuch"
	unmasked.key.at, unmasked.netmask = nowhere.key.at, 0
	both := unknown // which of the two counts is what Probe relies on
	both.netmask = 0
	d := func(a string, w int) destination { return destination{at: at(a), weight: w} }
	f := newFake()
	if err := f.write(step{op: addService, of: six}); err != nil {
		t.Fatal(err)
	}
	for _, s := range []step{
		{op: addService, of: six}, {op: addService, of: unknown}, {op: addService, of: unmasked}, {op: addService, of: both},
		{op: editService, of: nowhere}, {op: removeService, of: nowhere},
		{op: addDestination, of: nowhere, dest: d("[2001:db8:1::11]:80", 1)},
		{op: addDestination, of: six, dest: d("10.0.1.11:80", 1)},
		{op: addDestination, of: six, dest: d("[2001:db8:1::11]:80", 65536)},
		{op: addDestination, of: six, dest: d("[2001:db8:1::11]:80", 1)},
		{op: addDestination, of: six, dest: d("[2001:db8:1::11]:80", 1)},
		{op: editDestination, of: six, dest: d("[2001:db8:1::12]:80", 1)},
		{op: removeDestination, of: six, dest: d("[2001:db8:1::12]:80", 1)},
		{op: removeDestination, of: six, dest: d("[2001:db8:1::11]:80", 1)},
	} {
		if real, faked := m.write(s), f.write(s); !errors.Is(real, faked) {
			t.Errorf("%s: %v, the fake says %v", s.line(), real, faked)
		}
	}
}

// send makes flows of UDP from so many ports to a service, from this host.
func send(t *testing.T, to netip.AddrPort, from, n int) {
	t.Helper()
	for port := from; port < from+n; port++ {
		c, err := net.DialUDP("udp", &net.UDPAddr{IP: net.IPv4(203, 0, 113, 9), Port: port}, net.UDPAddrFromAddrPort(to))
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.Write([]byte("x"))
		if err = errors.Join(err, c.Close()); err != nil {
			t.Fatalf("from port %d: %v", port, err)
		}
	}
}

// flows counts the flows of each destination of a service, in their order.
func flows(t *testing.T, m *module, s service) (counts []int) {
	t.Helper()
	found, err := m.handle.GetDestinations(serviceOf(s))
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(found, func(a, b *ipvs.Destination) int { return slices.Compare(a.Address, b.Address) })
	for _, d := range found {
		counts = append(counts, d.ActiveConnections+d.InactiveConnections)
	}
	return counts
}

// Flows from consecutive ports fill nearly all slots of mh's table evenly, so their
// number shows how many a destination has.
func TestKernelShares(t *testing.T) {
	_, m := kernelRig(t)
	local(t, "198.51.100.10/32", "203.0.113.9/32")
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	_, targets, _ := net.ParseCIDR("10.0.0.0/8")
	// What is sent there comes back by the loopback and is dropped: nobody answers.
	if err := netlink.RouteReplace(&netlink.Route{Dst: targets, LinkIndex: lo.Attrs().Index, Scope: netlink.SCOPE_LINK}); err != nil {
		t.Fatal(err)
	}
	const n = 2000
	for i, c := range []struct {
		name    string
		weights []int
		shares  []float64
	}{
		{"as they are", []int{63, 1}, []float64{63. / 64, 1. / 64}},
		{"beyond 6 bits they are cut: 999 to 1 is 62 to 1", []int{999, 1}, []float64{62. / 63, 1. / 63}},
		{"and 64 to 127 is 32 to 63", []int{64, 127}, []float64{32. / 95, 63. / 95}},
		{"by their divisor first", []int{640, 320}, []float64{2. / 3, 1. / 3}},
		{"weight 0 from the beginning", []int{1, 0, 1}, []float64{0.5, 0, 0.5}},
	} {
		s := newService(serviceKey{17, netip.AddrPortFrom(netip.MustParseAddr("198.51.100.10"), uint16(1000+i))}, false)
		if err := m.write(step{op: addService, of: s}); err != nil {
			t.Fatal(err)
		}
		for j, w := range c.weights {
			d := destination{at: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 1, byte(11 + j)}), 8080), weight: w}
			if err := m.write(step{op: addDestination, of: s, dest: d}); err != nil {
				t.Fatal(err)
			}
		}
		send(t, s.key.at, 10000, n)
		counts := flows(t, m, s)
		for j, share := range c.shares {
			if got := float64(counts[j]) / n; got < share-0.04 || got > share+0.04 || (share == 0) != (got == 0) {
				t.Errorf("%s: %v of %d flows, shares should be %.3v", c.name, counts, n, c.shares)
				break
			}
		}
		t.Logf("%s: %v", c.name, counts)
	}
}

// answering is a server that says its own and its client's address, until the test
// ends.
func answering(t *testing.T, address string) {
	t.Helper()
	nstest.Serve(t, address, func(c net.Conn) {
		lines := bufio.NewScanner(c)
		for lines.Scan() {
			if _, err := fmt.Fprintf(c, "%s %s\n", address, c.RemoteAddr()); err != nil {
				return
			}
		}
	})
}

// A client is a connection that asks who is at the other end.
type client struct {
	net.Conn
	lines *bufio.Reader
}

func connectTo(t *testing.T, address string) *client {
	t.Helper()
	d := net.Dialer{Timeout: 10 * time.Second, LocalAddr: &net.TCPAddr{IP: net.IPv4(203, 0, 113, 9)}}
	c, err := d.DialContext(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return &client{c, bufio.NewReader(c)}
}

// who returns the server's own address, which has to see the client's.
func (c *client) who(t *testing.T) string {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprintln(c); err != nil {
		t.Fatal(err)
	}
	var server, seen string
	if _, err := fmt.Fscanln(c.lines, &server, &seen); err != nil {
		t.Fatalf("%s has no answer: %v", c.LocalAddr(), err)
	}
	if seen != c.LocalAddr().String() {
		t.Errorf("%s sees %s instead of %s", server, seen, c.LocalAddr())
	}
	return server
}

// A connection goes on when its destination leaves and when its service does, and
// with its end the last trace goes.
func TestKernelLingering(t *testing.T) {
	d, m := kernelRig(t)
	local(t, "198.51.100.10/32", "203.0.113.9/32", "10.0.1.11/32", "10.0.1.12/32")
	answering(t, "10.0.1.11:8080")
	answering(t, "10.0.1.12:8080")
	converge(t, d, web(dest("10.0.1.11:8080", 1)))
	c := connectTo(t, vip)
	if who := c.who(t); who != "10.0.1.11:8080" {
		t.Fatalf("answered by %s", who)
	}
	for _, to := range []*balancer.Table{web(dest("10.0.1.12:8080", 1)), table(nil)} {
		converge(t, d, to)
		if who := c.who(t); who != "10.0.1.11:8080" {
			t.Fatalf("answered by %s", who)
		}
	}
	want := []string{"-A -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port", "-a -t 198.51.100.10:80 -r 10.0.1.11:8080 -m -w 0"}
	if diff := cmp.Diff(want, describe(observed(t, m, everything).services)); diff != "" {
		t.Error(diff)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	wait.Until(t, patience, "the service goes with its last connection", func() bool {
		converge(t, d, table(nil))
		return len(observed(t, m, everything).services) == 0
	})
}

// New connections of a mixed service go to the relay's socket and to destinations,
// the former as if IPVS were not there, and go on when IPVS leaves. Until they are
// over the service stays.
func TestKernelRelayShare(t *testing.T) {
	d, m := kernelRig(t)
	local(t, "198.51.100.10/32", "203.0.113.9/32", "10.0.1.11/32")
	answering(t, "10.0.1.11:8080")
	answering(t, vip)
	mixed := web(dest("10.0.1.11:8080", 1), relayed("10.0.1.12:8080", 1))
	only := web(relayed("10.0.1.12:8080", 1))
	converge(t, d, only)
	var older []*client
	for range 20 {
		c := connectTo(t, vip)
		c.who(t)
		older = append(older, c)
	}
	converge(t, d, mixed)
	for _, c := range older {
		if who := c.who(t); who != vip {
			t.Errorf("a connection from before is answered by %s", who)
		}
	}
	count := make(map[string]int)
	var relay *client
	for range 40 {
		c := connectTo(t, vip)
		who := c.who(t)
		if count[who]++; who == vip && relay == nil {
			relay = c
		} else if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if count[vip] < 5 || count["10.0.1.11:8080"] < 5 {
		t.Fatalf("%v", count)
	}
	leftover := []string{"-A -t 198.51.100.10:80 -s mh -b mh-fallback,mh-port", "-a -t 198.51.100.10:80 -r 198.51.100.10:80 -m -w 1"}
	wait.Until(t, patience, "the service is there for the relay's connection alone", func() bool {
		converge(t, d, only)
		return slices.Equal(describe(observed(t, m, everything).services), leftover)
	})
	newer := connectTo(t, vip)
	if who := newer.who(t); who != vip {
		t.Errorf("answered by %s", who)
	}
	if who := relay.who(t); who != vip {
		t.Errorf("answered by %s", who)
	}
	for _, c := range []*client{newer, relay} {
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	wait.Until(t, patience, "the service goes with the relay's last connection", func() bool {
		converge(t, d, only)
		return len(observed(t, m, everything).services) == 0
	})
	relay = older[0]
	converge(t, d, nil)
	if who := relay.who(t); who != vip {
		t.Errorf("without IPVS answered by %s", who)
	}
}

// patience bounds every wait for the kernel.
const patience = 30 * time.Second
