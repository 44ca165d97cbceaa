// Package e2e has no code but tests: the real nlb program in networks of
// bench/lab, judged by the packets that clients and targets see. They need root
// and the programs nft, conntrack, nginx, curl and iperf3.
//
//	go test ./internal/e2e -run Hairpin
//	NLB_BINARY=bin/nlb go test ./internal/e2e
//
// Without NLB_BINARY the tests build nlb, and once more with the race detector for
// some of them, which fail if it finds a race. A test that fails prints the ruleset, the flows, the addresses
// and routes of the balancer, and the daemon's log.
package e2e
