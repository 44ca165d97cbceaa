// Package nft makes a balancer.Table real in nftables: one table, inet nlb,
// read back and changed in single transactions. See README.md for the packet's
// way through it.
//
// The table also counts: new flows and drops (Dataplane.Events) and, on demand,
// how each target's TCP flows begin (Dataplane.Outcomes).
//
// The package speaks nfnetlink itself. That buys four things no library in
// reach gives together: errors that name the failing step, a compare-and-swap
// on the ruleset's generation, rules compared byte by byte with what the kernel
// holds, and dumps of a million elements in a few seconds.
package nft
