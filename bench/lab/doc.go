// Package lab builds networks out of network namespaces: clients, a place for
// the load balancer, and targets that say who called.
//
//	top, err := lab.Routed(lab.Options{Targets: 2})
//	defer top.Close()
//	daemon := top.LB.Command(ctx, "nlb", "serve", "-c", "nlb.yaml")
//	top.Targets[0].Agent().Serve(ctx, lab.Serve{Ports: []uint16{8080}})
//	replies, err := top.Clients[0].Agent().Call(ctx, lab.Call{Network: "tcp", Dst: vip, N: 100})
//
// Traffic is made by agents: processes of this same binary that live inside a
// namespace from their first instruction, because goroutines move between
// threads and a namespace is a property of a thread. So every program that uses
// the package begins with MaybeRunAgent, and TestMain does too.
//
// Namespaces are named nlb-<pid>-<random>-<node> under /run/netns, where
// `ip netns exec` finds them. Close removes them with everything that runs in
// them; Sweep removes what a killed process left behind.
//
// What differs from a fresh namespace, so that a scenario fails for the reason
// it names: IPv6 duplicate address detection and router discovery are off,
// rp_filter is 0, ICMP redirects are neither sent nor followed, and links
// compute their own TX checksums (without that, a veth pair carries wrong
// checksums unseen).
package lab
