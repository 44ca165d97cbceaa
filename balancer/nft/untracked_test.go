package nft

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/internal/golden"
)

// untracking is relaying, and what is untracked of it: the services web, closed,
// which does not let everybody in, half, of whose groups one has no target, and
// idle, which has none. The service split is relayed in part. Of the destinations,
// the first is one of a kernel mode too.
func untracking() *balancer.Table {
	t := relaying()
	t.UntrackedRelay = true
	tcp := []uint8{balancer.ProtoTCP}
	shared, own, leaving := dest("10.0.1.11", 8080, 1), dest("10.0.1.12", 9090, 1), dest("10.0.1.13", 9090, 0)
	own6 := dest("2001:db8:1::12", 9090, 1)
	t.Pools[3].Destinations = []balancer.Destination{shared, own, leaving, own6}
	t.Pools = append(t.Pools,
		balancer.Pool{Name: "vacant", Protocols: tcp, ClientIP: balancer.ProxyProtocolV2, Destinations: []balancer.Destination{leaving}})
	service := func(name, vip string, port uint16, allow string, pools ...balancer.WeightedPool) {
		t.Services = append(t.Services, balancer.VirtualService{Name: name, Address: addr(vip), Protocols: tcp, Port: port,
			IdleTimeout: 350 * time.Second, Allow: prefixes(allow), Pools: pools})
	}
	service("closed", "198.51.100.11", 82, "203.0.113.0/24", balancer.WeightedPool{Pool: "preserve", Weight: 1})
	service("closed6", "2001:db8:77::10", 82, "2001:db8:99::/64", balancer.WeightedPool{Pool: "preserve", Weight: 1}, balancer.WeightedPool{Pool: "hairpin", Weight: 0})
	service("half", "198.51.100.11", 83, "0.0.0.0/0", balancer.WeightedPool{Pool: "preserve", Weight: 2}, balancer.WeightedPool{Pool: "vacant", Weight: 1})
	service("idle", "198.51.100.11", 84, "0.0.0.0/0", balancer.WeightedPool{Pool: "vacant", Weight: 1})
	service("mixed", "198.51.100.11", 85, "0.0.0.0/0", balancer.WeightedPool{Pool: "preserve", Weight: 1}, balancer.WeightedPool{Pool: "hairpin", Weight: 1})
	return t
}

func tracking() *balancer.Table {
	t := untracking()
	t.UntrackedRelay = false
	return t
}

// What there is more than with tracking.
func TestRenderUntracked(t *testing.T) {
	all, plain := renderAfresh(t, untracking()), renderAfresh(t, tracking())
	golden.Check(t, "untracked.nft", more(all, plain).String())
	if gone := slices.Concat(missing(plain.Chains, all.Chains), missing(plain.Sets, all.Sets)); len(gone) > 0 {
		t.Errorf("%v are gone", gone)
	}
}

func TestUntrackedIsListed(t *testing.T) {
	d := newDataplane(t)
	converge(t, d, &balancer.Desired{Table: untracking()})
	if p := planAfresh(t, &balancer.Desired{Table: untracking()}); !p.Empty() {
		t.Errorf("a second look wants to change %q", p.Lines())
	}
	if list := nftList(t, "inet nlb"); !strings.Contains(list, "socket wildcard 0") || !strings.Contains(list, "notrack accept") {
		t.Errorf("a rule is missing:\n%s", list)
	}
	for _, script := range []string{
		"flush chain inet nlb untracked_arriving", "flush chain inet nlb leaving", "flush chain inet nlb welcome", "flush set inet nlb relayed4",
		"add element inet nlb relayed4 { 198.51.100.11 . tcp . 22 }", "flush map inet nlb screened4", "flush chain inet nlb screen.closed",
		"add element inet nlb relaysources6 { 2001:db8::1 }", "delete element inet nlb relayeddests4 { 10.0.1.12 . tcp . 9090 }",
		"insert rule inet nlb guard ct state untracked accept",
	} {
		nft(t, script)
		if p := converge(t, d, &balancer.Desired{Table: untracking()}); p.Empty() {
			t.Errorf("%s: nothing was noticed", script)
		}
		if p := planAfresh(t, &balancer.Desired{Table: untracking()}); !p.Empty() {
			t.Errorf("%s: not mended: %q", script, p.Lines())
		}
	}
	converge(t, d, &balancer.Desired{Table: tracking()})
	if list := nftList(t, "inet nlb"); strings.Contains(list, "untracked") || strings.Contains(list, "socket") {
		t.Errorf("something is left:\n%s", list)
	}
}

// A site has a balancer on whose node a program plays the relay: it listens at
// the VIPs and says back what it hears.
type site struct {
	*lab.Topology
	t     *testing.T
	plane *Dataplane
}

// Ports of the site's services, by what they do with new connections.
const (
	openPort   = 80
	closedTo   = 81 // the second client
	vacantPort = 82 // no target
	halfPort   = 83 // for one half no target
	kernelPort = 84 // a kernel mode
	destPort   = 9090
	kernelDest = 8080
)

// routed is a network with the VIPs, and a dataplane, on its balancer.
func routed(t *testing.T, o lab.Options) (*lab.Topology, *Dataplane) {
	t.Helper()
	top, err := lab.Routed(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := top.Close(); err != nil {
			t.Error(err)
		}
	})
	var plane *Dataplane
	within(t, top.LB, func() (err error) { plane, err = New(zaptest.NewLogger(t), ""); return err })
	t.Cleanup(func() { plane.Close() })
	for _, vip := range []netip.Addr{lab.VIP4, lab.VIP6} {
		if err := top.LB.Address("lo", netip.PrefixFrom(vip, vip.BitLen())); err != nil {
			t.Fatal(err)
		}
	}
	return top, plane
}

func newSite(t *testing.T) *site {
	t.Helper()
	top, plane := routed(t, lab.Options{Clients: 2, Targets: 1})
	s := &site{Topology: top, t: t, plane: plane}
	for _, vip := range []netip.Addr{lab.VIP4, lab.VIP6} {
		for _, port := range []uint16{openPort, closedTo, vacantPort, halfPort} {
			echo(t, top.LB, netip.AddrPortFrom(vip, port))
		}
	}
	for _, a := range []netip.Addr{top.Targets[0].Addr4, top.Targets[0].Addr6} {
		echo(t, top.Targets[0], netip.AddrPortFrom(a, destPort))
		echo(t, top.Targets[0], netip.AddrPortFrom(a, kernelDest))
	}
	return s
}

// echo answers on a node until the test ends.
func echo(t *testing.T, n *lab.Node, at netip.AddrPort) {
	t.Helper()
	var l net.Listener
	within(t, n, func() (err error) {
		l, err = new(net.ListenConfig).Listen(context.Background(), "tcp", at.String())
		return err
	})
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed, by the test's end
			}
			go func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(4 * patience))
				_, _ = io.Copy(c, c) // the client sees what is wrong
			}()
		}
	}()
}

// An end is the client's of a connection.
type end struct{ net.Conn }

func (s *site) dial(n *lab.Node, from netip.Addr, to netip.AddrPort, wait time.Duration) (*end, error) {
	d := net.Dialer{Timeout: wait}
	if from.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
	}
	var c net.Conn
	err := n.Do(func() (err error) { c, err = d.Dial("tcp", to.String()); return err })
	if err != nil {
		return nil, err
	}
	s.t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(4 * patience))
	return &end{c}, nil
}

func (s *site) connect(n *lab.Node, from netip.Addr, to netip.AddrPort) *end {
	s.t.Helper()
	e, err := s.dial(n, from, to, patience)
	if err != nil {
		s.t.Fatal(err)
	}
	s.alive("at first", e)
	return e
}

func (s *site) alive(when string, ends ...*end) {
	s.t.Helper()
	for _, e := range ends {
		_, err := e.Write([]byte("hello"))
		if err == nil {
			_, err = io.ReadFull(e, make([]byte, 5))
		}
		if err != nil {
			s.t.Errorf("%s: %v → %v: %v", when, e.LocalAddr(), e.RemoteAddr(), err)
		}
	}
}

// dropped dials n times, wants silence and the counter to count it. It returns how
// many were taken nonetheless.
func (s *site) dropped(n *lab.Node, to netip.AddrPort, times int, counter string) (taken int) {
	s.t.Helper()
	before := s.counter(counter)
	for range times {
		_, err := s.dial(n, netip.Addr{}, to, 100*time.Millisecond)
		switch {
		case err == nil:
			taken++
		case !errors.Is(err, os.ErrDeadlineExceeded) && !isTimeout(err):
			s.t.Errorf("%v: %v, want silence", to, err)
		}
	}
	if got := s.counter(counter) - before; got != times-taken {
		s.t.Errorf("%v: %s rose by %d, and %d of %d were taken", to, counter, got, taken, times)
	}
	return taken
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

func (s *site) counter(name string) (packets int) {
	s.t.Helper()
	out, err := s.LB.Command(s.t.Context(), "nft", "list", "counter", "inet", "nlb", name).CombinedOutput()
	if err != nil {
		s.t.Fatalf("%v: %s", err, out)
	}
	_, rest, _ := strings.Cut(string(out), "packets ")
	if _, err := fmt.Sscan(rest, &packets); err != nil {
		s.t.Fatal(err)
	}
	return packets
}

// tracked are the entries of conntrack with a port.
func (s *site) tracked(port uint16) (lines []string) {
	s.t.Helper()
	for _, f := range []string{"ipv4", "ipv6"} {
		out, err := s.LB.Command(s.t.Context(), "conntrack", "-L", "-f", f, "-p", "tcp").Output()
		if err != nil {
			s.t.Fatal(err)
		}
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, fmt.Sprintf(" dport=%d ", port)) || strings.Contains(line, fmt.Sprintf(" sport=%d ", port)) {
				lines = append(lines, line)
			}
		}
	}
	return lines
}

func (s *site) table(change func(*balancer.Table)) *balancer.Desired {
	tcp := []uint8{balancer.ProtoTCP}
	b := &balancer.Table{UntrackedRelay: true, VIPs: []netip.Addr{lab.VIP4, lab.VIP6}, Sources: []netip.Addr{s.LB.Addr4, s.LB.Addr6}}
	target := s.Targets[0]
	dests := func(port uint16, weight int) []balancer.Destination {
		return []balancer.Destination{dest(target.Addr4.String(), port, weight), dest(target.Addr6.String(), port, weight)}
	}
	b.Pools = []balancer.Pool{
		{Name: "kernel", Protocols: tcp, ClientIP: balancer.SNAT, Destinations: dests(kernelDest, 1)},
		{Name: "open", Protocols: tcp, ClientIP: balancer.ProxyProtocolV2, Destinations: dests(destPort, 1)},
		{Name: "vacant", Protocols: tcp, ClientIP: balancer.ProxyProtocolV2, Destinations: dests(destPort, 0)},
	}
	for _, f := range families {
		vip, client := lab.VIP4, s.Clients[0].Addr4
		if f == ip6 {
			vip, client = lab.VIP6, s.Clients[0].Addr6
		}
		service := func(port uint16, allow netip.Prefix, pools ...balancer.WeightedPool) {
			b.Services = append(b.Services, balancer.VirtualService{Name: fmt.Sprintf("s%d-%s", port, f.name), Address: vip, Protocols: tcp, Port: port,
				IdleTimeout: time.Hour, Allow: []netip.Prefix{allow}, Pools: pools})
		}
		all, one := netip.PrefixFrom(vip, 0).Masked(), netip.PrefixFrom(client, f.bits)
		open, vacant := balancer.WeightedPool{Pool: "open", Weight: 1}, balancer.WeightedPool{Pool: "vacant", Weight: 1}
		service(openPort, all, open)
		service(closedTo, one, open)
		service(vacantPort, all, vacant)
		service(halfPort, all, open, vacant)
		service(kernelPort, all, balancer.WeightedPool{Pool: "kernel", Weight: 1})
	}
	if change != nil {
		change(b)
	}
	return &balancer.Desired{Table: b}
}

func (s *site) converge(change func(*balancer.Table)) {
	s.t.Helper()
	within(s.t, s.LB, func() error { converge(s.t, s.plane, s.table(change)); return nil })
}

// Relayed connections do not show in conntrack, on neither side; those of kernel
// modes do. What is not allowed, or has no target, is dropped and counted. All
// relayed ones go on when the setting or their services change.
func TestUntracked(t *testing.T) {
	s := newSite(t)
	s.converge(nil)
	var ends []*end
	for _, f := range families {
		vip, client, target := lab.VIP4, s.Clients[0].Addr4, s.Targets[0].Addr4
		lb := s.LB.Addr4
		if f == ip6 {
			vip, client, target, lb = lab.VIP6, s.Clients[0].Addr6, s.Targets[0].Addr6, s.LB.Addr6
		}
		at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(vip, port) }
		for _, port := range []uint16{openPort, closedTo} {
			ends = append(ends, s.connect(s.Clients[0], client, at(port)))
		}
		ends = append(ends, s.connect(s.LB, lb, netip.AddrPortFrom(target, destPort)))
		s.connect(s.LB, netip.Addr{}, at(openPort)) // under the VIP
		s.connect(s.LB, lb, at(openPort))
		for _, port := range []uint16{openPort, closedTo, destPort} {
			if lines := s.tracked(port); len(lines) > 0 {
				t.Errorf("IPv%s: port %d is tracked:\n%s", f.name, port, lines)
			}
		}
		ends = append(ends, s.connect(s.Clients[1], netip.Addr{}, at(kernelPort)))
		if s.tracked(kernelPort) == nil {
			t.Errorf("IPv%s: a flow of a kernel mode is not tracked", f.name)
		}

		if n := s.dropped(s.Clients[1], at(closedTo), 3, counterNotAllowed); n > 0 {
			t.Errorf("IPv%s: %d connections of a client that is not allowed", f.name, n)
		}
		if n := s.dropped(s.Clients[1], at(vacantPort), 3, counterNoTarget); n > 0 {
			t.Errorf("IPv%s: %d connections without a target", f.name, n)
		}
		// Odds of one half: none or all of 24 is one in ten million.
		if n := s.dropped(s.Clients[1], at(halfPort), 24, counterNoTarget); n == 0 || n == 24 {
			t.Errorf("IPv%s: %d of 24 connections to a group with a target", f.name, n)
		}
	}

	tracked := func(b *balancer.Table) { b.UntrackedRelay = false }
	for _, step := range []struct {
		when   string
		change func(*balancer.Table)
	}{
		{"tracked", tracked},
		{"untracked again", nil},
		{"tracked again", tracked},
		{"untracked once more", nil},
		{"no targets", func(b *balancer.Table) {
			for i := range b.Pools[1].Destinations {
				b.Pools[1].Destinations[i].Weight = 0
			}
		}},
		{"nobody is allowed", func(b *balancer.Table) {
			for i := range b.Services {
				b.Services[i].Allow = nil
			}
		}},
		{"a kernel mode", func(b *balancer.Table) { b.Pools[1].ClientIP = balancer.SNAT }},
		{"relayed", nil},
		{"mixed", func(b *balancer.Table) { b.Services[0].Pools = append(b.Services[0].Pools, b.Services[4].Pools...) }},
		{"no service", func(b *balancer.Table) { b.Services = nil }},
		{"relayed as at first", nil},
	} {
		s.converge(step.change)
		s.alive(step.when, ends...)
	}
}

// A masquerade of somebody else's uses the relay's address towards its target.
func TestUntrackedBesideMasquerade(t *testing.T) {
	s := newSite(t)
	s.converge(nil)
	if out, err := s.LB.Command(t.Context(), "nft", `table inet other {
		chain postrouting {
			type nat hook postrouting priority 100
			fib saddr type != local masquerade
		}
	}`).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, to := range []netip.Addr{s.Targets[0].Addr4, s.Targets[0].Addr6} {
		e := s.connect(s.Clients[0], netip.Addr{}, netip.AddrPortFrom(to, destPort))
		s.alive("masqueraded", e)
	}
	if s.tracked(destPort) == nil {
		t.Error("the masqueraded flows are not tracked")
	}
}
