// Package metrics exposes to Prometheus what the daemon knows and the kernel has
// counted: in nlb's own words, with the meaning of the CloudWatch metrics of a
// Network Load Balancer where there is one. docs/metrics.md lists them all.
//
//	balancer.Snapshot ──┐
//	rules' counters ────┤
//	conntrack ──────────┼─ Reading ─► Collector ─► /metrics
//	relay ──────────────┤                 ▲
//	reloads ────────────┘               Probes ◄── healthcheck
//
// All is read when it is asked for. No packet pays for it.
package metrics

import (
	"context"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"nlb/balancer"
	"nlb/balancer/conntrack"
	"nlb/proxyproto/relay"
)

// A Reading is what there is to expose at one moment. What is nil could not be
// read, or is not there, and its metrics are left out: 0 would be a lie.
type Reading struct {
	// Snapshot is nil before the first pass.
	Snapshot *balancer.Snapshot
	// Kernel is what the kernel counted, Table its connection tracking table.
	Kernel *Kernel
	Table  *conntrack.Usage
	// LostEvents is how many ends of flows were not heard.
	LostEvents uint64
	// Relay is nil if none runs, too.
	Relay  *relay.Stats
	Reload Reload
	// Failed has the sources that could not be read: dataplane, conntrack or relay.
	Failed map[string]error
}

// Kernel is what the kernel counted of our flows.
type Kernel struct {
	// Targets are the counters of targets that the kernel forwards to.
	Targets map[balancer.TargetKey]balancer.Counters
	// Totals are the other counters of the rules, by their names in balancer/nft.
	Totals map[string]uint64
}

// Reload is how the file was last loaded.
type Reload struct {
	// OK says that the last attempt succeeded. Succeeded is when the last one did.
	OK        bool
	Succeeded time.Time
}

// The sources of a Reading that may fail each for itself.
const (
	SourceDataplane = "dataplane"
	SourceConntrack = "conntrack"
	SourceRelay     = "relay"
)

// A Collector is a prometheus.Collector of all that Definitions lists.
type Collector struct {
	version string
	read    func(context.Context) Reading
	probes  *Probes
}

var _ prometheus.Collector = (*Collector)(nil)

// readWithin bounds a reading. It is below Prometheus' default of 10 s for a
// scrape, so that what could be read arrives.
const readWithin = 8 * time.Second

// NewCollector returns a Collector that reads anew for each scrape. Read is
// called by one goroutine for each scrape under way.
func NewCollector(version string, read func(context.Context) Reading, probes *Probes) *Collector {
	return &Collector{version: version, read: read, probes: probes}
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range definitions {
		if d != probeDuration && d != probeFailures {
			out <- d.desc
		}
	}
	c.probes.took.Describe(out)
	c.probes.failures.Describe(out)
}

// Collect implements prometheus.Collector.
func (c *Collector) Collect(out chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), readWithin)
	defer cancel()
	r := c.read(ctx)
	out <- buildInfo.value(1, c.version, runtime.Version())
	collectSources(out, &r)
	collectReload(out, r.Reload)
	if r.Snapshot != nil {
		collectApply(out, r.Snapshot)
		collectListeners(out, r.Snapshot.Spec)
		collectGroups(out, &r)
	}
	if r.Kernel != nil {
		collectTotals(out, r.Kernel.Totals)
	}
	if r.Table != nil {
		collectTable(out, r.Table)
		out <- lostEvents.value(float64(r.LostEvents))
	}
	if r.Relay != nil {
		collectRelay(out, r.Relay)
	}
	c.probes.took.Collect(out)
	c.probes.failures.Collect(out)
}

func collectSources(out chan<- prometheus.Metric, r *Reading) {
	for _, s := range []struct {
		name string
		here bool
	}{{SourceDataplane, true}, {SourceConntrack, true}, {SourceRelay, r.Relay != nil || r.Failed[SourceRelay] != nil}} {
		if s.here {
			out <- sourceUp.value(boolean(r.Failed[s.name] == nil), s.name)
		}
	}
}

func collectReload(out chan<- prometheus.Metric, r Reload) {
	out <- reloadOK.value(boolean(r.OK))
	out <- reloadTime.value(unix(r.Succeeded))
}

func collectApply(out chan<- prometheus.Metric, s *balancer.Snapshot) {
	out <- configGeneration.value(float64(s.Generation))
	out <- inForce.value(boolean(s.Held))
	out <- lastPass.value(unix(s.Passed))
	out <- lastSuccess.value(unix(s.Converged))
	out <- applyDuration.value(s.Took.Seconds())
	out <- applyWrites.value(float64(s.Writes))
	out <- applyFailures.value(float64(s.Failures))
	out <- driftRepairs.value(float64(s.Repairs))
	out <- latency(s.Latency)
}

func latency(l balancer.Latency) prometheus.Metric {
	below, buckets := uint64(0), make(map[float64]uint64, len(balancer.LatencyBounds))
	for i, bound := range balancer.LatencyBounds {
		below += l.Buckets[i]
		buckets[bound.Seconds()] = below
	}
	return prometheus.MustNewConstHistogram(verdictLatency.desc, l.Count, l.Sum.Seconds(), buckets)
}

func collectListeners(out chan<- prometheus.Metric, spec *balancer.Spec) {
	for i := range spec.Listeners {
		l := &spec.Listeners[i]
		for _, f := range l.Forward {
			out <- listenerInfo.value(1, l.Name, l.VIP.String(), strconv.Itoa(int(l.Port)), l.Protocol.String(), f.TargetGroup)
		}
	}
}

// collectGroups exposes the groups and their targets, those included that have
// left the file and still have flows.
func collectGroups(out chan<- prometheus.Metric, r *Reading) {
	for i := range r.Snapshot.Groups {
		g := &r.Snapshot.Groups[i]
		out <- groupFailOpen.value(boolean(g.FailOpen.Open), g.Name)
		var inState [balancer.Unused + 1]int
		for j := range g.Targets {
			t := &g.Targets[j]
			inState[t.State]++
			collectTarget(out, g, t)
			collectFlows(out, r, g, t)
		}
		for s := balancer.Initial; s <= balancer.Unused; s++ {
			out <- groupTargets.value(float64(inState[s]), g.Name, s.String())
		}
	}
}

func collectTarget(out chan<- prometheus.Metric, g *balancer.TargetGroupStatus, t *balancer.TargetStatus) {
	name := t.Target.AddrPort().String()
	out <- targetState.value(1, g.Name, name, t.State.String(), t.Reason)
	out <- targetWeight.value(float64(t.Share), g.Name, name)
}

// collectFlows exposes what a target's flows did, by who counts them: the relay
// for those that it serves, the kernel for all others.
func collectFlows(out chan<- prometheus.Metric, r *Reading, g *balancer.TargetGroupStatus, t *balancer.TargetStatus) {
	key := balancer.TargetKey{Group: g.Name, AddrPort: t.Target.AddrPort()}
	name := key.AddrPort.String()
	mode := t.Target.ClientIP
	if mode == 0 {
		mode = g.ClientIP
	}
	if mode == balancer.ProxyProtocolV2 {
		if r.Relay != nil {
			s := r.Relay.Targets[key]
			out <- activeFlows.value(float64(s.Active), g.Name, name)
			out <- newFlows.value(float64(s.New), g.Name, name)
			out <- processedBytes.value(float64(s.Bytes), g.Name, name)
		}
		return
	}
	if r.Kernel != nil {
		c := r.Kernel.Targets[key]
		out <- activeFlows.value(float64(c.ActiveFlows), g.Name, name)
		out <- newFlows.value(float64(c.NewFlows), g.Name, name)
		out <- processedBytes.value(float64(c.Bytes), g.Name, name)
		out <- processedPackets.value(float64(c.Packets), g.Name, name)
		out <- resetFlows.value(float64(c.Resets), g.Name, name)
	}
}

// packetDrops are those of the rules' drops that are about packets of no flow;
// all others are about the first packet of one.
var packetDrops = map[string]bool{"unwanted": true, "invalid": true}

// collectTotals exposes the rules' counters. Whatever ends in _drops is one: rules
// may learn new reasons without this package.
func collectTotals(out chan<- prometheus.Metric, totals map[string]uint64) {
	for name, n := range totals {
		reason, isDrop := strings.CutSuffix(name, "_drops")
		switch {
		case isDrop && packetDrops[reason]:
			out <- droppedPackets.value(float64(n), reason)
		case isDrop:
			out <- rejectedFlows.value(float64(n), reason)
		case name == "hairpins":
			out <- hairpinFlows.value(float64(n))
		case name == "resets":
			out <- resets.value(float64(n))
		}
	}
}

func collectTable(out chan<- prometheus.Metric, u *conntrack.Usage) {
	out <- conntrackEntries.value(float64(u.Entries))
	out <- conntrackLimit.value(float64(u.Limit))
	out <- insertFailures.value(float64(u.InsertFailed))
	out <- conntrackDrops.value(float64(u.Dropped))
	out <- earlyDrops.value(float64(u.EarlyDropped))
}

func collectRelay(out chan<- prometheus.Metric, s *relay.Stats) {
	out <- relayConnections.value(float64(s.Connections))
	out <- relayLimit.value(float64(s.MaxConnections))
	if s.OpenFiles > 0 { // a worker of an earlier version does not say
		out <- relayFiles.value(float64(s.OpenFiles))
		out <- relayMaxFiles.value(float64(s.MaxFiles))
	}
	out <- relayAccepted.value(float64(s.Accepted))
	out <- relayPortErrors.value(float64(s.NoPort))
	for reason, n := range map[string]uint64{
		"not_allowed": s.Refused, "failed": s.Failed, "no_target": s.NoTarget, "idle_timeout": s.IdleTimeouts, "exhausted": s.Exhausted,
	} {
		out <- relayResets.value(float64(n), reason)
	}
}

func boolean(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// unix is a time in seconds, 0 for the zero time.
func unix(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixMilli()) / 1000
}
