package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nlb/balancer/control"
	"nlb/bench/flood"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

// answering is a SYN proxy with its defaults.
func answering() map[string]any { return map[string]any{"enabled": true} }

// proxiedListener is listen with a SYN proxy, which is for IPv4 only.
func proxiedListener(name string, port uint16, group string) []listener {
	return answeredHere(listen(name, "TCP", port, group)[:1])
}

// answeredHere gives listeners a SYN proxy.
func answeredHere(listeners []listener) []listener {
	for i := range listeners {
		listeners[i].SYNProxy = answering()
	}
	return listeners
}

// kernelModes are the ways of a client's address that a SYN proxy may be in front of.
var kernelModes = []string{"preserve", "hairpin_snat", "snat"}

// TestSYNProxy has clients from everywhere behind SYN cookies: targets see of them what
// they see without, in all modes, whether the VIP is bound here or not.
func TestSYNProxy(t *testing.T) {
	t.Parallel()
	for _, bound := range []bool{true, false} {
		t.Run(map[bool]string{true: "bound", false: "routed"}[bound], func(t *testing.T) {
			t.Parallel()
			top := routed(t, lab.Options{})
			serveTargets(t, top, 8080)
			c := config{Sources: sources(top), VIPs: both()}
			if !bound {
				c.VIPs = []vip{{Address: lab.VIP4}, {Address: lab.VIP6}}
				for _, f := range families[:1] {
					// Where the VIP would be if somebody else had it: nobody is asked.
					must(t, top.LB, "ip", "-"+f.name, "route", "add", "default", "dev", top.Clients[0].Name)
				}
			}
			for i, mode := range kernelModes {
				name := fmt.Sprint("g", i)
				c.Listeners = append(c.Listeners, proxiedListener(name, uint16(81+i), name)...)
				c.Groups = append(c.Groups, pool(name, "TCP", mode, 8080, targets(top.Targets...)))
			}
			d := serving(t, top, c)
			proved := d.synproxy()
			for i, mode := range kernelModes {
				for _, f := range families[:1] {
					ask := lab.Call{Network: "tcp", Dst: f.at(uint16(81 + i)), N: 20, Parallel: 4}
					want := f.addr(top.Clients[0])
					if mode == "snat" {
						want = f.addr(top.LB)
					}
					what := mode + " IPv" + f.name
					allSeenAs(t, what, call(t, top.Clients[0], ask), want)
					if bound {
						// A client of the balancer's own host has nothing to prove.
						if got := call(t, top.LB, ask); got.Failed > 0 {
							t.Errorf("%s from the balancer: %v", what, got)
						}
					}
					if mode != "preserve" {
						// Half of them are sent to the target that asks.
						if got := call(t, top.Targets[0], ask); got.Failed > 0 || len(got.ByWho) != 2 {
							t.Errorf("%s from a target: %v", what, got)
						}
					}
				}
			}
			now := d.synproxy()
			// Of each kind of client but those of the balancer, who come without.
			if got, want := now["cookie_valid"]-proved["cookie_valid"], uint64((3+2)*20); got != want {
				t.Errorf("%d cookies returned, want %d", got, want)
			}
			if err := d.planned(); err != nil {
				t.Error(err)
			}
		})
	}
}

// synproxy reads what the kernel says of its SYN proxy in the balancer's namespace, by
// the names in the file's first line.
func (d *daemon) synproxy() map[string]uint64 {
	d.t.Helper()
	lines := strings.Split(strings.TrimSpace(must(d.t, d.node, "cat", "/proc/net/stat/synproxy")), "\n")
	names, all := strings.Fields(lines[0]), make(map[string]uint64)
	for _, line := range lines[1:] { // one of each processor
		for i, field := range strings.Fields(line) {
			n, err := strconv.ParseUint(field, 16, 64)
			if err != nil {
				d.t.Fatalf("synproxy: %q: %v", line, err)
			}
			all[names[i]] += n
		}
	}
	return all
}

// flooding is a flood from the first client's link.
func flooding(t *testing.T, top *lab.Topology) *flood.Flood {
	t.Helper()
	f, err := flood.Open(top.Clients[0], top.LB, 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// flowCount is how many flows conntrack has in the balancer's namespace.
func (d *daemon) flowCount() int {
	d.t.Helper()
	n, err := strconv.Atoi(strings.TrimSpace(must(d.t, d.node, "cat", "/proc/sys/net/netfilter/nf_conntrack_count")))
	if err != nil {
		d.t.Fatal(err)
	}
	return n
}

// TestSYNFlood floods a listener with a SYN proxy and one without. Behind the proxy,
// clients are served meanwhile, no target hears of the flood and no flow comes of it.
func TestSYNFlood(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Clients: 2, Targets: 1})
	serveTargets(t, top, 8080)
	const open, protected, syns = 81, 82, 20000
	d := serving(t, top, config{
		Sources: sources(top), VIPs: both(),
		Listeners: append(listen("open", "TCP", open, "web"), proxiedListener("protected", protected, "web")...),
		Groups:    []group{pool("web", "TCP", "preserve", 8080, targets(top.Targets...))},
	})
	f := flooding(t, top)
	before := d.flowCount()
	done := make(chan error, 1)
	go func() {
		for range 10 {
			if err := f.Send(families[0].at(protected), syns/10); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	const honest = 200
	got := call(t, top.Clients[1], lab.Call{Network: "tcp", Dst: families[0].at(protected), N: honest, Parallel: 4})
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got.OK != honest {
		t.Errorf("honest clients during the flood: %v", got)
	}
	if now := d.synproxy(); now["syn_received"] < syns {
		t.Errorf("%d SYNs were answered, of %d", now["syn_received"], syns)
	}
	// Health checks and honest clients leave flows that are over.
	if grown := d.flowCount() - before; grown > 2*honest {
		t.Errorf("%d flows came of a flood of %d SYNs behind the proxy", grown, syns)
	}
	before = d.flowCount()
	if err := f.Send(families[0].at(open), syns); err != nil {
		t.Fatal(err)
	}
	if grown := d.flowCount() - before; grown < syns*9/10 {
		t.Errorf("without a proxy a flood of %d SYNs made %d flows: the test cannot tell", syns, grown)
	}
}

// TestSYNProxyTurnsAway: who would not be served gets no answer in a target's place.
func TestSYNProxyTurnsAway(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Clients: 2, Targets: 1})
	serveTargets(t, top, 8080)
	const closed, empty = 81, 82
	c := config{
		Sources: sources(top), VIPs: both(),
		Listeners: append(proxiedListener("closed", closed, "web"), proxiedListener("empty", empty, "nobody")...),
		Groups: []group{
			pool("web", "TCP", "preserve", 8080, targets(top.Targets...)),
			pool("nobody", "TCP", "preserve", 8080, []target{target{Address: top.Targets[0].Addr4}.weighed(0)}),
		},
	}
	c.Listeners[0].Allow = []string{top.Clients[0].Addr4.String()}
	d := start(t, top, c.String())
	d.waitHealthy("web", 2)
	for _, f := range families[:1] {
		for _, x := range []struct {
			port    uint16
			counter string
		}{{closed, "not_allowed_drops"}, {empty, "no_target_drops"}} {
			before := d.counter(x.counter)
			got := call(t, top.Clients[1], lab.Call{Network: "tcp", Dst: f.at(x.port), N: 3, Parallel: 3, Timeout: briefly})
			allFail(t, x.counter, got, lab.Timeout)
			if n := d.counter(x.counter) - before; n != 3 {
				t.Errorf("IPv%s: %s rose by %d for 3 SYNs", f.name, x.counter, n)
			}
		}
		allSeenAs(t, "an allowed client", call(t, top.Clients[0], lab.Call{Network: "tcp", Dst: f.at(closed), N: 5}), f.addr(top.Clients[0]))

		// Segments that return no cookie, and ask for none, get nothing.
		from := netip.AddrPortFrom(f.addr(top.Clients[0]), 9)
		seen := capture(t, top.Targets[0], "eth0")
		atClient := capture(t, top.Clients[0], "eth0")
		before := d.synproxy()["cookie_invalid"]
		for _, flags := range strays {
			inject(t, top.Clients[0], from, f.at(closed), everywhere[0], flags)
		}
		wait.For(t, limit, "cookies that are none", func() error {
			if n := d.synproxy()["cookie_invalid"] - before; n < 3 {
				return fmt.Errorf("%d", n)
			}
			return nil
		})
		if found := append(packets(t, seen, of(from)), packets(t, atClient, toEnd(from))...); len(found) > 0 {
			t.Errorf("IPv%s: %d packets of or to who proved nothing, such as %v", f.name, len(found), found[0])
		}
	}
}

// of keeps what comes from an end, and toEnd what is sent to it.
func of(end netip.AddrPort) func(lab.Packet) bool {
	return func(p lab.Packet) bool { return p.From() == end }
}

func toEnd(end netip.AddrPort) func(lab.Packet) bool {
	return func(p lab.Packet) bool { return !p.Out && netip.AddrPortFrom(p.Dst, p.DstPort) == end }
}

// TestSYNProxyComesAndGoes turns a proxy on and off under flows that live. Those from
// before go on with it, those from meanwhile while there is any proxy.
func TestSYNProxyComesAndGoes(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{})
	serveTargets(t, top, 8080)
	plain := config{
		Sources: sources(top), VIPs: both(),
		Listeners: append(listen("web", "TCP", 81, "web")[:1], proxiedListener("other", 82, "web")...),
		Groups:    []group{pool("web", "TCP", "snat", 8080, targets(top.Targets...))},
	}
	protected := plain
	protected.Listeners = append(proxiedListener("web", 81, "web"), plain.Listeners[1:]...)
	d := serving(t, top, plain)
	var all []*lab.Flows
	hold := func() {
		for _, f := range families[:1] {
			all = append(all, held(t, top.Clients[0], lab.Call{Network: "tcp", Dst: f.at(81), N: 3}))
		}
	}
	check := func(when string) {
		t.Helper()
		for _, flows := range all {
			now, err := flows.Check(soon(t))
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range now {
				if f.Broken() || f.Moved() {
					t.Errorf("%s: a flow is broken or moved: %+v", when, f)
				}
			}
		}
	}
	hold()
	for _, next := range []struct {
		when string
		c    config
	}{{"with a proxy", protected}, {"without", plain}, {"with one again", protected}} {
		if err := d.reload(next.c.String()); err != nil {
			t.Fatal(err)
		}
		check(next.when)
		hold()
		check(next.when)
	}
}

// TestSYNProxyCutFlows has targets fail: the ends of flows that came by the proxy are
// told, though the sequence numbers of one are not those of the other.
func TestSYNProxyCutFlows(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 2})
	serveTargets(t, top, 8080, 9000)
	c := config{
		Sources: sources(top), VIPs: both(),
		Listeners: proxiedListener("web", 81, "web"),
		Groups:    []group{pool("web", "TCP", "preserve", 8080, targets(top.Targets[0]))},
	}
	c.Groups[0].HealthCheck["port"] = 9000
	c.Groups[0].FailOpen = map[string]any{"minimum_healthy_count": 0}
	d := serving(t, top, c)
	var conns []net.Conn
	for _, f := range families[:1] {
		conn := connect(t, top.Clients[0], f, 81)
		if _, err := io.WriteString(conn, "question\n"); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	must(t, top.Targets[0], "nft", "table inet failing { chain in { type filter hook input priority 0; tcp dport 9000 drop; }; }")
	d.waitHealthy("web", 0)
	for i, conn := range conns {
		_ = conn.SetReadDeadline(time.Now().Add(limit))
		if _, err := io.Copy(io.Discard, conn); err == nil || !strings.Contains(err.Error(), "reset") {
			t.Errorf("IPv%s: the client of a failed target: %v, not a reset", families[i].name, err)
		}
	}
}

// TestSourceLimit: a client with as many flows as it may have gets no more, until it has
// fewer. What counts as one client is an address, or a network of IPv6.
func TestSourceLimit(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Clients: 2, Targets: 1})
	serveTargets(t, top, 8080)
	one, other := top.Clients[0], top.Clients[1]
	const most = 5
	const plain, single, proxied = 81, 82, 83
	c := config{
		Sources: sources(top), VIPs: both(),
		Listeners: append(listen("plain", "TCP_UDP", plain, "web"), append(listen("single", "TCP", single, "web"), proxiedListener("proxied", proxied, "web")...)...),
		Groups:    []group{pool("web", "TCP_UDP", "hairpin_snat", 8080, targets(top.Targets...))},
	}
	for i := range c.Listeners {
		c.Listeners[i].MaxPerSource = most
		if c.Listeners[i].Port == single && c.Listeners[i].VIP == lab.VIP6.String() {
			c.Listeners[i].SourcePrefix = 128
		}
	}
	d := serving(t, top, c)
	for _, f := range families {
		for _, port := range []uint16{plain, single, proxied} {
			if f.name == "6" && port == proxied {
				continue // the kernel has no such proxy
			}
			what := fmt.Sprintf("IPv%s port %d", f.name, port)
			flows := held(t, one, lab.Call{Network: "tcp", Dst: f.at(port), N: most})
			before := d.counter("source_limit_drops")
			more := lab.Call{Network: "tcp", Dst: f.at(port), N: 3, Parallel: 3, Timeout: briefly}
			allFail(t, what+", one too many", call(t, one, more), lab.Timeout)
			if n := d.counter("source_limit_drops") - before; n < 3 {
				t.Errorf("%s: source_limit_drops rose by %d for 3 SYNs", what, n)
			}
			// Both clients are in one /64.
			ask := lab.Call{Network: "tcp", Dst: f.at(port), N: most}
			if f.name == "6" && port != single {
				allFail(t, what+", a neighbour", call(t, other, more), lab.Timeout)
			} else {
				allSeenAs(t, what+", another client", call(t, other, ask), f.addr(other))
			}
			now, err := flows.Check(soon(t))
			if err != nil {
				t.Fatal(err)
			}
			for _, flow := range now {
				if flow.Broken() || flow.Moved() {
					t.Errorf("%s: a flow within the limit is broken or moved: %+v", what, flow)
				}
			}
			if err := flows.Close(); err != nil {
				t.Fatal(err)
			}
			wait.For(t, limit, what+", after others ended", func() error {
				if got := call(t, one, lab.Call{Network: "tcp", Dst: f.at(port), Timeout: briefly}); got.Failed > 0 {
					return fmt.Errorf("%v", got)
				}
				return nil
			})
		}
	}
	// Connections count beside datagrams; those of before are over.
	got := call(t, other, lab.Call{Network: "udp", Dst: families[0].at(plain), N: 2 * most, Timeout: briefly})
	if got.OK != most || got.ByErr[lab.Timeout] != most {
		t.Errorf("%d sockets of a client that may have %d: %v", 2*most, most, got)
	}
	if err := d.planned(); err != nil {
		t.Error(err)
	}
}

// seldom is a health check that looks once in the time of a test.
func seldom() map[string]any {
	return map[string]any{"interval": "300s", "timeout": "1s", "healthy_threshold": 1}
}

// TestConntrackFull fills conntrack's table with the flows of others. Flows that are there
// go on, each new one that finds no room is counted, and when there is room they work.
func TestConntrackFull(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 1})
	serveTargets(t, top, 8080)
	c := config{
		Sources: sources(top), VIPs: both(), Listeners: listen("web", "TCP", 81, "web"),
		Groups: []group{pool("web", "TCP", "preserve", 8080, targets(top.Targets...))},
	}
	c.Groups[0].HealthCheck = seldom()
	d := serving(t, top, c)
	dst := families[0].at(81)
	flows := held(t, top.Clients[0], lab.Call{Network: "tcp", Dst: dst, N: 10})
	f := flooding(t, top)

	usage := func() control.Conntrack {
		t.Helper()
		s := d.status()
		if s.Conntrack == nil {
			t.Fatal("the status has no usage of conntrack")
		}
		return *s.Conntrack
	}
	begun := usage()
	if begun.Alarm || begun.Count < 10 || begun.DropsTotal != 0 {
		t.Fatalf("to begin with: %+v", begun)
	}
	if most := uint64(1 << 20); begun.Max > most {
		t.Skipf("conntrack's table has room for %d flows: filling it takes one of at most %d", begun.Max, most)
	}
	if err := top.LB.Do(func() error { return fillConntrack(int(begun.Max)) }); err != nil {
		t.Fatal(err)
	}
	full := usage()
	// Flows of this test's own end meanwhile.
	if full.Count < full.Max-10 || !full.Alarm {
		t.Fatalf("after it was filled: %+v", full)
	}
	const syns = 100
	admitted := d.counter("t1.web")
	for range syns {
		if err := f.SendFrom(f.Source(), dst); err != nil {
			t.Fatal(err)
		}
	}
	// Some of others' flows may have ended just then, and made room.
	wait.For(t, limit, "drops of new flows", func() error {
		in, dropped := d.counter("t1.web")-admitted, int(usage().DropsTotal-full.DropsTotal)
		if dropped < syns-in || in > syns/10 {
			return fmt.Errorf("%d were counted for %d new flows, of which %d got in", dropped, syns, in)
		}
		t.Logf("%d of %d entries; of %d new flows %d got in, and %d drops were counted", full.Count, full.Max, syns, in, dropped)
		return nil
	})
	now, err := flows.Check(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, flow := range now {
		if flow.Broken() || flow.Moved() {
			t.Errorf("a flow is broken or moved by a full table: %+v", flow)
		}
	}
	t.Logf("%d flows that were there were asked", len(now))
	if out := d.run("doctor", "-c", d.config, "-o", "json"); !strings.Contains(out.stdout, `"conntrack-full"`) {
		t.Errorf("nlb doctor does not find a full table: %s%s", out.stdout, out.stderr)
	}

	must(t, top.LB, "conntrack", "-F")
	room := time.Now()
	got := call(t, top.Clients[0], lab.Call{Network: "tcp", Dst: dst, N: 20})
	if got.OK != 20 {
		t.Errorf("when there is room again: %v", got)
	}
	t.Logf("%d of 20 new connections were answered %v after there was room", got.OK, time.Since(room).Round(time.Millisecond))
	wait.For(t, limit, "the alarm's end", func() error {
		if u := usage(); u.Alarm {
			return fmt.Errorf("%+v", u)
		}
		return nil
	})
	t.Logf("the alarm had ended %v after there was room", time.Since(room).Round(time.Millisecond))
	for _, words := range []string{"the conntrack table is nearly full", "the conntrack table has room again"} {
		if n := strings.Count(d.log.String(), words); n != 1 {
			t.Errorf("%q is in the log %d times", words, n)
		}
	}
}

// fillConntrack adds answered UDP flows of nobody's to the table of the thread's
// namespace, until it is full. The kernel makes no room by them, as it does by those
// without an answer.
func fillConntrack(most int) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	// All messages are alike but for the client's address and port, which are in each
	// twice: before the flow's NAT and after it.
	client, port := []byte{10, 99, 0xab, 0xcd}, []byte{0xbe, 0xef}
	one := foreignFlow(client, port)
	clients, ports := indexes(one, client), indexes(one, port)
	const atOnce = 500
	batch := bytes.Repeat(one, atOnce)
	for i := 0; i < most; i += atOnce {
		for j := range atOnce {
			m, n := batch[j*len(one):(j+1)*len(one)], i+j
			for _, at := range clients {
				binary.BigEndian.PutUint16(m[at+2:], uint16(n>>16))
			}
			for _, at := range ports {
				binary.BigEndian.PutUint16(m[at:], uint16(n))
			}
		}
		// Answers are errors of those for which there is no room: nobody reads them.
		if err := unix.Sendto(fd, batch, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return fmt.Errorf("sendto: %w", err)
		}
	}
	return nil
}

// indexes is where b has what.
func indexes(b, what []byte) (all []int) {
	for at := range b {
		if bytes.HasPrefix(b[at:], what) {
			all = append(all, at)
		}
	}
	return all
}

// foreignFlow is the message that adds a client's UDP flow
// (linux/netfilter/nfnetlink_conntrack.h).
func foreignFlow(client, clientPort []byte) []byte {
	const (
		newFlow             = unix.NFNL_SUBSYS_CTNETLINK << 8 // IPCTNL_MSG_CT_NEW
		original, reply     = 1, 2                            // CTA_TUPLE_ORIG, CTA_TUPLE_REPLY
		status, timeout     = 3, 7                            // CTA_STATUS, CTA_TIMEOUT
		assured             = 1<<1 | 1<<2 | 1<<3              // IPS_SEEN_REPLY, IPS_ASSURED, IPS_CONFIRMED
		header              = unix.SizeofNlMsghdr
		nested              = unix.NLA_F_NESTED
		ip, proto           = 1, 2    // CTA_TUPLE_IP, CTA_TUPLE_PROTO
		src, dst            = 1, 2    // CTA_IP_V4_SRC, CTA_IP_V4_DST
		number, sport, dprt = 1, 2, 3 // CTA_PROTO_*
	)
	attr := func(typ uint16, value ...byte) []byte {
		b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(value)))
		b = append(binary.NativeEndian.AppendUint16(b, typ), value...)
		return append(b, make([]byte, -len(value)&3)...)
	}
	server, serverPort := []byte{10, 98, 0, 1}, []byte{0, 53}
	tuple := func(typ uint16, from, to, fromPort, toPort []byte) []byte {
		return attr(typ|nested, slices.Concat(
			attr(ip|nested, append(attr(src, from...), attr(dst, to...)...)...),
			attr(proto|nested, slices.Concat(attr(number, unix.IPPROTO_UDP), attr(sport, fromPort...), attr(dprt, toPort...))...))...)
	}
	body := slices.Concat([]byte{unix.AF_INET, 0, 0, 0},
		tuple(original, client, server, clientPort, serverPort), tuple(reply, server, client, serverPort, clientPort),
		attr(status, binary.BigEndian.AppendUint32(nil, assured)...), attr(timeout, binary.BigEndian.AppendUint32(nil, 600)...))
	b := binary.NativeEndian.AppendUint32(nil, uint32(header+len(body)))
	b = binary.NativeEndian.AppendUint16(b, newFlow)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	return append(append(b, make([]byte, 8)...), body...)
}

// TestSourcePortsExhausted has an SNAT run out of source ports towards a target. The flows
// that get none are counted, and another source address has as many ports again. Clients
// come from ports below 512, of which the kernel keeps the range: 511 are soon used up.
func TestSourcePortsExhausted(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 1})
	serveTargets(t, top, 8080)
	const ports = 511
	c := config{
		Sources: []netip.Addr{top.LB.Addr4}, VIPs: both()[:1], Listeners: listen("web", "TCP", 81, "web")[:1],
		Groups: []group{pool("web", "TCP", "snat", 8080, targets(top.Targets[0])[:1])},
	}
	d := serving(t, top, c)
	f, dst := flooding(t, top), families[0].at(81)
	next := 0
	// send has new clients, each with one SYN.
	send := func(n int) {
		t.Helper()
		for range n {
			a := flood.Sources.Addr().As4()
			a[3] += byte(next / ports)
			if err := f.SendFrom(netip.AddrPortFrom(netip.AddrFrom4(a), uint16(1+next%ports)), dst); err != nil {
				t.Fatal(err)
			}
			next++
		}
	}
	sourced := func(by netip.Addr) (n int) {
		for _, e := range d.entries(dst) {
			if strings.Contains(e.text, "dst="+by.String()+" ") {
				n++
			}
		}
		return n
	}
	failures := func() int { return int(d.status().Conntrack.InsertFailuresTotal) }
	send(2 * ports)
	sent := time.Now()
	// The kernel looks at some ports at random and not at all: the last ones may stay free.
	wait.For(t, limit, "one source", func() error {
		got, failed := sourced(top.LB.Addr4), failures()
		if got < ports*9/10 || got > ports || failed != 2*ports-got {
			return fmt.Errorf("of %d flows %d got one of %d ports, and %d failures were counted", 2*ports, got, ports, failed)
		}
		t.Logf("of %d flows %d got one of %d ports, and %d failures were in the status %v later",
			2*ports, got, ports, failed, time.Since(sent).Round(time.Millisecond))
		return nil
	})

	const event = `"event": "flows.refused"`
	wait.Until(t, limit, "the event", func() bool { return strings.Contains(d.log.String(), event) })
	t.Logf("it was told %v after the flows", time.Since(sent).Round(time.Millisecond))

	second := netip.MustParseAddr("10.0.1.2")
	if err := top.LB.Address("lo", netip.PrefixFrom(second, 32)); err != nil {
		t.Fatal(err)
	}
	c.Sources = append(c.Sources, second)
	if err := d.reload(c.String()); err != nil {
		t.Fatal(err)
	}
	before := failures()
	send(4 * ports) // a hash shares them out
	wait.For(t, limit, "two sources", func() error {
		got := sourced(second)
		if got < ports*9/10 || failures() == before {
			return fmt.Errorf("%d flows from the second source, of %d ports; %d failures", got, ports, failures()-before)
		}
		t.Logf("%d flows from the second source, of %d ports; %d failures", got, ports, failures()-before)
		return nil
	})
}
