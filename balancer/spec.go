package balancer

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// A Protocol is what a listener accepts and what a target group speaks, in the
// words of ELBv2: TCP, UDP or TCP_UDP.
type Protocol uint8

const (
	TCP Protocol = iota + 1
	UDP
	TCPUDP
)

var protocolNames = map[Protocol]string{TCP: "TCP", UDP: "UDP", TCPUDP: "TCP_UDP"}

func (p Protocol) String() string               { return enumName(protocolNames, p) }
func (p Protocol) MarshalText() ([]byte, error) { return enumText(protocolNames, p) }
func (p *Protocol) UnmarshalText(b []byte) error {
	return enumParse(protocolNames, p, b, "TCP, UDP or TCP_UDP")
}

// Numbers lists the IP protocol numbers the protocol stands for, ascending.
func (p Protocol) Numbers() []uint8 {
	switch p {
	case TCP:
		return []uint8{ProtoTCP}
	case UDP:
		return []uint8{ProtoUDP}
	case TCPUDP:
		return []uint8{ProtoTCP, ProtoUDP}
	}
	return nil
}

// IP protocol numbers (IANA, "Assigned Internet Protocol Numbers").
const (
	ProtoTCP uint8 = 6
	ProtoUDP uint8 = 17
)

// A ClientIP is how the client's address travels to the targets of a group.
type ClientIP uint8

const (
	// Preserve rewrites the destination only. The target sees the client.
	Preserve ClientIP = iota + 1
	// HairpinSNAT preserves the client, except for a client that is on the
	// chosen target's own host: that flow is sourced from the balancer.
	HairpinSNAT
	// SNAT sources every flow from the balancer.
	SNAT
	// ProxyProtocolV2 ends the connection at the balancer and opens another,
	// which begins with a PROXY v2 header that names the client.
	ProxyProtocolV2
)

var clientIPNames = map[ClientIP]string{
	Preserve: "preserve", HairpinSNAT: "hairpin_snat", SNAT: "snat", ProxyProtocolV2: "proxy_protocol_v2",
}

func (m ClientIP) String() string               { return enumName(clientIPNames, m) }
func (m ClientIP) MarshalText() ([]byte, error) { return enumText(clientIPNames, m) }
func (m *ClientIP) UnmarshalText(b []byte) error {
	return enumParse(clientIPNames, m, b, "preserve, hairpin_snat, snat or proxy_protocol_v2")
}

// A Stickiness says which fields of a flow choose its target.
type Stickiness uint8

const (
	// StickyNone hashes the 5-tuple: each flow chooses anew.
	StickyNone Stickiness = iota
	// StickySourceIP hashes the client's address: a client keeps its target.
	StickySourceIP
)

var stickinessNames = map[Stickiness]string{StickyNone: "none", StickySourceIP: "source_ip"}

func (s Stickiness) String() string               { return enumName(stickinessNames, s) }
func (s Stickiness) MarshalText() ([]byte, error) { return enumText(stickinessNames, s) }
func (s *Stickiness) UnmarshalText(b []byte) error {
	return enumParse(stickinessNames, s, b, "none or source_ip")
}

// A CheckProtocol is what a health check speaks.
type CheckProtocol uint8

const (
	CheckTCP CheckProtocol = iota + 1
	CheckHTTP
	CheckHTTPS
)

var checkProtocolNames = map[CheckProtocol]string{CheckTCP: "TCP", CheckHTTP: "HTTP", CheckHTTPS: "HTTPS"}

func (p CheckProtocol) String() string               { return enumName(checkProtocolNames, p) }
func (p CheckProtocol) MarshalText() ([]byte, error) { return enumText(checkProtocolNames, p) }
func (p *CheckProtocol) UnmarshalText(b []byte) error {
	return enumParse(checkProtocolNames, p, b, "TCP, HTTP or HTTPS")
}

// A Spec is what the operator wants, complete and valid. It is never modified
// after it was made: a reload makes another.
type Spec struct {
	Dataplane Dataplane
	// SourceAddresses are the balancer's own addresses for SNAT, relayed
	// connections and probes. Empty for a family means: per target, the source
	// of the route towards it.
	SourceAddresses []netip.Addr
	// UntrackedRelay keeps relayed connections out of connection tracking; see
	// Table.
	UntrackedRelay bool
	// Flowtable lets established flows go past the packet filter; see
	// Table.FastPath.
	Flowtable    bool
	VIPs         []VIP
	Listeners    []Listener
	TargetGroups []TargetGroup
}

// Group returns the target group of that name, or nil.
func (s *Spec) Group(name string) *TargetGroup {
	for i := range s.TargetGroups {
		if s.TargetGroups[i].Name == name {
			return &s.TargetGroups[i]
		}
	}
	return nil
}

// GroupsInUse says to which target groups listeners forward.
func (s *Spec) GroupsInUse() map[string]bool {
	used := make(map[string]bool, len(s.TargetGroups))
	for _, l := range s.Listeners {
		for _, f := range l.Forward {
			used[f.TargetGroup] = true
		}
	}
	return used
}

// HasVIP reports whether a is one of the VIPs.
func (s *Spec) HasVIP(a netip.Addr) bool {
	for _, v := range s.VIPs {
		if v.Address == a {
			return true
		}
	}
	return false
}

// A VIP is an address that listeners answer on.
type VIP struct {
	Address netip.Addr
	// Interface is where the address is bound and announced; empty when it is
	// routed to this host or bound by somebody else.
	Interface string
}

// A Listener accepts new flows on one port of a VIP.
type Listener struct {
	Name     string
	VIP      netip.Addr
	Protocol Protocol
	Port     uint16
	Forward  []WeightedGroup
	// TCPIdleTimeout is how long an established flow may be silent, 60s to 6000s.
	TCPIdleTimeout time.Duration
	// Allow lists the client prefixes that may open flows, of either family.
	Allow []netip.Prefix
	// SYNProxy and SourceLimit protect the targets; off by default.
	SYNProxy    SYNProxy    `json:",omitzero"`
	SourceLimit SourceLimit `json:",omitzero"`
}

// A WeightedGroup is one choice of a listener's forward action.
type WeightedGroup struct {
	TargetGroup string
	Weight      int // 0-999, relative to the listener's other groups
}

// A TargetGroup is a set of targets that are treated alike.
type TargetGroup struct {
	Name                string
	Protocol            Protocol
	Port                uint16
	ClientIP            ClientIP
	AvoidSelf           bool // ClientIP Preserve only
	HairpinSubnet       bool // ClientIP HairpinSNAT only
	Stickiness          Stickiness
	DeregistrationDelay DeregistrationDelay
	Unhealthy           UnhealthyAction
	FailOpen            FailOpen
	ProxyProtocol       ProxyProtocol
	HealthCheck         HealthCheck
	Passive             PassiveCheck
	Targets             []Target
}

// ClientIPOf is how the client's address travels to one of g's targets.
func (g *TargetGroup) ClientIPOf(t Target) ClientIP {
	return cmp.Or(t.ClientIP, g.ClientIP)
}

// Forwards reports whether the kernel has flows of any target of s to send on, and not
// the relay alone.
func (s *Spec) Forwards() bool {
	return slices.ContainsFunc(s.TargetGroups, func(g TargetGroup) bool {
		return g.ClientIP != ProxyProtocolV2 || slices.ContainsFunc(g.Targets, func(t Target) bool { return g.ClientIPOf(t) != ProxyProtocolV2 })
	})
}

// DeregistrationDelay is what happens to the flows of a target that leaves.
type DeregistrationDelay struct {
	Timeout               time.Duration
	ConnectionTermination bool
}

// UnhealthyAction is what happens to the flows of a target that fails.
type UnhealthyAction struct {
	ConnectionTermination bool
	DrainingInterval      time.Duration
}

// FailOpen is when a group stops trusting its health checks: below either
// limit it routes to all of its targets. Zero turns a limit off.
type FailOpen struct {
	MinimumHealthyCount      int
	MinimumHealthyPercentage int
}

// A PassiveCheck judges targets by the TCP flows of clients. A target that
// leaves MaxFailures of them in a row without an answer, or refuses them, is
// held: it gets no new flows for Hold, and for twice as long each time it fails
// again soon after it came back, up to MaxHold. The zero value holds nobody.
type PassiveCheck struct {
	MaxFailures   int
	Hold, MaxHold time.Duration
}

// ProxyProtocol has the options of ClientIP ProxyProtocolV2.
type ProxyProtocol struct {
	UniqueID bool
	CRC32C   bool
}

// A HealthCheck says how targets of a group are probed.
type HealthCheck struct {
	Protocol           CheckProtocol
	Port               uint16 // 0: the target's own port ("traffic-port")
	Path               string
	Host               string // Host header; empty: the target's address
	Matcher            []StatusRange
	Interval           time.Duration
	Timeout            time.Duration
	HealthyThreshold   int
	UnhealthyThreshold int
	Source             netip.Addr // zero: chosen from SourceAddresses or the route
	ProxyProtocolLocal bool       // a PROXY v2 LOCAL header goes first
	VerifyTLS          bool       // HTTPS: demand a certificate chain to a trusted root
	ServerName         string     // HTTPS: SNI, and the name that VerifyTLS demands; empty: no SNI, and the target's address
	TrustedRoots       string     // HTTPS: the PEM certificates that VerifyTLS trusts; empty: the host's roots
}

// A StatusRange is an inclusive range of HTTP status codes.
type StatusRange struct{ First, Last int }

// A Target is one address and port that takes flows.
type Target struct {
	Address netip.Addr
	Port    uint16
	Weight  int // 0-256; 0 takes no new flows
	// ClientIP is the target's own, 0 if it is the group's.
	ClientIP ClientIP `json:",omitzero"`
	// Colocated lists what else is on the target's host: clients from there
	// are hairpins too.
	Colocated []netip.Prefix
}

// AddrPort is where the target listens.
func (t Target) AddrPort() netip.AddrPort { return netip.AddrPortFrom(t.Address, t.Port) }

// A TargetKey names a target in its group. The same address and port in two
// groups are two targets, as upstairs in ELBv2.
type TargetKey struct {
	Group    string
	AddrPort netip.AddrPort
}

func (k TargetKey) String() string { return k.Group + "/" + k.AddrPort.String() }

// Compare orders keys by group, then by address and port.
func (k TargetKey) Compare(o TargetKey) int {
	return cmp.Or(cmp.Compare(k.Group, o.Group), k.AddrPort.Compare(o.AddrPort))
}

func enumName[E ~uint8](names map[E]string, e E) string {
	if s, ok := names[e]; ok {
		return s
	}
	return fmt.Sprintf("%T(%d)", e, uint8(e))
}

func enumText[E ~uint8](names map[E]string, e E) ([]byte, error) {
	if s, ok := names[e]; ok {
		return []byte(s), nil
	}
	return nil, fmt.Errorf("%T(%d) has no name", e, uint8(e))
}

func enumParse[E ~uint8](names map[E]string, e *E, text []byte, choices string) error {
	for v, s := range names {
		if s == string(text) {
			*e = v
			return nil
		}
	}
	return fmt.Errorf("%q is not one of %s", text, choices)
}
