package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"nlb/bench/lab"
	"nlb/internal/wait"
)

// Ports of the resilience tests: what the VIPs offer, and what targets listen on.
const (
	webPort    = 80
	dnsPort    = 53
	extraPort  = 81 // a listener that comes and goes
	targetPort = 8080
	// keptPort is the first of the clients' fixed source ports, below the range
	// that the kernel takes others from (ip-sysctl, ip_local_port_range).
	keptPort = 20000
)

// twoServices is a TCP and a UDP listener on both VIPs, and the nodes behind
// them, preserved except for hairpins.
func twoServices(top *lab.Topology, nodes ...*lab.Node) config {
	return config{
		Sources:   sources(top),
		VIPs:      both(),
		Listeners: slices.Concat(listen("web", "TCP", webPort, "web"), listen("dns", "UDP", dnsPort, "dns")),
		Groups: []group{
			pool("web", "TCP", "hairpin_snat", targetPort, targets(nodes...)),
			pool("dns", "UDP", "hairpin_snat", targetPort, targets(nodes...)),
		},
	}
}

// served is a topology whose targets listen, and a daemon that knows some of
// them and found them healthy.
func served(t *testing.T, o lab.Options, known int) (*lab.Topology, *daemon) {
	t.Helper()
	top := routed(t, o)
	serveTargets(t, top, targetPort)
	d := start(t, top, twoServices(top, top.Targets[:known]...).String())
	d.waitAllHealthy()
	return top, d
}

func (d *daemon) state(name string) string { return filepath.Join(d.dir, "state", name) }

// A pressure is traffic that nothing may disturb: flows that are held, and new
// connections all the time.
type pressure struct {
	t     *testing.T
	held  []*lab.Flows
	kept  []*lab.Churning // UDP clients with a fixed port
	fresh []*lab.Churning // TCP connections, one after another
}

const (
	heldFlows = 30 // per family
	keptFlows = 6  // per family
	// Three workers per family, a connection each in so much time: 300/s.
	freshWorkers  = 3
	freshInterval = 20 * time.Millisecond
	// patience is for a machine that is busy with other things. A SYN that was
	// lost is repeated after 1 s and 3 s, and still counts as a gap.
	patience = 5 * time.Second
)

// press begins traffic from the first client.
func press(t *testing.T, top *lab.Topology) *pressure {
	t.Helper()
	p := &pressure{t: t}
	agent := top.Clients[0].Agent()
	for i, f := range families {
		held, err := agent.Hold(soon(t), lab.Call{Network: "tcp", Dst: f.at(webPort), N: heldFlows, Parallel: 10, Timeout: patience})
		if err != nil {
			t.Fatal(err)
		}
		p.held = append(p.held, held)
		kept, err := agent.Churn(soon(t), lab.Churn{Keep: true, Interval: 50 * time.Millisecond,
			Call: lab.Call{Network: "udp", Dst: f.at(dnsPort), SrcPort: keptPort + uint16(100*i), Parallel: keptFlows, Timeout: patience}})
		if err != nil {
			t.Fatal(err)
		}
		p.kept = append(p.kept, kept)
		fresh, err := agent.Churn(soon(t), lab.Churn{Interval: freshInterval,
			Call: lab.Call{Network: "tcp", Dst: f.at(webPort), Parallel: freshWorkers, Timeout: patience}})
		if err != nil {
			t.Fatal(err)
		}
		p.fresh = append(p.fresh, fresh)
	}
	p.check("at the beginning")
	// Every kept flow has a target before anything happens to targets.
	wait.For(t, limit, "UDP flows", func() error {
		for _, k := range p.kept {
			if l := p.load(k); l.OK < 2*keptFlows {
				return errors.New(l.String())
			}
		}
		return nil
	})
	return p
}

func (p *pressure) load(c *lab.Churning) lab.Load {
	p.t.Helper()
	l, err := c.Load(soon(p.t))
	if err != nil {
		p.t.Fatal(err)
	}
	return l
}

// more waits until so many more connections have been made.
func (p *pressure) more(n int) {
	p.t.Helper()
	made := func() (sum int) {
		for _, f := range p.fresh {
			sum += p.load(f).OK
		}
		return sum
	}
	enough := made() + n
	wait.Until(p.t, limit, fmt.Sprintf("%d more connections", n), func() bool { return made() >= enough })
}

// check fails the test if a held flow is broken or was moved.
func (p *pressure) check(when string) {
	p.t.Helper()
	for _, held := range p.held {
		flows, err := held.Check(soon(p.t))
		if err != nil {
			p.t.Fatal(err)
		}
		if len(flows) != heldFlows {
			p.t.Fatalf("%s: %d flows are held", when, len(flows))
		}
		if bad := lab.Broken(flows); len(bad) > 0 {
			p.t.Errorf("%s: %d of %d held flows are broken or moved, such as %+v", when, len(bad), len(flows), bad[0])
		}
	}
}

// end stops the traffic and fails the test for each connection that failed and
// each UDP flow that moved. It returns the new connections made.
func (p *pressure) end() (connections int) {
	p.t.Helper()
	p.check("at the end")
	stop := func(c *lab.Churning) lab.Load {
		l, err := c.Stop(soon(p.t))
		if err != nil {
			p.t.Fatal(err)
		}
		return l
	}
	for _, c := range p.fresh {
		l := stop(c)
		if l.Failed > 0 || l.OK == 0 {
			p.t.Errorf("new connections: %v", l)
		}
		connections += l.OK
	}
	for _, c := range p.kept {
		if l := stop(c); l.Failed > 0 || l.Moves > 0 || l.OK == 0 {
			p.t.Errorf("UDP flows: %v", l)
		}
	}
	for _, h := range p.held {
		if err := h.Close(); err != nil {
			p.t.Error(err)
		}
	}
	return connections
}

// A silence watches the kernel of the balancer for writes to the ruleset, the
// addresses, the links and the routes.
type silence struct {
	t        *testing.T
	node     *lab.Node
	monitors []*monitor
}

// A monitor is a program that prints what the kernel tells it.
type monitor struct {
	out  logBuffer
	from int // where the output that counts begins
}

// listenForSilence begins to watch. Marks, changes that are none of ours, show
// that the monitors are there.
func listenForSilence(t *testing.T, n *lab.Node) *silence {
	t.Helper()
	s := &silence{t: t, node: n}
	for _, argv := range [][]string{{"nft", "monitor"}, {"ip", "monitor", "link", "address", "route"}} {
		m := &monitor{}
		cmd := n.Command(t.Context(), argv[0], argv[1:]...)
		cmd.Stdout, cmd.Stderr = &m.out, &m.out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
		s.monitors = append(s.monitors, m)
	}
	s.mark("beginning")
	return s
}

// mark makes a change in each kernel interface and waits until each monitor has
// shown it. One that has just been started may have missed it, so that it is made
// again, but seldom: a stranger who never stops keeps nlb from its work.
func (s *silence) mark(name string) {
	s.t.Helper()
	const again = 25 // looks of eventually
	table, looks := "mark-"+name, 0
	wait.For(s.t, limit, "mark "+name, func() error {
		if looks++; looks%again == 1 {
			must(s.t, s.node, "nft", "add table inet "+table+"; delete table inet "+table)
			must(s.t, s.node, "ip", "address", "add", "192.0.2.1/32", "dev", "lo")
			must(s.t, s.node, "ip", "address", "delete", "192.0.2.1/32", "dev", "lo")
		}
		for i, text := range []string{"delete table inet " + table, "Deleted"} {
			if m := s.monitors[i]; !strings.Contains(m.out.String()[m.from:], text) {
				return fmt.Errorf("not seen: %q", text)
			}
		}
		return nil
	})
	s.settle()
}

// settle waits until nothing is said any more about marks, and forgets it.
func (s *silence) settle() {
	s.t.Helper()
	for _, m := range s.monitors {
		before := -1
		wait.For(s.t, limit, "silence", func() error {
			if now := len(m.out.String()); now != before {
				before = now
				return errors.New("still talking")
			}
			return nil
		})
		m.from = before
	}
}

// heard is what the kernel told since the last call, or the beginning, apart
// from the marks.
func (s *silence) heard() string {
	s.t.Helper()
	starts := make([]int, len(s.monitors))
	for i, m := range s.monitors {
		starts[i] = m.from
	}
	s.mark("end")
	var lines []string
	for i, m := range s.monitors {
		for line := range strings.Lines(m.out.String()[starts[i]:m.from]) {
			// An address of the marks has a route and two lines of its own.
			if strings.Contains(line, "mark-") || strings.Contains(line, "192.0.2.1") ||
				strings.Contains(line, "valid_lft") || strings.Contains(line, "(nft)") {
				continue
			}
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}

var overrides = regexp.MustCompile(`(?m)^# override: .*\n`)

// planned fails unless nlb plan, run beside the daemon or after it, finds
// nothing to do. Remarks about drained targets are no change.
func (d *daemon) planned() error {
	d.t.Helper()
	out := d.run("plan", "-c", d.config, "--state-dir", d.state(""))
	switch {
	case out.code != 0:
		return fmt.Errorf("nlb plan: exit %d: %s%s", out.code, out.stdout, out.stderr)
	case overrides.ReplaceAllString(out.stdout, "") != "" || out.stderr != "":
		return fmt.Errorf("nlb plan says %q %q", out.stdout, out.stderr)
	}
	return nil
}

// tableWords is the text of our table as a sorted list of words: the kernel
// lists the elements of a rebuilt set in another order.
func (d *daemon) tableWords() []string {
	d.t.Helper()
	text := must(d.t, d.node, "nft", "-s", "list", "table", "inet", "nlb")
	words := strings.FieldsFunc(text, func(r rune) bool { return strings.ContainsRune(" \t\n,{}", r) })
	slices.Sort(words)
	return words
}

// works fails the test unless new flows of both kinds and families work.
func works(t *testing.T, top *lab.Topology, when string) {
	t.Helper()
	for _, f := range families {
		for network, port := range map[string]uint16{"tcp": webPort, "udp": dnsPort} {
			got := call(t, top.Clients[0], lab.Call{Network: network, Dst: f.at(port), N: 10, Parallel: 10, Timeout: patience})
			if got.Failed > 0 {
				t.Errorf("%s: %s to %v: %v", when, network, f.at(port), got)
			}
		}
	}
}

// choices are the targets that a client's fixed 5-tuples lead to, by source port.
func choices(t *testing.T, n *lab.Node, f family, tuples int) map[uint16]string {
	t.Helper()
	const first = keptPort + 1000
	c := lab.Call{Network: "udp", Dst: f.at(dnsPort), SrcPort: first, N: tuples, Parallel: 50, Timeout: patience}
	// Without flows of an earlier time, which would keep their targets.
	flows, err := n.Agent().Hold(soon(t), c)
	if err != nil {
		t.Fatal(err)
	}
	chosen := make(map[uint16]string)
	for i, r := range flows.Opened {
		if r.Err != "" {
			t.Errorf("from port %d: %s", first+i, r.Err)
			continue
		}
		chosen[uint16(first+i)] = r.Who
	}
	if err := flows.Close(); err != nil {
		t.Fatal(err)
	}
	return chosen
}

// read is a file's content, or why there is none.
func read(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(b)
}
