package nft

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/bench/lab"
)

// A fastSite has a balancer with a flowtable between a client beyond a router and
// two targets.
type fastSite struct {
	*lab.Topology
	t     *testing.T
	plane *Dataplane
}

// needFlowtables skips where the kernel has none.
func needFlowtables(t *testing.T, d *Dataplane) {
	t.Helper()
	if err := d.ProbeFastPath(); err != nil {
		t.Skip(err)
	}
}

func newFastSite(t *testing.T) *fastSite {
	t.Helper()
	needFlowtables(t, newDataplane(t))
	top, plane := routed(t, lab.Options{})
	s := &fastSite{Topology: top, t: t, plane: plane}
	if err := errors.Join(top.LB.Forward(), top.LB.Sysctl("net.netfilter.nf_conntrack_acct", "1")); err != nil {
		t.Fatal(err)
	}
	return s
}

// links lists the balancer's interfaces.
func (s *fastSite) links() (names []string) {
	for _, line := range strings.Split(s.run("ip", "-o", "link", "show", "type", "veth"), "\n") {
		if f := strings.Fields(line); len(f) > 1 {
			name, _, _ := strings.Cut(strings.TrimSuffix(f[1], ":"), "@")
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// run runs a command on the balancer.
func (s *fastSite) run(name string, args ...string) string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	out, err := s.LB.Command(ctx, name, args...).Output()
	if err != nil {
		var failed *exec.ExitError
		if errors.As(err, &failed) {
			s.t.Fatalf("%s %q: %v\n%s", name, args, err, failed.Stderr)
		}
		s.t.Fatal(err)
	}
	return string(out)
}

// A fastCase is a family and a protocol.
type fastCase struct {
	name   string
	proto  uint8
	client func(*lab.Node) netip.Addr
	vip    netip.Addr
}

var fastCases = []fastCase{
	{"tcp4", balancer.ProtoTCP, func(n *lab.Node) netip.Addr { return n.Addr4 }, lab.VIP4},
	{"tcp6", balancer.ProtoTCP, func(n *lab.Node) netip.Addr { return n.Addr6 }, lab.VIP6},
	{"udp4", balancer.ProtoUDP, func(n *lab.Node) netip.Addr { return n.Addr4 }, lab.VIP4},
	{"udp6", balancer.ProtoUDP, func(n *lab.Node) netip.Addr { return n.Addr6 }, lab.VIP6},
}

// table has one service for the case, to the targets with the given weights.
func (s *fastSite) table(c fastCase, weights []int, terminate bool) *balancer.Desired {
	p := balancer.Pool{Name: "web", Protocols: []uint8{c.proto}, ClientIP: balancer.Preserve}
	for i, w := range weights {
		d := dest(c.client(s.Targets[i]).String(), 8080, w)
		d.Terminate = terminate && w == 0
		p.Destinations = append(p.Destinations, d)
	}
	return &balancer.Desired{Table: &balancer.Table{
		VIPs: []netip.Addr{c.vip}, FastPath: s.links(),
		Services: []balancer.VirtualService{{Name: "web", Address: c.vip, Protocols: []uint8{c.proto}, Port: 80, IdleTimeout: time.Minute,
			Allow: []netip.Prefix{netip.PrefixFrom(c.vip, 0).Masked()}, Pools: []balancer.WeightedPool{{Pool: "web", Weight: 1}}}},
		Pools: []balancer.Pool{p},
	}}
}

func (s *fastSite) converge(want *balancer.Desired) balancer.Plan {
	s.t.Helper()
	return converge(s.t, s.plane, want)
}

// echoes answers with what it gets, on each target, until the test ends.
func (s *fastSite) echoes(c fastCase) {
	for _, n := range s.Targets {
		at := netip.AddrPortFrom(c.client(n), 8080)
		if c.proto == balancer.ProtoUDP {
			var conn *net.UDPConn
			within(s.t, n, func() (err error) { conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at)); return err })
			done := make(chan struct{})
			go func() {
				defer close(done)
				b := make([]byte, 2048)
				for {
					n, from, err := conn.ReadFromUDPAddrPort(b)
					if err != nil {
						return
					}
					_, _ = conn.WriteToUDPAddrPort(b[:n], from)
				}
			}()
			s.t.Cleanup(func() { conn.Close(); <-done })
			continue
		}
		var l *net.TCPListener
		within(s.t, n, func() (err error) { l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at)); return err })
		s.t.Cleanup(func() { l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				s.t.Cleanup(func() { conn.Close() })
				go func() { _, _ = io.Copy(conn, conn) }()
			}
		}()
	}
}

// dial opens a flow of the client.
func (s *fastSite) dial(c fastCase) net.Conn {
	s.t.Helper()
	network := map[uint8]string{balancer.ProtoTCP: "tcp", balancer.ProtoUDP: "udp"}[c.proto]
	var conn net.Conn
	within(s.t, s.Clients[0], func() (err error) {
		conn, err = net.DialTimeout(network, netip.AddrPortFrom(c.vip, 80).String(), patience)
		return err
	})
	s.t.Cleanup(func() { conn.Close() })
	return conn
}

// ask sends a line and waits for its echo.
func ask(t *testing.T, conn net.Conn, line string) {
	t.Helper()
	if err := exchange(conn, line); err != nil {
		t.Fatal(err)
	}
}

func exchange(conn net.Conn, line string) error {
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, line+"\n"); err != nil {
		return err
	}
	got, err := bufio.NewReader(conn).ReadString('\n')
	if err == nil && got != line+"\n" {
		err = fmt.Errorf("asked %q, got %q", line, got)
	}
	return err
}

// entries are the lines of conntrack -L for the case.
func (s *fastSite) entries(c fastCase) []string {
	proto := map[uint8]string{balancer.ProtoTCP: "tcp", balancer.ProtoUDP: "udp"}[c.proto]
	family := "ipv4"
	if c.vip.Is6() {
		family = "ipv6"
	}
	var lines []string
	for _, line := range strings.Split(s.run("conntrack", "-L", "-f", family, "-p", proto, "-o", "extended"), "\n") {
		if strings.Contains(line, "dport=80 ") {
			lines = append(lines, line)
		}
	}
	return lines
}

// offload talks until the flow is in the flowtable.
func (s *fastSite) offload(c fastCase, conn net.Conn) {
	s.t.Helper()
	deadline := time.Now().Add(patience)
	for i := 0; ; i++ {
		ask(s.t, conn, fmt.Sprint("warm-up ", i))
		if strings.Contains(strings.Join(s.entries(c), "\n"), "[OFFLOAD]") {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("not offloaded:\n%s\n%s", strings.Join(s.entries(c), "\n"), s.run("nft", "list", "ruleset"))
		}
	}
}

func TestFastPathObserveAfterApply(t *testing.T) {
	s := newFastSite(t)
	c := fastCases[0]
	check := func(want *balancer.Desired) {
		t.Helper()
		s.converge(want)
		var afresh *Dataplane
		within(t, s.LB, func() (err error) { afresh, err = New(zaptest.NewLogger(t), ""); return err })
		defer afresh.Close()
		p, err := afresh.Plan(t.Context(), want)
		if err != nil {
			t.Fatal(err)
		}
		if !p.Empty() {
			t.Errorf("a restart wants to change %q", p.Lines())
		}
	}
	with := s.table(c, []int{1, 1}, false)
	check(with)
	for range 3 { // made anew each time
		check(s.table(c, []int{0, 1}, true))
		check(with)
	}
	observed := s.table(c, []int{1, 1}, false)
	observed.Table.Pools[0].Observed = true
	check(observed)
	fewer := s.table(c, []int{1, 1}, false)
	fewer.Table.FastPath = fewer.Table.FastPath[:1]
	check(fewer)
	without := s.table(c, []int{1, 1}, false)
	without.Table.FastPath = nil
	check(without)
	check(with)
	// A link goes and another of its name comes: nobody counts a transaction.
	s.run("ip", "link", "add", "fp0", "type", "veth", "peer", "name", "fp1")
	check(s.table(c, []int{1, 1}, false))
	s.run("ip", "link", "delete", "fp0")
	s.run("ip", "link", "add", "fp0", "type", "veth", "peer", "name", "fp1")
	if p := s.converge(s.table(c, []int{1, 1}, false)); p.Empty() {
		t.Error("the flowtable is not given the new link")
	}
	check(s.table(c, []int{1, 1}, false))
}

// TestFastPath has flows offloaded, counts them, and ends them.
func TestFastPath(t *testing.T) {
	s := newFastSite(t)
	for _, c := range fastCases {
		t.Run(c.name, func(t *testing.T) {
			s.t = t
			s.converge(s.table(c, []int{1, 0}, false))
			s.echoes(c)
			conn := s.dial(c)
			s.offload(c, conn)
			s.countsExactly(c, conn)

			// Others are drained, and other flows stay.
			s.converge(s.table(c, []int{0, 1}, false))
			ask(t, conn, "while drained")
			if !strings.Contains(strings.Join(s.entries(c), ""), "[OFFLOAD]") {
				t.Errorf("no longer offloaded: %q", s.entries(c))
			}
			other := s.dial(c)
			s.offload(c, other)
			if c.proto == balancer.ProtoUDP {
				s.losesNothing(c, conn)
				return
			}
			p := s.converge(s.table(c, []int{0, 1}, true))
			if lines := strings.Join(p.Lines(), "\n"); !strings.Contains(lines, "delete flowtable") {
				t.Errorf("not made anew: %s", lines)
			}
			wantFastReset(t, conn)
			ask(t, other, "after the others were ended")
			s.offload(c, other)
		})
	}
}

// wantFastReset speaks until the flow is reset.
func wantFastReset(t *testing.T, conn net.Conn) {
	t.Helper()
	begun := time.Now()
	err := exchange(conn, "are you there?")
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("not reset: %v", err)
	}
	t.Logf("reset after %s", time.Since(begun))
}

// countsExactly compares the accounts with what the client sends: conntrack
// counts each packet of IP, whichever way it took.
func (s *fastSite) countsExactly(c fastCase, conn net.Conn) {
	s.t.Helper()
	const rounds = 50
	forwarded := func() string { return s.run("nft", "list", "chain", "inet", "nlb", "forward") }
	before := s.packets(c)
	for i := range rounds {
		ask(s.t, conn, fmt.Sprintf("question %02d", i))
	}
	if c.proto == balancer.ProtoUDP {
		header := 28
		if c.vip.Is6() {
			header = 48
		}
		after := s.packets(c)
		want := [4]uint64{rounds, rounds * uint64(header+12), rounds, rounds * uint64(header+12)}
		for i := range want {
			if got := after[i] - before[i]; got != want[i] {
				s.t.Errorf("counted %d, want %d: %v then %v", got, want[i], before, after)
			}
		}
		return
	}
	after := s.packets(c)
	if after[0]-before[0] < rounds || after[2]-before[2] < rounds {
		s.t.Errorf("counted %v, then %v: fewer than were sent\n%s", before, after, forwarded())
	}
}

// losesNothing makes the flowtable anew again and again while a flow goes on. UDP
// repeats nothing: each packet that is lost shows.
func (s *fastSite) losesNothing(c fastCase, conn net.Conn) {
	s.t.Helper()
	all := s.table(c, []int{0, 1}, false)
	fewer := s.table(c, []int{0, 1}, false)
	fewer.Table.FastPath = fewer.Table.FastPath[:2]
	stop, talked := make(chan struct{}), make(chan error, 1)
	asked := 0
	go func() {
		for {
			select {
			case <-stop:
				talked <- nil
				return
			default:
			}
			if err := exchange(conn, fmt.Sprint("still ", asked)); err != nil {
				talked <- err
				return
			}
			asked++
		}
	}()
	begun := time.Now()
	const times = 10
	for range times {
		s.converge(fewer)
		s.converge(all)
	}
	took := time.Since(begun)
	close(stop)
	if err := <-talked; err != nil {
		s.t.Errorf("lost after %d questions: %v", asked, err)
	}
	s.t.Logf("made anew %d times in %v, %d questions meanwhile", 2*times, took, asked)
	s.offload(c, conn)
}

// packets are the four accounts of the one entry that is offloaded.
func (s *fastSite) packets(c fastCase) (n [4]uint64) {
	s.t.Helper()
	for _, line := range s.entries(c) {
		i := 0
		for _, word := range strings.Fields(line) {
			for _, key := range []string{"packets=", "bytes="} {
				if v, ok := strings.CutPrefix(word, key); ok {
					if _, err := fmt.Sscan(v, &n[i]); err != nil {
						s.t.Fatal(err)
					}
					i++
				}
			}
		}
	}
	return n
}

// TestFastPathMissing has the error that a kernel without flowtables makes.
func TestFastPathMissing(t *testing.T) {
	d := newDataplane(t)
	err := d.ProbeFastPath()
	if os.Getenv("NLB_VM_KERNEL") != "" {
		if err != nil {
			t.Errorf("this kernel has flowtables: %v", err)
		}
	} else if err != nil && (!strings.Contains(err.Error(), "nf_flow_table") || !strings.Contains(err.Error(), "flowtable: false")) {
		t.Errorf("%v does not name what is missing and the way out", err)
	}
	if have, err := d.sock.dump(); err != nil || have != nil {
		t.Errorf("the probe left %v, %v", have, err)
	}
}
