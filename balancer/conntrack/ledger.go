package conntrack

// A ledger adds up what flows carry, out of two sources that come in no order:
// dumps, which show flows that live, and events of flows that ended. Its totals
// only grow. It is not safe for concurrent use.
type ledger struct {
	flows  map[flowID]entry
	totals map[uint32]volume
	resets map[uint32]uint64 // flows whose end was told, after a reset
	// dump numbers the dump under way, and complete is the last one that was
	// read to its end. Until there was one, a flow that is not known may be
	// older than the ledger.
	dump, complete uint64

	// The dump under way: what it has shown so far, and the flows whose end was
	// told meanwhile. The kernel writes a dump ahead of its reader, so it may
	// still show them.
	live  map[uint32]tally
	ended map[flowID]struct{}
}

// An entry is how much a flow had carried when it was last seen, and in which
// dump that was.
type entry struct {
	seen volume
	dump uint64
}

type tally struct{ active, unaccounted uint64 }

func newLedger() *ledger {
	return &ledger{flows: map[flowID]entry{}, totals: map[uint32]volume{}, resets: map[uint32]uint64{}}
}

// begin starts a dump, or starts it again.
func (l *ledger) begin() {
	l.dump++
	l.live = map[uint32]tally{}
	if l.ended == nil {
		l.ended = map[flowID]struct{}{}
	}
}

// show is told of a flow in a dump.
func (l *ledger) show(key uint32, r *record) {
	id := r.flowID()
	if _, over := l.ended[id]; over {
		return
	}
	e, known := l.flows[id]
	if Status(r.status).dying() {
		// Its end tells more, or nothing, but it was not overlooked.
		if known {
			e.dump = l.dump
			l.flows[id] = e
		}
		return
	}
	if known && e.dump == l.dump {
		return // the kernel has begun a hash bucket anew
	}
	n := l.live[key]
	n.active++
	if !r.accounted {
		n.unaccounted++
	}
	l.live[key] = n
	v := r.volume()
	if known || l.complete > 0 {
		l.add(key, e.seen, v)
	}
	l.flows[id] = entry{v, l.dump}
}

// end is told of the event of a flow's end, with its last counters.
func (l *ledger) end(key uint32, r *record) {
	id := r.flowID()
	if l.ended != nil {
		l.ended[id] = struct{}{}
	}
	e, known := l.flows[id]
	if known || l.complete > 0 {
		l.add(key, e.seen, r.volume())
	}
	if tcpState(r.protoinfo) == Close {
		l.resets[key]++
	}
	delete(l.flows, id)
}

// finish ends a dump that was complete. All events that were sent before it
// ended must have been told.
//
// A flow that was not shown has ended, and its event is not to come, so what it
// carried at last is lost. It is kept for another dump all the same: while
// somebody resizes the table's hash, a dump overlooks flows, and one that came
// back as a new one would be counted twice.
func (l *ledger) finish() map[uint32]Counts {
	for id, e := range l.flows {
		if e.dump < l.complete {
			delete(l.flows, id)
		}
	}
	l.complete = l.dump
	counts := make(map[uint32]Counts, len(l.totals))
	for key, v := range l.totals {
		counts[key] = Counts{Bytes: v.bytes, Packets: v.packets}
	}
	for key, n := range l.resets {
		c := counts[key]
		c.Resets = n
		counts[key] = c
	}
	for key, n := range l.live {
		c := counts[key]
		c.Active, c.Unaccounted = n.active, n.unaccounted
		counts[key] = c
	}
	l.live, l.ended = nil, nil
	return counts
}

// abandon ends a dump that was not complete. What it showed stays counted.
func (l *ledger) abandon() { l.live, l.ended = nil, nil }

func (l *ledger) add(key uint32, from, to volume) {
	l.totals[key] = l.totals[key].plus(volume{grown(from.bytes, to.bytes), grown(from.packets, to.packets)})
}

// grown is how much a counter has counted since it was from. One that went back
// began anew: somebody ran `conntrack -L -z`, or an event was lost and the same
// tuple came to the same place in memory, which makes the same id.
func grown(from, to uint64) uint64 {
	if to < from {
		return to
	}
	return to - from
}
