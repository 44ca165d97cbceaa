package nft

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap/zaptest"

	"nlb/balancer"
	"nlb/bench/lab"
)

// A directed site has a balancer where IPVS chooses: clients beyond a router, two
// targets, and a program on the balancer itself that answers on the same ports as
// they do, which nobody may ever hear unless it is meant.
type directed struct {
	*lab.Topology
	t     *testing.T
	plane *Dataplane
}

const (
	directedPort = 80   // of each service
	answering    = 8080 // of each target
)

func newDirected(t *testing.T) *directed {
	t.Helper()
	if _, err := os.Stat("/proc/net/ip_vs"); errors.Is(err, fs.ErrNotExist) {
		t.Skip("this kernel has no IPVS (module ip_vs)")
	}
	top, err := lab.Routed(lab.Options{Clients: 2, Targets: 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := top.Close(); err != nil {
			t.Error(err)
		}
	})
	s := &directed{Topology: top, t: t}
	within(t, top.LB, func() (err error) { s.plane, err = New(zaptest.NewLogger(t), ""); return err })
	t.Cleanup(func() { s.plane.Close() })
	for _, vip := range []netip.Addr{lab.VIP4, lab.VIP6} {
		if err := top.LB.Address("lo", netip.PrefixFrom(vip, vip.BitLen())); err != nil {
			t.Fatal(err)
		}
	}
	for _, key := range []string{"conntrack", "expire_nodest_conn", "conn_reuse_mode"} {
		if err := top.LB.Sysctl("net.ipv4.vs."+key, "1"); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range append([]*lab.Node{top.LB}, top.Targets...) {
		if _, err := n.Agent().Serve(t.Context(), lab.Serve{Ports: []uint16{directedPort, answering, 22}}); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func (s *directed) lb(name string, args ...string) string {
	s.t.Helper()
	var said strings.Builder
	cmd := s.LB.Command(s.t.Context(), name, args...)
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		s.t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, &said)
	}
	return string(out)
}

// table has a service in each family, of both protocols, with one pool of the
// destinations, by the nodes' names.
func (s *directed) table(mode balancer.ClientIP, nodes ...*lab.Node) *balancer.Table {
	protocols := []uint8{balancer.ProtoTCP, balancer.ProtoUDP}
	p := balancer.Pool{Name: "web", Protocols: protocols, ClientIP: mode}
	for _, n := range nodes {
		p.Destinations = append(p.Destinations, dest(n.Addr4.String(), answering, 1), dest(n.Addr6.String(), answering, 1))
	}
	t := &balancer.Table{
		Dataplane: balancer.IPVS, Key: balancer.HashKey{1}, VIPs: []netip.Addr{lab.VIP4, lab.VIP6},
		Sources: []netip.Addr{s.LB.Addr4, s.LB.Addr6}, Pools: []balancer.Pool{p},
	}
	for _, vip := range t.VIPs {
		t.Services = append(t.Services, balancer.VirtualService{
			Name: "web" + familyOf(vip).name, Address: vip, Port: directedPort, Protocols: protocols, IdleTimeout: time.Hour,
			Allow: []netip.Prefix{netip.PrefixFrom(vip, 0).Masked()}, Pools: []balancer.WeightedPool{{Pool: "web", Weight: 1}},
		})
	}
	return t
}

// direct gives IPVS the table's services anew, and to each of them the further
// destinations, and then nftables the table.
func (s *directed) direct(t *balancer.Table, further ...netip.AddrPort) {
	s.t.Helper()
	s.lb("ipvsadm", "-C")
	for _, svc := range t.Services {
		for _, proto := range svc.Protocols {
			service := []string{map[uint8]string{balancer.ProtoTCP: "-t", balancer.ProtoUDP: "-u"}[proto], netip.AddrPortFrom(svc.Address, svc.Port).String()}
			s.lb("ipvsadm", append(append([]string{"-A"}, service...), "-s", "mh", "-b", "mh-fallback,mh-port")...)
			add := func(to netip.AddrPort, weight int) {
				if to.Addr().BitLen() == svc.Address.BitLen() {
					s.lb("ipvsadm", append(append([]string{"-a"}, service...), "-r", to.String(), "-m", "-w", strconv.Itoa(weight))...)
				}
			}
			for i := range t.Pools {
				for _, d := range t.Pools[i].Destinations {
					if t.Pools[i].ClientIPOf(&d) != balancer.ProxyProtocolV2 {
						add(d.AddrPort(), d.Weight)
					}
				}
			}
			for _, to := range further {
				add(to, 1)
			}
		}
	}
	s.apply(t)
}

func (s *directed) apply(t *balancer.Table) {
	s.t.Helper()
	converge(s.t, s.plane, &balancer.Desired{Table: t})
}

// call makes calls from a node to the services, one lane at a time.
func (s *directed) call(from *lab.Node, l lane, n int) []lab.Reply {
	s.t.Helper()
	c := l.once()
	c.N, c.Parallel, c.Timeout = n, n, patience
	return s.calls(from, c)
}

func (s *directed) calls(from *lab.Node, c lab.Call) []lab.Reply {
	s.t.Helper()
	replies, err := from.Agent().Call(s.t.Context(), c)
	if err != nil {
		s.t.Fatal(err)
	}
	return replies
}

// A lane is one of the four ways to call: by family and protocol.
type lane struct {
	network string
	vip     netip.Addr
}

var lanes = []lane{{"tcp", lab.VIP4}, {"udp", lab.VIP4}, {"tcp", lab.VIP6}, {"udp", lab.VIP6}}

func (l lane) String() string { return l.network + familyOf(l.vip).name }

func (l lane) service() netip.AddrPort { return netip.AddrPortFrom(l.vip, directedPort) }

func (l lane) target(n *lab.Node) netip.AddrPort { return netip.AddrPortFrom(l.of(n), answering) }

func (l lane) once() lab.Call { return lab.Call{Network: l.network, Dst: l.service()} }

// quiesce takes a node's weight in the service.
func (s *directed) quiesce(l lane, n *lab.Node) {
	s.t.Helper()
	service := map[string]string{"tcp": "-t", "udp": "-u"}[l.network]
	s.lb("ipvsadm", "-e", service, l.service().String(), "-r", l.target(n).String(), "-m", "-w", "0")
}

func (l lane) of(n *lab.Node) netip.Addr {
	if l.vip.Is4() {
		return n.Addr4
	}
	return n.Addr6
}

// want wants all replies to be from one of the nodes, and the caller to be seen as
// peer.
func (s *directed) want(what string, replies []lab.Reply, peer netip.Addr, nodes ...*lab.Node) {
	s.t.Helper()
	tally := lab.Count(replies)
	ok := tally.Failed == 0 && tally.ByPeer[peer.String()] == len(replies) && len(tally.ByWho) == len(nodes)
	for _, n := range nodes {
		ok = ok && tally.ByWho[n.Name] > 0
	}
	if !ok {
		s.t.Errorf("%s: %v, want all %d of %v to see %v\n%s", what, tally, len(replies), names(nodes), peer, s.state())
	}
}

func names(nodes []*lab.Node) (out []string) {
	for _, n := range nodes {
		out = append(out, n.Name)
	}
	return out
}

// refused wants nobody to answer, not even by an error, and the counter to say why.
func (s *directed) refused(what, counter string, from *lab.Node, c lab.Call) {
	s.t.Helper()
	before := s.events().Totals[counter]
	if tally := lab.Count(s.calls(from, c)); tally.ByErr[lab.Timeout] != max(c.N, 1) {
		s.t.Errorf("%s: %v, want silence\n%s", what, tally, s.state())
	}
	if after := s.events().Totals[counter]; after < before+uint64(max(c.N, 1)) {
		s.t.Errorf("%s: %s went from %d to %d\n%s", what, counter, before, after, s.state())
	}
}

func (s *directed) events() Events {
	s.t.Helper()
	e, err := s.plane.Events(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	return e
}

// state is what one wants to see when a test fails.
func (s *directed) state() string {
	return s.lb("ipvsadm", "-Lnc") + s.flows("ipv4") + s.flows("ipv6") + fmt.Sprint(s.events())
}

func (s *directed) flows(family string) string {
	return s.lb("conntrack", "-L", "-f", family)
}

var markText = regexp.MustCompile(`mark=(\d+)`)

// marks counts the flows to the services by their target, those of nobody under
// the number itself.
func (s *directed) marks(l lane) map[string]int {
	s.t.Helper()
	out := map[string]int{}
	for line := range strings.Lines(s.flows(map[bool]string{true: "ipv4", false: "ipv6"}[l.vip.Is4()])) {
		match := markText.FindStringSubmatch(line)
		if match == nil || !strings.HasPrefix(line, l.network) || !strings.Contains(line, fmt.Sprintf("dst=%s sport", l.vip)) {
			continue
		}
		v, err := strconv.ParseUint(match[1], 10, 32)
		if err != nil {
			s.t.Fatal(err)
		}
		name := fmt.Sprint(Mark(v).Target())
		if key, ok := s.plane.TargetOf(Mark(v)); ok {
			name = key.AddrPort.String()
		}
		out[name]++
	}
	return out
}

// Flows go to all targets, which see who calls or the balancer, and their entries
// name the target that they went to.
func TestCompanionModes(t *testing.T) {
	s := newDirected(t)
	for _, mode := range []balancer.ClientIP{balancer.Preserve, balancer.HairpinSNAT, balancer.SNAT} {
		s.lb("conntrack", "-F")
		s.direct(s.table(mode, s.Targets...))
		before := s.events()
		for _, l := range lanes {
			const n = 24
			what := fmt.Sprintf("%v %v", mode, l)
			replies := s.call(s.Clients[0], l, n)
			peer := l.of(s.Clients[0])
			if mode == balancer.SNAT {
				peer = l.of(s.LB)
			}
			s.want(what, replies, peer, s.Targets...)
			want := map[string]int{}
			for who, n := range lab.Count(replies).ByWho {
				want[l.target(s.node(who)).String()] = n
			}
			if diff := cmp.Diff(want, s.marks(l)); diff != "" {
				t.Errorf("%s: targets in the marks:\n%s", what, diff)
			}
			after := s.events()
			for _, target := range s.Targets {
				key := balancer.TargetKey{Group: "web", AddrPort: l.target(target)}
				got := after.NewFlows[key] - before.NewFlows[key]
				if got != uint64(want[key.AddrPort.String()]) {
					t.Errorf("%s: %v has %d new flows, want %d", what, key, got, want[key.AddrPort.String()])
				}
			}
			before = after
		}
	}
}

func (s *directed) node(name string) *lab.Node {
	for _, n := range s.Nodes() {
		if n.Name == name {
			return n
		}
	}
	s.t.Fatalf("no node %q", name)
	return nil
}

// A client that is its own target is sourced from here, or counted and dropped.
func TestCompanionHairpins(t *testing.T) {
	s := newDirected(t)
	self := s.Targets[0]
	for _, l := range lanes {
		s.direct(s.table(balancer.HairpinSNAT, self))
		before := s.events().Totals[counterHairpinned]
		s.want(fmt.Sprintf("hairpin_snat %v", l), s.call(self, l, 3), l.of(s.LB), self)
		if n := s.events().Totals[counterHairpinned] - before; n != 3 {
			t.Errorf("%v: %d hairpins, want 3", l, n)
		}
		s.want(fmt.Sprintf("no hairpin %v", l), s.call(s.Targets[1], l, 3), l.of(s.Targets[1]), self)
		avoid := s.table(balancer.Preserve, self)
		avoid.Pools[0].AvoidSelf = true
		s.direct(avoid)
		s.want(fmt.Sprintf("avoid_self %v", l), s.call(self, l, 3), l.of(s.LB), self)
		s.direct(s.table(balancer.Preserve, self))
		s.refused(fmt.Sprintf("preserve %v", l), counterHairpin, self, l.once())
	}
}

// A client on the balancer would be seen under the VIP.
func TestCompanionLocalClient(t *testing.T) {
	s := newDirected(t)
	s.direct(s.table(balancer.Preserve, s.Targets[0]))
	for _, l := range lanes {
		s.want(l.String(), s.call(s.LB, l, 3), l.of(s.LB), s.Targets[0])
		if diff := cmp.Diff(map[string]int{l.target(s.Targets[0]).String(): 3}, s.marks(l)); diff != "" {
			t.Errorf("%v: targets in the marks:\n%s", l, diff)
		}
	}
}

// A VIP shows nothing of the host, and only services to those who are allowed,
// whatever IPVS has.
func TestCompanionGuards(t *testing.T) {
	s := newDirected(t)
	table := s.table(balancer.Preserve, s.Targets[0])
	for i := range table.Services {
		a := lane{vip: table.Services[i].Address}.of(s.Clients[0])
		table.Services[i].Allow = []netip.Prefix{netip.PrefixFrom(a, a.BitLen())}
	}
	s.direct(table)
	for _, l := range lanes {
		service := l.once()
		s.refused(fmt.Sprintf("not allowed %v", l), counterNotAllowed, s.Clients[1], service)
		s.refused(fmt.Sprintf("no listener %v", l), counterUnwanted, s.Clients[0],
			lab.Call{Network: l.network, Dst: netip.AddrPortFrom(l.vip, 22)})
		s.want(fmt.Sprintf("allowed %v", l), s.call(s.Clients[0], l, 2), l.of(s.Clients[0]), s.Targets[0])
	}
	// Somebody has removed what IPVS had. The host listens on the port itself.
	s.lb("ipvsadm", "-C")
	for _, l := range lanes {
		s.refused(fmt.Sprintf("no service %v", l), counterNoTarget, s.Clients[0],
			l.once())
	}
	// The same with a flow that there is already.
	s.lb("conntrack", "-F")
	s.direct(table)
	held := s.hold(s.Clients[0], lanes...)
	s.lb("ipvsadm", "-C")
	s.broken("without a service", held, lab.Timeout)
}

// Where nobody can take a flow, IPVS is not asked, which would answer.
func TestCompanionNoTarget(t *testing.T) {
	s := newDirected(t)
	table := s.table(balancer.Preserve, s.Targets[0])
	for i := range table.Pools[0].Destinations {
		table.Pools[0].Destinations[i].Weight = 0
	}
	s.direct(table)
	for _, l := range lanes {
		s.refused(l.String(), counterNoTarget, s.Clients[0], l.once())
	}
}

// What somebody else adds to a service of ours gets no flow.
func TestCompanionUnknownDestination(t *testing.T) {
	s := newDirected(t)
	for _, stranger := range []*lab.Node{s.Targets[1], s.LB} {
		table := s.table(balancer.Preserve, s.Targets[0])
		s.direct(table, netip.AddrPortFrom(stranger.Addr4, answering), netip.AddrPortFrom(stranger.Addr6, answering))
		for _, l := range lanes {
			s.quiesce(l, s.Targets[0])
			s.refused(stranger.Name+" "+l.String(), counterNoTarget, s.Clients[0], l.once())
		}
	}
}

// A destination on the balancer itself is a target like others.
func TestCompanionLocalDestination(t *testing.T) {
	s := newDirected(t)
	s.direct(s.table(balancer.Preserve, s.LB))
	for _, l := range lanes {
		for _, from := range []*lab.Node{s.Clients[0], s.Targets[0]} {
			s.lb("conntrack", "-F")
			before := s.events()
			s.want(from.Name+" "+l.String(), s.call(from, l, 3), l.of(from), s.LB)
			key := balancer.TargetKey{Group: "web", AddrPort: l.target(s.LB)}
			if diff := cmp.Diff(map[string]int{key.AddrPort.String(): 3}, s.marks(l)); diff != "" {
				t.Errorf("%v: targets in the marks:\n%s", l, diff)
			}
			if n := s.events().NewFlows[key] - before.NewFlows[key]; n != 3 {
				t.Errorf("%v: %d new flows", l, n)
			}
		}
	}
}

// relaying adds a relayed target, which stands for the program on the balancer.
func (s *directed) relaying(t *balancer.Table) *balancer.Table {
	d4, d6 := dest(s.Targets[1].Addr4.String(), 9090, 1), dest(s.Targets[1].Addr6.String(), 9090, 1)
	t.Pools = append(t.Pools, balancer.Pool{Name: "relayed", Protocols: []uint8{balancer.ProtoTCP},
		ClientIP: balancer.ProxyProtocolV2, Destinations: []balancer.Destination{d4, d6}})
	for i := range t.Services {
		t.Services[i].Protocols = []uint8{balancer.ProtoTCP}
		t.Services[i].Pools = []balancer.WeightedPool{{Pool: "relayed", Weight: 1}, {Pool: "web", Weight: 1}}
	}
	return t
}

// A service's own address, as a destination, is the relay, if the service relays.
// Else it is nobody.
func TestCompanionRelays(t *testing.T) {
	s := newDirected(t)
	relay := []netip.AddrPort{netip.AddrPortFrom(lab.VIP4, directedPort), netip.AddrPortFrom(lab.VIP6, directedPort)}
	s.direct(s.relaying(s.table(balancer.SNAT, s.Targets[0])), relay...)
	for _, l := range []lane{lanes[0], lanes[2]} {
		const n = 24
		replies := s.call(s.Clients[0], l, n)
		tally := lab.Count(replies)
		if tally.OK != n || tally.ByWho[s.LB.Name] == 0 || tally.ByWho[s.Targets[0].Name] == 0 {
			t.Errorf("%v: %v\n%s", l, tally, s.state())
		}
		want := map[string]int{fmt.Sprint(relayed): tally.ByWho[s.LB.Name], l.target(s.Targets[0]).String(): tally.ByWho[s.Targets[0].Name]}
		if diff := cmp.Diff(want, s.marks(l)); diff != "" {
			t.Errorf("%v: targets in the marks:\n%s", l, diff)
		}
	}
	s.direct(s.table(balancer.SNAT), relay...)
	for _, l := range lanes {
		s.refused(l.String(), counterNoTarget, s.Clients[0], l.once())
	}
	s.lb("ipvsadm", "-C")
	only := s.relaying(s.table(balancer.SNAT, s.Targets[0]))
	for i := range only.Services {
		only.Services[i].Pools = only.Services[i].Pools[:1]
	}
	s.apply(only)
	for _, l := range []lane{lanes[0], lanes[2]} {
		s.want("without IPVS "+l.String(), s.call(s.Clients[0], l, 3), l.of(s.Clients[0]), s.LB)
	}
}

// hold opens flows, some in each lane.
func (s *directed) hold(from *lab.Node, lanes ...lane) (all []*lab.Flows) {
	s.t.Helper()
	for _, l := range lanes {
		c := l.once()
		c.N, c.Parallel, c.Timeout = 4, 4, patience/2
		f, err := from.Agent().Hold(s.t.Context(), c)
		if err != nil {
			s.t.Fatal(err)
		}
		if tally := lab.Count(f.Opened); tally.Failed > 0 {
			s.t.Fatalf("%v: %v\n%s", l, tally, s.state())
		}
		all = append(all, f)
	}
	return all
}

func (s *directed) check(f *lab.Flows) []lab.Flow {
	s.t.Helper()
	flows, err := f.Check(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	return flows
}

// alive wants the flows to go on where they are.
func (s *directed) alive(what string, held []*lab.Flows) {
	s.t.Helper()
	for _, h := range held {
		for _, f := range s.check(h) {
			if f.Broken() || f.Moved() {
				s.t.Errorf("%s: %v to %s is now %q at %q\n%s", what, f.First.From, f.First.Who, f.Now.Err, f.Now.Who, s.state())
			}
		}
	}
}

// broken wants the flows to fail in one way.
func (s *directed) broken(what string, held []*lab.Flows, err string) {
	s.t.Helper()
	for _, h := range held {
		for _, f := range s.check(h) {
			if f.Now.Err != err {
				s.t.Errorf("%s: %v to %s is now %q at %q, want %q\n%s", what, f.First.From, f.First.Who, f.Now.Err, f.Now.Who, err, s.state())
			}
		}
	}
}

// The flows of a target that is cut off end for both; the others go on.
func TestCompanionTerminates(t *testing.T) {
	s := newDirected(t)
	tcp := []lane{lanes[0], lanes[2]}
	for _, mode := range []balancer.ClientIP{balancer.Preserve, balancer.SNAT} {
		table := s.table(mode, s.Targets...)
		s.direct(table)
		held := s.hold(s.Clients[0], tcp...)
		captures := map[*lab.Node]*lab.Capture{}
		for _, n := range s.Targets {
			c, err := n.Agent().Capture(t.Context(), "eth0")
			if err != nil {
				t.Fatal(err)
			}
			captures[n] = c
		}
		ended := s.Targets[0]
		for i := range table.Pools[0].Destinations {
			d := &table.Pools[0].Destinations[i]
			if d.Address == ended.Addr4 || d.Address == ended.Addr6 {
				d.Weight, d.Terminate = 0, true
			}
		}
		s.apply(table)
		var cut int
		for _, h := range held {
			for _, f := range s.check(h) {
				switch {
				case f.First.Who != ended.Name && (f.Broken() || f.Moved()):
					t.Errorf("%v: a flow of %s is now %q\n%s", mode, f.First.Who, f.Now.Err, s.state())
				case f.First.Who == ended.Name && f.Now.Err != lab.Reset:
					t.Errorf("%v: a flow of %s is now %q, want %q\n%s", mode, f.First.Who, f.Now.Err, lab.Reset, s.state())
				case f.First.Who == ended.Name:
					cut++
				}
			}
		}
		if cut == 0 {
			t.Fatalf("%v: no flow was %s's", mode, ended.Name)
		}
		for n, c := range captures {
			seen, err := c.Packets(t.Context(), func(p lab.Packet) bool { return p.Flags&lab.RST != 0 })
			if err != nil || n != ended && len(seen) > 0 {
				t.Errorf("%v: %s saw %v, %v", mode, n.Name, seen, err)
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		}
		for _, h := range held {
			if err := h.Close(); err != nil {
				t.Error(err)
			}
		}
		s.lb("conntrack", "-F")
	}
}

// Who chooses changes under the flows of both, which stay where they are; new ones
// are the other's. UDP flows of IPVS end, and begin anew when they are forgotten.
func TestCompanionTakesOverFlows(t *testing.T) {
	s := newDirected(t)
	for _, mode := range []balancer.ClientIP{balancer.Preserve, balancer.SNAT} {
		with, without := s.table(mode, s.Targets...), s.table(mode, s.Targets...)
		without.Dataplane = balancer.NFTables
		s.lb("ipvsadm", "-C")
		s.apply(without)
		rules := s.hold(s.Clients[0], lanes...)
		s.direct(with)
		s.alive(fmt.Sprintf("%v: of nftables under IPVS", mode), rules)
		served := s.hold(s.Clients[1], lanes...)
		s.alive(fmt.Sprintf("%v: of IPVS", mode), served)
		// IPVS lingers, without weight.
		for _, l := range lanes {
			for _, n := range s.Targets {
				s.quiesce(l, n)
			}
		}
		s.apply(without)
		s.alive(fmt.Sprintf("%v: of nftables under nftables", mode), rules)
		s.alive(fmt.Sprintf("%v: of IPVS under nftables", mode), []*lab.Flows{served[0], served[2]})
		udp := []*lab.Flows{served[1], served[3]}
		s.broken(fmt.Sprintf("%v: of IPVS under nftables", mode), udp, lab.Timeout)
		s.lb("conntrack", "-D", "-p", "udp")
		s.broken(fmt.Sprintf("%v: forgotten under nftables", mode), udp, "")
		for _, l := range lanes {
			if tally := lab.Count(s.call(s.Clients[0], l, 8)); tally.Failed > 0 {
				t.Errorf("%v %v: %v\n%s", mode, l, tally, s.state())
			}
		}
		for _, h := range append(rules, served...) {
			if err := h.Close(); err != nil {
				t.Error(err)
			}
		}
		s.lb("conntrack", "-F")
	}
}

// Connections of the relay stay with it when IPVS gets their service: it schedules
// nothing but what begins (sloppy_tcp=0).
func TestCompanionLeavesRelayedFlows(t *testing.T) {
	s := newDirected(t)
	only := s.relaying(s.table(balancer.SNAT, s.Targets[0]))
	for i := range only.Services {
		only.Services[i].Pools = only.Services[i].Pools[:1]
	}
	s.apply(only)
	held := s.hold(s.Clients[0], lanes[0], lanes[2])
	s.direct(s.relaying(s.table(balancer.SNAT, s.Targets[0])), netip.AddrPortFrom(lab.VIP4, directedPort), netip.AddrPortFrom(lab.VIP6, directedPort))
	s.alive("IPVS came", held)
}

// Flows that conntrack has forgotten go on, and are known again.
func TestCompanionForgottenFlows(t *testing.T) {
	s := newDirected(t)
	for _, mode := range []balancer.ClientIP{balancer.Preserve, balancer.SNAT} {
		s.direct(s.table(mode, s.Targets...))
		held := s.hold(s.Clients[0], lanes...)
		var before []map[string]int
		for _, l := range lanes {
			before = append(before, s.marks(l))
		}
		s.lb("conntrack", "-F")
		s.alive(fmt.Sprintf("%v: forgotten", mode), held)
		for i, l := range lanes {
			if diff := cmp.Diff(before[i], s.marks(l)); diff != "" {
				t.Errorf("%v %v: targets in the marks:\n%s", mode, l, diff)
			}
		}
		for _, h := range held {
			if err := h.Close(); err != nil {
				t.Error(err)
			}
		}
		s.lb("conntrack", "-F")
	}
}

// How flows begin is counted once, though their packets pass two filters of ours.
func TestCompanionOutcomes(t *testing.T) {
	s := newDirected(t)
	if out, err := s.Targets[1].Command(t.Context(), "nft", `table inet firewall {
		chain input {
			type filter hook input priority 0
			ip protocol tcp reject with tcp reset
			meta l4proto tcp drop
		}
	}`).CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
	table := s.table(balancer.Preserve, s.Targets...)
	table.Pools[0].Observed = true
	s.direct(table)
	for l, why := range map[lane]string{lanes[0]: lab.Refused, lanes[2]: lab.Timeout} {
		before := s.outcomes()
		c := l.once()
		c.N, c.Parallel, c.Timeout = 12, 12, 2500*time.Millisecond // a SYN is repeated after 1 s
		tally := lab.Count(s.calls(s.Clients[0], c))
		if tally.OK == 0 || tally.ByErr[why] == 0 || tally.OK+tally.ByErr[why] != c.N {
			t.Errorf("%v: %v, want some %q\n%s", l, tally, why, s.state())
		}
		after := s.outcomes()
		for i, want := range []balancer.Outcomes{{Answered: uint64(tally.OK)}, {Failed: uint64(tally.ByErr[why])}} {
			key := balancer.TargetKey{Group: "web", AddrPort: l.target(s.Targets[i])}
			got := balancer.Outcomes{Failed: after[key].Failed - before[key].Failed, Answered: after[key].Answered - before[key].Answered}
			if got != want {
				t.Errorf("%v: %v has %+v, want %+v", l, key, got, want)
			}
		}
	}
}

func (s *directed) outcomes() map[balancer.TargetKey]balancer.Outcomes {
	s.t.Helper()
	out, err := s.plane.Outcomes(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}
