package nft

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

// TestCompanion shows with packets what the rules do beside IPVS, all on one site:
// to build one takes an emulated machine longer than most of what is shown there.
func TestCompanion(t *testing.T) {
	s := newDirected(t)
	for name, show := range map[string]func(*testing.T, *directed){
		"modes":               companionModes,
		"hairpins":            companionHairpins,
		"local client":        companionLocalClient,
		"guards":              companionGuards,
		"no target":           companionNoTarget,
		"unknown destination": companionUnknownDestination,
		"local destination":   companionLocalDestination,
		"relays":              companionRelays,
		"terminates":          companionTerminates,
		"takes over flows":    companionTakesOverFlows,
		"leaves relayed":      companionLeavesRelayedFlows,
		"forgotten flows":     companionForgottenFlows,
		"outcomes":            companionOutcomes,
		"between modes":       companionBetweenModes,
	} {
		t.Run(name, func(t *testing.T) { show(t, s.as(t)) })
	}
}

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

	// silence is how long nobody answers where somebody could: longer than an answer
	// takes, and shorter than the second after which a SYN is repeated (RFC 6298, 2).
	silence = 700 * time.Millisecond
)

func newDirected(t *testing.T) *directed {
	t.Helper()
	if _, err := os.Stat("/proc/net/ip_vs"); errors.Is(err, fs.ErrNotExist) {
		t.Skip("this kernel has no IPVS (module ip_vs)")
	}
	top, plane := routed(t, lab.Options{Clients: 2, Targets: 2})
	s := &directed{Topology: top, t: t, plane: plane}
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

// as is the site for a test, after which nobody knows a flow or a service.
func (s *directed) as(t *testing.T) *directed {
	other := *s
	other.t = t
	t.Cleanup(other.forget)
	return &other
}

// forget removes all services, with them what IPVS knows of flows
// (expire_nodest_conn), and then all entries. What is left of a flow would take
// another one for its own that a client begins with the same port.
func (s *directed) forget() {
	s.t.Helper()
	s.ipvs("-C")
	expired := time.After(patience)
	for header := 2; ; { // lines
		left := s.lb("ipvsadm", "-Lnc")
		if strings.Count(left, "\n") <= header {
			break
		}
		select {
		case <-expired:
			s.t.Fatalf("IPVS knows flows without a service:\n%s", left)
		case <-time.After(20 * time.Millisecond):
		}
	}
	s.lb("conntrack", "-F")
}

// ipvs has ipvsadm do what the lines say.
func (s *directed) ipvs(lines ...string) {
	s.t.Helper()
	s.feed(strings.Join(lines, "\n")+"\n", "ipvsadm", "-R")
}

// lb runs a program on the balancer.
func (s *directed) lb(name string, args ...string) string {
	s.t.Helper()
	return s.feed("", name, args...)
}

// feed runs a program on the balancer that reads what it is fed. It has a context of
// its own because it is used when a test is over.
func (s *directed) feed(input, name string, args ...string) string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var said strings.Builder
	cmd := s.LB.Command(ctx, name, args...)
	cmd.Stdin, cmd.Stderr = strings.NewReader(input), &said
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
	lines := []string{"-C"}
	for i := range t.Services {
		svc := &t.Services[i]
		for _, proto := range svc.Protocols {
			service := virtualService(proto, netip.AddrPortFrom(svc.Address, svc.Port))
			lines = append(lines, "-A "+service+" -s mh -b mh-fallback,mh-port")
			add := func(to netip.AddrPort, weight int) {
				if to.Addr().BitLen() == svc.Address.BitLen() {
					lines = append(lines, fmt.Sprintf("-a %s -r %v -m -w %d", service, to, weight))
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
	s.ipvs(lines...)
	s.apply(t)
}

// virtualService is a service as ipvsadm writes it.
func virtualService(proto uint8, at netip.AddrPort) string {
	return map[uint8]string{balancer.ProtoTCP: "-t ", balancer.ProtoUDP: "-u "}[proto] + at.String()
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

func (l lane) proto() uint8 {
	return map[string]uint8{"tcp": balancer.ProtoTCP, "udp": balancer.ProtoUDP}[l.network]
}

// quiesce takes the nodes' weights in all services.
func (s *directed) quiesce(nodes ...*lab.Node) {
	s.t.Helper()
	s.quiesceIn(lanes, nodes...)
}

func (s *directed) quiesceIn(lanes []lane, nodes ...*lab.Node) {
	s.t.Helper()
	var lines []string
	for _, l := range lanes {
		for _, n := range nodes {
			lines = append(lines, fmt.Sprintf("-e %s -r %v -m -w 0", virtualService(l.proto(), l.service()), l.target(n)))
		}
	}
	s.ipvs(lines...)
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

// refused makes calls, all at a time. It wants nobody to answer any, not even by an
// error, and the counter to say why.
func (s *directed) refused(what, counter string, from *lab.Node, calls ...lab.Call) {
	s.t.Helper()
	before := s.events().Totals[counter]
	replies, errs := make([][]lab.Reply, len(calls)), make([]error, len(calls))
	var wg sync.WaitGroup
	for i, c := range calls {
		c.Timeout = silence
		wg.Go(func() { replies[i], errs[i] = from.Agent().Call(s.t.Context(), c) })
	}
	wg.Wait()
	for i, c := range calls {
		if tally := lab.Count(replies[i]); errs[i] != nil || tally.ByErr[lab.Timeout] != 1 {
			s.t.Errorf("%s: %s %v: %v, %v, want silence\n%s", what, c.Network, c.Dst, tally, errs[i], s.state())
		}
	}
	if after := s.events().Totals[counter]; after < before+uint64(len(calls)) {
		s.t.Errorf("%s: %s went from %d to %d for %d calls\n%s", what, counter, before, after, len(calls), s.state())
	}
}

// everyLane is a call of each kind to a port of the VIPs.
func everyLane(port uint16) (calls []lab.Call) {
	for _, l := range lanes {
		calls = append(calls, lab.Call{Network: l.network, Dst: netip.AddrPortFrom(l.vip, port)})
	}
	return calls
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
func companionModes(t *testing.T, s *directed) {
	for _, mode := range []balancer.ClientIP{balancer.Preserve, balancer.HairpinSNAT, balancer.SNAT} {
		t.Run(mode.String(), func(t *testing.T) { s.as(t).mode(mode) })
	}
}

func (s *directed) mode(mode balancer.ClientIP) {
	s.direct(s.table(mode, s.Targets...))
	before := s.events()
	for _, l := range lanes {
		replies := s.call(s.Clients[0], l, 24) // one of two targets is never met: 1 in 8 million
		peer := l.of(s.Clients[0])
		if mode == balancer.SNAT {
			peer = l.of(s.LB)
		}
		s.want(l.String(), replies, peer, s.Targets...)
		want := map[string]int{}
		for who, n := range lab.Count(replies).ByWho {
			want[l.target(s.node(who)).String()] = n
		}
		if diff := cmp.Diff(want, s.marks(l)); diff != "" {
			s.t.Errorf("%v: targets in the marks:\n%s", l, diff)
		}
		after := s.events()
		for _, target := range s.Targets {
			key := balancer.TargetKey{Group: "web", AddrPort: l.target(target)}
			got := after.NewFlows[key] - before.NewFlows[key]
			if got != uint64(want[key.AddrPort.String()]) {
				s.t.Errorf("%v: %v has %d new flows, want %d", l, key, got, want[key.AddrPort.String()])
			}
		}
		before = after
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
func companionHairpins(t *testing.T, s *directed) {
	self := s.Targets[0]
	s.direct(s.table(balancer.HairpinSNAT, self))
	for _, l := range lanes {
		before := s.events().Totals[counterHairpinned]
		s.want(fmt.Sprintf("hairpin_snat %v", l), s.call(self, l, 3), l.of(s.LB), self)
		if n := s.events().Totals[counterHairpinned] - before; n != 3 {
			t.Errorf("%v: %d hairpins, want 3", l, n)
		}
		s.want(fmt.Sprintf("no hairpin %v", l), s.call(s.Targets[1], l, 3), l.of(s.Targets[1]), self)
	}
	s.forget()
	avoid := s.table(balancer.Preserve, self)
	avoid.Pools[0].AvoidSelf = true
	s.direct(avoid)
	for _, l := range lanes {
		s.want(fmt.Sprintf("avoid_self %v", l), s.call(self, l, 3), l.of(s.LB), self)
	}
	s.forget()
	s.direct(s.table(balancer.Preserve, self))
	s.refused("preserve", counterHairpin, self, everyLane(directedPort)...)
}

// A client on the balancer would be seen under the VIP.
func companionLocalClient(t *testing.T, s *directed) {
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
func companionGuards(t *testing.T, s *directed) {
	table := s.table(balancer.Preserve, s.Targets[0])
	for i := range table.Services {
		a := lane{vip: table.Services[i].Address}.of(s.Clients[0])
		table.Services[i].Allow = []netip.Prefix{netip.PrefixFrom(a, a.BitLen())}
	}
	s.direct(table)
	s.refused("not allowed", counterNotAllowed, s.Clients[1], everyLane(directedPort)...)
	s.refused("no listener", counterUnwanted, s.Clients[0], everyLane(22)...)
	for _, l := range lanes {
		s.want(fmt.Sprintf("allowed %v", l), s.call(s.Clients[0], l, 2), l.of(s.Clients[0]), s.Targets[0])
	}
	// Somebody has removed what IPVS had. The host listens on the port itself.
	s.ipvs("-C")
	s.refused("no service", counterNoTarget, s.Clients[0], everyLane(directedPort)...)
	// The same with a flow that there is already.
	s.forget()
	s.direct(table)
	held := s.hold(s.Clients[0], few, lanes...)
	s.ipvs("-C")
	before := s.events().Totals[counterNoTarget]
	s.broken("without a service", held, lab.Timeout)
	if asked, n := uint64(len(lanes)*few), s.events().Totals[counterNoTarget]-before; n < asked {
		t.Errorf("without a service: %s rose by %d for %d questions", counterNoTarget, n, asked)
	}
}

// Where nobody can take a flow, IPVS is not asked, which would answer.
func companionNoTarget(t *testing.T, s *directed) {
	table := s.table(balancer.Preserve, s.Targets[0])
	for i := range table.Pools[0].Destinations {
		table.Pools[0].Destinations[i].Weight = 0
	}
	s.direct(table)
	s.refused("no weight", counterNoTarget, s.Clients[0], everyLane(directedPort)...)
}

// What somebody else adds to a service of ours gets no flow.
func companionUnknownDestination(t *testing.T, s *directed) {
	for _, stranger := range []*lab.Node{s.Targets[1], s.LB} {
		table := s.table(balancer.Preserve, s.Targets[0])
		s.direct(table, netip.AddrPortFrom(stranger.Addr4, answering), netip.AddrPortFrom(stranger.Addr6, answering))
		s.quiesce(s.Targets[0])
		s.refused(stranger.Name, counterNoTarget, s.Clients[0], everyLane(directedPort)...)
	}
}

// A destination on the balancer itself is a target like others.
func companionLocalDestination(t *testing.T, s *directed) {
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
func companionRelays(t *testing.T, s *directed) {
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
	s.refused("no relay", counterNoTarget, s.Clients[0], everyLane(directedPort)...)
	s.forget()
	only := s.relaying(s.table(balancer.SNAT, s.Targets[0]))
	for i := range only.Services {
		only.Services[i].Pools = only.Services[i].Pools[:1]
	}
	s.apply(only)
	for _, l := range []lane{lanes[0], lanes[2]} {
		s.want("without IPVS "+l.String(), s.call(s.Clients[0], l, 3), l.of(s.Clients[0]), s.LB)
	}
}

// few is how many flows are enough where it does not matter who has them.
const few = 4

// hold opens so many flows in each lane, which end with the test.
func (s *directed) hold(from *lab.Node, each int, lanes ...lane) (all []*lab.Flows) {
	s.t.Helper()
	for _, l := range lanes {
		c := l.once()
		c.N, c.Parallel, c.Timeout = each, each, patience
		f, err := from.Agent().Hold(s.t.Context(), c)
		if err != nil {
			s.t.Fatal(err)
		}
		s.t.Cleanup(func() {
			if err := f.Close(); err != nil {
				s.t.Error(err)
			}
		})
		if tally := lab.Count(f.Opened); tally.Failed > 0 {
			s.t.Fatalf("%v: %v\n%s", l, tally, s.state())
		}
		all = append(all, f)
	}
	return all
}

// check asks on all flows at a time.
func (s *directed) check(held []*lab.Flows, timeout time.Duration) (all []lab.Flow) {
	s.t.Helper()
	flows, errs := make([][]lab.Flow, len(held)), make([]error, len(held))
	var wg sync.WaitGroup
	for i, h := range held {
		wg.Go(func() { flows[i], errs[i] = h.CheckWithin(s.t.Context(), timeout) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		s.t.Fatal(err)
	}
	return slices.Concat(flows...)
}

// alive wants the flows to go on where they are.
func (s *directed) alive(what string, held []*lab.Flows) {
	s.t.Helper()
	for _, f := range s.check(held, patience) {
		if f.Broken() || f.Moved() {
			s.t.Errorf("%s: %v to %s is now %q at %q\n%s", what, f.First.From, f.First.Who, f.Now.Err, f.Now.Who, s.state())
		}
	}
}

// broken wants the flows to fail in one way, or not at all.
func (s *directed) broken(what string, held []*lab.Flows, err string) {
	s.t.Helper()
	timeout := patience
	if err == lab.Timeout {
		timeout = silence
	}
	for _, f := range s.check(held, timeout) {
		if f.Now.Err != err {
			s.t.Errorf("%s: %v to %s is now %q at %q, want %q\n%s", what, f.First.From, f.First.Who, f.Now.Err, f.Now.Who, err, s.state())
		}
	}
}

// The flows of a target that is cut off end for both; the others go on.
func companionTerminates(t *testing.T, s *directed) {
	for _, mode := range []balancer.ClientIP{balancer.Preserve, balancer.SNAT} {
		t.Run(mode.String(), func(t *testing.T) { s.as(t).terminates(mode) })
	}
}

func (s *directed) terminates(mode balancer.ClientIP) {
	table := s.table(mode, s.Targets...)
	s.direct(table)
	held := s.hold(s.Clients[0], 12, lanes[0], lanes[2]) // one of two targets has none: 1 in 8 million
	captures := map[*lab.Node]*lab.Capture{}
	for _, n := range s.Targets {
		c, err := n.Agent().Capture(s.t.Context(), "eth0")
		if err != nil {
			s.t.Fatal(err)
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
	for _, f := range s.check(held, patience) {
		switch {
		case f.First.Who != ended.Name && (f.Broken() || f.Moved()):
			s.t.Errorf("a flow of %s is now %q\n%s", f.First.Who, f.Now.Err, s.state())
		case f.First.Who == ended.Name && f.Now.Err != lab.Reset:
			s.t.Errorf("a flow of %s is now %q, want %q\n%s", f.First.Who, f.Now.Err, lab.Reset, s.state())
		case f.First.Who == ended.Name:
			cut++
		}
	}
	if cut == 0 {
		s.t.Fatalf("no flow was %s's", ended.Name)
	}
	for n, c := range captures {
		seen, err := c.Packets(s.t.Context(), func(p lab.Packet) bool { return p.Flags&lab.RST != 0 })
		if err != nil || n != ended && len(seen) > 0 {
			s.t.Errorf("%s saw %v, %v", n.Name, seen, err)
		}
		if err := c.Close(); err != nil {
			s.t.Error(err)
		}
	}
}

// Who chooses changes under the flows of both, which stay where they are; new ones
// are the other's. UDP flows of IPVS end, and begin anew when they are forgotten.
func companionTakesOverFlows(t *testing.T, s *directed) {
	for _, mode := range []balancer.ClientIP{balancer.Preserve, balancer.SNAT} {
		t.Run(mode.String(), func(t *testing.T) { s.as(t).takesOver(mode) })
	}
}

func (s *directed) takesOver(mode balancer.ClientIP) {
	with, without := s.table(mode, s.Targets...), s.table(mode, s.Targets...)
	without.Dataplane = balancer.NFTables
	s.apply(without)
	rules := s.hold(s.Clients[0], few, lanes...)
	s.direct(with)
	s.alive("of nftables under IPVS", rules)
	served := s.hold(s.Clients[1], few, lanes...)
	s.alive("of IPVS", served)
	s.quiesce(s.Targets...) // IPVS lingers
	s.apply(without)
	s.alive("of nftables under nftables", rules)
	s.alive("of IPVS under nftables", []*lab.Flows{served[0], served[2]})
	udp := []*lab.Flows{served[1], served[3]}
	s.broken("of IPVS under nftables", udp, lab.Timeout)
	s.lb("conntrack", "-D", "-p", "udp")
	s.broken("forgotten under nftables", udp, "")
	for _, l := range lanes {
		if tally := lab.Count(s.call(s.Clients[0], l, 8)); tally.Failed > 0 {
			s.t.Errorf("%v: %v\n%s", l, tally, s.state())
		}
	}
}

// Connections of the relay stay with it when IPVS gets their service: it schedules
// nothing but what begins (sloppy_tcp=0).
func companionLeavesRelayedFlows(t *testing.T, s *directed) {
	only := s.relaying(s.table(balancer.SNAT, s.Targets[0]))
	for i := range only.Services {
		only.Services[i].Pools = only.Services[i].Pools[:1]
	}
	s.apply(only)
	held := s.hold(s.Clients[0], few, lanes[0], lanes[2])
	s.direct(s.relaying(s.table(balancer.SNAT, s.Targets[0])), netip.AddrPortFrom(lab.VIP4, directedPort), netip.AddrPortFrom(lab.VIP6, directedPort))
	s.alive("IPVS came", held)
}

// While a service changes its mode, IPVS may have destinations for what the rules
// leave to the relay: they follow, or have gone ahead. Nobody gets to a target as
// nobody's flow: one that the rules know has its number, and is sourced from here,
// and of others the client asks again until both agree.
func companionBetweenModes(t *testing.T, s *directed) {
	through := func(pools ...balancer.WeightedPool) *balancer.Table {
		table := s.relaying(s.table(balancer.SNAT, s.Targets[0], s.LB))
		for i := range table.Services {
			table.Services[i].Pools = pools
		}
		return table
	}
	relay, web := balancer.WeightedPool{Pool: "relayed", Weight: 1}, balancer.WeightedPool{Pool: "web", Weight: 1}
	for _, c := range []struct {
		lane
		node *lab.Node
	}{{lanes[0], s.Targets[0]}, {lanes[2], s.Targets[0]}, {lanes[0], s.LB}} {
		what := fmt.Sprintf("%v to %s", c.lane, c.node.Name)
		choose := func(table *balancer.Table) {
			s.direct(table)
			for _, n := range []*lab.Node{s.Targets[0], s.LB} {
				if n != c.node {
					s.quiesceIn([]lane{c.lane}, n)
				}
			}
		}
		choose(through(relay))
		s.asksAgain(what+", the rules follow", c.lane, c.node, func() { s.apply(through(web)) })
		choose(through(relay))
		s.asksAgain(what+", IPVS follows", c.lane, s.LB, func() { s.ipvs("-C") })
		s.forget()
		choose(through(relay, balancer.WeightedPool{Pool: "web"}))
		replies := s.call(s.Clients[0], c.lane, 3)
		peer := c.of(s.LB)
		if c.node == s.LB {
			peer = c.of(s.Clients[0]) // what ends here passes no postrouting
		}
		s.want(what+", known to the rules", replies, peer, c.node)
		if diff := cmp.Diff(map[string]int{c.target(c.node).String(): 3}, s.marks(c.lane)); diff != "" {
			t.Errorf("%s, known to the rules, targets in the marks:\n%s", what, diff)
		}
	}
}

// asksAgain calls once, changes something when the call has been dropped, and wants
// it to get to the node all the same.
func (s *directed) asksAgain(what string, l lane, node *lab.Node, change func()) {
	s.t.Helper()
	before := s.events().Totals[counterNoTarget]
	type outcome struct {
		replies []lab.Reply
		err     error
	}
	done := make(chan outcome, 1)
	go func() {
		c := l.once()
		c.Timeout = 2 * patience
		replies, err := s.Clients[0].Agent().Call(s.t.Context(), c)
		done <- outcome{replies, err}
	}()
	wait.Until(s.t, patience, what+": a dropped packet", func() bool { return s.events().Totals[counterNoTarget] > before }, s.state)
	change()
	o := <-done
	if o.err != nil {
		s.t.Fatal(o.err)
	}
	if tally := lab.Count(o.replies); tally.ByWho[node.Name] != 1 {
		s.t.Errorf("%s: %v, want an answer of %s\n%s", what, tally, node.Name, s.state())
	}
}

// A relay that is kept from tracking takes what looks like the middle of one of its
// connections. Flows that IPVS has are IPVS's all the same, when conntrack has
// forgotten them.
func TestCompanionForgottenFlowsOfMixedService(t *testing.T) {
	const port = 81 // of nobody who listens at all addresses
	s := newDirected(t)
	table := s.relaying(s.table(balancer.SNAT, s.Targets[0]))
	table.UntrackedRelay = true
	for i := range table.Services {
		table.Services[i].Port = port
		if _, err := s.LB.Agent().Serve(t.Context(), lab.Serve{Addr: table.Services[i].Address, Ports: []uint16{port}}); err != nil {
			t.Fatal(err)
		}
	}
	s.direct(table)
	for _, l := range []lane{lanes[0], lanes[2]} {
		const n = 4
		held, err := s.Clients[0].Agent().Hold(t.Context(), lab.Call{
			Network: l.network, Dst: netip.AddrPortFrom(l.vip, port), N: n, Parallel: n, Timeout: patience / 2})
		if err != nil {
			t.Fatal(err)
		}
		s.want(l.String(), held.Opened, l.of(s.LB), s.Targets[0])
		s.lb("conntrack", "-F")
		s.alive(l.String()+", forgotten", []*lab.Flows{held})
		if diff := cmp.Diff(map[string]int{l.target(s.Targets[0]).String(): n}, s.marks(l)); diff != "" {
			t.Errorf("%v: targets in the marks:\n%s", l, diff)
		}
	}
}

// Flows that conntrack has forgotten go on, and are known again.
func companionForgottenFlows(t *testing.T, s *directed) {
	for _, mode := range []balancer.ClientIP{balancer.Preserve, balancer.SNAT} {
		t.Run(mode.String(), func(t *testing.T) { s.as(t).forgotten(mode) })
	}
}

func (s *directed) forgotten(mode balancer.ClientIP) {
	s.direct(s.table(mode, s.Targets...))
	held := s.hold(s.Clients[0], few, lanes...)
	var before []map[string]int
	for _, l := range lanes {
		before = append(before, s.marks(l))
	}
	s.lb("conntrack", "-F")
	s.alive("forgotten", held)
	for i, l := range lanes {
		if diff := cmp.Diff(before[i], s.marks(l)); diff != "" {
			s.t.Errorf("%v: targets in the marks:\n%s", l, diff)
		}
	}
}

// How flows begin is counted once, though their packets pass two filters of ours.
func companionOutcomes(t *testing.T, s *directed) {
	firewall := func(script string) {
		t.Helper()
		if out, err := s.Targets[1].Command(context.Background(), "nft", script).CombinedOutput(); err != nil {
			t.Errorf("nft: %v\n%s", err, out)
		}
	}
	firewall(`table inet firewall {
		chain input {
			type filter hook input priority 0
			ip protocol tcp reject with tcp reset
			meta l4proto tcp drop
		}
	}`)
	defer firewall("delete table inet firewall")
	table := s.table(balancer.Preserve, s.Targets...)
	table.Pools[0].Observed = true
	s.direct(table)
	for l, why := range map[lane]string{lanes[0]: lab.Refused, lanes[2]: lab.Timeout} {
		before := s.outcomes()
		c := l.once()
		// One of two targets is never met: 1 in 8 million. A SYN is repeated after 1 s.
		c.N, c.Parallel, c.Timeout = 24, 24, 2500*time.Millisecond
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
