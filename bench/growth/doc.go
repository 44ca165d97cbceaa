// Package growth is the part of the race that measures what the first packet of a
// flow costs as the configuration grows: with more listeners, and with more
// targets.
//
// Each contestant has a network of its own for each size, with a client, a
// balancer and one node that has all the targets' addresses. In a round they take
// turns of some milliseconds: sizes in an order that changes, and for each size
// the contestants in an order that changes, so that those that are compared are
// measured one right after the other.
//
// In a turn one thread sends packets onto the client's link, each the first of a
// new UDP flow, with the listeners in turn, and reads them at the targets, a small
// batch at a time. On a veth pair the kernel carries a packet all the way within
// the call that sends it, so the thread's time is the path's, that of sender and
// receiver included. The median of the batches is the round's value: most batches
// are over before anybody else gets the core. The CPU time of an nlb is counted
// for its own turns; the others sleep, but for less than one percent of a core
// each. After each turn the balancer forgets its flows, so that all turns find the
// same table.
//
// Between two flows of one of a thousand listeners there are 999 others, after
// which little of its rules is left in the caches near the core: that is what
// growth costs where look-ups do not grow.
//
// Direct routing costs the same at all sizes, but for its targets' addresses. It
// is measured at each all the same, for what else may change from one to the other.
package growth
