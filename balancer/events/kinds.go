package events

import (
	"slices"

	"go.uber.org/zap"
)

// Key is the field of a log entry that has the event's name.
const Key = "event"

// A Kind is what an event is one of. Names and fields are stable: fields are added,
// and neither is renamed or removed.
type Kind struct {
	name, meaning string
	fields        []string
}

// Name is the kind's: nouns and a verb, with dots between what contains and what is
// contained.
func (k *Kind) Name() string { return k.name }

// Meaning is what happened, in one sentence.
func (k *Kind) Meaning() string { return k.meaning }

// Fields are the names of all fields that an event of the kind may have.
func (k *Kind) Fields() []string { return slices.Clone(k.fields) }

// Field makes a log entry an event of this kind.
func (k *Kind) Field() zap.Field { return zap.String(Key, k.name) }

// kinds are all there are, in the order below.
var kinds []*Kind

// All lists the kinds, in the order in which they are documented.
func All() []*Kind { return slices.Clone(kinds) }

func kind(name, meaning string, fields ...string) *Kind {
	k := &Kind{name, meaning, fields}
	kinds = append(kinds, k)
	return k
}

// The daemon.
var (
	DaemonStarted  = kind("daemon.started", "`nlb serve` has read its file and begins.", "version", "config", "socket")
	DaemonReady    = kind("daemon.ready", "The kernel holds a configuration for the first time since the start.")
	DaemonStopping = kind("daemon.stopping", "The daemon was asked to stop. It is the last event of a stream.")
	DaemonStopped  = kind("daemon.stopped", "The daemon ends, the kernel goes on forwarding; for the log alone, the stream has ended.")
	DaemonHangs    = kind("daemon.hangs", "A part of the daemon stands still: `/livez` fails and systemd's watchdog is not fed.", "error")
	DaemonRecovers = kind("daemon.recovered", "What had stood still goes on.")
	SystemdFailed  = kind("systemd.notify_failed", "systemd could not be told.", "state", "error")
	LogLinesLost   = kind("log.lost", "Nobody read the log for so long that lines of it were lost; in the log alone.", "lines")
)

// The configuration.
var (
	ConfigReloaded      = kind("config.reloaded", "A reload put another configuration in force.", "generation", "listeners", "target_groups")
	ConfigReloadFailed  = kind("config.reload_failed", "A reload failed, and the former configuration stays in force.", "error")
	ConfigNeedsRestart  = kind("config.restart_needed", "A setting of the file changes with a restart only.", "setting", "in_force", "in_file")
	ConfigNote          = kind("config.note", "Something follows from the configuration that its author may not expect; the message says what.")
	DataplaneWasChosen  = kind("config.dataplane_chosen", "`dataplane: auto` was decided.", "ipvs")
	StateCannotBeRead   = kind("state.read_failed", "What a former daemon knew cannot be read; the message says what follows.", "file", "error")
	StateCannotBeKept   = kind("state.write_failed", "What the next daemon should know cannot be written down; the message says what follows.", "error")
	StateIsSlow         = kind("state.write_slow", "The disk of the state folder does not answer. Reloads and drains may wait for it; verdicts do not.", "for")
	ForeignStateDamaged = kind("state.previous_unknown", "What settings of the host were before is unknown: they will not be restored.", "error")
)

// Targets and target groups.
var (
	TargetStateChanged = kind("target.state_changed", "A target went from one state to another.",
		"target_group", "target", "from", "to", "reason", "description")
	TargetDeregistered = kind("target.deregistered", "`nlb drain` took a target out.", "target_group", "target", "until", "connection_termination")
	TargetRegistered   = kind("target.registered", "`nlb undrain` took a target back.", "target_group", "target")
	DrainStarted       = kind("target.drain_started",
		"A target takes no new flows and keeps those it has until the time told, because of `nlb drain` or because it left the file (`removed`). "+
			"Told again by a daemon that takes up a drain of the former one.",
		"target_group", "target", "until", "removed")
	DrainEnded = kind("target.drain_ended",
		"A drain is over; `outcome` is `expired`, `registered` (the target is back) or `not_in_use` (no listener leads to its group).",
		"target_group", "target", "outcome")
	FlowsEnded    = kind("target.flows_ended", "Flows of a target that has gone were ended, as its group asks for.", "target_group", "target", "flows")
	FailOpenBegan = kind("group.fail_open_began", "Too few targets of a group are healthy: new flows go to all of them.", "target_group")
	FailOpenEnded = kind("group.fail_open_ended", "New flows go to a group's healthy targets only.", "target_group")
	PassiveFailed = kind("group.passive_check_failed",
		"How clients' connections begin cannot be read: passive health checks judge nobody.", "error")
)

// The kernel.
var (
	KernelApplyFailed    = kind("kernel.apply_failed", "The kernel could not be made to hold the configuration; it is tried on.", "error")
	KernelApplyRecovered = kind("kernel.apply_recovered", "The kernel holds the configuration again.", "failures", "after")
	KernelDriftRepaired  = kind("kernel.drift_repaired", "Somebody else had changed what is ours, and it was put back.", "part")
	KernelWatchEnded     = kind("kernel.watch_ended", "Changes by others may go unseen until the next resync.", "part", "resync", "error")
	StaleFlowsRemoved    = kind("flows.stale_removed", "Flows to where they should not go were forgotten: their next packets choose anew.", "flows")
	FlowsNotSwept        = kind("flows.sweep_failed", "Flows that should end, or be forgotten, could not be; the message says which.", "error")
	FlowsNotTimed        = kind("flows.idle_timeouts_failed", "The idle timeouts of flows in the flowtable cannot be kept for now.", "error")
	ConntrackNearlyFull  = kind("conntrack.nearly_full", "The conntrack table is 80 % full: when it is full, new flows are dropped.", "count", "max", "dropped", "early_dropped")
	ConntrackRelaxed     = kind("conntrack.relaxed", "Less than 70 % of the conntrack table is in use.", "count", "max", "dropped", "early_dropped")
	FlowsRefused         = kind("flows.refused", "New flows were dropped because others had their addresses and ports: under SNAT, no source port was left towards a target. Told again after a minute without any.", "refused", "refused_total")
	ConntrackUnread      = kind("conntrack.unread", "How full the conntrack table is cannot be read for now.", "error")
	FlowEventsLost       = kind("flows.events_lost", "The kernel said more of flows than could be read: their last bytes are not counted. Told once.", "lost", "lost_total")
	SysctlSet            = kind("sysctl.set", "A sysctl was set.", "key", "value")
	VIPAdded             = kind("vip.added", "A VIP was bound to an interface.", "address", "interface")
	VIPRemoved           = kind("vip.removed", "A VIP was taken off an interface.", "address", "interface")
	VIPForeign           = kind("vip.foreign", "A VIP is bound by somebody else, and is left to them.", "address", "interface")
	VIPNotAnnounced      = kind("vip.announce_failed", "The neighbours were not told of VIPs.", "address", "interface", "error")
	VIPNotLocal          = kind("vip.not_local", "IPVS sees only what is delivered to this host, and packets to these VIPs are not.", "vips")
)

// The relay of proxy_protocol_v2.
var (
	RelayStarted          = kind("relay.started", "A relay worker was started.", "pid", "took")
	RelayAttended         = kind("relay.attended", "The daemon is connected to a relay worker: a new one, or one that was there; `after` is its predecessor.", "pid", "version", "after")
	RelayGone             = kind("relay.gone", "The relay worker is gone, and another one is started after the pause told.", "pid", "after")
	RelayStartFailed      = kind("relay.start_failed", "A relay worker could not be started.", "error")
	RelaySilent           = kind("relay.unresponsive", "The relay worker does not answer.", "error")
	RelayUpgradeBegan     = kind("relay.upgrade_started", "The relay worker is of another version, and a new one takes over.", "pid", "version", "wanted")
	RelayUpgradeFailed    = kind("relay.upgrade_failed", "A relay worker of another version stays.", "pid", "version", "wanted", "error")
	RelayProgramDiffers   = kind("relay.program_differs", "The program on disk is of another version than the daemon.", "pid", "version", "wanted", "program", "on_disk")
	RelaySuccessorStarted = kind("relay.successor_started", "A relay worker that is a service of its own started the one that takes over; in its own log alone.", "pid")
	RelaySuccessorFailed  = kind("relay.successor_failed", "A relay worker that is a service of its own could not start the one that should take over; in its own log alone.", "program", "error")
	RelayListens          = kind("relay.listener_opened", "The relay listens on an address.", "address")
	RelayListensNoMore    = kind("relay.listener_closed", "The relay listens on an address no more.", "address")
)
