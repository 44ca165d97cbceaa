package balancer

import (
	"context"
	"hash/maphash"
	"net/netip"
	"time"

	"go.uber.org/zap"
)

const (
	// LongestIdle is the longest TCPIdleTimeout there is. An entry that has more
	// time left than that was in the flowtable.
	LongestIdle = 6000 * time.Second
	// idleEvery is how often flows are looked at, and how much too long a silent
	// one may be remembered.
	idleEvery = 5 * time.Second
	// idleRest times its own duration follows each look, so that the table of a
	// busy host, of which a million flows take seconds, is not read all the time.
	idleRest = 10
	// idleAgain is how many looks follow one that may have missed flows.
	idleAgain = 2
)

// FlowTimes is what the kernel knows of how long silent flows are remembered.
type FlowTimes interface {
	// Limit shows each TCP flow of ours to left, and gives those that it chooses
	// so much time. It may show a flow twice.
	Limit(ctx context.Context, left func(Flow) (d time.Duration, ok bool)) (n int, err error)
}

// An IdleKeeper keeps the idle timeouts of TCP flows that were in the flowtable.
//
// While a flow is in it, its conntrack entry lives as long as the flow, and when
// the flow has been silent for 30 s and leaves it, the entry is left with up to
// a day, whatever its timeout policy says (nf_flow_table_core.c). The next packet
// would put that right, but a silent flow has none. An IdleKeeper therefore
// watches the packets of the flows that are in the flowtable, and gives those that
// left it what remains of their listener's timeout. A flow is never forgotten too
// early, and up to idleEvery too late.
type IdleKeeper struct {
	reconciler *Reconciler
	flows      FlowTimes
	log        *zap.Logger

	// The goroutine of Run owns these.
	active map[uint64]activity
	idle   map[netip.AddrPort]time.Duration // by VIP; of former listeners too
	seed   maphash.Seed
	again  int
}

// An activity is how many packets a flow had, in both directions, when it was
// first seen to have them.
type activity struct {
	packets uint64
	at      time.Time
}

// NewIdleKeeper returns an IdleKeeper for the listeners of r's snapshots.
func NewIdleKeeper(r *Reconciler, flows FlowTimes, log *zap.Logger) *IdleKeeper {
	return &IdleKeeper{
		reconciler: r, flows: flows, log: log, seed: maphash.MakeSeed(), again: idleAgain,
		idle: make(map[netip.AddrPort]time.Duration),
	}
}

// Run looks at the flows until ctx ends. Then it returns nil. Without a flowtable
// it looks for what one from another time may have left, and rests.
func (k *IdleKeeper) Run(ctx context.Context) error {
	wait := idleEvery
	for sleep(ctx, wait) {
		wait = idleEvery
		snapshot := k.reconciler.Snapshot()
		if snapshot == nil {
			continue
		}
		k.learn(snapshot.Desired.Table)
		if k.again == 0 {
			continue
		}
		begun := time.Now()
		if err := k.look(ctx); err != nil {
			if ctx.Err() == nil {
				k.log.Error("the idle timeouts of flows cannot be kept, trying again", zap.Error(err))
			}
		} else if len(snapshot.Desired.Table.FastPath) == 0 {
			k.again--
		}
		wait = max(idleEvery, idleRest*time.Since(begun))
	}
	return nil
}

// learn takes in the listeners. A flow outlives its listener.
func (k *IdleKeeper) learn(t *Table) {
	for _, s := range t.Services {
		if s.IdleTimeout > 0 {
			k.idle[netip.AddrPortFrom(s.Address, s.Port)] = s.IdleTimeout
		}
	}
	if len(t.FastPath) > 0 {
		k.again = idleAgain
	}
}

// look reads all flows once.
func (k *IdleKeeper) look(ctx context.Context) error {
	now, seen := time.Now(), make(map[uint64]activity, len(k.active))
	n, err := k.flows.Limit(ctx, func(f Flow) (time.Duration, bool) {
		id := maphash.Comparable(k.seed, f.ends())
		a := k.activity(id, f, now)
		if f.Offloaded {
			seen[id] = a
			return 0, false
		}
		if !f.Established || f.Left <= LongestIdle {
			return 0, false
		}
		return max(time.Second, k.timeout(f.VIP)-now.Sub(a.at)), true
	})
	if err != nil {
		return err
	}
	k.active = seen
	if n > 0 {
		k.log.Debug("silent flows left the flowtable", zap.Int("flows", n))
	}
	return nil
}

// activity is when the flow last had a packet, at the latest. Who has no counters
// may have had one now.
func (k *IdleKeeper) activity(id uint64, f Flow, now time.Time) activity {
	packets := f.Sent + f.Answered
	if a, ok := k.active[id]; ok && a.packets == packets && packets > 0 {
		return a
	}
	return activity{packets, now}
}

func (k *IdleKeeper) timeout(vip netip.AddrPort) time.Duration {
	if d, ok := k.idle[vip]; ok {
		return d
	}
	return LongestIdle // of a listener from before a restart
}
