package traps

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"nlb/balancer"
	"nlb/bench/lab"
)

// Modes are the values of client_ip, in the order in which they are compared.
var Modes = []string{"preserve", "hairpin_snat", "snat", "proxy_protocol_v2"}

// A Comparison is how the modes fare in the same cases.
type Comparison struct {
	// Dataplane is what nlb was run with.
	Dataplane balancer.Dataplane `json:"dataplane"`

	Cases []Case `json:"cases"`
	Rates []Rate `json:"rates"`
}

// A Case is one caller of one target, by every mode.
type Case struct {
	Name  string `json:"case"`
	Title string `json:"title"`
	Cells []Cell `json:"cells"` // in the order of Modes
}

// A Cell is what became of one call.
type Cell struct {
	Mode  string `json:"mode"`
	Works bool   `json:"works"`
	// Sees is the address that the target saw, and Header the one that a PROXY
	// header told it; zero if the call failed, or there was no header.
	Sees   netip.Addr `json:"target_sees,omitzero"`
	Header netip.Addr `json:"header,omitzero"`
	// Error is why the call failed, or that there is no such thing.
	Error string `json:"error,omitempty"`
	// Says is Sees and Header by their roles, or the error, in a word or two.
	Says string `json:"says"`

	walked Finding // the packets' way, with Options.Walks
}

// A Rate is how fast connections are made, one question and one answer each, as a
// share of those without a balancer on the same way.
type Rate struct {
	Mode     string  `json:"mode"`
	Relative float64 `json:"relative"`
}

// Where targets listen: plainly, and for who reads PROXY headers; and the same
// for servers that speak first.
const (
	plainBase    = 81 // of the VIP's ports, a port for each mode
	greetingBase = 91
)

func backend(greeting bool, mode string) uint16 {
	port := uint16(targetPort)
	if greeting {
		port += 2
	}
	if mode == "proxy_protocol_v2" {
		port++
	}
	return port
}

// A comparedNet is a network and the cases that are tried in it.
type comparedNet struct {
	name    string
	build   func(lab.Options) (*lab.Topology, error)
	options lab.Options
	target  func(*site) *lab.Node
	keys    string // of the target, in YAML
	hairpin string // of the group in mode hairpin_snat, in YAML
	cases   []comparedCase
}

// A comparedCase is one caller. prepare changes the network for it, until
// s.revert.
type comparedCase struct {
	name, title string
	caller      func(*site) *lab.Node
	prepare     func(*site) error
	udp         bool
	v6          bool
	greeting    bool
}

func outside(s *site) *lab.Node { return s.Clients[0] }
func first(s *site) *lab.Node   { return s.Targets[0] }

var comparedNets = []comparedNet{
	{
		name: "routed", build: lab.Routed, options: lab.Options{Targets: 1}, target: first,
		cases: []comparedCase{
			{name: "outside client", title: "a client beyond the balancer, which is the target's way back", caller: outside},
			{name: "hairpin, self", title: "the target calls the VIP", caller: first},
			{name: "VIP on the target", title: "the target has the VIP on lo", caller: outside, prepare: func(s *site) error {
				return s.bind(s.Targets[0])
			}},
			{name: "server speaks first", title: "the client waits for a greeting, as with SMTP", caller: outside, greeting: true},
			{name: "UDP", title: "one datagram and its answer", caller: outside, udp: true},
			{name: "IPv6", title: "an outside client, over IPv6", caller: outside, v6: true},
		},
	},
	{
		name: "pod node", build: lab.PodNode, options: lab.Options{Nodes: 1},
		target: func(s *site) *lab.Node { return s.Targets[1] }, keys: `colocated: ["10.244.1.0/24"]`,
		cases: []comparedCase{{name: "same node", title: "a pod calls a pod of its node (colocated is set)", caller: first}},
	},
	{
		name: "one-arm", build: lab.OneArm, options: lab.Options{Targets: 1}, target: first, hairpin: ", hairpin_subnet: true",
		cases: []comparedCase{{
			name: "same subnet", title: "a client in the target's subnet (hairpin_subnet is set)",
			caller: func(s *site) *lab.Node { return s.Inside[0] },
		}},
	},
	{
		name: "multi-homed", build: lab.MultiHomed, options: lab.Options{Targets: 1}, target: first,
		cases: []comparedCase{
			{name: "strict rp_filter", title: "the target's way back is another interface, rp_filter=1", caller: outside, prepare: func(s *site) error {
				const key = "net.ipv4.conf.all.rp_filter"
				s.later(func() error { return s.Targets[0].Sysctl(key, "0") })
				return s.Targets[0].Sysctl(key, "1")
			}},
			{name: "asymmetric return", title: "the target's way back goes past the balancer", caller: outside},
		},
	},
}

// caseOrder is the order for the reader: from what always works to the details.
var caseOrder = []string{
	"outside client", "hairpin, self", "same node", "same subnet", "strict rp_filter", "asymmetric return",
	"VIP on the target", "server speaks first", "UDP", "IPv6",
}

// Compare tries every case by every mode, with the real nlb.
func Compare(ctx context.Context, o Options) (Comparison, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	c := Comparison{Dataplane: o.Dataplane}
	results := make([][]Case, len(comparedNets))
	group, ctx := errgroup.WithContext(ctx)
	for i, n := range comparedNets {
		group.Go(func() (err error) {
			results[i], err = n.compare(ctx, o)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return c, fmt.Errorf("compare: %w", err)
	}
	c.Cases = slices.Concat(results...)
	slices.SortFunc(c.Cases, func(a, b Case) int {
		return cmp.Compare(slices.Index(caseOrder, a.Name), slices.Index(caseOrder, b.Name))
	})
	return c, nil
}

// withNLB builds the network and runs nlb with every mode in it, for as long as
// do takes.
func (n comparedNet) withNLB(ctx context.Context, o Options, do func(*site) error) (err error) {
	s, err := newSite(Scenario{Name: n.name, build: n.build, options: n.options}, Options{Program: o.Program, Dataplane: o.Dataplane, Walks: o.Walks, callTime: o.callTime})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	for _, greeting := range []bool{false, true} {
		for _, serve := range []lab.Serve{
			{Ports: []uint16{backend(greeting, "snat")}, Greet: greeting},
			{Ports: []uint16{backend(greeting, "proxy_protocol_v2")}, Networks: []string{"tcp"}, Greet: greeting, Proxy: true},
		} {
			if _, err := n.target(s).Agent().Serve(ctx, serve); err != nil {
				return err
			}
		}
	}
	if err := s.nlb(ctx, s.LB, n.config(s), settled); err != nil {
		return err
	}
	return do(s)
}

func (n comparedNet) compare(ctx context.Context, o Options) (cases []Case, err error) {
	err = n.withNLB(ctx, o, func(s *site) error {
		for _, c := range n.cases {
			done, err := c.try(ctx, s)
			if err != nil {
				return err
			}
			cases = append(cases, done)
		}
		return nil
	})
	return cases, err
}

// config has a listener and a group for each mode, one more for servers that
// speak first, and both families.
func (n comparedNet) config(s *site) string {
	var listeners, groups strings.Builder
	t := n.target(s)
	for _, greeting := range []bool{false, true} {
		base, suffix := plainBase, ""
		if greeting {
			base, suffix = greetingBase, "-first"
		}
		for i, mode := range Modes {
			name := strings.ReplaceAll(mode, "_", "-") + suffix
			protocol, keys := "TCP_UDP", ""
			if mode == "proxy_protocol_v2" {
				protocol = "TCP"
			}
			if mode == "hairpin_snat" {
				keys = n.hairpin
			}
			for _, vip := range []netip.Addr{lab.VIP4, lab.VIP6} {
				family := "4"
				if vip.Is6() {
					family = "6"
				}
				fmt.Fprintf(&listeners, "  - {name: %s-%s, vip: %q, protocol: %s, port: %d, forward: [{target_group: %s}]}\n",
					name, family, vip, protocol, base+i, name)
			}
			fmt.Fprintf(&groups, "  - {name: %s, protocol: %s, port: %d, client_ip: %s%s, targets: [%s, {address: %q}]}\n",
				name, protocol, backend(greeting, mode), mode, keys, at(t, n.keys), t.Addr6)
		}
	}
	return fmt.Sprintf(`source_addresses: [%v, %q]
vips: [{address: %v, interface: lo}, {address: %q, interface: lo}]
metrics: {address: ""}
listeners:
%starget_groups:
%s`, s.LB.Addr4, s.LB.Addr6, lab.VIP4, lab.VIP6, &listeners, &groups)
}

// compareTime is how long a call may take: many cells are calls that hang.
const compareTime = 2 * time.Second

// try makes the call by all modes at once, or one after the other if their packets
// are to be told apart.
func (c comparedCase) try(ctx context.Context, s *site) (done Case, err error) {
	if c.prepare != nil {
		if err := c.prepare(s); err != nil {
			return done, errors.Join(err, s.revert())
		}
	}
	defer func() { err = errors.Join(err, s.revert()) }()
	done = Case{Name: c.name, Title: c.title, Cells: make([]Cell, len(Modes))}
	failed := make([]error, len(Modes))
	var calls sync.WaitGroup
	for i := range Modes {
		if s.options.Walks {
			done.Cells[i], failed[i] = c.walk(ctx, s, i)
			continue
		}
		calls.Go(func() { done.Cells[i], failed[i] = c.cell(ctx, s, i) })
	}
	calls.Wait()
	return done, errors.Join(failed...)
}

func (c comparedCase) cell(ctx context.Context, s *site, mode int) (Cell, error) {
	cell := Cell{Mode: Modes[mode]}
	call, base := lab.Call{Timeout: cmp.Or(s.options.callTime, compareTime), Silent: c.greeting}, plainBase
	if c.greeting {
		base = greetingBase
	}
	vip := lab.VIP4
	if c.v6 {
		vip = lab.VIP6
	}
	call.Dst = netip.AddrPortFrom(vip, uint16(base+mode))
	if c.udp {
		if cell.Mode == "proxy_protocol_v2" {
			cell.Error, cell.Says = "nlb relays TCP alone", "TCP only"
			return cell, nil
		}
		call.Network = "udp"
	}
	caller := c.caller(s)
	r, err := s.call(ctx, caller, call)
	if err != nil {
		return cell, err
	}
	cell.Error, cell.Sees, cell.Header = r.Err, r.Peer, r.Client.Addr()
	cell.Works = r.Err == ""
	cell.Says = cell.words(s, caller)
	return cell, nil
}

// words has roles for addresses.
func (c Cell) words(s *site, caller *lab.Node) string {
	if !c.Works {
		return "no: " + c.Error
	}
	role := func(a netip.Addr) string {
		switch a {
		case caller.Addr4, caller.Addr6:
			return "client"
		case s.LB.Addr4, s.LB.Addr6:
			return "lb"
		}
		return a.String()
	}
	if c.Header.IsValid() {
		return role(c.Sees) + ", " + role(c.Header) + " in header"
	}
	return role(c.Sees)
}

// How rates are measured: calls in a batch, and at a time.
const (
	rateCalls    = 300
	rateParallel = 4
)

// RateRounds is how often MeasureRates should measure for people: about four
// seconds on a quiet machine.
const RateRounds = 10

// MeasureRates measures how fast connections are made by each mode, beside those
// that no balancer touches, in turns, a number of rounds. The best of each counts,
// since all that others do on the machine makes it slower. It says what a mode
// costs roughly: client, balancer and target share the machine's cores.
func MeasureRates(ctx context.Context, o Options, rounds int) ([]Rate, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	best := make([]float64, len(Modes)+1)
	routed := comparedNets[0]
	err := routed.withNLB(ctx, o, func(s *site) error {
		direct := target(s.Targets[0])
		for range rounds {
			for i := range best {
				dst := direct
				if i > 0 {
					dst = netip.AddrPortFrom(lab.VIP4, uint16(plainBase+i-1))
				}
				rate, err := connectionRate(ctx, s.Clients[0], dst)
				if err != nil {
					return err
				}
				best[i] = max(best[i], rate)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("measure rates: %w", err)
	}
	var rates []Rate
	for i, mode := range Modes {
		rates = append(rates, Rate{mode, float64(int(100*best[i+1]/best[0]+0.5)) / 100})
	}
	return rates, nil
}

// connectionRate is connections per second, each with a question and an answer.
func connectionRate(ctx context.Context, from *lab.Node, dst netip.AddrPort) (float64, error) {
	begin := time.Now()
	replies, err := from.Agent().Call(ctx, lab.Call{Network: "tcp", Dst: dst, N: rateCalls, Parallel: rateParallel, Timeout: answerTime})
	took := time.Since(begin)
	if err != nil {
		return 0, err
	}
	if t := lab.Count(replies); t.Failed > 0 {
		return 0, fmt.Errorf("%v: %v", dst, t)
	}
	return rateCalls / took.Seconds(), nil
}

// ComparisonText is a Comparison as a table for people, 80 columns wide.
func ComparisonText(c Comparison) string {
	var b strings.Builder
	row := func(name string, cells []string) {
		fmt.Fprintf(&b, "%-20s", name)
		for i, cell := range cells {
			if i < len(cells)-1 {
				cell = fmt.Sprintf("%-13s ", cell)
			}
			b.WriteString(cell)
		}
		b.WriteString("\n")
	}
	row("the target sees", Modes)
	b.WriteString(strings.Repeat("─", MinWidth) + "\n")
	for _, done := range c.Cases {
		var cells []string
		for _, cell := range done.Cells {
			cells = append(cells, strings.Replace(cell.Says, " in header", "*", 1))
		}
		row(done.Name, cells)
	}
	if len(c.Rates) > 0 {
		var cells []string
		for _, r := range c.Rates {
			cells = append(cells, fmt.Sprintf("%.2f", r.Relative))
		}
		row("connections/s **", cells)
	}
	fmt.Fprintf(&b, "\nnlb ran with dataplane %v\n", c.Dataplane)
	b.WriteString("*  in the PROXY v2 header that comes first\n")
	if len(c.Rates) > 0 {
		b.WriteString("** new connections, of those without a balancer on the same way; all ends share\n   this machine's cores, so a rough figure\n")
	}
	b.WriteString("\n")
	for _, done := range c.Cases {
		fmt.Fprintf(&b, "%-20s%s\n", done.Name, done.Title)
	}
	return b.String()
}
