// Package maglev is the keyed, weighted consistent hash that chooses targets. A
// flow's fields are hashed with the kernel's jhash, the hash selects a slot,
// and a table, the same in the kernel and in user space, says whose slot it is:
//
//	fields ──JHash(seed)──► 32 bits ──Slot(size)──► slot ──Build──► target
//
// The lookup table is what Maglev introduced (Eisenbud et al., "Maglev: a fast
// and reliable software network load balancer", NSDI 2016). How it is filled is
// not: the paper's permutations of a prime number of slots move too much when
// one of a few targets leaves, and nearly everything when the prime changes.
// Here, a fixed number of contests, the base, decides the table. In each one
// all targets draw lots, keyed and weighted (rendezvous hashing); then targets
// that won too often hand their closest wins to those that won too rarely. A
// contest decides one slot of the smallest table, and 2, 4, 8 … neighbouring
// slots, a contiguous range of hashes, of larger ones. That is why sizes are
// powers of two: a table may grow with its group while the contests, and so
// nearly all flows, stay. A prime would have no use, as nothing here steps
// through the table modulo its size.
//
// # Balance
//
// A target has its share, weight/sum(weights), within 1 % of it when that is
// 100 slots or more, and within one slot otherwise.
//
// # Disruption
//
// When one of N equal targets leaves, its own share has to move. What moves
// beyond that, in percent of all hashes, was measured with 3 to 8 keys and up
// to 10 removals for each; the average and, in brackets, the largest:
//
//	  N   base 1024   base 4096   base 8192   base 16384  Maglev, prime size
//	  3   0.5 (1.5)   0.2 (0.9)   0.1 (0.5)   0.1 (0.2)    0.4  (1.3) of 1021
//	  5   1.0 (2.3)   0.4 (0.8)   0.3 (0.6)   0.2 (0.3)    1.1  (1.8) of 1021
//	 10   1.6 (3.1)   0.8 (1.4)   0.5 (0.8)   0.3 (0.5)    2.3  (3.3) of 1021
//	 11   1.7 (3.3)   0.8 (1.5)   0.5 (0.8)   0.3 (0.6)   81.9 (82.9) 4093 to 1021
//	 40   2.6 (3.2)   1.3 (1.6)   0.8 (1.1)   0.5 (0.7)    2.2  (3.2) of 4093
//	 41   2.6 (3.1)   1.3 (1.5)   0.8 (1.1)   0.5 (0.7)
//	100   2.7 (3.2)   1.5 (1.7)   1.0 (1.2)   0.7 (0.8)    1.4  (1.5) of 16381
//	160   2.3 (3.1)   1.5 (1.8)   1.1 (1.3)   0.8 (0.9)
//	200   2.3 (3.1)   1.4 (1.7)   1.1 (1.3)   0.8 (0.9)    1.6  (1.8) of 20011
//
// Steps between sizes are in these numbers: they cost nothing extra. The excess
// is the noise of the draws: a target's slots have about the same number of
// runners-up among each of the others, but not exactly, and exact shares have
// to be restored by moving the difference. It falls with the square root of the
// number of contests, whatever the number of slots; the other orders of
// settling that were tried were no better. A base of 8192 keeps it below 1 %
// for groups of up to about 20, one of 16384 for every N up to 200. Kernel
// memory is the other side: about 104 bytes for each slot of a map, so 0.1,
// 0.4, 0.9 and 1.7 MB for a group of up to 10 targets.
//
// A target that only fails for a while need not leave: it keeps its slots, and a
// flow that meets one of them is hashed again, into the Spare table. Then nothing
// moves but its own share.
//
// # Agreement
//
// Balancers that share a key, a base and a configuration have equal tables,
// whatever the order of the targets, the history of changes or the machine.
// Everything is computed in integers. testdata/golden.json freezes the results;
// changing them is a breaking change, as it deals all flows anew.
package maglev
