package explain

import (
	"fmt"
	"net/netip"

	"nlb/balancer"
)

// A Verdict says what becomes of a flow.
type Verdict string

// The verdicts. None is for what the balancer has no part in.
const (
	Forward Verdict = "forward"
	Drop    Verdict = "drop"
	None    Verdict = "none"
)

// Why a flow is dropped. A chain of somebody else has its own words.
const (
	ReasonNoListener = "no listener"
	ReasonNotAllowed = "source not allowed"
	ReasonNoTarget   = "no target"
	ReasonHairpin    = "hairpin"
	ReasonNoSource   = "no source address"
)

// What the choice depends on, where the question does not decide it.
const (
	DependsOnPort = "the source port"
	DependsOnIPVS = "IPVS, which chooses by a hash of its own"
)

// How a client is on its target's host.
const (
	Self      = "self"      // it is the target
	Colocated = "colocated" // an address of it, by the configuration
	Subnet    = "subnet"    // a neighbour, who would be answered past the balancer
)

// A Question is a flow's first packet, as the client sends it. All addresses are
// of one family.
type Question struct {
	Protocol uint8 // IP protocol number: TCP or UDP
	// Client has port 0 if the port is not known.
	Client, Destination netip.AddrPort
}

// An Answer is what becomes of a flow: the Outcome, or the likeliest of several.
type Answer struct {
	Protocol string `json:"protocol"`
	Client   string `json:"client"`
	VIP      string `json:"vip"`
	Outcome
	// DependsOn says what else decides; empty when nothing does. Possible has then
	// all outcomes there may be, the likeliest first.
	DependsOn string     `json:"depends_on,omitempty"`
	Possible  []Possible `json:"possible,omitempty"`
	// Foreign lists what chains of others do to the flow, or may do.
	Foreign []Foreign `json:"foreign,omitempty"`
	// Notes say what the answer does not take into account.
	Notes []string `json:"notes,omitempty"`
}

// A Possible is one of several Outcomes.
type Possible struct {
	// Share is the part of all source ports, or of the weights, 0 to 1.
	Share float64 `json:"share"`
	Outcome
}

// An Outcome is what becomes of a flow. What does not apply is empty.
type Outcome struct {
	Verdict     Verdict   `json:"verdict"`
	Reason      string    `json:"reason"` // of a drop
	Listener    string    `json:"listener"`
	TargetGroup string    `json:"target_group"`
	Target      *Endpoint `json:"target"`
	ClientIP    string    `json:"client_ip"` // the target's mode
	// Hairpin says that the client is on the target's host, and HairpinKind how.
	Hairpin     bool   `json:"hairpin"`
	HairpinKind string `json:"hairpin_kind,omitempty"`
	// Avoided is the target that the flow was kept from, as it is the client's own.
	Avoided *Endpoint `json:"avoided,omitempty"`
	// TargetSees is the address that the target takes for the client's; empty when
	// it is one of TargetSeesOneOf.
	TargetSees      string   `json:"target_sees"`
	TargetSeesOneOf []string `json:"target_sees_one_of,omitempty"`
	// HeaderClient is whom a PROXY v2 header names to the target.
	HeaderClient string `json:"header_client,omitempty"`
	// SYNProxy says that the client has to return a SYN cookie first.
	SYNProxy bool `json:"syn_proxy,omitempty"`
	// Limit is how many flows the client may have at a time; absent without a limit.
	Limit *Limit `json:"source_limit,omitempty"`
	// Rewrites are in the order in which they are made.
	Rewrites []Rewrite `json:"rewrites"`
}

// A Limit is of the flows of all who count as one client.
type Limit struct {
	Flows  uint32       `json:"flows"`
	Client netip.Prefix `json:"client"`
}

// An Endpoint is where a target listens.
type Endpoint struct {
	Address netip.Addr `json:"address"`
	Port    uint16     `json:"port"`
}

// AddrPort is the Endpoint in one.
func (e *Endpoint) AddrPort() netip.AddrPort { return netip.AddrPortFrom(e.Address, e.Port) }

// A Rewrite is a change of addresses and ports, on the way out; replies have it
// undone. A port of 0 is not known, or chosen when the packet comes.
type Rewrite struct {
	By                string         `json:"by"` // dnat, snat or relay
	SourceBefore      netip.AddrPort `json:"source_before"`
	DestinationBefore netip.AddrPort `json:"destination_before"`
	SourceAfter       netip.AddrPort `json:"source_after"`
	DestinationAfter  netip.AddrPort `json:"destination_after"`
}

// Kinds of Rewrite.
const (
	ByDNAT  = "dnat"
	BySNAT  = "snat"
	ByRelay = "relay"
)

// A Foreign is a rule of somebody else that meets the flow.
type Foreign struct {
	// Where names the rule as nft(8) does: family, table, chain, hook, handle.
	Where string `json:"where"`
	// Does is what it does: drop, reject, or the kind of a change.
	Does string `json:"does"`
	// Ends says that the flow goes no further.
	Ends bool `json:"ends"`
	// Certain says that it does; else it may, as not all that it matches is known.
	Certain bool `json:"certain"`
}

// protocolName is the protocol's name in the configuration.
func protocolName(proto uint8) string {
	switch proto {
	case balancer.ProtoTCP:
		return balancer.TCP.String()
	case balancer.ProtoUDP:
		return balancer.UDP.String()
	}
	return ""
}

// Check says what is wrong with the question, if anything is.
func (q Question) Check() error {
	switch {
	case q.Client.Addr().BitLen() != q.Destination.Addr().BitLen():
		return fmt.Errorf("%s and %s are not of one address family", q.Client.Addr(), q.Destination.Addr())
	case q.Destination.Port() == 0:
		return fmt.Errorf("%s has no port", q.Destination.Addr())
	}
	return nil
}
