package nft

import (
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

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/internal/nstest"
)

// The tests of this package program the kernel of a namespace of their own.
func TestMain(m *testing.M) {
	lab.MaybeRunAgent()
	os.Exit(nstest.Main(m))
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func prefixes(s ...string) (out []netip.Prefix) {
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func dest(a string, port uint16, weight int, domain ...string) balancer.Destination {
	ip := addr(a)
	return balancer.Destination{
		Address: ip, Port: port, Weight: weight,
		Domain: append([]netip.Prefix{netip.PrefixFrom(ip, ip.BitLen())}, prefixes(domain...)...),
	}
}

// everything is a table that uses all there is.
func everything() *balancer.Table {
	ending := dest("10.0.1.13", 8080, 0)
	ending.Terminate = true
	both := []balancer.Destination{
		dest("10.0.1.11", 8080, 1, "10.244.1.0/24", "10.244.2.0/25"), dest("10.0.1.12", 8080, 3), ending,
		dest("2001:db8:1::11", 8080, 1, "2001:db8:f1::/64"), dest("2001:db8:1::12", 8080, 1),
	}
	tcp, udp := []uint8{balancer.ProtoTCP}, []uint8{balancer.ProtoUDP}
	all4, all6 := prefixes("0.0.0.0/0"), prefixes("::/0")
	one := func(n string) []balancer.WeightedPool { return []balancer.WeightedPool{{Pool: n, Weight: 1}} }
	const idle = 350 * time.Second
	return &balancer.Table{
		Key:     balancer.HashKey{1, 2, 3},
		VIPs:    []netip.Addr{addr("198.51.100.10"), addr("198.51.100.11"), addr("2001:db8:77::10")},
		Sources: []netip.Addr{addr("10.0.1.1"), addr("10.0.1.2")},
		Services: []balancer.VirtualService{
			{Name: "web", Address: addr("198.51.100.10"), Protocols: tcp, Port: 80, IdleTimeout: idle, Allow: all4, Pools: one("preserve")},
			{Name: "web6", Address: addr("2001:db8:77::10"), Protocols: tcp, Port: 80, IdleTimeout: idle, Allow: all6, Pools: one("hairpin")},
			{Name: "dns", Address: addr("198.51.100.10"), Protocols: []uint8{6, 17}, Port: 53, IdleTimeout: 60 * time.Second,
				Allow: prefixes("10.0.0.0/8", "203.0.113.0/24", "203.0.114.0/24"), Pools: one("hairpin"), Sticky: true},
			{Name: "split", Address: addr("198.51.100.11"), Protocols: udp, Port: 443, Allow: all4, Sticky: true,
				Pools: []balancer.WeightedPool{{Pool: "snat", Weight: 90}, {Pool: "avoid", Weight: 10}, {Pool: "hairpin", Weight: 0}}},
			{Name: "none", Address: addr("198.51.100.11"), Protocols: tcp, Port: 81, IdleTimeout: idle, Pools: one("empty")},
		},
		Pools: []balancer.Pool{
			{Name: "avoid", Protocols: udp, ClientIP: balancer.Preserve, AvoidSelf: true, Destinations: both},
			{Name: "empty", Protocols: tcp, ClientIP: balancer.Preserve},
			{Name: "hairpin", Protocols: []uint8{6, 17}, ClientIP: balancer.HairpinSNAT, Sticky: true, Destinations: both},
			{Name: "preserve", Protocols: tcp, ClientIP: balancer.Preserve, Destinations: both},
			{Name: "snat", Protocols: udp, ClientIP: balancer.SNAT, Destinations: both[:2]},
		},
	}
}

func newDataplane(t *testing.T) *Dataplane {
	t.Helper()
	d, err := New(zaptest.NewLogger(t), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p, err := d.Plan(context.Background(), nil)
		if err == nil {
			err = d.Apply(context.Background(), p)
		}
		if err != nil {
			t.Error(err)
		}
		d.Close()
	})
	return d
}

func converge(t *testing.T, d *Dataplane, want *balancer.Desired) balancer.Plan {
	t.Helper()
	p, err := d.Plan(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if err := d.Keep(); err != nil {
		t.Fatal(err)
	}
	return p
}

// What the kernel says back is what it was told, so a second daemon finds
// nothing to do.
func TestObserveAfterApply(t *testing.T) {
	d := newDataplane(t)
	for _, table := range []*balancer.Table{everything(), relaying(), protecting()} {
		want := &balancer.Desired{Table: table}
		converge(t, d, want)
		if p := planAfresh(t, want); !p.Empty() {
			t.Fatalf("a second look wants to change %q", p.Lines())
		}
	}
}

// What a kernel can is found out without a trace.
func TestProbesOfProtection(t *testing.T) {
	d := newDataplane(t)
	converge(t, d, &balancer.Desired{Table: everything()})
	if err := errors.Join(d.ProbeSYNProxy(), d.ProbeSourceLimit()); err != nil {
		t.Error(err)
	}
	if err := d.try(addRule{chainProbe, rule(func(b *ruleBuilder) { b.bare("nosuchexpression") })}); err == nil {
		t.Error("the kernel takes what it does not have")
	}
	if p := planAfresh(t, &balancer.Desired{Table: everything()}); !p.Empty() {
		t.Errorf("afterwards %q", p.Lines())
	}
}

// nft 1.0.6 dies on some rules that the kernel takes. None of ours may be one.
func TestListable(t *testing.T) {
	d := newDataplane(t)
	for _, table := range []*balancer.Table{everything(), protecting()} {
		converge(t, d, &balancer.Desired{Table: table})
		if list := nftList(t, "inet nlb"); !strings.Contains(list, "chain group4.hairpin") {
			t.Errorf("a group is missing:\n%s", list)
		}
	}
}

func nftList(t *testing.T, table string) string {
	t.Helper()
	out, err := exec.Command("nft", append([]string{"list", "table"}, strings.Fields(table)...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("nft list table %s: %v\n%s", table, err, out)
	}
	return string(out)
}

func nft(t *testing.T, script string) string {
	t.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(script + "\n")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("nft %s: %v\n%s", script, err, out)
	}
	return string(out)
}

func planAfresh(t *testing.T, want *balancer.Desired) balancer.Plan {
	t.Helper()
	d, err := New(zaptest.NewLogger(t), "")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	p, err := d.Plan(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// Whatever somebody does to our table, the next look finds it and one
// transaction mends it.
func TestDrift(t *testing.T) {
	tampering := []string{
		"delete table inet nlb",
		"flush table inet nlb",
		"flush chain inet nlb prerouting",
		"flush chain inet nlb forward",
		"flush map inet nlb services4",
		"flush set inet nlb vips6",
		"delete element inet nlb services4 { 198.51.100.10 . tcp . 80 }",
		"add element inet nlb services4 { 198.51.100.10 . tcp . 22 : goto idle_350s.group4.preserve }",
		"delete element inet nlb services4 { 198.51.100.10 . tcp . 80 }; add element inet nlb services4 { 198.51.100.10 . tcp . 80 : accept }",
		"delete element inet nlb vips4 { 198.51.100.10 }",
		"add element inet nlb vips4 { 198.51.100.99 }",
		"delete element inet nlb allow.dns { 10.0.0.0/8 }",
		"add element inet nlb allow.dns { 192.0.2.0/24 }",
		"flush set inet nlb ended",
		"add element inet nlb ended { 0x00004000 }",
		"flush chain inet nlb leaving",
		"add rule inet nlb prerouting accept",
		"insert rule inet nlb unwanted accept",
		"flush chain inet nlb unwanted; add rule inet nlb unwanted accept",
		"flush chain inet nlb source4; add rule inet nlb source4 masquerade",
		"add chain inet nlb stranger { type filter hook input priority 0; policy drop; }",
		"add chain inet nlb input { type filter hook input priority -5; policy drop; }",
		"add set inet nlb stranger { type ipv4_addr; }",
		"add set inet nlb stranger { type ifname; flags dynamic, timeout; }",
		"add counter inet nlb stranger",
		"add quota inet nlb stranger { over 1 mbytes }",
		"delete table inet nlb; add table inet nlb { flags dormant; }",
		"delete table inet nlb; add table inet nlb; add set inet nlb vips4 { type ipv6_addr; }",
		"delete table inet nlb; add table inet nlb; add chain inet nlb prerouting { type filter hook input priority 0; }",
	}
	d := newDataplane(t)
	want := &balancer.Desired{Table: everything()}
	converge(t, d, want)
	for _, script := range tampering {
		t.Run(script, func(t *testing.T) {
			nft(t, strings.ReplaceAll(script, "; add ", "\nadd "))
			if p := converge(t, d, want); p.Empty() {
				t.Error("nothing was noticed")
			}
			if p := planAfresh(t, want); !p.Empty() {
				t.Errorf("not mended: %q", p.Lines())
			}
		})
	}
}

// While a target's flows are being ended, whatever either end sends is answered
// with a reset; a flow of another target goes on. Then nothing is left of it.
func TestTerminate(t *testing.T) {
	for _, f := range []struct{ client, vip, target string }{
		{"203.0.113.9", "198.51.100.10", "10.0.1.%d"},
		{"2001:db8:99::9", "2001:db8:77::10", "2001:db8:1::%d"},
	} {
		t.Run(f.vip, func(t *testing.T) {
			first, second := addr(fmt.Sprintf(f.target, 11)), addr(fmt.Sprintf(f.target, 12))
			for _, a := range []netip.Addr{addr(f.client), addr(f.vip), first, second} {
				nstest.Own(t, a)
			}
			d := newDataplane(t)
			table := func(weight int, terminate bool) *balancer.Desired {
				all := netip.PrefixFrom(addr(f.vip), 0).Masked()
				ds := []balancer.Destination{dest(first.String(), 8080, weight), dest(second.String(), 8080, 1-weight)}
				ds[0].Terminate = terminate
				return &balancer.Desired{Table: &balancer.Table{
					VIPs: []netip.Addr{addr(f.vip)}, Sources: []netip.Addr{addr(f.client)},
					Services: []balancer.VirtualService{{Name: "web", Address: addr(f.vip), Protocols: []uint8{balancer.ProtoTCP}, Port: 80,
						IdleTimeout: time.Hour, Allow: []netip.Prefix{all}, Pools: []balancer.WeightedPool{{Pool: "web", Weight: 1}}}},
					Pools: []balancer.Pool{{Name: "web", Protocols: []uint8{balancer.ProtoTCP}, ClientIP: balancer.Preserve, Destinations: ds}},
				}}
			}
			connect := func(to netip.Addr) (client, target *net.TCPConn) {
				return connection(t, addr(f.client), netip.AddrPortFrom(addr(f.vip), 80), netip.AddrPortFrom(to, 8080))
			}
			converge(t, d, table(1, false))
			ended, endedTarget := connect(first)
			again, againTarget := connect(first)
			converge(t, d, table(0, false))
			other, otherTarget := connect(second)

			key := balancer.TargetKey{Group: "web", AddrPort: netip.AddrPortFrom(first, 8080)}
			mark, ok := d.Number(key)
			if got, known := d.TargetOf(mark); !ok || !known || got != key {
				t.Errorf("%v has the number %x, which is %v's", key, mark, got)
			}
			if p := converge(t, d, table(0, true)).(*Plan); len(p.steps) == 0 {
				t.Error("Terminate changes nothing")
			}
			if p := planAfresh(t, table(0, true)); !p.Empty() {
				t.Errorf("a restart wants to change %q", p.Lines())
			}
			if e, err := d.Events(t.Context()); err != nil || e.Totals[counterReset] != 0 {
				t.Errorf("%d resets before anybody spoke: %v", e.Totals[counterReset], err)
			}
			wantReset(t, ended, endedTarget)
			wantReset(t, againTarget, again)
			if e, err := d.Events(t.Context()); err != nil || e.Totals[counterReset] < 2 {
				t.Errorf("two flows were reset, and %d resets counted: %v", e.Totals[counterReset], err)
			}
			wantAlive(t, other, otherTarget)

			converge(t, d, table(0, false))
			if list := nftList(t, "inet nlb"); strings.Contains(list, "ended") || strings.Contains(list, "reject") {
				t.Errorf("something is left:\n%s", list)
			}
			if p := planAfresh(t, table(0, false)); !p.Empty() {
				t.Errorf("a restart wants to change %q", p.Lines())
			}
		})
	}
}

// patience bounds every wait for the kernel.
const patience = 10 * time.Second

// connection is both ends of a flow through the table.
func connection(t *testing.T, client netip.Addr, vip, target netip.AddrPort) (near, far *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(target))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_ = l.SetDeadline(time.Now().Add(patience))
	dialer := net.Dialer{Timeout: patience, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(client, 0))}
	c, err := dialer.Dial("tcp", vip.String())
	if err != nil {
		t.Fatal(err)
	}
	far, err = l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	near = c.(*net.TCPConn)
	for _, c := range []*net.TCPConn{near, far} {
		_ = c.SetDeadline(time.Now().Add(patience))
		t.Cleanup(func() { c.Close() })
	}
	wantAlive(t, near, far)
	return near, far
}

func wantAlive(t *testing.T, from, to net.Conn) {
	t.Helper()
	for _, way := range [][2]net.Conn{{from, to}, {to, from}} {
		if _, err := way[0].Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(way[1], make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
	}
}

// wantReset wants the first end to be told that the flow has ended when it says
// something, and then the other.
func wantReset(t *testing.T, ends ...net.Conn) {
	t.Helper()
	for _, c := range ends {
		if _, err := c.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%v → %v: %v, want a reset", c.LocalAddr(), c.RemoteAddr(), err)
		}
	}
}

// Other people's tables are the same before and after all we do.
func TestForeignTablesUntouched(t *testing.T) {
	nft(t, `table inet other {
		set s {
			type ipv4_addr
			elements = { 192.0.2.1 }
		}
		chain c {
			type filter hook forward priority 0
			ip saddr @s counter drop
		}
	}
	table ip nlb {
		chain prerouting {
			type nat hook prerouting priority -100
		}
	}`)
	others := func() string { return nftList(t, "inet other") + nftList(t, "ip nlb") }
	before := others()
	t.Cleanup(func() { nft(t, "delete table inet other\ndelete table ip nlb") })
	d := newDataplane(t)
	for _, want := range []*balancer.Desired{{Table: everything()}, {Table: &balancer.Table{}}, nil, {Table: everything()}, nil} {
		converge(t, d, want)
		if after := others(); after != before {
			t.Fatalf("changed:\n%s\nwas:\n%s", after, before)
		}
	}
}

// large is n listeners, each with a group of ten.
func large(n int) *balancer.Table {
	t := &balancer.Table{VIPs: []netip.Addr{addr("198.51.100.10")}, Sources: []netip.Addr{addr("10.0.0.2")}}
	for i := range n {
		name := fmt.Sprintf("g%d", i)
		p := balancer.Pool{Name: name, Protocols: []uint8{balancer.ProtoTCP}, ClientIP: balancer.HairpinSNAT}
		for j := range 10 {
			p.Destinations = append(p.Destinations, dest(netip.AddrFrom4([4]byte{10, 1 + byte(i>>8), byte(i), byte(j + 1)}).String(), 8080, 1))
		}
		t.Pools = append(t.Pools, p)
		t.Services = append(t.Services, balancer.VirtualService{
			Name: name, Address: addr("198.51.100.10"), Protocols: []uint8{balancer.ProtoTCP}, Port: uint16(1000 + i),
			IdleTimeout: 350 * time.Second, Allow: prefixes("0.0.0.0/0"), Pools: []balancer.WeightedPool{{Pool: name, Weight: 1}},
		})
	}
	return t
}

// BenchmarkScale reports what a thousand listeners of ten targets cost: cold,
// one target more, and a restart that finds them all.
func BenchmarkScale(b *testing.B) { benchmarkScale(b, balancer.NFTables) }

func benchmarkScale(b *testing.B, dataplane balancer.Dataplane) {
	ctx := context.Background()
	spent := map[string]time.Duration{}
	timed := func(what string, f func()) {
		start := time.Now()
		f()
		spent[what] += time.Since(start)
	}
	must := func(err error) {
		if err != nil {
			b.Fatal(err)
		}
	}
	apply := func(d *Dataplane, want *balancer.Desired) {
		p, err := d.Plan(ctx, want)
		must(err)
		must(d.Apply(ctx, p))
	}
	for b.Loop() {
		d, err := New(zap.NewNop(), "")
		must(err)
		table := large(1000)
		table.Dataplane = dataplane
		timed("cold", func() { apply(d, &balancer.Desired{Table: table}) })
		table.Pools[500].Destinations = slices.Clone(table.Pools[500].Destinations)
		table.Pools[500].Destinations[3].Weight = 0
		timed("change", func() { apply(d, &balancer.Desired{Table: table}) })
		fresh, err := New(zap.NewNop(), "")
		must(err)
		timed("restart", func() {
			p, err := fresh.Plan(ctx, &balancer.Desired{Table: table})
			must(err)
			if !p.Empty() {
				b.Fatalf("a restart wants to change %.500q", p.Lines())
			}
		})
		timed("clear", func() { apply(d, nil) })
		must(d.Close())
		must(fresh.Close())
	}
	for what, t := range spent {
		b.ReportMetric(float64(t.Milliseconds())/float64(b.N), what+"-ms")
	}
}
