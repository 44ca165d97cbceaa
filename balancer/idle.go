package balancer

import (
	"context"
	"hash/maphash"
	"maps"
	"net/netip"
	"time"

	"go.uber.org/zap"

	"nlb/balancer/events"
)

const (
	// LongestIdle is the longest TCPIdleTimeout there is. An entry that has more
	// time left than that was in the flowtable.
	LongestIdle = 6000 * time.Second
	// offloadedFor is what the kernel gives flows in the flowtable (NF_CT_DAY).
	offloadedFor = 24 * time.Hour
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
	// SetTimeouts shows each TCP flow of ours to timeout, and has those that it
	// chooses remembered for so long if they stay silent. It may show a flow twice,
	// and returns how many it chose. A flow may speak before it is carried out.
	SetTimeouts(ctx context.Context, timeout func(Flow) (d time.Duration, ok bool)) (n int, err error)
}

// An IdleKeeper keeps the idle timeouts of TCP flows that were in the flowtable.
//
// While a flow is in it, its conntrack entry lives as long as the flow, and when
// the flow has been silent for 30 s and leaves it, the entry is left with up to
// a day, whatever its timeout policy says (flow_offload_fixup_ct in the kernel's
// nf_flow_table_core.c). The next packet would put that right, but a silent flow
// has none. An IdleKeeper therefore watches the packets of the flows that are in
// the flowtable, and gives those that left it what remains of their listener's
// timeout. A flow is never forgotten too early, and up to idleEvery too late, and
// a second more because the kernel counts whole ones.
type IdleKeeper struct {
	reconciler *Reconciler
	flows      FlowTimes
	log        *zap.Logger
	seed       maphash.Seed

	// The goroutine of Run owns these.
	watched map[uint64]activity
	wait    time.Duration // until the next look
	again   int           // looks to come without a flowtable
	learned *Snapshot
	idle    map[netip.AddrPort]time.Duration // by VIP; of former listeners too
}

// An activity is what is known of when a flow last had a packet.
type activity struct {
	packets uint64 // in both directions; 0 where nobody counts
	// at is when it was first seen to have had so many, which is later than the
	// last of them.
	at time.Time
	// shortened says that its time was shortened since.
	shortened bool
}

// NewIdleKeeper returns an IdleKeeper for the listeners of r's snapshots.
func NewIdleKeeper(r *Reconciler, flows FlowTimes, log *zap.Logger) *IdleKeeper {
	return &IdleKeeper{
		reconciler: r, flows: flows, log: log, seed: maphash.MakeSeed(),
		watched: make(map[uint64]activity), wait: idleEvery, again: idleAgain,
		idle: make(map[netip.AddrPort]time.Duration),
	}
}

// Run looks at the flows until ctx ends. Then it returns nil. Without a flowtable
// it looks for what one from another time may have left, and rests.
func (k *IdleKeeper) Run(ctx context.Context) error {
	for sleep(ctx, k.wait) {
		k.learn()
		if k.learned == nil || k.again == 0 {
			continue
		}
		begun := time.Now()
		err := k.look(ctx)
		k.wait = max(idleEvery, idleRest*time.Since(begun))
		switch {
		case err != nil && ctx.Err() == nil:
			k.log.Error("the idle timeouts of flows cannot be kept, trying again", events.FlowsNotTimed.Field(), zap.Error(err))
		case err == nil && len(k.learned.Desired.Table.FastPath) == 0:
			k.again--
		}
	}
	return nil
}

// learn takes in the listeners of the moment. A flow outlives its listener.
func (k *IdleKeeper) learn() {
	snapshot := k.reconciler.Snapshot()
	if snapshot == k.learned {
		return
	}
	k.learned = snapshot
	for _, s := range snapshot.Desired.Table.Services {
		if s.IdleTimeout > 0 {
			k.idle[netip.AddrPortFrom(s.Address, s.Port)] = s.IdleTimeout
		}
	}
	if len(snapshot.Desired.Table.FastPath) > 0 {
		k.again = idleAgain
	}
}

// look reads all flows once.
func (k *IdleKeeper) look(ctx context.Context) error {
	watched := make(map[uint64]activity, len(k.watched))
	n, err := k.flows.SetTimeouts(ctx, func(f Flow) (time.Duration, bool) {
		id := maphash.Comparable(k.seed, f.ends())
		before, known := k.watched[id]
		// Read as late as this, the time is after all packets that were counted.
		now, d := before.next(f, known, time.Now()), time.Duration(0)
		switch {
		case before.shortened && !now.shortened && (f.Offloaded || f.Established):
			// It spoke, maybe before it was shortened, which undid what the kernel
			// had given it then.
			d = k.timeout(f)
		case !f.Offloaded && f.Established && f.Left > LongestIdle:
			// Who speaks before this is carried out is seen at the next look.
			d, now.shortened = max(2*k.wait, k.timeout(f)-time.Since(now.at)), true
		}
		if f.Offloaded || now.shortened {
			watched[id] = now
		}
		return d, d > 0
	})
	if err != nil {
		maps.Copy(k.watched, watched) // some may have been shortened
		return err
	}
	k.watched = watched
	if n > 0 {
		k.log.Debug("silent flows left the flowtable", zap.Int("flows", n))
	}
	return nil
}

// next is the activity of a flow that was seen at now.
func (a activity) next(f Flow, known bool, now time.Time) activity {
	packets := f.Sent + f.Answered
	switch {
	case !known || packets != a.packets:
		return activity{packets: packets, at: now}
	case packets == 0:
		a.at = now // it may have had one
	}
	return a
}

// timeout is how long a flow is remembered from its last packet on.
func (k *IdleKeeper) timeout(f Flow) time.Duration {
	if f.Offloaded {
		return offloadedFor
	}
	k.learn()
	if d, ok := k.idle[f.VIP]; ok {
		return d
	}
	return LongestIdle // of a listener from before a restart
}
