// Package traps has the ways in which load balancing goes wrong, each as a
// scenario that really does: a network of namespaces, a naive set-up that fails
// for a named reason, and nlb with the cure.
//
//	result, err := traps.Run(ctx, scenario, traps.Options{Program: "bin/nlb"})
//
// Both are shown by packets. A naive set-up has failed only if the reason was
// seen: a packet that a capture holds, or a counter of the kernel's. A cure works
// only if a target answered, and said who called. What a Result tells of a
// packet's way is read from captures.
//
// Nothing is needed but root and the kernel: rules go to nf_tables and routes to
// rtnetlink directly. Programs that use the package begin with
// lab.MaybeRunAgent.
package traps
