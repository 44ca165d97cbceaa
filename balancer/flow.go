package balancer

import (
	"context"
	"net/netip"
	"time"
)

// A Flow is one flow of clients through the balancer, or past it.
type Flow struct {
	Protocol uint8 // IP protocol number
	// Client sent the first packet, to VIP. Target answers; Source is whom it
	// takes for the client.
	Client, VIP, Source, Target netip.AddrPort
	// To is the target that the flow was sent to, if Ours says that it was
	// sent by us and if that target is still installed.
	To   TargetKey
	Ours bool
	// By rewrites its packets.
	By Dataplane
	// Live says that an end of a TCP flow may have a connection that it can be
	// told has ended: the flow is established, on its way to or from it, or was
	// reset, which the packet filter does to one end at a time.
	Live bool
	// Offloaded says that its packets go by the flowtable.
	Offloaded bool
	// Established says that a TCP flow is between the handshake and the first FIN.
	Established bool
	// Left is how long it is remembered if it stays silent. A flow that is
	// offloaded has no such time, and 0 here.
	Left time.Duration
	// Sent and Answered count the packets of the client and of the target, 0
	// where nobody counts them.
	Sent, Answered uint64
}

// FlowTable is what the kernel knows of flows.
type FlowTable interface {
	// FlowsTo lists the flows of those of the targets that are installed.
	FlowsTo(ctx context.Context, targets []TargetKey) ([]Flow, error)
	// Forget forgets those flows of the targets that over chooses, and counts
	// them. It does nothing to targets that are not installed.
	Forget(ctx context.Context, targets []TargetKey, over func(Flow) bool) (map[TargetKey]int, error)
	// Prune forgets each flow of the host that stale chooses, ours or not.
	Prune(ctx context.Context, stale func(Flow) bool) (int, error)
	// Prompt makes both ends of TCP flows say something.
	Prompt(flows []Flow) error
}
