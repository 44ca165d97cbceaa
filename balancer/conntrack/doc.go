// Package conntrack counts, lists and ends the flows of the balancer in the
// kernel's connection tracking table, over ctnetlink (netlink(7), the kernel's
// linux/netfilter/nfnetlink_conntrack.h). It knows a flow by its conntrack mark
// and nothing else: a flow is ours if it has a bit of [Options].Mask, and those
// bits are the key that it is counted under.
//
//	NFNLGRP_CONNTRACK_DESTROY ──► ledger ──► Counts   bytes of flows that ended
//	dump of the table         ──►   │                 flows now, bytes so far
//	                                └ last seen bytes of every flow
//
// # Totals never go down
//
// The ledger remembers how much every flow of ours had carried when it was last
// seen, and adds the difference whenever it is seen again, in a dump or in the
// event of its end. A flow whose end nobody tells loses only what it carried
// since the last dump. Those are
//
//   - flows older than the listener, while net.netfilter.nf_conntrack_events is
//     2, its default: the kernel then gives a flow its event record only if
//     somebody listened when it began. 1 gives every flow one;
//   - flows whose event found the socket full ([Stats].LostEvents).
//
// What flows had carried before the tracker began is not counted, so that a
// restart shows as no burst.
//
// The kernel could also hold events back until we have room
// (NETLINK_BROADCAST_ERROR). It holds the dead flow back with them, so a
// balancer that was stopped for a while would find its table full and new
// flows refused. Losing a number is better.
//
// # Costs
//
// The end of a flow is a message, which the kernel writes where the flow ends: by a
// timer, or in the path of a packet that uses its addresses again. That is about two
// hundredths of what a short connection costs. To be woken for it would be another
// tenth, so messages are read by the batch. The kernel writes them for strangers' flows
// and for the relay's as well, and drops them at our socket: where nobody but the relay
// has flows, the tracker does not listen ([Tracker.ExpectNone]).
//
// The ledger keeps about 50 bytes for each flow of ours. A dump reads the whole
// table, since the kernel's filter knows equality with one mark (CTA_MARK and
// CTA_MARK_MASK) but not "any of these bits"; reading of one target's flows
// alone uses it. Bytes need net.netfilter.nf_conntrack_acct=1 when a flow
// begins, else the flow shows in [Counts].Unaccounted.
package conntrack
