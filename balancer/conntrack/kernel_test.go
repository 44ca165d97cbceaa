package conntrack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"nlb/internal/nstest"
	"nlb/internal/wait"
)

func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }

// patience bounds every wait for the kernel.
const patience = 20 * time.Second

// The mark of these tests: a target in mask, and a bit that is somebody else's.
const (
	mask    = uint32(0xffff << 14)
	web     = uint32(7 << 14)
	dns     = uint32(8 << 14)
	foreign = uint32(1)
)

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func sysctl(t testing.TB, name, value string) {
	t.Helper()
	path := filepath.Join("/proc/sys/net/netfilter", name)
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.WriteFile(path, before, 0) })
}

// host gives the namespace addresses and the marks, and an empty table.
//
//	203.0.113.9 ──► 198.51.100.10:80 (web), :53 (dns), :99 (somebody else's)
//	2001:db8:1::9 ──► 2001:db8::10, likewise
func host(t testing.TB) {
	t.Helper()
	for _, a := range []string{"203.0.113.9/32", "198.51.100.10/32"} {
		run(t, "ip", "address", "replace", a, "dev", "lo")
	}
	for _, a := range []string{"2001:db8:1::9/128", "2001:db8::10/128"} {
		run(t, "ip", "address", "replace", a, "dev", "lo", "nodad")
		awaitLocal(t, strings.TrimSuffix(a, "/128"))
	}
	sysctl(t, "nf_conntrack_acct", "1")
	// A delayed acknowledgement must not bring back a flow that the test ended.
	sysctl(t, "nf_conntrack_tcp_loose", "0")
	rules := fmt.Sprintf(`table inet marks {
		chain output {
			type filter hook output priority mangle
			th dport 80 ct state new ct mark set %#x
			th dport 53 ct state new ct mark set %#x
			th dport 99 ct state new ct mark set %#x
		}
	}`, web|foreign, dns|1<<31, foreign)
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
	t.Cleanup(func() {
		run(t, "nft", "delete", "table", "inet", "marks")
		empty(t)
	})
	empty(t)
}

// awaitLocal waits until packets to an IPv6 address are taken in. The kernel
// adds the route for it some time after the address, even without DAD.
func awaitLocal(t testing.TB, addr string) {
	t.Helper()
	routes := func() string { return run(t, "ip", "-6", "route", "show", "table", "local") }
	wait.Until(t, patience, "a local route for "+addr, func() bool { return strings.Contains(routes(), "local "+addr+" ") }, routes)
}

// empty ends every flow of the namespace.
func empty(t testing.TB) {
	t.Helper()
	c, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	if err := c.send(appendMessage(nil, msgDelete, unix.NLM_F_ACK, 0, unix.AF_UNSPEC, nil)); err != nil {
		t.Fatal(err)
	}
	err = c.answers(context.Background(), func(m message) (bool, error) {
		if errno := m.errno(); errno != 0 {
			return true, errno
		}
		return true, nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A clock is what a Tracker takes for the time: it moves when told, so that no
// dump is ever reused by accident, or not reused because the machine is slow.
type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

func newTracker(t testing.TB, log *zap.Logger) (*Tracker, *clock) {
	t.Helper()
	tr, err := New(Options{Log: log, Mask: mask})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tr.Close)
	c := &clock{time.Unix(1e9, 0)}
	tr.now = c.now
	return tr, c
}

// start runs tr until the test ends.
func start(t testing.TB, tr *Tracker) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- tr.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	select {
	case <-tr.Ready():
	case <-time.After(patience):
		t.Fatal("the tracker does not get ready")
	}
	return stop
}

// counts reads anew.
func counts(t testing.TB, tr *Tracker, c *clock) map[uint32]Counts {
	t.Helper()
	c.t = c.t.Add(time.Second)
	got, err := tr.Counts(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func flows(t testing.TB, tr *Tracker, f Filter) []Flow {
	t.Helper()
	got, err := tr.Flows(context.Background(), f)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// datagrams sends n datagrams of size bytes to a socket that answers none.
func datagrams(t testing.TB, from, to string, n, size int) {
	t.Helper()
	server, err := net.ListenPacket("udp", to)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 0))}
	c, err := d.Dial("udp", to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range n {
		if _, err := c.Write(make([]byte, size)); err != nil {
			t.Fatal(err)
		}
	}
}

// connect opens a TCP connection to an echo server and sends size bytes through
// it. Both ends stay open until the test ends.
func connect(t testing.TB, from, to string, size int) net.Conn {
	t.Helper()
	server, err := net.Listen("tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	echoed := make(chan struct{})
	t.Cleanup(func() { _ = server.Close(); <-echoed })
	go func() {
		defer close(echoed)
		if c, err := server.Accept(); err == nil {
			_, _ = io.Copy(c, c)
			_ = c.Close()
		}
	}()
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 0)), Timeout: patience}
	c, err := d.Dial("tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestCountsRealTraffic(t *testing.T) {
	host(t)
	tr, clk := newTracker(t, nil)
	start(t, tr)

	datagrams(t, "203.0.113.9", "198.51.100.10:53", 5, 100)
	datagrams(t, "2001:db8:1::9", "[2001:db8::10]:53", 3, 1000)
	datagrams(t, "203.0.113.9", "198.51.100.10:99", 4, 100)
	const size = 5000
	connect(t, "203.0.113.9", "198.51.100.10:80", size)
	connect(t, "2001:db8:1::9", "[2001:db8::10]:80", size)

	got := counts(t, tr, clk)
	want := Counts{Active: 2, Bytes: 5*(20+8+100) + 3*(40+8+1000), Packets: 8}
	if diff := cmp.Diff(want, got[dns]); diff != "" {
		t.Errorf("UDP (-want +got):\n%s", diff)
	}
	if c := got[web]; c.Active != 2 || c.Bytes <= 4*size || c.Packets < 12 {
		t.Errorf("TCP: %+v, want two flows that carried %d bytes four times", c, size)
	}
	if len(got) != 2 {
		t.Errorf("counts of %d keys, want web and dns alone: %v", len(got), got)
	}

	// The total is the same once the flows have ended, for their events bring
	// what the dump had seen.
	before := got
	empty(t)
	got = counts(t, tr, clk)
	for _, key := range []uint32{web, dns} {
		if c := got[key]; c.Active != 0 || c.Bytes < before[key].Bytes {
			t.Errorf("after the end: %+v, before %+v", c, before[key])
		}
	}
	if got[dns].Bytes != want.Bytes {
		t.Errorf("UDP after the end: %d bytes, want %d", got[dns].Bytes, want.Bytes)
	}
	if n := tr.Stats().Remembered; n != 0 {
		t.Errorf("%d flows remembered, all have ended", n)
	}
}

// Flows that no dump saw are known by their event alone.
func TestEventBringsBytes(t *testing.T) {
	host(t)
	tr, clk := newTracker(t, nil)
	start(t, tr)
	datagrams(t, "203.0.113.9", "198.51.100.10:53", 5, 100)
	empty(t)
	want := Counts{Bytes: 5 * 128, Packets: 5}
	if diff := cmp.Diff(want, counts(t, tr, clk)[dns]); diff != "" {
		t.Errorf("counts (-want +got):\n%s", diff)
	}
}

// With nf_conntrack_events=2 the end of an older flow makes no event. Its total
// stays what the last dump saw.
func TestOldFlowsNeverCountDown(t *testing.T) {
	host(t)
	sysctl(t, "nf_conntrack_events", "2")
	c := connect(t, "203.0.113.9", "198.51.100.10:80", 1000)
	tr, clk := newTracker(t, nil)
	start(t, tr)

	if got := counts(t, tr, clk)[web]; got.Active != 1 || got.Bytes != 0 {
		t.Fatalf("adopted flow: %+v, want it active and nothing counted", got)
	}
	if _, err := c.Write(make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	seen := counts(t, tr, clk)[web]
	if seen.Bytes < 2*1000 || seen.Bytes > 3000 {
		t.Errorf("bytes %d, want 1000 twice and headers", seen.Bytes)
	}
	empty(t)
	for range 3 {
		if got := counts(t, tr, clk)[web]; got.Active != 0 || got.Bytes != seen.Bytes {
			t.Errorf("after the end: %+v, want %d bytes", got, seen.Bytes)
		}
	}
	if n := tr.Stats().Remembered; n != 0 {
		t.Errorf("%d flows remembered, all have ended", n)
	}
}

func TestUnaccounted(t *testing.T) {
	host(t)
	sysctl(t, "nf_conntrack_acct", "0")
	tr, clk := newTracker(t, nil)
	datagrams(t, "203.0.113.9", "198.51.100.10:53", 1, 1)
	if diff := cmp.Diff(Counts{Active: 1, Unaccounted: 1}, counts(t, tr, clk)[dns]); diff != "" {
		t.Errorf("counts (-want +got):\n%s", diff)
	}
	if f := flows(t, tr, Filter{}); len(f) != 1 || f[0].Accounted {
		t.Errorf("flows %v, want one without counters", f)
	}
}

func TestDumpIsReused(t *testing.T) {
	host(t)
	tr, clk := newTracker(t, nil)
	ask := func() uint64 {
		t.Helper()
		got, err := tr.Counts(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		return got[dns].Active
	}
	ask()
	datagrams(t, "203.0.113.9", "198.51.100.10:53", 1, 1)
	clk.t = clk.t.Add(reuse)
	if n := ask(); n != 0 {
		t.Errorf("%d flows within %v, want the old dump's 0", n, reuse)
	}
	clk.t = clk.t.Add(time.Millisecond)
	if n := ask(); n != 1 {
		t.Errorf("%d flows later than %v, want a new dump's 1", n, reuse)
	}
}

// conntrack(8) reads the same table; what it prints is what we print.
func TestFlowsAgreeWithConntrackTool(t *testing.T) {
	if _, err := exec.LookPath("conntrack"); err != nil {
		t.Skip("missing: the conntrack tool (Debian package conntrack)")
	}
	host(t)
	datagrams(t, "203.0.113.9", "198.51.100.10:53", 5, 100)
	datagrams(t, "2001:db8:1::9", "[2001:db8::10]:53", 3, 1000)
	connect(t, "203.0.113.9", "198.51.100.10:80", 10)
	connect(t, "2001:db8:1::9", "[2001:db8::10]:80", 10)

	// The two read at different times: seconds pass, and TCP acknowledges late.
	seconds := regexp.MustCompile(`(^\S+ +\d+) \d+`)
	counters := regexp.MustCompile(`packets=\d+ bytes=\d+`)
	timeless := func(line string) string {
		line = seconds.ReplaceAllString(line, "$1 TIMEOUT")
		if strings.HasPrefix(line, "tcp ") {
			line = counters.ReplaceAllString(line, "COUNTERS")
		}
		return line
	}
	var want []string
	for _, family := range []string{"ipv4", "ipv6"} {
		out, err := exec.Command("conntrack", "-L", "-f", family).Output()
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(out)) {
			if line, ok := strings.CutSuffix(strings.TrimSpace(line), " use=1"); ok {
				want = append(want, timeless(line))
			}
		}
	}
	tr, _ := newTracker(t, nil)
	var got []string
	for _, f := range flows(t, tr, Filter{}) {
		if f.Timeout <= 0 {
			t.Errorf("no time left for %v", f)
		}
		got = append(got, timeless(f.String()))
	}
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("flows (-conntrack +ours):\n%s", diff)
	}
	if len(got) != 4 {
		t.Errorf("%d flows, want 4", len(got))
	}
}

func TestDeleteFunc(t *testing.T) {
	host(t)
	tr, clk := newTracker(t, nil)
	create(t, 0, 3*changeBatch, dns)
	create(t, 3*changeBatch, 100, foreign)
	datagrams(t, "2001:db8:1::9", "[2001:db8::10]:53", 1, 1)
	strangers := 0
	odd := func(f Flow) bool {
		if f.Mark&mask == 0 {
			strangers++
			return false
		}
		return f.Original.Src.Port()%2 == 1 || f.Original.Src.Addr().Is6()
	}
	n, err := tr.DeleteFunc(context.Background(), Filter{}, odd)
	if want := 3*changeBatch/2 + 1; err != nil || n != want {
		t.Errorf("deleted %d, %v, want %d", n, err, want)
	}
	if strangers < 100 {
		t.Errorf("asked about %d flows of others, want all 100", strangers)
	}
	if got := counts(t, tr, clk)[dns].Active; got != 3*changeBatch/2 {
		t.Errorf("%d flows left, want %d", got, 3*changeBatch/2)
	}
	if n := tr.Stats().Table; n != 3*changeBatch/2+100 {
		t.Errorf("%d flows in the table", n)
	}
	if n, err := tr.DeleteFunc(context.Background(), Filter{}, odd); err != nil || n != 0 {
		t.Errorf("deleted %d, %v, want none", n, err)
	}
	everything := func(f Flow) bool { return true }
	n, err = tr.DeleteFunc(context.Background(), Filter{Mark: dns, Mask: mask}, everything)
	if err != nil || n != 3*changeBatch/2 {
		t.Errorf("deleted %d of one mark, %v, want %d", n, err, 3*changeBatch/2)
	}
}

// A flow that has gone meanwhile, and a successor with the same tuple, are
// neither counted nor harmed.
func TestRemoveSparesSuccessor(t *testing.T) {
	host(t)
	create(t, 0, 2, dns)
	tr, clk := newTracker(t, nil)
	var names []flowName
	err := tr.ours(context.Background(), markFilter{}, func() {}, func(r *record) error {
		names = append(names, r.name())
		return nil
	})
	if err != nil || len(names) != 2 {
		t.Fatalf("%d flows, %v", len(names), err)
	}
	// The id is the last attribute but for the zone, which is not there.
	wrong := names[1].attrs
	wrong[len(wrong)-1] ^= 0xff

	n, err := tr.change(context.Background(), []request{{msgDelete, names[0]}, {msgDelete, names[1]}, {msgDelete, names[0]}})
	if err != nil || n != 1 {
		t.Errorf("removed %d, %v, want 1", n, err)
	}
	if got := counts(t, tr, clk)[dns].Active; got != 1 {
		t.Errorf("%d flows, want the successor", got)
	}
}

func TestSetTimeouts(t *testing.T) {
	host(t)
	create(t, 0, 3, dns)
	tr, _ := newTracker(t, nil)
	ctx := context.Background()
	before, err := tr.Flows(ctx, Filter{})
	if err != nil || len(before) != 3 {
		t.Fatalf("%d flows, %v", len(before), err)
	}
	chosen := before[1].Original.Src
	n, err := tr.SetTimeouts(ctx, func(f Flow) (time.Duration, bool) {
		return 7776*time.Second - time.Millisecond, f.Original.Src == chosen
	})
	if err != nil || n != 1 {
		t.Errorf("changed %d, %v, want 1", n, err)
	}
	after, err := tr.Flows(ctx, Filter{})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range after {
		// The other flows were made with less.
		if changed := f.Timeout > 7000*time.Second && f.Timeout <= 7776*time.Second; changed != (f.Original.Src == chosen) {
			t.Errorf("%v has %v", f, f.Timeout)
		}
	}
}

// A listener whose buffer is full loses events. They are counted, said once, and
// the next dumps put the ledger right.
func TestLostEvents(t *testing.T) {
	host(t)
	core, logged := observer.New(zap.WarnLevel)
	tr, clk := newTracker(t, zap.New(core))
	l, err := listen(mask, 0, 4096)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	if err := tr.attach(l); err != nil {
		t.Fatal(err)
	}
	defer tr.detach()
	counts(t, tr, clk)
	const n = 1000
	create(t, 0, n, dns)
	if got := counts(t, tr, clk)[dns].Active; got != n {
		t.Fatalf("%d flows, want %d", got, n)
	}
	empty(t)
	if got := counts(t, tr, clk)[dns]; got.Active != 0 {
		t.Errorf("%+v after the end", got)
	}
	lost, left := tr.Stats().LostEvents, tr.Stats().Remembered
	if lost == 0 || lost >= n || int(lost) != left {
		t.Errorf("%d events lost and %d flows not heard of, want the same, of %d", lost, left, n)
	}
	counts(t, tr, clk)
	if s := tr.Stats(); s.Remembered != 0 {
		t.Errorf("%d flows are still remembered", s.Remembered)
	}
	if n := logged.Len(); n != 1 {
		t.Errorf("%d lines logged, want 1: %v", n, logged.All())
	}
}

// Events of flows that we do not count take no room in our socket.
func TestForeignEventsAreFiltered(t *testing.T) {
	host(t)
	l, err := listen(mask, web, 4096)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	if err := l.join(); err != nil {
		t.Fatal(err)
	}
	create(t, 0, 1000, foreign)
	create(t, 1000, 500, 0)
	create(t, 1500, 500, web|foreign)
	create(t, 2000, 1, dns|foreign)
	empty(t)
	var got []uint32
	for {
		n, err := unix.Read(l.fd, l.buf)
		if err == unix.EAGAIN {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		m, _, _ := nextMessage(l.buf[:n])
		var r record
		if err := r.parse(m); err != nil {
			t.Error(err)
		}
		got = append(got, r.mark)
	}
	if diff := cmp.Diff([]uint32{dns | foreign}, got); diff != "" {
		t.Errorf("marks of events (-want +got):\n%s", diff)
	}
}

// The kernel makes no messages for us as long as there is nothing to count, and loses
// none when there is.
func TestExpect(t *testing.T) {
	host(t)
	tr, clk := newTracker(t, nil)
	tr.uncounted = web
	listens := func(want bool) {
		t.Helper()
		if got := heard(t); got != want {
			t.Errorf("somebody is told of flows' ends: %v, want %v", got, want)
		}
	}
	tr.ExpectNone()
	create(t, 0, 10, web)
	stop := start(t, tr)
	listens(false)
	if got := counts(t, tr, clk); len(got) != 0 {
		t.Errorf("%v is counted", got)
	}

	if err := tr.Expect(); err != nil {
		t.Fatal(err)
	}
	listens(true)
	datagrams(t, "203.0.113.9", "198.51.100.10:53", 5, 100)
	tr.ExpectNone()
	if got := counts(t, tr, clk)[dns].Active; got != 1 {
		t.Errorf("%d flows, want 1", got)
	}
	listens(true) // for its end
	empty(t)
	if got := counts(t, tr, clk)[dns]; got != (Counts{Bytes: 5 * 128, Packets: 5}) {
		t.Errorf("%+v when the flow has ended", got)
	}
	listens(false)

	// A daemon that starts finds what another one left.
	create(t, 100, 1, dns)
	stop()
	listens(false)
	next, _ := newTracker(t, nil)
	next.ExpectNone()
	start(t, next)
	listens(true)
}

// heard reports whether anybody in the namespace is told of flows' ends.
func heard(t testing.TB) bool {
	t.Helper()
	sockets, err := os.ReadFile("/proc/thread-self/net/netlink")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(sockets)) {
		f := strings.Fields(line) // sk, protocol, port, groups
		groups, err := strconv.ParseUint(f[3], 16, 32)
		if f[1] == strconv.Itoa(unix.NETLINK_NETFILTER) && err == nil && groups&(1<<(unix.NFNLGRP_CONNTRACK_DESTROY-1)) != 0 {
			return true
		}
	}
	return false
}

func TestRunIsJoined(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	host(t)
	tr, clk := newTracker(t, nil)
	stop := start(t, tr)
	if err := tr.Run(context.Background()); err == nil {
		t.Error("a second Run at the same time is no error")
	}
	stop()
	start(t, tr)() // again
	datagrams(t, "203.0.113.9", "198.51.100.10:53", 1, 1)
	if got := counts(t, tr, clk)[dns].Active; got != 1 {
		t.Errorf("%d flows without Run, want 1", got)
	}
}

func TestCancelled(t *testing.T) {
	host(t)
	create(t, 0, 2000, dns)
	tr, _ := newTracker(t, nil)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := tr.Counts(ctx); err != context.Canceled {
		t.Errorf("Counts: %v", err)
	}
	if _, err := tr.Flows(ctx, Filter{}); err != context.Canceled {
		t.Errorf("Flows: %v", err)
	}
	if err := tr.Run(ctx); err != nil {
		t.Errorf("Run: %v", err)
	}
	if got, err := tr.Counts(context.Background()); err != nil || got[dns].Active != 2000 {
		t.Errorf("counts %v, %v after those that were given up", got, err)
	}
}

func TestNoMask(t *testing.T) {
	if _, err := New(Options{}); err == nil {
		t.Error("a tracker of everybody's flows")
	}
}

// Each shows what Flows lists, and ends with the first error of who looks.
func TestEach(t *testing.T) {
	host(t)
	create(t, 0, 1500, dns)
	create(t, 1500, 500, foreign)
	tr, _ := newTracker(t, nil)
	seen := make(map[netip.AddrPort]bool)
	if err := tr.Each(t.Context(), func(f Flow) error { seen[f.Original.Src] = true; return nil }); err != nil {
		t.Fatal(err)
	}
	listed := flows(t, tr, Filter{})
	for _, f := range listed {
		if !seen[f.Original.Src] {
			t.Errorf("%v is not shown", f)
		}
	}
	if len(listed) != 1500 || len(seen) != 1500 {
		t.Errorf("%d flows are listed, %d are shown, of 1500", len(listed), len(seen))
	}
	enough, shown := errors.New("enough"), 0
	err := tr.Each(t.Context(), func(Flow) error { shown++; return enough })
	if !errors.Is(err, enough) || shown != 1 {
		t.Errorf("%d flows, and then %v", shown, err)
	}
}

// create adds n UDP flows with a mark, the first with number at.
func create(t testing.TB, at, n int, mark uint32) {
	t.Helper()
	c, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	for n > 0 {
		batch := min(n, 500)
		var b []byte
		for i := range batch {
			number := at + i
			client := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(number / 50000)}), uint16(10000+number%50000))
			var a attrs
			a.tuple(ctaTupleOrig, UDP, client, vip4)
			a.tuple(ctaTupleReply, UDP, target4, client)
			a.u32(ctaStatus, statusConfirmed)
			a.u32(ctaTimeout, 600)
			a.u32(ctaMark, mark)
			flags := uint16(unix.NLM_F_CREATE | unix.NLM_F_EXCL)
			if i == batch-1 {
				flags |= unix.NLM_F_ACK
			}
			c.seq++
			b = appendMessage(b, unix.NFNL_SUBSYS_CTNETLINK<<8, flags, c.seq, unix.AF_INET, a)
		}
		if err := c.send(b); err != nil {
			t.Fatal(err)
		}
		err := c.answers(context.Background(), func(m message) (bool, error) {
			if errno := m.errno(); errno != 0 {
				return true, fmt.Errorf("create flow: %w", errno)
			}
			return true, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		at, n = at+batch, n-batch
	}
}

// The table of the benchmarks: 100,000 flows, a third of them one target's.
func crowd(b *testing.B) (*Tracker, *clock) {
	host(b)
	create(b, 0, 33_334, web)
	create(b, 33_334, 66_666, dns)
	tr, clk := newTracker(b, nil)
	counts(b, tr, clk)
	b.ReportAllocs()
	return tr, clk
}

func BenchmarkCounts100k(b *testing.B) {
	tr, clk := crowd(b)
	for b.Loop() {
		if got := counts(b, tr, clk); got[web].Active+got[dns].Active != 100_000 {
			b.Fatal(got)
		}
	}
}

func BenchmarkFlows100k(b *testing.B) {
	tr, _ := crowd(b)
	for b.Loop() {
		if got := flows(b, tr, Filter{}); len(got) != 100_000 {
			b.Fatal(len(got))
		}
	}
}

func BenchmarkFlowsOfOneTarget(b *testing.B) {
	tr, _ := crowd(b)
	for b.Loop() {
		if got := flows(b, tr, Filter{web, mask}); len(got) != 33_334 {
			b.Fatal(len(got))
		}
	}
}

func BenchmarkDelete33kOf100k(b *testing.B) {
	tr, _ := crowd(b)
	for b.Loop() {
		n, err := tr.DeleteFunc(context.Background(), Filter{}, func(f Flow) bool { return f.Mark&mask == web })
		if err != nil || n != 33_334 {
			b.Fatal(n, err)
		}
		b.StopTimer()
		create(b, 0, 33_334, web)
		b.StartTimer()
	}
}
