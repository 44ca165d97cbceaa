// Package counting counts the processor instructions that the way through nlb
// takes, for each packet and for each connection. It is what the command
// bench/instructions and the race's part of that name have in common, and a test
// that fails when nlb takes more than it did.
//
// It boots emulated machines with one of Debian's kernels whose clock counts
// instructions (see internal/vm), so that nothing which happens on the host
// changes a figure. In each, a network is built for each way (client, balancer,
// two targets), nlb installs the way and ends, and one thread sends from the
// client and reads at the targets. On a veth pair the kernel carries a packet all
// the way within the call that sends it, so the instructions between two readings
// of the clock are those of the sender, the path and the receiver. Those of the
// sender and the receiver are the same in every way: the difference to the way
// without a balancer is what the balancer adds.
//
// Instructions aren't time. Caches that miss, locks that processors contend for
// and network cards don't show; bench/traffic measures time.
package counting
