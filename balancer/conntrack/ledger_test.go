package conntrack

import (
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// seen is a record of flow number n that has carried so many bytes, each packet
// 100 of them.
func seen(n uint32, bytes uint64) *record {
	id := binary.BigEndian.AppendUint32(nil, n)
	return &record{original: id, id: id, sent: volume{bytes, bytes / 100}, accounted: true}
}

func dying(r *record) *record {
	r.status |= statusDying
	return r
}

// inState is the record of a TCP flow in a state.
func inState(r *record, s TCPState) *record {
	var inner, outer attrs
	inner.put(ctaProtoinfoTCPState, []byte{byte(s)})
	outer.put(ctaProtoinfoTCP|nested, inner)
	r.protoinfo = outer
	return r
}

func TestLedger(t *testing.T) {
	const key = 7
	dump := func(l *ledger, rs ...*record) map[uint32]Counts {
		l.begin()
		for _, r := range rs {
			l.show(key, r)
		}
		return l.finish()
	}
	tests := map[string]struct {
		do   func(l *ledger) map[uint32]Counts
		want Counts
	}{
		"what flows carried before is not counted": {
			func(l *ledger) map[uint32]Counts { return dump(l, seen(1, 500)) },
			Counts{Active: 1},
		},
		"an adopted flow counts from then on": {
			func(l *ledger) map[uint32]Counts { dump(l, seen(1, 500)); return dump(l, seen(1, 700)) },
			Counts{Active: 1, Bytes: 200, Packets: 2},
		},
		"a new flow counts whole": {
			func(l *ledger) map[uint32]Counts { dump(l); return dump(l, seen(1, 700)) },
			Counts{Active: 1, Bytes: 700, Packets: 7},
		},
		"a flow that no dump saw counts whole": {
			func(l *ledger) map[uint32]Counts { dump(l); l.end(key, seen(1, 700)); return dump(l) },
			Counts{Bytes: 700, Packets: 7},
		},
		"an end during the first dump counts nothing": {
			func(l *ledger) map[uint32]Counts { l.begin(); l.end(key, seen(1, 700)); return l.finish() },
			Counts{},
		},
		"the event of the end brings the rest": {
			func(l *ledger) map[uint32]Counts {
				dump(l)
				dump(l, seen(1, 500))
				l.end(key, seen(1, 700))
				return dump(l)
			},
			Counts{Bytes: 700, Packets: 7},
		},
		"without the event the last seen bytes stay": {
			func(l *ledger) map[uint32]Counts {
				dump(l)
				dump(l, seen(1, 500))
				dump(l)
				return dump(l)
			},
			Counts{Bytes: 500, Packets: 5},
		},
		"a dump written before the end and read after it": {
			func(l *ledger) map[uint32]Counts {
				dump(l)
				l.begin()
				l.end(key, seen(1, 700))
				l.show(key, seen(1, 500))
				return l.finish()
			},
			Counts{Bytes: 700, Packets: 7},
		},
		"a flow that dies waits for its event": {
			func(l *ledger) map[uint32]Counts {
				dump(l)
				dump(l, seen(1, 500))
				for range 3 {
					dump(l, dying(seen(1, 600)))
				}
				l.end(key, seen(1, 700))
				return dump(l)
			},
			Counts{Bytes: 700, Packets: 7},
		},
		"a flow overlooked by one dump is no new one": {
			func(l *ledger) map[uint32]Counts {
				dump(l)
				dump(l, seen(1, 500))
				dump(l)
				return dump(l, seen(1, 700))
			},
			Counts{Active: 1, Bytes: 700, Packets: 7},
		},
		"a flow shown twice by one dump is one": {
			func(l *ledger) map[uint32]Counts { dump(l); return dump(l, seen(1, 500), seen(1, 500)) },
			Counts{Active: 1, Bytes: 500, Packets: 5},
		},
		"a dump that starts over counts once": {
			func(l *ledger) map[uint32]Counts {
				dump(l)
				l.begin()
				l.show(key, seen(1, 500))
				l.begin()
				l.show(key, seen(1, 600))
				return l.finish()
			},
			Counts{Active: 1, Bytes: 600, Packets: 6},
		},
		"an abandoned dump is no reason to forget a flow": {
			func(l *ledger) map[uint32]Counts {
				dump(l)
				dump(l, seen(1, 500))
				for range 3 {
					l.begin()
					l.abandon()
				}
				dump(l)
				return dump(l, seen(1, 700))
			},
			Counts{Active: 1, Bytes: 700, Packets: 7},
		},
		"counters that somebody reset": {
			func(l *ledger) map[uint32]Counts {
				dump(l)
				dump(l, seen(1, 500))
				return dump(l, seen(1, 300))
			},
			Counts{Active: 1, Bytes: 800, Packets: 8},
		},
		"only flows that saw a reset count as such": {
			func(l *ledger) map[uint32]Counts {
				dump(l)
				l.end(key, inState(seen(1, 100), Close))
				l.end(key, inState(seen(2, 100), Established))
				l.end(key, inState(seen(3, 100), LastAck))
				l.end(key, seen(4, 100))
				return dump(l, inState(seen(5, 100), Close))
			},
			Counts{Active: 1, Bytes: 500, Packets: 5, Resets: 1},
		},
		"a flow without counters": {
			func(l *ledger) map[uint32]Counts {
				dump(l)
				r := seen(1, 0)
				r.accounted = false
				return dump(l, r)
			},
			Counts{Active: 1, Unaccounted: 1},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, tt.do(newLedger())[key]); diff != "" {
				t.Errorf("counts (-want +got):\n%s", diff)
			}
		})
	}
}

// A kernel with flows that come, carry and go in any order, and a reader that
// is behind. Whatever happens, a total is never more than what was carried and
// never less than before; and it is exact if every event arrives.
func TestLedgerAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const key = 7
		l := newLedger()
		lossy := rapid.Bool().Draw(t, "events get lost")
		live := map[uint32]uint64{}
		var carried, before uint64
		var born uint32
		var events, pages []*record // sent, not yet read
		inDump := false

		pick := func(t *rapid.T) uint32 {
			var ids []uint32
			for n := range born {
				if _, ok := live[n]; ok {
					ids = append(ids, n)
				}
			}
			if len(ids) == 0 {
				t.Skip("no flow")
			}
			return rapid.SampledFrom(ids).Draw(t, "flow")
		}
		hear := func() {
			if len(events) > 0 {
				l.end(key, events[0])
				events = events[1:]
			}
		}
		finish := func(t *rapid.T) Counts {
			for len(pages) > 0 {
				l.show(key, pages[0])
				pages = pages[1:]
			}
			for len(events) > 0 {
				hear()
			}
			inDump = false
			c := l.finish()[key]
			if c.Bytes < before || c.Bytes > carried {
				t.Fatalf("total %d, was %d, carried %d", c.Bytes, before, carried)
			}
			before = c.Bytes
			return c
		}
		l.begin()
		finish(t)
		t.Repeat(map[string]func(*rapid.T){
			"come": func(*rapid.T) { live[born] = 0; born++ },
			"carry": func(t *rapid.T) {
				n := pick(t)
				bytes := rapid.Uint64Range(0, 1000).Draw(t, "bytes")
				live[n] += bytes
				carried += bytes
			},
			"go": func(t *rapid.T) {
				n := pick(t)
				if !lossy || rapid.Bool().Draw(t, "heard") {
					events = append(events, seen(n, live[n]))
				}
				delete(live, n)
			},
			"begin a dump": func(t *rapid.T) {
				if inDump {
					t.Skip("under way")
				}
				inDump = true
				l.begin()
			},
			// The kernel writes a page of the dump, ahead of its reader.
			"page": func(t *rapid.T) {
				if !inDump {
					t.Skip("no dump")
				}
				n := pick(t)
				pages = append(pages, seen(n, live[n]))
			},
			"read a page": func(t *rapid.T) {
				if len(pages) == 0 {
					t.Skip("nothing to read")
				}
				l.show(key, pages[0])
				pages = pages[1:]
			},
			"hear": func(*rapid.T) { hear() },
			"end the dump": func(t *rapid.T) {
				if !inDump {
					t.Skip("no dump")
				}
				// A complete dump shows every flow that lives through it.
				for n := range born {
					if bytes, ok := live[n]; ok {
						pages = append(pages, seen(n, bytes))
					}
				}
				finish(t)
			},
			"": func(*rapid.T) {},
		})
		if inDump {
			finish(t)
		}
		l.begin()
		for n, bytes := range live {
			pages = append(pages, seen(n, bytes))
		}
		if c := finish(t); !lossy && c.Bytes != carried {
			t.Fatalf("total %d, carried %d and nothing was lost", c.Bytes, carried)
		}
	})
}
