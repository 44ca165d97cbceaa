package e2e

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

var labOfOne = lab.Options{Targets: 1}

// A conformFile is a configuration file that chooses a dataplane.
type conformFile struct {
	Dataplane string `yaml:"dataplane"`
	config    `yaml:",inline"`
}

// String is the file.
func (c conformFile) String() string {
	text, err := yaml.Marshal(c)
	if err != nil {
		panic(err) // as of config
	}
	return string(text)
}

// offer adds a listener on both VIPs.
func (c *conformFile) offer(s *site, name, protocol string, to ...forward) {
	for _, l := range listen(name, protocol, s.port(name), "") {
		l.Forward = to
		c.Listeners = append(c.Listeners, l)
	}
}

// withdraw removes it.
func (c *conformFile) withdraw(name string) {
	c.Listeners = slices.DeleteFunc(c.Listeners, func(l listener) bool { return l.Name == name+"4" || l.Name == name+"6" })
}

// serve adds a group and a listener for it, of the same name.
func (c *conformFile) serve(s *site, g group) {
	c.Groups = append(c.Groups, g)
	c.offer(s, g.Name, g.Protocol, to(g.Name)...)
}

// group is one of the file's.
func (c *conformFile) group(name string) *group {
	i := slices.IndexFunc(c.Groups, func(g group) bool { return g.Name == name })
	return &c.Groups[i]
}

// clone is a file that may be changed without changing this one.
func (c conformFile) clone() conformFile {
	c.Listeners, c.Groups = slices.Clone(c.Listeners), slices.Clone(c.Groups)
	return c
}

// A site is where all cases are shown, with one daemon:
//
//	c1 203.0.113.9  --- lb 10.0.1.1 --- 10.0.1.11 … t1 t2 t3
//	c2 203.0.113.10 --/    10.0.2.1 --+ 10.0.2.11   s1          one segment
//	                                  \ 10.0.2.101  s2
//	                       10.0.1.1 --- 10.0.1.21   n1 --- 10.244.1.11 p1
//	                                                   \-- 10.244.1.12 p2
//
// The listeners' ports are the cases' own, and so are the groups that change.
type site struct {
	plane balancer.Dataplane
	top   *lab.Topology
	d     *daemon
	// In one segment, and on one node.
	seated, neighbour, host, pod, sibling *lab.Node
	// settings are those of IPVS before the daemon came.
	settings map[string]string

	numbers sync.Mutex
	ports   map[string]uint16 // guarded by numbers; of listeners, by name
	targets map[string]uint16 // guarded by numbers; of groups, by name
	unused  uint16            // guarded by numbers; the clients' next fresh port

	reloading sync.Mutex

	mu      sync.Mutex
	written conformFile               // guarded by mu
	edits   []func(*conformFile)      // guarded by mu; of the next reload
	probed  map[probed]*lab.Listeners // guarded by mu; what health checks find
}

// probed is a port of a node that nothing but health checks ask.
type probed struct {
	node string
	port uint16
}

// Ports of the targets, apart from targetPort.
const (
	headedPort = 8081 // reads a header first
	cutHealth  = 9001 // and the following: health checks of groups whose targets fail
	openHealth = 9002
	deadHealth = 9003
	ownPort    = 8085 // the balancer's own target
	sshPort    = 22   // a service of the balancer's that is none of a VIP's

	// Groups have ports of their own: IPVS takes two flows for one that lead from
	// one client's port to one target by different listeners, and a client's ports
	// are drawn for each listener anew.
	firstTargetPort = 8100
	targetPorts     = 60
)

// openSite builds the site, with a daemon that found all targets healthy.
func openSite(t *testing.T, plane balancer.Dataplane) *site {
	t.Helper()
	s := &site{
		plane: plane, top: routed(t, lab.Options{Clients: 2, Targets: 3}),
		ports: map[string]uint16{}, targets: map[string]uint16{}, unused: keptPort / 2, probed: map[probed]*lab.Listeners{},
	}
	s.addSegment(t)
	s.addPods(t)
	s.addClients(t)
	s.open(t)
	s.written = s.fileFor(standing)
	// UDP flows of a machine that is slow must not be forgotten while they rest.
	done(t, s.top.LB.Sysctl("net.netfilter.nf_conntrack_udp_timeout", "180"))
	begun := time.Now()
	s.settings = ipvsSettings(t, s.top.LB)
	s.strangers(t)
	s.d = prepare(t, s.top, s.written.String())
	s.d.terse = true // there are some hundred thousand elements
	s.d.start()
	s.waitHealthy(s.d)
	t.Logf("all targets of %d groups were healthy after %v", len(s.written.Groups), time.Since(begun).Round(time.Millisecond))
	return s
}

// fileFor is what cases need, unless it would be refused. What others had is
// gone: the fewer there is, the faster is a slow machine.
func (s *site) fileFor(of []conformity) conformFile {
	c := conformFile{Dataplane: s.plane.String(), config: config{Sources: sources(s.top), VIPs: both()}}
	for i := range of {
		x := &of[i]
		if x.needs != nil && (x.taken || cannot[s.plane][x.name] == "") {
			x.needs(s, &c)
		}
	}
	return c
}

// turnTo has the daemon serve other cases.
func (s *site) turnTo(t *testing.T, of []conformity) {
	t.Helper()
	s.written = s.fileFor(of)
	done(t, s.d.reload(s.written.String()))
	s.waitHealthy(s.d)
}

// waitHealthy waits for the targets in the file. Groups that left it disappear
// from the daemon's status at any time.
func (s *site) waitHealthy(d *daemon) {
	d.t.Helper()
	for _, g := range s.written.Groups {
		d.waitHealthy(g.Name, len(g.Targets))
	}
}

// node adds a node to the topology.
func (s *site) node(t *testing.T, name string) *lab.Node {
	t.Helper()
	n, err := s.top.Node(name)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// done fails the test for the first error.
func done(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

var anywhere = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}

// prefixes parses one of each family.
func prefixes(v4, v6 string) []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix(v4), netip.MustParsePrefix(v6)}
}

// defaults routes everything to a router, by its addresses.
func defaults(t *testing.T, n *lab.Node, v4, v6 string) {
	t.Helper()
	done(t, n.Route(anywhere[0], netip.MustParseAddr(v4), "eth0"), n.Route(anywhere[1], netip.MustParseAddr(v6), "eth0"))
}

// addSegment adds two neighbours that reach each other without the balancer.
func (s *site) addSegment(t *testing.T) {
	t.Helper()
	sw := s.node(t, "sw")
	done(t, sw.Bridge("br0"))
	plug := func(n *lab.Node, iface string, addrs []netip.Prefix) {
		done(t, s.top.Wire(lab.End{Node: n, Iface: iface, Addrs: addrs}, lab.End{Node: sw, Iface: n.Name}), sw.Enslave(n.Name, "br0"))
	}
	plug(s.top.LB, "sw", prefixes("10.0.2.1/24", "2001:db8:2::1/64"))
	s.seated, s.neighbour = s.node(t, "s1"), s.node(t, "s2")
	plug(s.seated, "eth0", prefixes("10.0.2.11/24", "2001:db8:2::11/64"))
	plug(s.neighbour, "eth0", prefixes("10.0.2.101/24", "2001:db8:2::101/64"))
	for _, n := range []*lab.Node{s.seated, s.neighbour} {
		defaults(t, n, "10.0.2.1", "2001:db8:2::1")
	}
}

// addPods adds a node with two pods.
func (s *site) addPods(t *testing.T) {
	t.Helper()
	s.host = s.node(t, "n1")
	done(t, s.host.Forward())
	done(t, s.top.Wire(
		lab.End{Node: s.top.LB, Iface: "n1", Addrs: prefixes("10.0.1.1/32", "2001:db8:1::1/128")},
		lab.End{Node: s.host, Iface: "eth0", Addrs: prefixes("10.0.1.21/32", "2001:db8:1::21/128")}))
	defaults(t, s.host, "10.0.1.1", "2001:db8:1::1")
	pods := prefixes("10.244.1.0/24", "2001:db8:244:1::/64")
	for i, f := range families {
		at := f.addr(s.host)
		done(t, s.top.LB.Route(netip.PrefixFrom(at, at.BitLen()), netip.Addr{}, "n1"), s.top.LB.Route(pods[i], at, "n1"))
	}
	s.pod, s.sibling = s.node(t, "p1"), s.node(t, "p2")
	for i, n := range []*lab.Node{s.pod, s.sibling} {
		own := prefixes(fmt.Sprintf("10.244.1.%d/32", 11+i), fmt.Sprintf("2001:db8:244:1::%d/128", 11+i))
		done(t, s.top.Wire(
			lab.End{Node: s.host, Iface: n.Name, Addrs: prefixes("10.244.1.1/32", "2001:db8:244:1::1/128")},
			lab.End{Node: n, Iface: "eth0", Addrs: own}))
		for _, p := range own {
			done(t, s.host.Route(p, netip.Addr{}, n.Name))
		}
		defaults(t, n, "10.244.1.1", "2001:db8:244:1::1")
	}
}

// extras is how many addresses the second client has beside its first.
const extras = 16

// addClients gives the second client further addresses.
func (s *site) addClients(t *testing.T) {
	t.Helper()
	for _, f := range families {
		done(t, s.top.LB.Route(clientNets[f.name], netip.Addr{}, s.top.Clients[1].Name))
		for _, a := range s.extras(f) {
			done(t, s.top.Clients[1].Address("eth0", netip.PrefixFrom(a, a.BitLen())))
		}
	}
}

// extras are the further addresses.
func (s *site) extras(f family) (all []netip.Addr) {
	for a := clientNets[f.name].Addr().Next(); len(all) < extras; a = a.Next() {
		all = append(all, a)
	}
	return all
}

// open makes the targets listen, and the balancer's host on ports that a VIP must
// not show: also on one that a listener has.
func (s *site) open(t *testing.T) {
	t.Helper()
	ports := []uint16{targetPort}
	for i := range targetPorts {
		ports = append(ports, uint16(firstTargetPort+i))
	}
	for _, n := range append(slices.Clone(s.top.Targets), s.seated, s.pod) {
		serveOn(t, n, lab.Serve{Ports: ports})
	}
	serveHeaders(t, s.top.Targets, headedPort)
	serveOn(t, s.top.LB, lab.Serve{Ports: []uint16{ownPort, sshPort, s.port("preserve")}})
	for _, port := range []uint16{cutHealth, openHealth, deadHealth} {
		s.heal(t, port, s.top.Targets...)
	}
}

// heal makes nodes pass the health checks of a port.
func (s *site) heal(t *testing.T, port uint16, nodes ...*lab.Node) {
	t.Helper()
	for _, n := range nodes {
		l, err := n.Agent().Serve(soon(t), lab.Serve{Ports: []uint16{port}, Networks: []string{"tcp"}})
		done(t, err)
		s.mu.Lock()
		s.probed[probed{n.Name, port}] = l
		s.mu.Unlock()
	}
}

// fail makes nodes fail the health checks of a port.
func (s *site) fail(t *testing.T, port uint16, nodes ...*lab.Node) {
	t.Helper()
	for _, n := range nodes {
		s.mu.Lock()
		l := s.probed[probed{n.Name, port}]
		s.mu.Unlock()
		done(t, l.Close())
	}
}

// port is that of a listener.
func (s *site) port(name string) uint16 {
	s.numbers.Lock()
	defer s.numbers.Unlock()
	if s.ports[name] == 0 {
		const first = 1001
		s.ports[name] = first + uint16(len(s.ports))
	}
	return s.ports[name]
}

// targetPort is where the targets of a group listen.
func (s *site) targetPort(group string) uint16 {
	s.numbers.Lock()
	defer s.numbers.Unlock()
	if s.targets[group] == 0 {
		if len(s.targets) == targetPorts {
			panic("too few ports of targets")
		}
		s.targets[group] = firstTargetPort + uint16(len(s.targets))
	}
	return s.targets[group]
}

// fresh is the first of so many ports that no client has had. What the kernel takes
// may be that of a UDP flow which conntrack still knows.
func (s *site) fresh(ports int) uint16 {
	s.numbers.Lock()
	defer s.numbers.Unlock()
	first := s.unused
	s.unused += uint16(ports)
	return first
}

// have adds a group that several cases use, unless it is there.
func (c *conformFile) have(g group) string {
	if !slices.ContainsFunc(c.Groups, func(x group) bool { return x.Name == g.Name }) {
		c.Groups = append(c.Groups, g)
	}
	return g.Name
}

// second is a group of the second target alone.
func (s *site) second(c *conformFile) string {
	return c.have(s.pool("second", "TCP_UDP", "preserve", targetPort, s.top.Targets[1]))
}

// pool is a group whose targets are not to fail.
func (s *site) pool(name, protocol, mode string, port uint16, nodes ...*lab.Node) group {
	if port == targetPort && !strings.HasPrefix(name, "self-") { // those are to share a target
		port = s.targetPort(name)
	}
	g := pool(name, protocol, mode, port, targets(nodes...))
	g.HealthCheck = patient()
	return g
}

// fragile is a group of preserved clients whose targets fail and recover fast.
func (s *site) fragile(name string, port uint16, nodes ...*lab.Node) group {
	g := s.pool(name, "TCP_UDP", "preserve", targetPort, nodes...)
	g.HealthCheck = map[string]any{"port": port, "interval": "1s", "timeout": "1s", "healthy_threshold": 1, "unhealthy_threshold": 2}
	return g
}

// change changes the file and has it reloaded. Cases change what is theirs; what
// several want at the same time is one reload.
func (x *trial) change(edit func(c *conformFile)) {
	x.t.Helper()
	x.mu.Lock()
	x.edits = append(x.edits, edit)
	x.mu.Unlock()
	x.reloading.Lock()
	defer x.reloading.Unlock()
	x.mu.Lock()
	edits, next := x.edits, x.written.clone()
	x.edits = nil
	x.mu.Unlock()
	if len(edits) == 0 {
		return // another case took ours along
	}
	for _, edit := range edits {
		edit(&next)
	}
	if err := x.d.reload(next.String()); err != nil {
		x.t.Fatal(err)
	}
	x.mu.Lock()
	x.written = next
	x.mu.Unlock()
}

// beside runs nlb with a file beside the daemon's that needs more.
func (x *trial) beside(needs func(s *site, c *conformFile), args ...string) output {
	x.t.Helper()
	x.mu.Lock()
	next := x.written.clone()
	x.mu.Unlock()
	needs(x.site, &next)
	name := filepath.Join(x.t.TempDir(), "nlb.yaml")
	done(x.t, os.WriteFile(name, []byte(next.String()), 0o600))
	return x.d.run(append(args, "-c", name)...)
}

// ask makes calls from a node to a listener.
func (x *trial) ask(n *lab.Node, f flavour, listener string, calls int) []lab.Reply {
	x.t.Helper()
	return replies(x.t, n, lab.Call{Network: f.network, Dst: f.at(x.port(listener)), N: calls, Parallel: 8, Timeout: limit / 2})
}

// seen makes calls and fails the test unless the targets all saw one address.
func (x *trial) seen(n *lab.Node, f flavour, listener string, calls int, as netip.Addr) lab.Tally {
	x.t.Helper()
	got := lab.Count(x.ask(n, f, listener, calls))
	allSeenAs(x.t, x.note(f, n.Name+" calls "+listener), got, as)
	return got
}

// named makes calls to a relayed listener, where headers say who calls.
func (x *trial) headed(n *lab.Node, f flavour, listener string, calls int) {
	x.t.Helper()
	named(x.t, x.note(f, n.Name+" calls "+listener), x.ask(n, f, listener, calls), f.addr(x.top.LB))
}

// silent makes calls and fails the test unless nobody answers, not even with an
// error, and a counter says why.
func (x *trial) silent(n *lab.Node, f flavour, listener, counter string) {
	x.t.Helper()
	const calls = 4
	before := x.d.counter(counter)
	got := call(x.t, n, lab.Call{Network: f.network, Dst: f.at(x.port(listener)), N: calls, Parallel: calls, Timeout: briefly})
	allFail(x.t, x.note(f, n.Name+" calls "+listener), got, lab.Timeout)
	if counter == "" {
		return
	}
	// Other cases may have their part in it.
	if rose := x.d.counter(counter) - before; rose < calls {
		x.t.Errorf("%s", x.note(f, fmt.Sprintf("%s rose by %d for %d flows", counter, rose, calls)))
	}
}

// patience is for one answer. A lost segment is sent again; a datagram is not, and
// one that is on its way while its flow changes is lost.
func (f flavour) patience() time.Duration {
	if f.network == "udp" {
		return limit / 10
	}
	return limit / 2
}

// A kept is flows of one flavour that stay open.
type kept struct {
	x     *trial
	f     flavour
	flows *lab.Flows
}

// keep opens so many flows that each of two targets has some: that one has none
// is less likely than 1 in 8 million.
func (x *trial) keep(f flavour, listener string) *kept {
	x.t.Helper()
	return &kept{x, f, held(x.t, x.top.Clients[0], lab.Call{
		Network: f.network, Dst: f.at(x.port(listener)), N: 24, Parallel: 8, Timeout: f.patience(),
	})}
}

// keepAll opens flows of every flavour, before the case changes anything.
func (x *trial) keepAll(listener string) map[string]*kept {
	x.t.Helper()
	all := map[string]*kept{}
	for _, f := range flavours {
		all[f.String()] = x.keep(f, listener)
	}
	return all
}

// now asks on all flows that had a target.
func (k *kept) now(t *testing.T, of string) []lab.Flow {
	t.Helper()
	all, err := k.flows.Check(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	all = slices.DeleteFunc(all, func(x lab.Flow) bool { return of != "" && x.First.Who != of })
	if len(all) == 0 {
		t.Fatalf("%v: none of the flows is at %s", k.f, of)
	}
	return all
}

// alive fails the test unless the flows that a target has, or all, go on there.
func (k *kept) alive(t *testing.T, when, of string) {
	t.Helper()
	all := k.now(t, of)
	if bad := lab.Broken(all); len(bad) > 0 {
		t.Errorf("%v, %s: %d of %d flows are broken or moved, such as %+v", k.f, when, len(bad), len(all), bad[0])
	}
}

// ends waits until the connections that a target has are reset.
func (k *kept) ends(t *testing.T, when, of string) {
	t.Helper()
	defer func() {
		if t.Failed() {
			k.explain(t, of)
		}
	}()
	wait.For(t, limit, fmt.Sprintf("%v, %s: resets", k.f, when), func() error {
		for _, x := range k.now(t, of) {
			if x.Now.Err != lab.Reset {
				return fmt.Errorf("a flow of %s: %+v", of, x.Now)
			}
		}
		return nil
	})
}

// explain logs what the kernel knows of a target's flows that go on.
func (k *kept) explain(t *testing.T, of string) {
	t.Helper()
	known := must(t, k.x.top.LB, "conntrack", "-L", "-f", k.f.version())
	if haveIPVS() {
		known += must(t, k.x.top.LB, "ipvsadm", "-Lnc")
	}
	for _, x := range k.now(t, of) {
		if x.Broken() {
			continue
		}
		port := fmt.Sprint(x.Now.From.Port())
		for line := range strings.Lines(known) {
			if strings.Contains(line, "sport="+port+" ") || strings.Contains(line, ":"+port+" ") {
				t.Logf("goes on: %s", strings.TrimSpace(line))
			}
		}
	}
	rules := must(t, k.x.top.LB, "nft", "-t", "list", "table", "inet", "nlb")
	for line := range strings.Lines(rules) {
		if strings.Contains(line, "ended") {
			t.Log(strings.TrimSpace(line))
		}
	}
}

// moves waits until the flows that a target has are answered by another.
func (k *kept) moves(t *testing.T, when, of, to string) {
	t.Helper()
	wait.For(t, limit, fmt.Sprintf("%v, %s: flows move", k.f, when), func() error {
		for _, x := range k.now(t, of) {
			if x.Now.Who != to {
				return fmt.Errorf("a flow of %s: %+v", of, x.Now)
			}
		}
		return nil
	})
}

// goesTo fails the test unless new flows work, and go to these targets and no
// other.
func (x *trial) goesTo(when string, f flavour, listener string, who ...string) {
	x.t.Helper()
	const calls = 24 // one of two that is never met: 1 in 8 million
	flows, err := x.top.Clients[0].Agent().Hold(soon(x.t), lab.Call{
		Network: f.network, Dst: f.at(x.port(listener)), SrcPort: x.fresh(calls), N: calls, Parallel: 8, Timeout: limit / 2,
	})
	done(x.t, err)
	got := lab.Count(flows.Opened)
	done(x.t, flows.Close())
	met := slices.Sorted(maps.Keys(got.ByWho))
	slices.Sort(who)
	if got.Failed > 0 || !slices.Equal(met, who) {
		x.t.Errorf("%s", x.note(f, fmt.Sprintf("%s: %v, want them at %v", when, got, who)))
	}
}
