package metrics

import "github.com/prometheus/client_golang/prometheus"

// A Kind is what a metric's values mean, in the words of Prometheus.
type Kind string

// The kinds of metrics that there are.
const (
	Gauge     Kind = "gauge"
	Counter   Kind = "counter"
	Histogram Kind = "histogram"
)

// A Definition is what there is to know of one metric, for its exposition and
// for docs/metrics.md.
type Definition struct {
	Name   string
	Kind   Kind
	Labels []string
	Help   string
	// CloudWatch is the metric of a Network Load Balancer that means the same, or
	// comes close ("CloudWatch metrics for your Network Load Balancer" in the ELBv2
	// guide); empty where there is none.
	CloudWatch string

	desc *prometheus.Desc
}

// definitions are all, in the order of the documentation. Only define adds to it,
// before main.
var definitions []*Definition

// Definitions lists all metrics of nlb's own, in the order of the documentation.
func Definitions() []Definition {
	all := make([]Definition, len(definitions))
	for i, d := range definitions {
		all[i] = *d
	}
	return all
}

func define(k Kind, name, cloudWatch, help string, labels ...string) *Definition {
	d := &Definition{
		Name: "nlb_" + name, Kind: k, Labels: labels, Help: help, CloudWatch: cloudWatch,
		desc: prometheus.NewDesc("nlb_"+name, help, labels, nil),
	}
	definitions = append(definitions, d)
	return d
}

// value is one sample of a gauge or counter.
func (d *Definition) value(v float64, labels ...string) prometheus.Metric {
	kind := prometheus.GaugeValue
	if d.Kind == Counter {
		kind = prometheus.CounterValue
	}
	return prometheus.MustNewConstMetric(d.desc, kind, v, labels...)
}

// What the labels mean:
//
//	listener, target_group  names of the configuration
//	target                  address:port, as [2001:db8::1]:80 for IPv6
//	state, reason           of a target: ELBv2's; of what was dropped: as the help says
//
// No label has a client's address: clients choose theirs, and each would be a
// series for ever.
var (
	buildInfo = define(Gauge, "build_info", "",
		"1, with the version of the program.", "version", "goversion")
	sourceUp = define(Gauge, "source_up", "",
		"Whether what a source knows could be read for this scrape. Where it is 0, the metrics of that source are missing: they are not 0. "+
			"dataplane: what the kernel counts of targets, and drops; conntrack: the size and losses of its table; relay: all of relayed targets, there only if a relay runs.", "source")

	listenerInfo = define(Gauge, "listener_info", "",
		"1 for each target group that a listener forwards to. vip is the address, protocol TCP, UDP or TCP_UDP.",
		"listener", "vip", "port", "protocol", "target_group")
	groupTargets = define(Gauge, "target_group_targets", "HealthyHostCount, UnHealthyHostCount",
		"Targets of a group in each state: initial, healthy, unhealthy, unhealthy.draining, draining, unused.", "target_group", "state")
	groupFailOpen = define(Gauge, "target_group_fail_open", "",
		"Whether a group has fewer healthy targets than fail_open asks for, so that all of them take new flows.", "target_group")
	targetState = define(Gauge, "target_state", "",
		"1 for the state that a target is in, with its reason code, which is empty for a healthy one.", "target_group", "target", "state", "reason")
	targetWeight = define(Gauge, "target_weight", "",
		"Weight that new flows see: the configured one, or 0 while the target takes none.", "target_group", "target")
	activeFlows = define(Gauge, "target_active_flows", "ActiveFlowCount",
		"Flows that a target has now.", "target_group", "target")
	newFlows = define(Counter, "target_new_flows_total", "NewFlowCount; with nlb_target_group_fail_open also UnhealthyRoutedFlowCount",
		"Flows that were sent to a target.", "target_group", "target")
	processedBytes = define(Counter, "target_processed_bytes_total", "ProcessedBytes",
		"Bytes of a target's flows in both directions: with IP headers where the kernel forwards, without any where the relay does.", "target_group", "target")
	processedPackets = define(Counter, "target_processed_packets_total", "ProcessedPackets",
		"Packets of a target's flows in both directions. There is none for relayed targets: the relay sees bytes.", "target_group", "target")
	resetFlows = define(Counter, "target_reset_flows_total", "TCP_Client_Reset_Count + TCP_Target_Reset_Count + TCP_ELB_Reset_Count, by flows and not by packets",
		"TCP flows of a target that ended after a reset, from the client, the target or nlb: connection tracking does not tell who sent it. "+
			"A flow counts when it is forgotten, 10 s after the reset. There is none for relayed targets, see nlb_relay_resets_total.", "target_group", "target")

	resets = define(Counter, "resets_total", "TCP_ELB_Reset_Count",
		"Resets that nlb sent to the ends of flows that it ends: of targets that failed or were deregistered, with connection termination. "+
			"Those of the relay are in nlb_relay_resets_total.")

	rejectedFlows = define(Counter, "rejected_flows_total", "RejectedFlowCount; not_allowed: SecurityGroupBlockedFlowCount_Inbound_TCP, _UDP",
		"First packets of flows that were dropped, so that a client that repeats its SYN counts again. "+
			"not_allowed: the listener's allow leaves the client out; no_target: the group has nobody to send to; "+
			"hairpin: the client is its own target, under preserve; no_source: no address to source the flow from.", "reason")
	droppedPackets = define(Counter, "dropped_packets_total", "",
		"Packets of no flow that were dropped. unwanted: to a VIP, but to no listener of it; invalid: from a target, but of no flow that is known.", "reason")
	hairpinFlows = define(Counter, "hairpin_flows_total", "",
		"Flows that were sourced from the balancer because client and target share a host.")

	probeDuration = define(Histogram, "health_check_duration_seconds", "",
		"Time from a probe's start to the target's good answer. A probe that several groups share counts in each.", "target_group")
	probeFailures = define(Counter, "health_check_failures_total", "",
		"Probes without a good answer, by how they ended: refused, timeout, reset, closed, unreachable, tls, malformed, code_mismatch, "+
			"source_is_a_vip; unmade: not made for a reason of this host, and held against nobody.", "target_group", "reason")

	conntrackEntries = define(Gauge, "conntrack_entries", "",
		"Flows in the connection tracking table of this network namespace, others' included.")
	conntrackLimit = define(Gauge, "conntrack_entries_limit", "",
		"Flows that may be in there: net.netfilter.nf_conntrack_max.")
	insertFailures = define(Counter, "conntrack_insert_failures_total", "PortAllocationErrorCount",
		"Flows of this network namespace, others' included, that were dropped because another had the same addresses and ports: "+
			"under SNAT, because every source port towards a target was taken.")
	conntrackDrops = define(Counter, "conntrack_dropped_packets_total", "",
		"Packets that connection tracking dropped: those of nlb_conntrack_insert_failures_total, and others because the table was full.")
	earlyDrops = define(Counter, "conntrack_early_drops_total", "",
		"Unanswered flows that were forgotten to make room in a full table.")
	lostEvents = define(Counter, "conntrack_lost_events_total", "",
		"Flows of targets whose end was not heard. What they carried at last is missing in nlb_target_processed_bytes_total.")

	relayConnections = define(Gauge, "relay_connections", "ActiveFlowCount",
		"Clients' connections through the relay now. Like all of the relay's, this is there while one runs.")
	relayLimit = define(Gauge, "relay_connections_limit", "",
		"Connections that the relay may have: as many as its file descriptors allow, unless --max-connections says less.")
	relayFiles = define(Gauge, "relay_open_fds", "",
		"File descriptors of the relay's process, and of those before it that still have connections.")
	relayMaxFiles = define(Gauge, "relay_max_fds", "",
		"File descriptors that the relay's process may have, its hard limit.")
	relayAccepted = define(Counter, "relay_accepted_connections_total", "NewFlowCount",
		"Clients' connections that the relay took, those that it reset included.")
	relayResets = define(Counter, "relay_resets_total", "TCP_ELB_Reset_Count",
		"Clients' connections that the relay itself reset. not_allowed: the listener's allow leaves the client out; no_target: there was none to try; "+
			"failed: none that was tried answered; idle_timeout: both ends were silent; exhausted: no descriptor or memory.", "reason")
	relayPortErrors = define(Counter, "relay_port_allocation_errors_total", "PortAllocationErrorCount",
		"Dials of the relay that found no free port at any source address.")

	configGeneration = define(Gauge, "config_generation", "",
		"Configurations that were put in force since the daemon's start.")
	reloadOK = define(Gauge, "config_last_reload_successful", "",
		"Whether the last attempt to reload the file succeeded; 1 before the first.")
	reloadTime = define(Gauge, "config_last_reload_success_timestamp_seconds", "",
		"When the file was last loaded with success, in Unix time.")
	inForce = define(Gauge, "apply_in_force", "",
		"Whether the kernel holds the configuration.")
	lastPass = define(Gauge, "apply_last_pass_timestamp_seconds", "",
		"When the kernel was last compared with what it should hold, in Unix time. A daemon that lives does so every 10 s or sooner.")
	lastSuccess = define(Gauge, "apply_last_success_timestamp_seconds", "",
		"When the kernel was last seen to hold what it should, in Unix time; 0 for never.")
	applyDuration = define(Gauge, "apply_duration_seconds", "",
		"How long that pass took, to look and to make it so.")
	applyWrites = define(Counter, "apply_writes_total", "",
		"Changes of the kernel that were carried out.")
	applyFailures = define(Counter, "apply_failures_total", "",
		"Passes that failed. Each is tried again.")
	driftRepairs = define(Counter, "apply_drift_repairs_total", "",
		"Changes that undid what somebody else did to nlb's part of the kernel.")
	verdictLatency = define(Histogram, "verdict_latency_seconds", "",
		"Time from a health check's verdict until the kernel follows it.")
)
