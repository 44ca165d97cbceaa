package nft

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

// Ports of a target, by what becomes of a SYN that comes there. Its listener has
// the same.
const (
	takenPort    = 8080
	closedPort   = 8081
	silentPort   = 8082 // a firewall drops it
	noPortPort   = 8083 // a firewall answers that there is no such port
	noHostPort   = 8084 // a firewall answers that there is no such host
	deafPort     = 8085 // taken, but the client hears nothing of it
	fullPort     = 8086 // the accept queue is full
	idlePort     = 8087 // nobody sends one
	sourcedShift = 1000 // between the port of a preserving listener and one with SNAT
)

const targetFirewall = `table inet firewall {
	chain prerouting {
		type filter hook prerouting priority -300
		tcp dport 8082 drop
	}
	chain input {
		type filter hook input priority 0
		tcp dport 8083 reject with icmpx type port-unreachable
		tcp dport 8084 reject with icmpx type host-unreachable
	}
}`

const clientFirewall = `table inet firewall {
	chain input {
		type filter hook input priority 0
		tcp sport { 8085, 9085 } drop
	}
}`

// An observed is a balancer whose table counts outcomes, with a client and a
// target.
type observed struct {
	*lab.Topology
	plane *Dataplane
}

func within(t *testing.T, n *lab.Node, f func() error) {
	t.Helper()
	if err := n.Do(f); err != nil {
		t.Fatal(err)
	}
}

func newObserved(t *testing.T) *observed {
	t.Helper()
	top, err := lab.Routed(lab.Options{Targets: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := top.Close(); err != nil {
			t.Error(err)
		}
	})
	o := &observed{Topology: top}
	within(t, top.LB, func() (err error) { o.plane, err = New(zaptest.NewLogger(t), ""); return err })
	t.Cleanup(func() { o.plane.Close() })
	o.firewall(t, o.Targets[0], targetFirewall)
	o.firewall(t, o.Clients[0], clientFirewall)
	for _, key := range []string{"net.ipv4.icmp_ratelimit", "net.ipv6.icmp.ratelimit"} {
		if err := o.Targets[0].Sysctl(key, "0"); err != nil {
			t.Fatal(err)
		}
	}
	return o
}

func (o *observed) firewall(t *testing.T, n *lab.Node, script string) {
	t.Helper()
	if out, err := n.Command(t.Context(), "nft", script).CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
}

// poolName is the name of a listener and its pool.
func poolName(mode balancer.ClientIP, port uint16) string { return fmt.Sprintf("%v-%d", mode, port) }

func listenerPort(mode balancer.ClientIP, port uint16) uint16 {
	if mode == balancer.SNAT {
		return port + sourcedShift
	}
	return port
}

var modes = []balancer.ClientIP{balancer.Preserve, balancer.SNAT}

// table has a listener for each mode and port, with one target of either family.
// The first pool alone is observed.
func (o *observed) table(target *lab.Node) *balancer.Table {
	b := &balancer.Table{
		VIPs:    []netip.Addr{lab.VIP4, lab.VIP6},
		Sources: []netip.Addr{o.LB.Addr4, o.LB.Addr6},
	}
	protocols := []uint8{balancer.ProtoTCP, balancer.ProtoUDP}
	for _, mode := range modes {
		for port := uint16(takenPort); port <= idlePort; port++ {
			name := poolName(mode, port)
			b.Pools = append(b.Pools, balancer.Pool{
				Name: name, Protocols: protocols, ClientIP: mode, Observed: len(b.Pools) == 0,
				Destinations: []balancer.Destination{dest(target.Addr4.String(), port, 1), dest(target.Addr6.String(), port, 1)},
			})
			for _, vip := range b.VIPs {
				b.Services = append(b.Services, balancer.VirtualService{
					Name: name + familyOf(vip).name, Address: vip, Port: listenerPort(mode, port), Protocols: protocols,
					IdleTimeout: time.Hour, Allow: []netip.Prefix{netip.PrefixFrom(vip, 0).Masked()},
					Pools: []balancer.WeightedPool{{Pool: name, Weight: 1}},
				})
			}
		}
	}
	return b
}

type outcomes = map[balancer.TargetKey]balancer.Outcomes

func (o *observed) outcomes(t *testing.T) outcomes {
	t.Helper()
	got, err := o.plane.Outcomes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func wantOutcomes(t *testing.T, want, got outcomes) {
	t.Helper()
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.AddrPort{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// begin sends the first segment of a connection from a node, and more if there is
// no answer.
func begin(t *testing.T, from *lab.Node, to netip.AddrPort) (fd int) {
	t.Helper()
	within(t, from, func() (err error) {
		fd, err = unix.Socket(socketFamily(to.Addr()), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err = unix.Connect(fd, sockaddr(to)); err == unix.EINPROGRESS {
			err = nil
		}
		return err
	})
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func socketFamily(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// ended waits for the error that a connection fails with, nil if it does not.
func ended(t *testing.T, fd int) error {
	t.Helper()
	wait.Until(t, patience, "an answer", func() bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 0)
		return err == nil && n > 0
	})
	errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		t.Fatal(err)
	}
	if errno == 0 {
		return nil
	}
	return unix.Errno(errno)
}

// asked waits until the first segment was sent again twice.
func asked(t *testing.T, fd int) {
	t.Helper()
	wait.Until(t, patience, "two retransmissions", func() bool {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			t.Fatal(err)
		}
		return info.Total_retrans >= 2
	})
}

// listen takes connections on a node, or has a queue that one connection fills.
func listen(t *testing.T, n *lab.Node, at netip.AddrPort, backlog int) {
	t.Helper()
	within(t, n, func() error {
		fd, err := unix.Socket(socketFamily(at.Addr()), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		t.Cleanup(func() { unix.Close(fd) })
		return errors.Join(unix.Bind(fd, sockaddr(at)), unix.Listen(fd, backlog))
	})
}

// fill takes the one place of an accept queue.
func fill(t *testing.T, n *lab.Node, at netip.AddrPort) {
	t.Helper()
	listen(t, n, at, 0)
	if err := ended(t, begin(t, n, at)); err != nil {
		t.Fatal(err)
	}
}

// A way is how a target of one family is reached.
type way struct {
	vip, target netip.Addr
	mode        balancer.ClientIP
}

func ways(target *lab.Node) (out []way) {
	for _, mode := range modes {
		out = append(out, way{lab.VIP4, target.Addr4, mode}, way{lab.VIP6, target.Addr6, mode})
	}
	return out
}

func (w way) to(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(w.vip, listenerPort(w.mode, port))
}

func (w way) key(port uint16) balancer.TargetKey {
	return balancer.TargetKey{Group: poolName(w.mode, port), AddrPort: netip.AddrPortFrom(w.target, port)}
}

// How each flow began is counted once, whatever the mode and the family, and
// however often its client asks.
func TestOutcomes(t *testing.T) {
	const flows = 3
	o := newObserved(t)
	target, client := o.Targets[0], o.Clients[0]
	converge(t, o.plane, &balancer.Desired{Table: o.table(target)})
	for _, a := range []netip.Addr{target.Addr4, target.Addr6} {
		listen(t, target, netip.AddrPortFrom(a, takenPort), 64)
		listen(t, target, netip.AddrPortFrom(a, deafPort), 64)
		fill(t, target, netip.AddrPortFrom(a, fullPort))
	}
	if got := o.outcomes(t); len(got) > 0 {
		t.Errorf("before the first packet: %v", got)
	}

	failed, answered := balancer.Outcomes{Failed: flows}, balancer.Outcomes{Answered: flows}
	want := outcomes{}
	var quick, slow []int
	ends := map[int]error{}
	for _, w := range ways(target) {
		for range flows {
			for port, end := range map[uint16]error{
				takenPort: nil, closedPort: unix.ECONNREFUSED, noPortPort: unix.ECONNREFUSED, noHostPort: unix.EHOSTUNREACH,
			} {
				fd := begin(t, client, w.to(port))
				quick, ends[fd] = append(quick, fd), end
			}
			for _, port := range []uint16{silentPort, fullPort, deafPort} {
				slow = append(slow, begin(t, client, w.to(port)))
			}
		}
		want[w.key(takenPort)] = answered
		for _, port := range []uint16{closedPort, noPortPort, noHostPort, silentPort, fullPort} {
			want[w.key(port)] = failed
		}
	}
	for _, fd := range quick {
		// A host that is not there has several errnos, by the family.
		err := ended(t, fd)
		if err != ends[fd] && (err == nil || ends[fd] != unix.EHOSTUNREACH) {
			t.Errorf("a connection ended with %v, want %v", err, ends[fd])
		}
	}
	for _, fd := range slow {
		asked(t, fd)
	}
	got := o.outcomes(t)
	for _, w := range ways(target) {
		// The target repeats what nobody hears, as often as it likes.
		if deaf := got[w.key(deafPort)]; deaf.Failed != 0 || deaf.Answered < flows {
			t.Errorf("%v: %+v, want no failure", w, deaf)
		}
		delete(got, w.key(deafPort))
	}
	wantOutcomes(t, want, got)
}

// What belongs to flows that are established, or that conntrack picked up in
// their middle, or that are not TCP, is nobody's outcome; nor is it one if there
// is nothing.
func TestNoOutcomes(t *testing.T) {
	o := newObserved(t)
	target, client := o.Targets[0], o.Clients[0]
	converge(t, o.plane, &balancer.Desired{Table: o.table(target)})
	for _, w := range ways(target) {
		t.Run(fmt.Sprintf("%v/%v", w.vip, w.mode), func(t *testing.T) {
			before := o.outcomes(t)
			same := func(after string) {
				t.Helper()
				t.Log(after)
				wantOutcomes(t, before, o.outcomes(t))
			}
			near, far := o.connected(t, w)
			before[w.key(takenPort)] = balancer.Outcomes{Answered: before[w.key(takenPort)].Answered + 1}
			same("a handshake")
			for range 10 {
				wantAlive(t, near, far)
			}
			same("data")
			if err := far.(*net.TCPConn).SetLinger(0); err != nil {
				t.Fatal(err)
			}
			far.Close()
			if _, err := near.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("got %v", err)
			}
			same("a reset of the target")

			fd := o.resumed(t, client, w.to(closedPort))
			if _, err := unix.Read(fd, make([]byte, 1)); err != unix.ECONNRESET {
				t.Errorf("got %v", err)
			}
			same("a reset of a flow without a beginning")

			var udp net.Conn
			within(t, client, func() (err error) { udp, err = net.Dial("udp", w.to(closedPort).String()); return err })
			defer udp.Close()
			_ = udp.SetDeadline(time.Now().Add(patience))
			if _, err := udp.Write([]byte("hello")); err != nil {
				t.Fatal(err)
			}
			if _, err := udp.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("got %v", err)
			}
			same("a refused datagram")
		})
	}
}

// connected is both ends of a flow to the port that takes them.
func (o *observed) connected(t *testing.T, w way) (near, far net.Conn) {
	t.Helper()
	var l *net.TCPListener
	within(t, o.Targets[0], func() (err error) {
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(w.target, takenPort)))
		return err
	})
	defer l.Close()
	_ = l.SetDeadline(time.Now().Add(patience))
	within(t, o.Clients[0], func() (err error) {
		near, err = net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(w.to(takenPort)))
		return err
	})
	t.Cleanup(func() { near.Close() })
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() })
	for _, c := range []net.Conn{near, far} {
		_ = c.SetDeadline(time.Now().Add(patience))
	}
	wantAlive(t, near, far)
	return near, far
}

// resumed is one end of a connection that never began. It has sent a segment.
func (o *observed) resumed(t *testing.T, from *lab.Node, to netip.AddrPort) (fd int) {
	t.Helper()
	const on, off = 1, 0
	within(t, from, func() (err error) {
		fd, err = unix.Socket(socketFamily(to.Addr()), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		return errors.Join(
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(patience.Seconds())}),
			unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, on),
			unix.Connect(fd, sockaddr(to)),
			unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, off))
	})
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// Flows that begin or end on the balancer itself count like others, and those
// that do both count once.
func TestOutcomesOnThisHost(t *testing.T) {
	o := newObserved(t)
	for _, vip := range []netip.Addr{lab.VIP4, lab.VIP6} {
		if err := o.LB.Address("lo", netip.PrefixFrom(vip, vip.BitLen())); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name           string
		client, target *lab.Node
	}{
		{"client", o.LB, o.Targets[0]},
		{"target", o.Clients[0], o.LB},
		{"both", o.LB, o.LB},
	} {
		t.Run(tt.name, func(t *testing.T) {
			table := o.table(tt.target)
			converge(t, o.plane, &balancer.Desired{Table: table})
			for _, a := range []netip.Addr{tt.target.Addr4, tt.target.Addr6} {
				listen(t, tt.target, netip.AddrPortFrom(a, takenPort), 64)
				fill(t, tt.target, netip.AddrPortFrom(a, fullPort))
			}
			want := outcomes{}
			var asking []int
			for _, w := range ways(tt.target) {
				if tt.name == "both" && w.mode == balancer.Preserve {
					continue // a client on the target's own host is dropped
				}
				if err := ended(t, begin(t, tt.client, w.to(takenPort))); err != nil {
					t.Errorf("%v: %v", w, err)
				}
				if err := ended(t, begin(t, tt.client, w.to(closedPort))); err != unix.ECONNREFUSED {
					t.Errorf("%v: %v", w, err)
				}
				asking = append(asking, begin(t, tt.client, w.to(fullPort)))
				want[w.key(takenPort)] = balancer.Outcomes{Answered: 1}
				want[w.key(closedPort)] = balancer.Outcomes{Failed: 1}
				want[w.key(fullPort)] = balancer.Outcomes{Failed: 1}
			}
			for _, fd := range asking {
				asked(t, fd)
			}
			wantOutcomes(t, want, o.outcomes(t))
			converge(t, o.plane, nil)
		})
	}
}

// What rules count is no drift, is listed by nft, and goes with the last observed
// pool. Numbers of targets that are gone are left out.
func TestOutcomesLifecycle(t *testing.T) {
	d := newDataplane(t)
	outcomes := func() outcomes {
		got, err := d.Outcomes(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	if got := outcomes(); len(got) > 0 {
		t.Errorf("without a table: %v", got)
	}
	converge(t, d, &balancer.Desired{Table: everything()})
	if got := outcomes(); len(got) > 0 {
		t.Errorf("unobserved: %v", got)
	}
	want := &balancer.Desired{Table: observing()}
	if p := converge(t, d, want); p.Empty() {
		t.Error("to observe changes nothing")
	}
	// 9 is hairpin's [2001:db8:1::11]:8080, and nobody is 40000.
	nft(t, "add element inet nlb failed { 0x00024000 counter packets 3 bytes 180, 0x27100000 counter packets 1 bytes 60 }")
	nft(t, "add element inet nlb answered { 0x00024000 counter packets 5 bytes 300 }")
	if p := converge(t, d, want); !p.Empty() {
		t.Errorf("what was counted is taken for drift: %q", p.Lines())
	}
	if p := planAfresh(t, want); !p.Empty() {
		t.Errorf("a restart wants to change %q", p.Lines())
	}
	key := balancer.TargetKey{Group: "hairpin", AddrPort: netip.MustParseAddrPort("[2001:db8:1::11]:8080")}
	wantOutcomes(t, map[balancer.TargetKey]balancer.Outcomes{key: {Failed: 3, Answered: 5}}, outcomes())
	list := nftList(t, "inet nlb")
	for _, line := range []string{
		"set failed {", "set answered {", "flags dynamic", "chain outcomes {", "ct status assured accept", "add @judged { ct id }",
		"add @failed { ct mark & 0x3fffc000 counter }", "0x00024000 counter packets 3 bytes 180",
	} {
		if !strings.Contains(list, line) {
			t.Errorf("nft does not list %q:\n%s", line, list)
		}
	}
	converge(t, d, &balancer.Desired{Table: everything()})
	if p := planAfresh(t, &balancer.Desired{Table: everything()}); !p.Empty() {
		t.Errorf("something is left: %q", p.Lines())
	}
}

// Somebody else's hands are seen on what counts, too.
func TestDriftOfOutcomes(t *testing.T) {
	d := newDataplane(t)
	want := &balancer.Desired{Table: observing()}
	converge(t, d, want)
	const unused = "flush chain inet nlb outcomes\nflush chain inet nlb failure\ndelete set inet nlb failed\n"
	for _, script := range []string{
		"flush chain inet nlb outcomes",
		"flush chain inet nlb failure\nflush chain inet nlb outcomes\ndelete set inet nlb judged\nadd set inet nlb judged { type mark; flags dynamic, timeout; timeout 1s; }",
		unused,
		unused + "add set inet nlb failed { type mark; }",
		unused + "add set inet nlb failed { type mark; flags dynamic; size 1; }",
		unused + "add set inet nlb failed { type mark; flags dynamic, timeout; }",
		unused + "add set inet nlb failed { type mark; flags dynamic; size 65535; counter; }",
		unused + "add set inet nlb failed { type inet_service; flags dynamic; }",
	} {
		t.Run(script, func(t *testing.T) {
			nft(t, script)
			if p := converge(t, d, want); p.Empty() {
				t.Error("nothing was noticed")
			}
			if p := planAfresh(t, want); !p.Empty() {
				t.Errorf("not mended: %q", p.Lines())
			}
		})
	}
}

// observing is everything with two observed pools.
func observing() *balancer.Table {
	t := everything()
	for i := range t.Pools {
		t.Pools[i].Observed = t.Pools[i].Name == "preserve" || t.Pools[i].Name == "hairpin"
	}
	return t
}

// BenchmarkOutcomes reads the counts of a thousand targets.
func BenchmarkOutcomes(b *testing.B) {
	d, err := New(zap.NewNop(), "")
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	table := large(100)
	table.Pools[0].Observed = true
	apply := func(want *balancer.Desired) {
		p, err := d.Plan(b.Context(), want)
		if err == nil {
			err = d.Apply(b.Context(), p)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	apply(&balancer.Desired{Table: table})
	var elems []string
	for i := range 1000 {
		elems = append(elems, fmt.Sprintf("0x%08x counter packets 1 bytes 60", markOf(uint16(i+1), 0)))
	}
	for _, set := range []string{setFailed, setAnswered} {
		out, err := exec.Command("nft", "add element inet nlb "+set+" { "+strings.Join(elems, ", ")+" }").CombinedOutput()
		if err != nil {
			b.Fatalf("%v\n%s", err, out)
		}
	}
	for b.Loop() {
		got, err := d.Outcomes(b.Context())
		if err != nil || len(got) != 1000 {
			b.Fatalf("%d targets, %v", len(got), err)
		}
	}
	apply(nil)
}
