package prompt_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/balancer/nft"
	"nlb/balancer/prompt"
	"nlb/bench/lab"
)

func TestMain(m *testing.M) {
	lab.MaybeRunAgent()
	os.Exit(m.Run())
}

// patience bounds every wait for the kernel.
const patience = 10 * time.Second

const (
	endingPort = 80 // the listener whose target is being ended
	otherPort  = 81
	targetPort = 8080
)

// A network is a client, a balancer and two targets, each behind a listener.
type network struct {
	*lab.Topology
	plane    *nft.Dataplane
	prompter *prompt.Prompter
}

func newNetwork(t *testing.T) *network {
	t.Helper()
	top, err := lab.Routed(lab.Options{Targets: 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := top.Close(); err != nil {
			t.Error(err)
		}
	})
	n := &network{Topology: top}
	within(t, top.LB, func() (err error) { n.plane, err = nft.New(zaptest.NewLogger(t), ""); return err })
	t.Cleanup(func() { n.plane.Close() })
	within(t, top.LB, func() (err error) { n.prompter, err = prompt.New(); return err })
	t.Cleanup(func() {
		if err := n.prompter.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func within(t *testing.T, n *lab.Node, f func() error) {
	t.Helper()
	if err := n.Do(f); err != nil {
		t.Fatal(err)
	}
}

// A family is the addresses of one address family.
type family struct {
	name                        string
	client, vip, source, t1, t2 netip.Addr
}

func (n *network) families() []family {
	return []family{
		{"IPv4", n.Clients[0].Addr4, lab.VIP4, n.LB.Addr4, n.Targets[0].Addr4, n.Targets[1].Addr4},
		{"IPv6", n.Clients[0].Addr6, lab.VIP6, n.LB.Addr6, n.Targets[0].Addr6, n.Targets[1].Addr6},
	}
}

// install gives the balancer its table; terminate is for the first target.
func (n *network) install(t *testing.T, f family, mode balancer.ClientIP, terminate bool) {
	t.Helper()
	tcp := []uint8{balancer.ProtoTCP}
	table := &balancer.Table{VIPs: []netip.Addr{f.vip}, Sources: []netip.Addr{f.source}}
	add := func(name string, port uint16, target netip.Addr, terminate bool) {
		d := balancer.Destination{
			Address: target, Port: targetPort, Weight: 1,
			Domain: []netip.Prefix{netip.PrefixFrom(target, target.BitLen())},
		}
		if terminate {
			d.Weight, d.Terminate = 0, true
		}
		table.Pools = append(table.Pools, balancer.Pool{Name: name, Protocols: tcp, ClientIP: mode, Destinations: []balancer.Destination{d}})
		table.Services = append(table.Services, balancer.VirtualService{
			Name: name, Address: f.vip, Protocols: tcp, Port: port, IdleTimeout: time.Hour,
			Allow: []netip.Prefix{netip.PrefixFrom(f.vip, 0).Masked()}, Pools: []balancer.WeightedPool{{Pool: name, Weight: 1}},
		})
	}
	add("ending", endingPort, f.t1, terminate)
	add("other", otherPort, f.t2, false)
	p, err := n.plane.Plan(t.Context(), &balancer.Desired{Table: table})
	if err == nil {
		err = n.plane.Apply(t.Context(), p)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A flow is both ends of a connection.
type flow struct{ client, target *net.TCPConn }

func (n *network) connect(t *testing.T, vip netip.AddrPort, target *lab.Node, at netip.Addr) flow {
	t.Helper()
	var l *net.TCPListener
	within(t, target, func() (err error) {
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(at, targetPort)))
		return err
	})
	defer l.Close()
	var f flow
	within(t, n.Clients[0], func() (err error) {
		f.client, err = net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(vip))
		return err
	})
	t.Cleanup(func() { f.client.Close() })
	err := l.SetDeadline(time.Now().Add(patience))
	if err == nil {
		f.target, err = l.AcceptTCP()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.target.Close() })
	f.wantAlive(t)
	return f
}

func (f flow) wantAlive(t *testing.T) {
	t.Helper()
	for _, way := range [][2]*net.TCPConn{{f.client, f.target}, {f.target, f.client}} {
		if _, err := way[0].Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
		_ = way[1].SetReadDeadline(time.Now().Add(patience))
		if _, err := way[1].Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	f.settle(t)
}

// settle waits until the last acknowledgement is there.
func (f flow) settle(t *testing.T) {
	t.Helper()
	deadline := time.After(patience)
	for tick := time.Tick(5 * time.Millisecond); ; {
		if info(t, f.client).Unacked == 0 && info(t, f.target).Unacked == 0 {
			return
		}
		select {
		case <-tick:
		case <-deadline:
			t.Fatal("something stays unacknowledged")
		}
	}
}

func info(t *testing.T, c *net.TCPConn) (info *unix.TCPInfo) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err2 := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	return info
}

// segments is how many segments each end has got.
func (f flow) segments(t *testing.T) [2]uint32 {
	return [2]uint32{info(t, f.client).Segs_in, info(t, f.target).Segs_in}
}

// prompted is the flow as the balancer knows it.
func (f flow) prompted() prompt.Flow {
	addr := func(a net.Addr) netip.AddrPort { return a.(*net.TCPAddr).AddrPort() }
	return prompt.Flow{
		Client: addr(f.client.LocalAddr()), VIP: addr(f.client.RemoteAddr()),
		Source: addr(f.target.RemoteAddr()), Target: addr(f.target.LocalAddr()),
	}
}

func (f flow) wantReset(t *testing.T) {
	t.Helper()
	for who, c := range map[string]*net.TCPConn{"client": f.client, "target": f.target} {
		_ = c.SetReadDeadline(time.Now().Add(patience))
		if n, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("the %s read %d bytes, %v: want a reset", who, n, err)
		}
	}
}

// An idle flow of a target that is being ended is reset at both ends after one
// prompt. A flow of another target goes on, and gets no segment.
func TestPromptEndsIdleFlows(t *testing.T) {
	n := newNetwork(t)
	for _, f := range n.families() {
		for _, mode := range []balancer.ClientIP{balancer.Preserve, balancer.SNAT} {
			for _, timestamps := range []string{"1", "0"} {
				t.Run(fmt.Sprintf("%s/%v/timestamps=%s", f.name, mode, timestamps), func(t *testing.T) {
					for _, node := range []*lab.Node{n.Clients[0], n.Targets[0], n.Targets[1]} {
						if err := node.Sysctl("net.ipv4.tcp_timestamps", timestamps); err != nil {
							t.Fatal(err)
						}
					}
					n.install(t, f, mode, false)
					ending := n.connect(t, netip.AddrPortFrom(f.vip, endingPort), n.Targets[0], f.t1)
					other := n.connect(t, netip.AddrPortFrom(f.vip, otherPort), n.Targets[1], f.t2)
					before := other.segments(t)
					if preserved := ending.prompted().Source == ending.prompted().Client; preserved != (mode == balancer.Preserve) {
						t.Fatalf("the flow is %+v", ending.prompted())
					}

					n.install(t, f, mode, true)
					if err := n.prompter.Prompt([]prompt.Flow{ending.prompted()}); err != nil {
						t.Fatal(err)
					}
					start := time.Now()
					ending.wantReset(t)
					t.Logf("both ends reset after %v", time.Since(start))
					if diff := cmp.Diff(before, other.segments(t)); diff != "" {
						t.Errorf("the other flow got segments:\n%s", diff)
					}
					other.wantAlive(t)
				})
			}
		}
	}
}

// firewall lets a node's own connections and those to the target's port pass, and
// nothing that connection tracking takes for invalid.
const firewall = `table inet firewall {
	chain input {
		type filter hook input priority 0; policy drop
		ct state invalid counter drop
		ct state established,related accept
		meta l4proto ipv6-icmp accept
		tcp dport 8080 tcp flags & (syn | ack) == syn ct state new accept
	}
}`

// Segments reach the ends through firewalls and NAT on their way that drop what
// does not fit the state of the flow.
func TestPromptPassesStatefulFirewalls(t *testing.T) {
	n := newNetwork(t)
	for _, node := range []*lab.Node{n.Clients[0], n.Targets[0]} {
		cmd := node.Command(t.Context(), "nft", firewall)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("nft: %v\n%s", err, out)
		}
	}
	for _, f := range n.families() {
		for _, mode := range []balancer.ClientIP{balancer.Preserve, balancer.SNAT} {
			t.Run(fmt.Sprintf("%s/%v", f.name, mode), func(t *testing.T) {
				n.install(t, f, mode, false)
				flow := n.connect(t, netip.AddrPortFrom(f.vip, endingPort), n.Targets[0], f.t1)
				n.install(t, f, mode, true)
				if err := n.prompter.Prompt([]prompt.Flow{flow.prompted()}); err != nil {
					t.Fatal(err)
				}
				flow.wantReset(t)
			})
		}
	}
}

// Flows that begin or end on the balancer itself are ended like others.
func TestPromptEndsLocalFlows(t *testing.T) {
	n := newNetwork(t)
	here := *n.Topology
	here.Clients = []*lab.Node{n.LB}
	for _, f := range n.families() {
		if err := n.LB.Address("lo", netip.PrefixFrom(f.vip, f.vip.BitLen())); err != nil {
			t.Fatal(err)
		}
		local := f
		local.t1 = f.source
		for _, tt := range []struct {
			name   string
			n      *network
			f      family
			target *lab.Node
		}{
			{"client", &network{&here, n.plane, n.prompter}, f, n.Targets[0]},
			{"target", n, local, n.LB},
		} {
			t.Run(f.name+"/"+tt.name, func(t *testing.T) {
				tt.n.install(t, tt.f, balancer.Preserve, false)
				flow := tt.n.connect(t, netip.AddrPortFrom(f.vip, endingPort), tt.target, tt.f.t1)
				tt.n.install(t, tt.f, balancer.Preserve, true)
				if err := n.prompter.Prompt([]prompt.Flow{flow.prompted()}); err != nil {
					t.Fatal(err)
				}
				flow.wantReset(t)
			})
		}
	}
}

// Without a rule to meet, a prompt does a flow no harm.
func TestPromptAloneIsHarmless(t *testing.T) {
	n := newNetwork(t)
	for _, f := range n.families() {
		t.Run(f.name, func(t *testing.T) {
			n.install(t, f, balancer.SNAT, false)
			flow := n.connect(t, netip.AddrPortFrom(f.vip, endingPort), n.Targets[0], f.t1)
			for range 10 {
				if err := n.prompter.Prompt([]prompt.Flow{flow.prompted()}); err != nil {
					t.Fatal(err)
				}
				flow.wantAlive(t)
			}
		})
	}
}

// What cannot be sent is reported, and the rest is sent.
func TestPromptGoesOnAfterErrors(t *testing.T) {
	n := newNetwork(t)
	for _, f := range n.families() {
		t.Run(f.name, func(t *testing.T) {
			n.install(t, f, balancer.Preserve, false)
			flow := n.connect(t, netip.AddrPortFrom(f.vip, endingPort), n.Targets[0], f.t1)
			n.install(t, f, balancer.Preserve, true)
			nowhere := flow.prompted()
			nowhere.Target = netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), 1)
			if f.t1.Is6() {
				nowhere.Target = netip.AddrPortFrom(netip.MustParseAddr("2001:db8:dead::1"), 1)
			}
			err := n.prompter.Prompt([]prompt.Flow{{}, nowhere, flow.prompted()})
			if !errors.Is(err, unix.ENETUNREACH) || !strings.Contains(err.Error(), nowhere.Target.String()) ||
				!strings.Contains(err.Error(), "one address family") {
				t.Errorf("got %v", err)
			}
			flow.wantReset(t)
		})
	}
}
