// Package ipvs makes a balancer.Table real in IPVS, the kernel's virtual server:
// IPVS chooses the destination of a new flow and rewrites it. What else a service
// needs is done by rules of nftables, in the variant that goes with it.
//
// goal says which virtual services should be there and transition in which order
// they become so, both without a kernel. A Dataplane reads what is installed and
// carries that out; it remembers nothing but what the settings were before ours.
package ipvs
