package balancer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"nlb/balancer/events"
)

// A loop is the state of a Reconciler's Run and belongs to its goroutine.
type loop struct {
	*Reconciler

	spec   *Spec
	known  map[TargetKey]bool // the targets of spec
	key    HashKey
	health HealthView
	drains Drains
	holds  Holds
	// See View.
	failOpen map[string]FailOpenState
	leftover map[TargetKey]time.Time
	// terminating has the targets whose flows the kernel ends, and whether none
	// are left.
	terminating map[TargetKey]bool
	routes      map[netip.Addr]Route // nil before the first look
	links       []string             // found with them

	// What is on disk. See write.
	unkept      bool  // drains are not
	registered  *Spec // what was written down last, or by Options
	keptSpec    *Spec // registered is this one, reduced
	unkeptParts bool  // Parts have written to the kernel since
	writing     *writing
	waiting     *change
	unwritten   writeErrors // of the last writing
	resting     bool        // it failed, and there was no look since

	held     *Desired  // the kernel was last seen to hold it; nil: unknown
	lastHeld time.Time // see View
	counts   Snapshot  // what is carried from one Snapshot to the next
	failures int       // passes that failed since the last that did not
	failing  time.Time

	// When to act next; zero: not for this reason.
	resyncAt, driftAt, retryAt, changeAt, slowAt time.Time
	// No look for drift before this.
	restUntil time.Time
	// unapplied are the verdicts that the kernel does not have yet, and when they
	// were passed.
	unapplied map[TargetKey]time.Time
}

func (l *loop) run(ctx context.Context) {
	if l.spec != nil {
		l.counts.Generation++
		l.known = targetKeys(l.spec)
		l.pass(ctx, true)
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	defer l.flush(ctx)
	for ctx.Err() == nil {
		now := time.Now()
		l.turned.Store(&now)
		l.write()
		timer.Reset(l.untilNext())
		requests := l.requests
		if l.waiting != nil {
			requests = nil // one after the other
		}
		select {
		case <-ctx.Done():
		case req := <-requests:
			l.answer(ctx, req)
		case errs := <-l.written:
			l.finish(ctx, errs)
		case <-l.wake:
			l.receive(ctx, l.takeInbox())
		case <-timer.C:
			l.act(ctx)
		}
	}
}

// untilNext is how long the loop may sleep.
func (l *loop) untilNext() time.Duration {
	var next time.Time
	for _, t := range []time.Time{l.resyncAt, l.driftAt, l.retryAt, l.changeAt, l.slowAt} {
		if !t.IsZero() && (next.IsZero() || t.Before(next)) {
			next = t
		}
	}
	if next.IsZero() {
		return l.resync
	}
	return max(0, time.Until(next))
}

// act does what is due.
func (l *loop) act(ctx context.Context) {
	now := time.Now()
	due := func(t time.Time) bool { return !t.IsZero() && !now.Before(t) }
	look := due(l.resyncAt) || due(l.driftAt) || due(l.retryAt)
	if l.spec != nil && (look || due(l.changeAt)) {
		l.pass(ctx, look)
	}
	if due(l.slowAt) {
		l.complainOfSlow()
	}
}

// Verdicts come in swarms: a host that dies takes its targets of both families
// and of several groups with it. Where a pass is costly, what comes right behind
// a verdict goes along with it, instead of waiting for a pass of its own.
const (
	costly = 20 * time.Millisecond
	gather = 5 * time.Millisecond
)

// receive takes in what others told. Health is acted on at once, or nearly so,
// drift after a pause.
func (l *loop) receive(ctx context.Context, in inbox) {
	if in.drift && l.spec != nil && l.driftAt.IsZero() {
		l.driftAt = time.Now().Add(driftDelay)
		if l.driftAt.Before(l.restUntil) {
			l.driftAt = l.restUntil
		}
	}
	if l.spec == nil {
		return
	}
	for _, k := range in.leftover {
		l.leftover[k] = time.Now()
	}
	for _, k := range in.ended {
		if _, terminates := l.terminating[k]; terminates {
			l.terminating[k] = true
		}
	}
	news := l.learn(in.health)
	if in.holds != nil {
		l.holds = l.holds.with(in.holds, l.known)
	}
	if !news && in.leftover == nil && in.holds == nil {
		return
	}
	if l.counts.Took < costly {
		l.pass(ctx, false)
		return
	}
	if at := time.Now().Add(gather); l.changeAt.IsZero() || at.Before(l.changeAt) {
		l.changeAt = at
	}
}

// learn takes in what the health checks found, and reports whether that is news:
// a reload tells again of all targets.
func (l *loop) learn(found map[TargetKey]Health) (news bool) {
	for k, h := range found {
		old, told := l.health[k]
		if !l.known[k] || told && old.same(h) {
			continue
		}
		if _, waits := l.unapplied[k]; !waits && old.State != h.State {
			l.unapplied[k] = h.Since
		}
		l.health[k] = h
		news = true
	}
	return news
}

func targetKeys(spec *Spec) map[TargetKey]bool {
	keys := make(map[TargetKey]bool)
	for _, g := range spec.TargetGroups {
		for _, t := range g.Targets {
			keys[TargetKey{Group: g.Name, AddrPort: t.AddrPort()}] = true
		}
	}
	return keys
}

// answer does what was asked for, or has it wait for the disk.
func (l *loop) answer(ctx context.Context, req request) {
	if err := req.ctx.Err(); err != nil {
		req.reply <- err // nobody waits any more
		return
	}
	c, err := req.plan(ctx, l)
	switch {
	case err != nil || c == nil:
		req.reply <- err
	case !l.unkept && reflect.DeepEqual(c.drains, l.drains):
		req.reply <- c.do(ctx)
	default:
		c.request = req
		l.waiting = c
	}
}

// replace puts another Spec in force, or the former again. The drains that follow
// are written down first: a crash in between must not cut the flows of a target
// that has left.
func (l *loop) replace(ctx context.Context, spec *Spec) (*change, error) {
	drains := l.drains.Follow(cmp.Or(l.spec, l.registered), spec, time.Now())
	if err := l.rehearse(ctx, spec, drains); err != nil {
		return nil, err // nothing was touched
	}
	return &change{drains: drains, do: func(ctx context.Context) error {
		before := l.drains
		l.drains, l.unkept = drains, false
		return l.exchange(ctx, spec, before)
	}}, nil
}

// exchange puts another Spec in force, whose drains are; after an error it is the
// former with those before.
func (l *loop) exchange(ctx context.Context, spec *Spec, before Drains) error {
	done := l.converge(ctx, spec, true, false)
	if done.err != nil {
		l.unkept = !reflect.DeepEqual(before, l.drains)
		l.drains = before
		if l.spec != nil {
			l.pass(ctx, true)
		}
		return done.err
	}
	l.spec = spec
	l.counts.Generation++
	l.known = targetKeys(spec)
	maps.DeleteFunc(l.health, func(k TargetKey, _ Health) bool { return !l.known[k] })
	l.settle(done)
	l.log.Info("configuration is in force", events.ConfigReloaded.Field(), zap.Uint64("generation", l.counts.Generation),
		zap.Int("listeners", len(spec.Listeners)), zap.Int("target_groups", len(spec.TargetGroups)))
	return nil
}

func (l *loop) drain(group string, addr netip.Addr, port uint16) (*change, error) {
	key, err := findTarget(l.spec, group, addr, port)
	if err != nil {
		return nil, err
	}
	if _, already := l.drains[key]; already {
		return nil, nil
	}
	drain := newDrain(l.spec.Group(group), time.Now())
	next := maps.Clone(l.drains)
	next[key] = drain
	return &change{drains: next, do: func(ctx context.Context) error {
		l.log.Info("target is deregistered", events.TargetDeregistered.Field(), zap.String("target_group", group),
			zap.Stringer("target", key.AddrPort), zap.Time("until", drain.Until), zap.Bool("connection_termination", drain.Terminate))
		return l.follow(ctx, next)
	}}, nil
}

func (l *loop) undrain(group string, addr netip.Addr, port uint16) (*change, error) {
	key, err := findTarget(l.spec, group, addr, port)
	if err != nil {
		return nil, err
	}
	if _, drains := l.drains[key]; !drains {
		return nil, nil
	}
	next := maps.Clone(l.drains)
	delete(next, key)
	return &change{drains: next, do: func(ctx context.Context) error {
		l.log.Info("target is registered again", events.TargetRegistered.Field(), zap.String("target_group", group), zap.Stringer("target", key.AddrPort))
		return l.follow(ctx, next)
	}}, nil
}

// follow makes drains that are written down those in force.
func (l *loop) follow(ctx context.Context, drains Drains) error {
	l.drains, l.unkept = drains, false
	l.pass(ctx, false)
	return l.counts.Err
}

// rehearse finds what can be known to fail without touching anything.
func (l *loop) rehearse(ctx context.Context, spec *Spec, drains Drains) error {
	routes, links, err := l.findRoutes(ctx, spec)
	if err != nil {
		return err
	}
	seen := l.view(time.Now())
	seen.Routes, seen.Links, seen.Drains = routes, links, drains
	_, err = PlanAll(ctx, l.parts, Forward(spec, seen))
	return err
}

// pass makes the kernel hold the Spec in force and records what came of it.
// With look it asks the host anew for the routes.
func (l *loop) pass(ctx context.Context, look bool) {
	l.tidy(time.Now())
	done := l.converge(ctx, l.spec, look, true)
	if ctx.Err() != nil {
		return // the stop is the failure
	}
	l.settle(done)
}

// tidy forgets what is over.
func (l *loop) tidy(now time.Time) {
	l.holds = l.holds.current(l.spec, l.known, now)
	l.tidyLeftover(now)
	if next, changed := l.drains.settle(l.view(now)); changed {
		l.drains, l.unkept, l.resting = next, true, false
	}
}

// tidyLeftover forgets the targets whose time is over, and gives those more that
// still have flows: once a target is not installed any more, nobody can tell which
// flows were its.
func (l *loop) tidyLeftover(now time.Time) {
	for k, at := range l.leftover {
		if now.Before(at.Add(terminateFor)) {
			continue
		}
		if ended, terminates := l.terminating[k]; terminates && !ended && l.swept.Load() {
			l.leftover[k] = now
		} else {
			delete(l.leftover, k)
		}
	}
}

// An outcome is what came of one pass.
type outcome struct {
	want   *Desired
	groups []TargetGroupStatus
	looked bool
	begun  time.Time
	// held says that the kernel holds want, though the routes that it rests on
	// may not be today's, which is an error all the same.
	held bool
	err  error
}

// converge makes the Parts hold a Spec: all of them, or with sparing those that
// others cannot do without.
func (l *loop) converge(ctx context.Context, spec *Spec, look, sparing bool) outcome {
	done := outcome{looked: look, begun: time.Now()}
	var lost error
	if look || l.routes == nil {
		routes, links, err := l.findRoutes(ctx, spec)
		if err == nil {
			l.routes, l.links = routes, links
		}
		lost = err
	}
	seen := l.view(time.Now())
	done.groups = Targets(spec, seen)
	done.want = forward(spec, seen, done.groups)
	if lost != nil && l.routes == nil {
		done.err = lost
		return done
	}
	// When what is wanted is what was there, a change to be made is one that
	// somebody else undid.
	held := l.held
	repair := sync.OnceValue(func() bool {
		return held != nil && held.Table.samePools(done.want.Table) && reflect.DeepEqual(held, done.want)
	})
	l.held = nil
	l.changing.Store(true)
	parts := l.parts
	if !look && held.sameBesideTable(done.want) {
		parts = slices.DeleteFunc(slices.Clone(parts), func(p Part) bool {
			_, ignores := p.(TableIgnorer)
			return ignores
		})
	}
	wrote := func(p PartPlan) { l.wrote(p, repair()) }
	var spared, err error
	if sparing {
		spared, err = ConvergeSparing(ctx, parts, done.want, wrote)
	} else {
		err = Converge(ctx, parts, done.want, wrote)
	}
	if err == nil {
		l.lastHeld, done.held = seen.Now, true
		if spared == nil {
			l.held = done.want
		}
	}
	// Yesterday's routes carry today's health, but they are to be found again.
	done.err = errors.Join(err, spared, lost)
	return done
}

// findRoutes asks for the routes to the targets, and for the links if there is a
// use for them.
func (l *loop) findRoutes(ctx context.Context, spec *Spec) (routes map[netip.Addr]Route, links []string, err error) {
	routes, err = l.router.Routes(ctx, RoutedAddrs(spec, l.drains), spec.HasVIP)
	if err != nil {
		return nil, nil, fmt.Errorf("find the routes to the targets: %w", err)
	}
	if routes == nil {
		routes = make(map[netip.Addr]Route)
	}
	if spec.Flowtable {
		if links, err = l.router.Links(ctx); err != nil {
			return nil, nil, fmt.Errorf("find the links of the flowtable: %w", err)
		}
	}
	return routes, links, nil
}

func (l *loop) view(now time.Time) View {
	return View{
		Key: l.key, Health: l.health, Drains: l.drains, Holds: l.holds, Routes: l.routes, Links: l.links,
		FailOpen: l.failOpen, Leftover: l.leftover, LastHeld: l.lastHeld, Now: now,
	}
}

func (l *loop) wrote(p PartPlan, repair bool) {
	l.counts.Writes++
	l.unkeptParts = true
	if log := l.log.Check(zap.DebugLevel, "kernel changed"); log != nil {
		log.Write(zap.String("part", p.Part), zap.Strings("changes", p.Plan.Lines()))
	}
	if repair {
		l.counts.Repairs++
		l.log.Warn("drift repaired: somebody else had changed what is ours",
			events.KernelDriftRepaired.Field(), zap.String("part", p.Part))
	}
}

// settle records a pass over the Spec in force: what to say, what to show and
// when to look again.
func (l *loop) settle(done outcome) {
	now := time.Now()
	if done.looked {
		l.resting = false
		l.driftAt = time.Time{}
		l.resyncAt = now.Add(l.resync)
		l.restUntil = now.Add(driftRest * now.Sub(done.begun))
	}
	if done.held {
		l.noteTerminating(done, now)
		l.noteLatency(now)
	}
	l.changeAt = nextChange(done.groups)
	l.failOpen = make(map[string]FailOpenState, len(done.groups))
	for _, g := range done.groups {
		l.failOpen[g.Name] = g.FailOpen
	}
	if done.err != nil {
		l.failed(done.err, done.held, now)
	} else {
		l.succeeded(done, now)
	}
	l.counts.Err = done.err
	l.publish(done, now)
}

// noteTerminating counts the time in which flows are ended from when the kernel
// began to, which a busy host may do late.
func (l *loop) noteTerminating(done outcome, now time.Time) {
	next := make(map[TargetKey]bool)
	for _, g := range done.groups {
		for i := range g.Targets {
			t := &g.Targets[i]
			if !t.Terminate {
				continue
			}
			key := t.key(g.Name)
			ended, already := l.terminating[key]
			if !already {
				l.leftover[key] = now
			}
			next[key] = ended
		}
	}
	l.terminating = next
}

// noteLatency counts the verdicts that the kernel has now.
func (l *loop) noteLatency(now time.Time) {
	for _, since := range l.unapplied {
		l.counts.Latency.add(now.Sub(since))
	}
	clear(l.unapplied)
}

func (l *loop) failed(err error, held bool, now time.Time) {
	if l.failures == 0 {
		l.failing = now
		what := "cannot make the kernel hold the configuration, trying on"
		if held {
			what = "the configuration is in force by what was known before, trying on"
		}
		l.log.Error(what, events.KernelApplyFailed.Field(), zap.Error(err))
	}
	l.failures++
	l.counts.Failures++
	l.retryAt = now.Add(backOff(l.failures))
}

func (l *loop) succeeded(done outcome, now time.Time) {
	if l.failures > 0 {
		l.log.Info("kernel holds the configuration again",
			events.KernelApplyRecovered.Field(), zap.Int("failures", l.failures), zap.Duration("after", now.Sub(l.failing)))
	}
	l.failures = 0
	l.retryAt = time.Time{}
	l.counts.Converged, l.counts.Took = now, now.Sub(done.begun)
}

func (l *loop) publish(done outcome, now time.Time) {
	next := l.counts
	next.Spec, next.Desired, next.Groups, next.Passed, next.Held = l.spec, done.want, done.groups, now, done.held
	var before []TargetGroupStatus
	if s := l.snapshot.Load(); s != nil {
		before = s.Groups
	}
	known := statusByKey(before)
	stamp(known, next.Groups, now)
	logTransitions(l.log, known, before, next.Groups)
	l.snapshot.Store(&next)
	l.changing.Store(false)
	select {
	case l.passed <- struct{}{}:
	default: // a look that nobody took yet covers this pass
	}
	closeOnce(l.attempted)
	if next.Err == nil {
		closeOnce(l.converged)
	}
}

// closeOnce is for channels that only the loop closes.
func closeOnce(c chan struct{}) {
	select {
	case <-c:
	default:
		close(c)
	}
}

// nextChange is when the first state ends by itself, zero if none does.
func nextChange(groups []TargetGroupStatus) (next time.Time) {
	sooner := func(t time.Time) {
		if !t.IsZero() && (next.IsZero() || t.Before(next)) {
			next = t
		}
	}
	for _, g := range groups {
		sooner(g.FailOpen.Until)
		for _, t := range g.Targets {
			sooner(t.Until)
			sooner(t.TerminateUntil)
		}
	}
	return next
}
