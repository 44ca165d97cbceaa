package conntrack

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"go.uber.org/zap"
)

// reuse is how old a dump may be to answer Counts again: as long as a scrape
// and a `status` that ask at the same time may be apart.
const reuse = 200 * time.Millisecond

// attempts is how often a dump is read that the kernel calls inconsistent.
const attempts = 5

// Options are what a Tracker needs to know.
type Options struct {
	// Log gets the loss of events. Nil is no log.
	Log *zap.Logger
	// Mask has the bits of the conntrack mark that name a flow's target. A
	// flow is ours if it has any of them. It must not be 0.
	Mask uint32
	// Uncounted is the key of flows that somebody else counts; 0 for none.
	Uncounted uint32
}

// Counts are what the flows of one key did.
type Counts struct {
	// Active is how many flows there are now.
	Active uint64
	// Bytes and Packets are those of both directions since the tracker began,
	// IP headers included, of flows that live and flows that ended. They never
	// go down. What flows carried before the tracker began is not in it.
	Bytes, Packets uint64
	// Resets is how many TCP flows have ended, since the tracker began, that saw a
	// reset: from the client, from the target or from this host, which the kernel
	// does not tell apart. A flow counts when conntrack forgets it, 10 seconds after
	// the reset (nf_conntrack_tcp_timeout_close), and only if Run heard of that.
	Resets uint64
	// Unaccounted is how many of Active have no counters and are not in Bytes
	// and Packets: net.netfilter.nf_conntrack_acct was 0 when they began.
	Unaccounted uint64
}

// Stats tell how the tracker does.
type Stats struct {
	// LostEvents is how many flows of ours ended unheard, because the socket
	// was full. Each lost the bytes that it carried since the last dump.
	LostEvents uint64
	// Table is how many flows the last complete dump had, those of others
	// included, and DumpTime is how long it took.
	Table    int
	DumpTime time.Duration
	// Remembered is how many flows of ours the ledger holds.
	Remembered int
}

// A Tracker counts flows. Its methods may be called from many goroutines, and
// except for Counts' bytes of ended flows none needs Run.
type Tracker struct {
	log       *zap.Logger
	mask      uint32
	uncounted uint32
	conns     pool
	// now is time.Now but for tests.
	now func() time.Time

	ready     chan struct{} // closed by Run
	readyOnce sync.Once

	// dumping is held, by sending, while the ledger takes in a dump. It guards
	// counts and read.
	dumping chan struct{}
	counts  map[uint32]Counts
	read    time.Time // end of the dump that counts is from

	mu     sync.Mutex // guards the rest
	ledger *ledger
	events *listener // nil unless Run runs
	idle   bool      // no flow to count is expected
	warned bool      // of lost events, since the last dump
	stats  Stats
}

// New returns a Tracker. It opens nothing: each method opens what it needs, and
// leaves it to the next.
func New(o Options) (*Tracker, error) {
	if o.Mask == 0 {
		return nil, errors.New("conntrack: no bit of the mark is ours")
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	return &Tracker{
		log: o.Log, mask: o.Mask, uncounted: o.Uncounted, now: time.Now,
		ready: make(chan struct{}), dumping: make(chan struct{}, 1), ledger: newLedger(),
	}, nil
}

// Close closes the sockets that no method is using.
func (t *Tracker) Close() { t.conns.close() }

// Counts returns what was counted, by the bits of the mark that are in Mask. A
// key has an entry once a flow of it was seen, and keeps it. The table is read,
// unless that was done within the last 200 ms.
func (t *Tracker) Counts(ctx context.Context) (map[uint32]Counts, error) {
	select {
	case t.dumping <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { <-t.dumping }()

	if t.counts == nil || t.now().Sub(t.read) > reuse {
		if err := t.survey(ctx); err != nil {
			return nil, err
		}
	}
	return maps.Clone(t.counts), nil
}

// Stats returns how the tracker does at the moment.
func (t *Tracker) Stats() Stats {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.stats
	s.Remembered = len(t.ledger.flows)
	return s
}

// survey takes a dump into the ledger. The caller holds dumping. The ledger is
// free between two flows, so that events are read meanwhile.
func (t *Tracker) survey(ctx context.Context) error {
	begun := t.now()
	table := 0
	err := t.dump(ctx, markFilter{}, func() {
		table = 0
		t.mu.Lock()
		defer t.mu.Unlock()
		t.ledger.begin()
	}, func(r *record) error {
		table++
		if key := t.key(r); key != 0 {
			t.mu.Lock()
			defer t.mu.Unlock()
			t.ledger.show(key, r)
		}
		return nil
	})
	t.mu.Lock()
	defer t.mu.Unlock()
	if err == nil {
		err = t.drain() // see ledger.finish
	}
	if err != nil {
		t.ledger.abandon()
		return err
	}
	t.counts, t.read = t.ledger.finish(), t.now()
	t.stats.Table, t.stats.DumpTime = table, t.read.Sub(begun)
	t.warned = false
	if t.idle && len(t.ledger.flows) == 0 {
		return t.events.leave()
	}
	return nil
}

// key is what a flow is counted under, 0 if it is not.
func (t *Tracker) key(r *record) uint32 {
	if key := r.mark & t.mask; key != t.uncounted {
		return key
	}
	return 0
}

// dump reads the table. It calls begin first and again whenever the kernel makes it
// start over.
func (t *Tracker) dump(ctx context.Context, filter markFilter, begin func(), f func(*record) error) error {
	for range attempts {
		begin()
		err := t.conns.use(func(c *conn) error { return c.dump(ctx, filter, f) })
		if !errors.Is(err, errInterrupted) {
			return err
		}
	}
	return fmt.Errorf("dump conntrack table, %d times: %w", attempts, errInterrupted)
}
