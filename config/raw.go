package config

import (
	"net/netip"
	"time"

	"nlb/balancer"
)

// The raw structs mirror the file, and their tags are its whole contract:
//
//	yaml      the key
//	required  there is no default; leaving it out is an error
//	default   the default, as the file would say it; lists separate by spaces
//	range     the limits of a number or duration, inclusive
//	step      what a duration is a multiple of
//	enum      the choices, separated by |, when balancer has no type for them
//	least     a list may not be empty; the text says what belongs in it
//	meaning   what the choices mean, for error messages
//	optional  "" is allowed and means none
//	doc       the description in the JSON Schema
//
// What depends on other keys (the port of a target, the timeout of a health
// check, connection_termination of a UDP group) is at the end of this file.
type rawFile struct {
	mapping `yaml:"-"`

	Dataplane rawWord               `yaml:"dataplane" enum:"nftables|ipvs|auto" default:"nftables" doc:"What in the kernel chooses targets: nftables, ipvs, or auto, which is nftables. Also --dataplane and NLB_DATAPLANE."`
	Flowtable rawBool               `yaml:"flowtable" default:"false" doc:"Let established flows of the kernel modes go past the packet filter, by a flowtable of nftables. Only with dataplane: nftables."`
	StateDir  value[string, folder] `yaml:"state_dir" default:"/var/lib/nlb" doc:"The folder for what must survive a restart: the hash key, the targets' numbers, and who is registered, drained and healthy. Also --state-dir and NLB_STATE_DIR."`
	Log       rawLog                `yaml:"log" doc:"What is logged and how."`
	Metrics   rawMetrics            `yaml:"metrics" doc:"Where Prometheus metrics are served."`

	Relay           rawRelay         `yaml:"relay" doc:"How relayed connections are treated."`
	SourceAddresses []rawAddress     `yaml:"source_addresses" doc:"The balancer's own addresses, one or more per family: SNAT pool, source of relayed connections and of health checks. Never a VIP. Default: per target, the source of the route towards it, if that is no VIP."`
	VIPs            []rawVIP         `yaml:"vips" doc:"The addresses that listeners answer on."`
	Listeners       []rawListener    `yaml:"listeners" doc:"What is accepted, and where it is forwarded."`
	TargetGroups    []rawTargetGroup `yaml:"target_groups" doc:"Sets of targets that are treated alike."`
}

type (
	rawAddress  = value[netip.Addr, address]
	rawPrefix   = value[netip.Prefix, prefix]
	rawName     = value[string, name]
	rawPort     = value[uint16, port]
	rawInt      = value[int, integer]
	rawBool     = value[bool, boolean]
	rawDuration = value[time.Duration, duration]
	rawWord     = value[string, words]

	rawProtocol      = value[balancer.Protocol, enum[balancer.Protocol, *balancer.Protocol]]
	rawCheckProtocol = value[balancer.CheckProtocol, enum[balancer.CheckProtocol, *balancer.CheckProtocol]]
	rawClientIP      = value[balancer.ClientIP, enum[balancer.ClientIP, *balancer.ClientIP]]
	rawStickiness    = value[balancer.Stickiness, enum[balancer.Stickiness, *balancer.Stickiness]]
)

type rawLog struct {
	mapping `yaml:"-"`

	Level  rawWord `yaml:"level" enum:"debug|info|warn|error" default:"info" doc:"The least important messages that are still logged. Also --log-level and NLB_LOG_LEVEL."`
	Format rawWord `yaml:"format" enum:"console|json" default:"console" doc:"Lines for people, or JSON objects for machines. Also --log-format and NLB_LOG_FORMAT."`
}

type rawMetrics struct {
	mapping `yaml:"-"`

	Address value[string, hostPort] `yaml:"address" default:"127.0.0.1:9469" doc:"host:port to serve metrics on; empty turns them off. Also --metrics-address and NLB_METRICS_ADDRESS."`
}

type rawRelay struct {
	mapping `yaml:"-"`

	Conntrack rawBool `yaml:"conntrack" default:"true" doc:"Whether the kernel tracks the connections of listeners whose groups are all relayed, and the relay's own to targets. Without, they cost less, and a firewall of this host that goes by connection state must let untracked packets pass."`
}

type rawVIP struct {
	mapping `yaml:"-"`

	Address   rawAddress          `yaml:"address" required:"true" doc:"An IPv4 or IPv6 address."`
	Interface value[string, link] `yaml:"interface" doc:"The interface to bind the address to, and to announce it on if the link speaks ARP or NDP. Left out: the address is routed here or bound by somebody else."`
}

type rawListener struct {
	mapping `yaml:"-"`

	Name           rawName      `yaml:"name" required:"true" doc:"A unique name of 1-32 letters, digits and hyphens."`
	VIP            rawAddress   `yaml:"vip" required:"true" doc:"One of vips."`
	Protocol       rawProtocol  `yaml:"protocol" required:"true" doc:"The transport protocols that are accepted."`
	Port           rawPort      `yaml:"port" required:"true" doc:"The port that clients connect to."`
	Forward        []rawForward `yaml:"forward" required:"true" least:"one or more target groups" doc:"One or more target groups."`
	TCPIdleTimeout rawDuration  `yaml:"tcp_idle_timeout" default:"350s" range:"60s-6000s" step:"1s" doc:"How long an established TCP flow may be silent."`
	Allow          []rawPrefix  `yaml:"allow" least:"one or more prefixes; leave the key out to let everybody in" default:"0.0.0.0/0 ::/0" doc:"The clients that may open flows. Default: everybody."`

	SYNProxy                rawSYNProxy `yaml:"syn_proxy" doc:"Whether handshakes are answered in place of targets, by SYN cookies."`
	MaxConnectionsPerSource rawInt      `yaml:"max_connections_per_source" default:"0" range:"0-1000000" doc:"How many flows one client may have at a time; 0 is no limit."`
	SourcePrefixLength      rawInt      `yaml:"source_prefix_length" range:"8-128" doc:"The length in bits of the prefix that max_connections_per_source takes for one client. Default: 32 for an IPv4 VIP, 64 for an IPv6 one."`
}

type rawSYNProxy struct {
	mapping `yaml:"-"`

	Enabled     rawBool `yaml:"enabled" default:"false" doc:"Whether a client has to prove its address before its TCP flow exists for conntrack and targets. For IPv4, with dataplane: nftables, and not for relayed targets."`
	MSS         rawInt  `yaml:"mss" default:"1460" range:"536-65495" doc:"The largest segment in bytes that clients may send: what all targets take."`
	WindowScale rawInt  `yaml:"window_scale" default:"7" range:"0-14" doc:"By how many bits the windows that targets announce are to be shifted: what all targets use. Needs timestamps."`
	Timestamps  rawBool `yaml:"timestamps" default:"false" doc:"Whether clients that offer timestamps may use them, and with them window scaling and selective acknowledgements, for which the cookie needs them. Targets with Linux 6.14 or later, and others that check the echo of timestamps, then take up to a second for some connections."`
}

type rawForward struct {
	mapping `yaml:"-"`

	TargetGroup rawName `yaml:"target_group" required:"true" doc:"The name of a target group."`
	Weight      rawInt  `yaml:"weight" default:"1" range:"0-999" doc:"The share of new flows, relative to the listener's other groups."`
}

type rawTargetGroup struct {
	mapping `yaml:"-"`

	Name                rawName                `yaml:"name" required:"true" doc:"A unique name of 1-32 letters, digits and hyphens."`
	Protocol            rawProtocol            `yaml:"protocol" required:"true" doc:"The transport protocols that the targets speak."`
	Port                rawPort                `yaml:"port" required:"true" doc:"The port of targets that do not name their own."`
	ClientIP            rawClientIP            `yaml:"client_ip" required:"true" meaning:"preserve: targets see the client, replies must return through here; hairpin_snat: as preserve, but a client on the target's own host is seen as the balancer; snat: targets see the balancer; proxy_protocol_v2: targets see the balancer and read the client from a header" doc:"How the client's address travels to the targets. preserve: DNAT only, the target sees the client. hairpin_snat: as preserve, except for clients on the chosen target's own host. snat: the target sees the balancer. proxy_protocol_v2: the connection is relayed and begins with a header that names the client."`
	AvoidSelf           rawBool                `yaml:"avoid_self" default:"false" doc:"With client_ip preserve: never choose the client itself as the target."`
	HairpinSubnet       rawBool                `yaml:"hairpin_subnet" default:"false" doc:"With client_ip hairpin_snat: clients in the target's directly connected subnet count as its own host."`
	Stickiness          rawStickiness          `yaml:"stickiness" default:"none" doc:"none hashes the 5-tuple of a flow, source_ip only the client's address."`
	DeregistrationDelay rawDeregistrationDelay `yaml:"deregistration_delay" doc:"What happens to the flows of a target that leaves."`
	Unhealthy           rawUnhealthy           `yaml:"unhealthy" doc:"What happens to the flows of a target that fails."`
	FailOpen            rawFailOpen            `yaml:"fail_open" doc:"When the group stops trusting its health checks: below either limit it routes to all targets."`
	ProxyProtocol       rawProxyProtocol       `yaml:"proxy_protocol" doc:"Options of client_ip proxy_protocol_v2."`
	HealthCheck         rawHealthCheck         `yaml:"health_check" doc:"How targets are probed."`
	PassiveHealthCheck  rawPassiveHealthCheck  `yaml:"passive_health_check" doc:"Whether and how targets are judged by the TCP flows of clients."`
	Targets             []rawTarget            `yaml:"targets" doc:"Who takes the flows."`
}

type rawDeregistrationDelay struct {
	mapping `yaml:"-"`

	Timeout               rawDuration `yaml:"timeout" default:"300s" range:"0s-3600s" doc:"How long the flows of a leaving target may go on."`
	ConnectionTermination rawBool     `yaml:"connection_termination" doc:"Whether the flows that are left at the end of the timeout are cut. Default: false for TCP groups, true for UDP and TCP_UDP groups."`
}

type rawUnhealthy struct {
	mapping `yaml:"-"`

	ConnectionTermination rawBool     `yaml:"connection_termination" default:"true" doc:"Whether the flows of a target are cut when it becomes unhealthy."`
	DrainingInterval      rawDuration `yaml:"draining_interval" default:"0s" range:"0s-360000s" doc:"How long a failed target stays unhealthy.draining before it is unhealthy. Only without connection_termination."`
}

type rawFailOpen struct {
	mapping `yaml:"-"`

	MinimumHealthyCount      rawInt `yaml:"minimum_healthy_count" default:"1" range:"0-" doc:"The least number of healthy targets; 0 turns the limit off."`
	MinimumHealthyPercentage rawInt `yaml:"minimum_healthy_percentage" default:"0" range:"0-100" doc:"The least share of healthy targets in percent; 0 turns the limit off."`
}

type rawProxyProtocol struct {
	mapping `yaml:"-"`

	UniqueID rawBool `yaml:"unique_id" default:"false" doc:"Adds a TLV with an id for each connection (PP2_TYPE_UNIQUE_ID)."`
	CRC32C   rawBool `yaml:"crc32c" default:"false" doc:"Adds a TLV with a checksum of the header (PP2_TYPE_CRC32C)."`
}

type rawHealthCheck struct {
	mapping `yaml:"-"`

	Protocol           rawCheckProtocol                       `yaml:"protocol" default:"TCP" doc:"What a probe speaks."`
	Port               value[uint16, trafficPort]             `yaml:"port" default:"traffic-port" doc:"The port to probe; traffic-port is the target's own."`
	Path               value[string, urlPath]                 `yaml:"path" default:"/" doc:"The path to request; HTTP and HTTPS only."`
	Host               value[string, hostHeader]              `yaml:"host" default:"" doc:"The Host header; empty is the target's address. HTTP and HTTPS only."`
	Matcher            value[[]balancer.StatusRange, matcher] `yaml:"matcher" default:"200-399" doc:"The status codes of a healthy target; HTTP and HTTPS only."`
	Interval           rawDuration                            `yaml:"interval" default:"30s" range:"1s-300s" doc:"The time from one probe of a target to the next."`
	Timeout            rawDuration                            `yaml:"timeout" range:"1s-120s" doc:"When a probe without an answer has failed; at most the interval. Default: 10s, or 6s for HTTP, or the interval if that is shorter."`
	HealthyThreshold   rawInt                                 `yaml:"healthy_threshold" default:"5" range:"1-10" doc:"Successes in a row that make an unhealthy target healthy."`
	UnhealthyThreshold rawInt                                 `yaml:"unhealthy_threshold" default:"2" range:"1-10" doc:"Failures in a row that make a target unhealthy."`
	Source             rawAddress                             `yaml:"source" optional:"true" default:"" doc:"The source address of probes, in place of source_addresses. Never a VIP."`
	ProxyProtocol      rawWord                                `yaml:"proxy_protocol" enum:"none|local" default:"none" doc:"local sends a PROXY v2 LOCAL header first."`
	VerifyTLS          rawBool                                `yaml:"verify_tls" default:"false" doc:"Whether the target's certificate must be valid for its name and chain to a trusted root; HTTPS only."`
	ServerName         value[string, hostName]                `yaml:"server_name" default:"" doc:"The name in SNI, which is also the one that verify_tls demands; empty is no SNI, and the target's address. HTTPS only."`
	CAFile             value[string, file]                    `yaml:"ca_file" default:"" doc:"A PEM file of the root certificates that verify_tls trusts; empty is the host's roots. HTTPS only."`

	trustedRoots string // what CAFile holds, once it was read
}

type rawPassiveHealthCheck struct {
	mapping `yaml:"-"`

	Enabled     rawBool     `yaml:"enabled" default:"false" doc:"Whether targets are judged by the TCP flows of clients; not in UDP groups."`
	MaxFailures rawInt      `yaml:"max_failures" default:"5" range:"1-100" doc:"TCP flows in a row that a target refused or left unanswered until it is held."`
	Hold        rawDuration `yaml:"hold" default:"10s" range:"1s-1h" doc:"How long a held target gets no new flows the first time; doubled each time it fails again soon after; at most max_hold."`
	MaxHold     rawDuration `yaml:"max_hold" default:"5m" range:"1s-24h" doc:"The limit of the doubling, and for how long a target must do well after a hold to begin anew."`
}

type rawTarget struct {
	mapping `yaml:"-"`

	Address   rawAddress  `yaml:"address" required:"true" doc:"An IPv4 or IPv6 address; not a VIP."`
	Port      rawPort     `yaml:"port" doc:"Default: the port of the group."`
	Weight    rawInt      `yaml:"weight" default:"1" range:"0-256" doc:"The share of new flows, relative to the group's other targets; 0 takes none."`
	ClientIP  rawClientIP `yaml:"client_ip" doc:"Default: the client_ip of the group. Another one is for changing the mode of a group's targets one by one."`
	Colocated []rawPrefix `yaml:"colocated" doc:"What else is on the target's host, such as its pods: clients from there are hairpins too."`
}

// clientIP is the target's own mode, 0 if it is the group's.
func (t *rawTarget) clientIP(g *rawTargetGroup) balancer.ClientIP {
	if !t.ClientIP.Written || t.ClientIP.V == g.ClientIP.V {
		return 0
	}
	return t.ClientIP.V
}

// port is the target's own port, or the group's; 0 when neither could be read.
func (t *rawTarget) port(g *rawTargetGroup) uint16 {
	if t.Port.Written {
		return t.Port.V
	}
	return g.Port.V
}

// sourcePrefixLength defaults to an address, or to the network that an IPv6 host can
// choose its addresses from (RFC 4291, 2.5.1).
func (l *rawListener) sourcePrefixLength() int {
	switch {
	case l.SourcePrefixLength.Written:
		return l.SourcePrefixLength.V
	case l.VIP.V.Is4():
		return 32
	}
	return 64
}

// timeout defaults to ELBv2's 6s for HTTP and 10s for the rest, but never to
// more than the interval.
func (h *rawHealthCheck) timeout() time.Duration {
	if h.Timeout.Written {
		return h.Timeout.V
	}
	standard := 10 * time.Second
	if h.Protocol.V == balancer.CheckHTTP {
		standard = 6 * time.Second
	}
	return min(standard, h.Interval.V)
}

// connectionTermination defaults to true where there is no end of a flow to
// wait for (ELBv2, deregistration_delay.connection_termination.enabled).
func (g *rawTargetGroup) connectionTermination() bool {
	if c := g.DeregistrationDelay.ConnectionTermination; c.Written {
		return c.V
	}
	return g.Protocol.V != balancer.TCP
}
