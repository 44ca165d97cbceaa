package balancer

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"nlb/balancer/events"
)

const (
	// DefaultResync is how often the kernel is looked at when nothing says
	// that it changed.
	DefaultResync = 10 * time.Second

	// One netlink transaction of a stranger is many notifications: look once
	// they have ceased to be news.
	driftDelay = 50 * time.Millisecond
	// A stranger that never stops must not occupy us: a look is followed by
	// at least this many times its own duration without another.
	driftRest = 4

	firstBackOff = 50 * time.Millisecond
	lastBackOff  = 5 * time.Second
)

// ErrStopped is returned to those who ask something of a Reconciler whose Run
// has returned.
var ErrStopped = errors.New("the reconciler has stopped")

// Options are what a Reconciler works with.
type Options struct {
	// Parts are made to hold what they should in this order; see Converge.
	Parts []Part
	// Router is watched too if it is a Watcher.
	Router Router
	Log    *zap.Logger
	Key    HashKey
	// Spec is in force from the start, and is pursued until it holds. Nil
	// touches nothing before SetSpec.
	Spec *Spec
	// Health is what was known of the targets before a restart: it holds until
	// a health check says otherwise.
	Health HealthView
	// Holds are those that were in force before a restart.
	Holds Holds
	// Drains are those that were under way, or over, before a restart.
	Drains Drains
	// KeepDrains keeps drains for a restart. What somebody asked for takes effect
	// after it, and not after an error; that a drain is over is kept afterwards. It
	// may take long: Run calls it and KeepRegistered, one at a time, beside what
	// else it does. Nil keeps nothing.
	KeepDrains func(Drains) error
	// Registered is what was registered when a daemon last ran, as Registered
	// reduces it: targets that Spec does not have begin to drain. Nil drains none.
	Registered *Spec
	// KeepRegistered keeps what is registered for a restart. It is called with a
	// reduced Spec once that is in force, if it differs from the last one, and
	// again later after an error. Nil keeps nothing.
	KeepRegistered func(*Spec) error
	// Resync is how often the kernel is looked at in any case. 0 means DefaultResync.
	Resync time.Duration
}

// A Reconciler makes the kernel hold what a Spec asks for and keeps it so. The
// goroutine of Run owns the state; every method is safe from any goroutine.
type Reconciler struct {
	parts  []Part
	router Router
	log    *zap.Logger
	resync time.Duration
	start  loop // Run takes it over

	keepDrains     func(Drains) error
	keepRegistered func(*Spec) error
	requests       chan request
	written        chan writeErrors // holds one: the writing under way has ended
	wake           chan struct{}    // holds one: there is something in the inbox
	attempted      chan struct{}    // closed after the first pass
	converged      chan struct{}    // closed after the first pass without an error
	passed         chan struct{}    // holds one: there is a new snapshot
	stopped        chan struct{}    // closed when Run returns
	snapshot       atomic.Pointer[Snapshot]
	turned         atomic.Pointer[time.Time]
	changing       atomic.Bool // the kernel may hold something else than the snapshot says
	swept          atomic.Bool // there is a Sweeper, and flows take as long to end as it says

	mu    sync.Mutex
	inbox inbox // mu
}

// An inbox collects what happened since the loop last looked.
type inbox struct {
	health   map[TargetKey]Health
	leftover []TargetKey
	ended    []TargetKey
	holds    Holds
	drift    bool
}

// A request is something that the loop is to do; reply holds one answer. Plan
// returns nil if there is nothing to do.
type request struct {
	ctx   context.Context
	plan  func(context.Context, *loop) (*change, error)
	reply chan error
}

// NewReconciler returns a Reconciler that does nothing before Run.
func NewReconciler(o Options) *Reconciler {
	if o.Resync == 0 {
		o.Resync = DefaultResync
	}
	health := maps.Clone(o.Health)
	if health == nil {
		health = make(HealthView)
	}
	if o.KeepDrains == nil {
		o.KeepDrains = func(Drains) error { return nil }
	}
	if o.KeepRegistered == nil {
		o.KeepRegistered = func(*Spec) error { return nil }
	}
	now := time.Now()
	known := o.Drains.overdue(now)
	drains := known
	if o.Spec != nil {
		drains = o.Drains.Restart(o.Registered, o.Spec, now)
	}
	r := &Reconciler{
		parts:  o.Parts,
		router: o.Router,
		log:    o.Log,
		resync: o.Resync,
		start: loop{
			spec: o.Spec, key: o.Key, health: health, holds: maps.Clone(o.Holds), drains: drains, leftover: make(map[TargetKey]time.Time),
			lastHeld: now.Add(-1), // what is overdue since a time without a daemon is due now
			unkept:   !reflect.DeepEqual(drains, known), registered: o.Registered,
			unapplied: make(map[TargetKey]time.Time),
		},
		keepDrains:     o.KeepDrains,
		keepRegistered: o.KeepRegistered,
		passed:         make(chan struct{}, 1),
		requests:       make(chan request),
		written:        make(chan writeErrors, 1),
		wake:           make(chan struct{}, 1),
		attempted:      make(chan struct{}),
		converged:      make(chan struct{}),
		stopped:        make(chan struct{}),
	}
	r.turned.Store(&now)
	return r
}

// Turned is when the loop last began another turn, which it does at least once in each
// resync; before Run, when the Reconciler was made. A loop that lives and has not turned
// for many resyncs hangs: in a call of the kernel, or in a Part.
func (r *Reconciler) Turned() time.Time { return *r.turned.Load() }

// Attempted is closed after the first pass, whatever came of it.
func (r *Reconciler) Attempted() <-chan struct{} { return r.attempted }

// Converged is closed once the kernel was seen to hold what it should.
func (r *Reconciler) Converged() <-chan struct{} { return r.converged }

// Snapshot returns the state after the latest pass, nil before the first.
func (r *Reconciler) Snapshot() *Snapshot { return r.snapshot.Load() }

// SetSpec puts spec in force and returns when the kernel holds it. After an
// error the former Spec is in force again and the kernel was returned to it,
// or is being returned to it. When ctx ends before the Reconciler began, nothing
// happens; when it ends later, the answer is lost and the change is not.
func (r *Reconciler) SetSpec(ctx context.Context, spec *Spec) error {
	return r.request(ctx, func(ctx context.Context, l *loop) (*change, error) { return l.replace(ctx, spec) })
}

// Drain deregisters the target of a group that has the address and, unless it
// is 0, the port: it takes no new flows once Drain has returned without an
// error. Its flows live on for the group's DeregistrationDelay. To drain a
// target twice changes nothing, not even the deadline.
func (r *Reconciler) Drain(ctx context.Context, group string, addr netip.Addr, port uint16) error {
	return r.request(ctx, func(_ context.Context, l *loop) (*change, error) { return l.drain(group, addr, port) })
}

// Undrain registers a target again that Drain had deregistered.
func (r *Reconciler) Undrain(ctx context.Context, group string, addr netip.Addr, port uint16) error {
	return r.request(ctx, func(_ context.Context, l *loop) (*change, error) { return l.undrain(group, addr, port) })
}

func (r *Reconciler) request(ctx context.Context, plan func(context.Context, *loop) (*change, error)) error {
	req := request{ctx: ctx, plan: plan, reply: make(chan error, 1)}
	select {
	case r.requests <- req:
	case <-r.stopped:
		return ErrStopped
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case err := <-req.reply:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// SetHealth records what the health checks found. Targets that the Spec in
// force does not have are ignored.
func (r *Reconciler) SetHealth(found map[TargetKey]Health) {
	if len(found) == 0 {
		return
	}
	r.tell(func(in *inbox) {
		if in.health == nil {
			in.health = make(map[TargetKey]Health, len(found))
		}
		maps.Copy(in.health, found)
	})
}

// leftover tells of targets that have flows although they should have none.
func (r *Reconciler) leftover(keys []TargetKey) {
	r.tell(func(in *inbox) { in.leftover = append(in.leftover, keys...) })
}

// ended tells of targets that terminate and have no flows any more.
func (r *Reconciler) ended(keys []TargetKey) {
	if len(keys) == 0 {
		return
	}
	r.tell(func(in *inbox) { in.ended = append(in.ended, keys...) })
}

// hold keeps targets from new flows.
func (r *Reconciler) hold(targets Holds) {
	r.tell(func(in *inbox) {
		if in.holds == nil {
			in.holds = make(Holds, len(targets))
		}
		maps.Copy(in.holds, targets)
	})
}

func (r *Reconciler) drifted() { r.tell(func(in *inbox) { in.drift = true }) }

func (r *Reconciler) tell(write func(*inbox)) {
	r.mu.Lock()
	write(&r.inbox)
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default: // a wake-up that nobody took yet covers this one
	}
}

func (r *Reconciler) takeInbox() inbox {
	r.mu.Lock()
	defer r.mu.Unlock()
	in := r.inbox
	r.inbox = inbox{}
	return in
}

// Run converges until ctx ends, then returns nil and leaves the kernel as it
// is. It may be called once.
func (r *Reconciler) Run(ctx context.Context) error {
	defer close(r.stopped)
	var watches sync.WaitGroup
	defer watches.Wait()
	watch := func(name string, of any) {
		if w, ok := of.(Watcher); ok {
			watches.Go(func() { r.watch(ctx, name, w) })
		}
	}
	for _, p := range r.parts {
		watch(p.Name(), p)
	}
	watch("routes", r.router)
	l := r.start
	l.Reconciler = r
	l.run(ctx)
	return nil
}

// watch keeps a Part's watch alive. What happened while there was none is
// found by looking once it is there again.
func (r *Reconciler) watch(ctx context.Context, part string, w Watcher) {
	failures := 0
	for {
		begun := time.Now()
		err := w.Watch(ctx, r.drifted)
		if ctx.Err() != nil {
			return
		}
		if time.Since(begun) > lastBackOff {
			failures = 0
		}
		if failures == 0 {
			r.log.Warn("watch of the kernel ended, changes by others may go unseen until the resync",
				events.KernelWatchEnded.Field(), zap.String("part", part), zap.Duration("resync", r.resync), zap.Error(err))
		}
		failures++
		if !sleep(ctx, backOff(failures)) {
			return
		}
		r.drifted()
	}
}

// backOff is how long to wait after so many failures in a row: doubling, and
// scattered by a fifth so that hosts which failed together do not return together.
func backOff(failures int) time.Duration {
	d := lastBackOff
	if shift := failures - 1; shift < 7 { // 50 ms << 7 is beyond 5 s
		d = min(d, firstBackOff<<shift)
	}
	return d - rand.N(d/5)
}

// sleep reports whether it was not cut short.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
