package nft

import (
	"context"
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"

	"nlb/balancer"
)

var _ balancer.OutcomeCounter = (*Dataplane)(nil)

// Outcomes implements balancer.OutcomeCounter. It reads two sets, whatever else
// the table has; without a table, or without observed Pools, the map is empty.
// Counts begin anew with a table that had to be made anew. While one Pool is
// observed, the flows of all are counted.
func (d *Dataplane) Outcomes(context.Context) (map[balancer.TargetKey]balancer.Outcomes, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	failed, err := d.sock.counts(setFailed)
	if err != nil {
		return nil, err
	}
	answered, err := d.sock.counts(setAnswered)
	if err != nil {
		return nil, err
	}
	out := make(map[balancer.TargetKey]balancer.Outcomes, len(failed)+len(answered))
	for _, m := range []map[Mark]uint64{failed, answered} {
		for mark := range m {
			if key, ok := d.numbers.byNum[mark.Target()]; ok {
				out[key] = balancer.Outcomes{Failed: failed[mark], Answered: answered[mark]}
			}
		}
	}
	return out, nil
}

// counts reads the counters of a dynamic set's elements. A set that is not there
// has none.
func (s *socket) counts(set string) (out map[Mark]uint64, err error) {
	err = s.listElems(set, func() { out = map[Mark]uint64{} }, func(elem []byte) {
		if mark, packets, ok := parseCount(elem); ok {
			out[mark] = packets
		}
	})
	if errors.Is(err, unix.ENOENT) {
		err = nil
	}
	return out, err
}

// parseCount reads an element whose one statement is a counter.
func parseCount(elem []byte) (m Mark, packets uint64, ok bool) {
	key := find(find(elem, unix.NFTA_SET_ELEM_KEY), unix.NFTA_DATA_VALUE)
	expr := find(elem, unix.NFTA_SET_ELEM_EXPR)
	if len(key) != 4 || text(find(expr, unix.NFTA_EXPR_NAME)) != "counter" {
		return 0, 0, false
	}
	packets = be64(find(find(expr, unix.NFTA_EXPR_DATA), unix.NFTA_COUNTER_PACKETS))
	return Mark(binary.NativeEndian.Uint32(key)), packets, true
}
