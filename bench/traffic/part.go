// Package traffic is the part of the race that measures loads: new connections,
// requests at a fixed pace, bulk, and packets of UDP flows, of those who send on
// packets as of those who relay connections.
//
// Each contestant has a network of its own (client, balancer, three targets; all
// alike, all there from the beginning), because a ruleset makes the kernel track
// connections in the balancer's namespace, and only those who have one pay for
// it. The contestants take turns in an order that changes, and all others are
// idle meanwhile.
//
// Everything runs on one core: the balancer, and one thread that is the client
// and the targets. Rates are per second that the core worked, and costs are the
// core's work: the CPU time of the thread, the balancer and the kernel's softirq
// thread, all the way from the client's call to the target's and back. Nothing
// is subtracted: direct routing has the generator's own share. What other
// programs had of the core does not count, nor what a balancer does while it is
// not its turn: nlb looks after things a few times a second, traffic or not.
//
// A target knows who calls, and every connection is checked: for the client's
// address or the balancer's, as the contestant promises, or for the header of
// the PROXY protocol. Of some it is checked that it is the client's very port. A
// wrong one ends the measurement, and so does a target that gets next to none of
// the connections.
//
// UDP is measured of those who send on packets alone. A packet goes all the way
// within the call that sends it there, so that a batch is what was sent and
// nothing waits; a relay's process would have to run in between, and how often
// the two change places, which nobody would see, would be most of the figure.
package traffic

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"time"

	"nlb/bench/part"
	"nlb/bench/peers"
	"nlb/bench/report"
)

// Names of metrics.
const (
	connectionRate = "TCP connections"
	connectionCost = "CPU for a TCP connection"
	latency50      = "request latency, p50"
	latency99      = "request latency, p99"
	latency999     = "request latency, p99.9"
	bulkRate       = "bulk throughput"
	packetRate     = "UDP packets"
	packetCost     = "CPU for a UDP packet"
)

// Cases of bulkRate.
const (
	oneFlow    = "1 flow"
	eightFlows = "8 flows"
)

var metrics = []part.Metric{
	{Key: "connections", Metric: report.Metric{Name: connectionRate, Unit: "connections/s", Better: report.More, Limited: true}},
	{Key: "connections", Metric: report.Metric{Name: connectionCost, Unit: "µs", Better: report.Less, Decimals: 2, Limited: true}},
	{Key: "latency", Metric: report.Metric{Name: latency50, Unit: "µs", Better: report.Less, Decimals: 1}},
	{Key: "latency", Metric: report.Metric{Name: latency99, Unit: "µs", Better: report.Less, Decimals: 1, PrintedOnly: true}},
	{Key: "latency", Metric: report.Metric{Name: latency999, Unit: "µs", Better: report.Less, Decimals: 1, PrintedOnly: true}},
	{Key: "bulk", Metric: report.Metric{Name: bulkRate, Unit: "Gbit/s", Better: report.More, Decimals: 2, Limited: true,
		Cases: []string{oneFlow, eightFlows}}},
	{Key: "udp", Metric: report.Metric{Name: packetRate, Unit: "packets/s", Better: report.More, Limited: true}},
	{Key: "udp", Metric: report.Metric{Name: packetCost, Unit: "ns", Better: report.Less, Limited: true}},
}

// unit is that of a metric, by name.
func unit(name string) string {
	i := slices.IndexFunc(metrics, func(m part.Metric) bool { return m.Name == name })
	return metrics[i].Unit
}

// Part is what the race needs to know of this package.
var Part = part.Part{
	Name:        "traffic",
	Metrics:     metrics,
	Contestants: names(),
	Goals:       goals(),
	Setups:      setups(),
	Rounds:      7,
	QuickRounds: 3,
	Estimate:    estimate,
	Open:        open,
}

// goals are that nlb forwards like the least that does the same, and relays better
// than HAProxy.
func goals() (all []report.Goal) {
	add := func(metric, cas, contestant, of string, limit float64) {
		all = append(all, report.Goal{
			Metric: metric, Row: report.GoalRow{Case: cas, Contestant: contestant}, Of: report.GoalRow{Case: cas, Contestant: of}, Limit: limit,
		})
	}
	for _, pair := range [][2]string{{part.Preserve, part.MinimalDNAT}, {part.Hairpin, part.MinimalDNAT}, {part.SNAT, part.MinimalSNAT}} {
		add(connectionRate, "", pair[0], pair[1], 0.97)
		add(latency50, "", pair[0], pair[1], 1.03)
		add(bulkRate, oneFlow, pair[0], pair[1], 0.97)
		add(bulkRate, eightFlows, pair[0], pair[1], 0.97)
		add(packetRate, "", pair[0], pair[1], 0.97)
	}
	add(connectionRate, "", part.Relay, part.SendProxy, 1.05)
	add(connectionRate, "", part.Untracked, part.SendProxy, 1.05)
	add(bulkRate, oneFlow, part.Relay, part.Spliced, 1)
	add(bulkRate, eightFlows, part.Relay, part.Spliced, 1)
	return all
}

// How long things take beside the shares, on a machine of today; generously,
// since other programs have it as well.
const (
	buildTime = 800 * time.Millisecond // of a network and its balancer, and their end
	turnTime  = warmUp + 5*time.Millisecond
)

func estimate(o part.Options) (round, around time.Duration) {
	for i := range contestants {
		wanted := false
		for _, l := range loads {
			if l.wanted(&o, &contestants[i]) {
				wanted = true
				share := l.share(o.Quick)
				round += share + time.Duration(l.turns(share))*turnTime
			}
		}
		if wanted {
			around += buildTime
		}
	}
	return round, around
}

// A runner has the sites of all contestants that are wanted.
type runner struct {
	o     part.Options
	sites []*site
	// share is each contestant's part of a round.
	share func(*load) time.Duration
}

func open(ctx context.Context, o part.Options) (part.Runner, error) {
	r := &runner{o: o, share: func(l *load) time.Duration { return l.share(o.Quick) }}
	if err := r.build(ctx); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func (r *runner) build(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("needs root, because it makes network namespaces")
	}
	m, err := newMeter(r.o.Core)
	if err != nil {
		return err
	}
	var wanted []*contestant
	for i := range contestants {
		c := &contestants[i]
		if !slices.ContainsFunc(loads, func(l *load) bool { return l.wanted(&r.o, c) }) {
			continue
		}
		if err := ready(c, r.o.Programs); err != nil {
			return err
		}
		wanted = append(wanted, c)
	}
	for _, c := range wanted {
		s, err := newSite(ctx, c, r.o.Programs, m)
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		r.sites = append(r.sites, s)
	}
	return nil
}

// ready says what a contestant needs and does not find.
func ready(c *contestant, programs part.Programs) error {
	if err := programs.Ready(c.program); err != nil {
		return fmt.Errorf("%s: %w", c.name, err)
	}
	if c.program == part.Nginx {
		if _, err := peers.StreamModule(); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	return nil
}

// Close removes all networks.
func (r *runner) Close() error {
	var errs []error
	for _, s := range r.sites {
		errs = append(errs, s.close())
	}
	r.sites = nil
	return errors.Join(errs...)
}

// Round measures all loads of all contestants. This program has urgency
// meanwhile, as the balancers always have, and no garbage is collected while a
// clock runs.
func (r *runner) Round(ctx context.Context, n int, out part.Recorder) error {
	calm, err := hurry(os.Getpid())
	if err != nil {
		return err
	}
	defer calm()
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	for _, l := range loads {
		if err := r.measure(ctx, n, l, out); err != nil {
			return fmt.Errorf("%s: %w", l.name, err)
		}
	}
	return nil
}
