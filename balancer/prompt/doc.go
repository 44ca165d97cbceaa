// Package prompt makes both ends of a silent TCP flow speak, so that what they
// say can be answered with a reset.
//
// A balancer cannot end a flow by a reset of its own making: the ends believe one
// only if its sequence number is the very next that they expect (RFC 5961,
// section 3), which nobody in between knows of a flow at rest. But an end that
// gets a SYN within a connection answers with a challenge ACK (section 4), which
// has all the numbers, and the packet filter that stands in its way makes the
// reset from them:
//
//	client                 balancer                 target
//	  │ ◄─ SYN, ACK from the VIP │ SYN as the client ─► │
//	  │ challenge ACK ─────────► │ ◄───── challenge ACK │
//	  │ ◄─────────────────── RST │ RST ───────────────► │
//
// The target gets a SYN and the client a SYN, ACK because these are what stateful
// firewalls and address translators on the way let pass in that direction, for
// the sake of RFC 5961 (tcp_conntracks in the kernel's
// nf_conntrack_proto_tcp.c). A SYN to the client, or a segment out of the window
// to either, would draw the same answer, and be dropped as invalid there. An end
// that has forgotten the flow answers too, with a reset that goes nowhere, or as
// a listener with a SYN, ACK that meets the packet filter.
package prompt
