package balancer

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"time"

	"go.uber.org/zap"

	"nlb/balancer/events"
)

const (
	// A Linux host answers one prompt in 500 ms for a connection (RFC 5961,
	// section 7; tcp_invalid_ratelimit), and a prompt may get lost.
	promptEvery = 600 * time.Millisecond
	prompts     = 3
	// lookEvery is how often it is looked who was told: those may begin anew.
	lookEvery = 50 * time.Millisecond
	// forgetAfter leaves a slow client a round trip for the last one.
	forgetAfter = 2500 * time.Millisecond
	// pruneEvery is how often all flows are judged when nothing changed.
	pruneEvery = 30 * time.Second
	// sweepRetry is the pause after a failure.
	sweepRetry = time.Second
	// Targets that fail all the time must not have us walk the flows all the
	// time: a sweep is followed by so many times its own duration without one,
	// up to longestRest, and what became due meanwhile is swept together.
	sweepRest   = 4
	longestRest = 200 * time.Millisecond
)

// A Sweeper ends the flows that the state of the targets says should not be. A
// change of rules does nothing to flows that began before it.
type Sweeper struct {
	reconciler *Reconciler
	flows      FlowTable
	log        *zap.Logger

	// The goroutine of Run owns these.
	cuts      map[TargetKey]*cut
	ending    current[map[TargetKey]bool]
	staleness current[*staleness]
	judged    *staleness // all flows were judged by it
	// missed says that there may be entries of relayed connections from a time
	// before these were untracked; see leftTracked.
	missed bool
	prune  time.Time // when to judge again in any case
	vips   map[netip.Addr]bool
}

// A cut is a target whose flows are being ended.
type cut struct {
	begun    time.Time
	prompted int
	looks    int // since the last prompt
	// nobody says that the last prompt found no end to ask.
	nobody bool
	// waiting has the flows whose ends were asked to speak.
	waiting map[flowEnds]askedFlow
	// held is when there were last flows that the flowtable had not released yet.
	// Until then what their ends say is counted, and not answered with a reset.
	held  time.Time
	ended int
	// tried is when whatever was left could not be forgotten.
	tried time.Time
	done  bool
}

// An askedFlow is one whose ends were asked to speak.
type askedFlow struct {
	before Flow // as it was then
	prompt int  // the last that it had a part in
}

// flowEnds tells a target's flows from each other.
type flowEnds struct{ client, vip netip.AddrPort }

func (f Flow) ends() flowEnds { return flowEnds{f.Client, f.VIP} }

// NewSweeper returns a Sweeper that does what r's snapshots say.
func NewSweeper(r *Reconciler, flows FlowTable, log *zap.Logger) *Sweeper {
	r.swept.Store(true)
	s := &Sweeper{reconciler: r, flows: flows, log: log, cuts: make(map[TargetKey]*cut), vips: make(map[netip.Addr]bool)}
	s.ending = current[map[TargetKey]bool]{reconciler: r, derive: terminating}
	s.staleness = current[*staleness]{reconciler: r, derive: s.stalenessOf}
	return s
}

// terminating has the targets whose flows are to be ended.
func terminating(snapshot *Snapshot) map[TargetKey]bool {
	keys := make(map[TargetKey]bool)
	for _, g := range snapshot.Groups {
		for _, t := range g.Targets {
			if t.Terminate {
				keys[t.key(g.Name)] = true
			}
		}
	}
	return keys
}

func (s *Sweeper) stalenessOf(snapshot *Snapshot) *staleness {
	table := snapshot.Desired.Table
	for _, a := range table.VIPs {
		s.vips[a] = true
	}
	if table.UntrackedRelay && (s.judged == nil || !s.judged.untracked) {
		s.missed = true
	}
	return newStaleness(snapshot.Desired, maps.Clone(s.vips), table.UntrackedRelay || s.missed)
}

// Run sweeps after each pass of the Reconciler that changed something, until
// ctx ends. Then it returns nil.
func (s *Sweeper) Run(ctx context.Context) error {
	timer := time.NewTimer(pruneEvery)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.reconciler.passed:
		case <-timer.C:
		}
		wait := pruneEvery
		if snapshot := s.reconciler.Snapshot(); snapshot != nil && snapshot.Held {
			begun := time.Now()
			wait = s.sweep(ctx, snapshot, begun)
			if !sleep(ctx, min(sweepRest*time.Since(begun), longestRest)) {
				return nil
			}
		}
		timer.Reset(wait)
	}
}

// sweep does what is due and returns how long nothing will be.
func (s *Sweeper) sweep(ctx context.Context, snapshot *Snapshot, now time.Time) time.Duration {
	wait := s.cut(ctx, snapshot.Groups, now)
	begun, _ := s.staleness.get()
	if begun.equal(s.judged) && now.Before(s.prune) {
		return min(wait, s.prune.Sub(now))
	}
	judgedAll := true
	n, err := s.flows.Prune(ctx, func(f Flow) bool {
		j, ok := s.staleness.get()
		judgedAll = judgedAll && ok
		return ok && j.stale(f)
	})
	if n > 0 {
		s.log.Info("stale flows removed: their next packets choose anew", events.StaleFlowsRemoved.Field(), zap.Int("flows", n))
	}
	if err != nil {
		s.failed(ctx, "stale flows cannot be removed, trying again", err)
	}
	if err != nil || !judgedAll {
		return min(wait, sweepRetry)
	}
	// If it changed meanwhile, those that were looked at first are judged again.
	s.judged, s.prune = begun, now.Add(pruneEvery)
	if last, _ := s.staleness.get(); last == begun {
		s.missed = false
	}
	s.findLeftover(ctx, snapshot.Groups)
	return min(wait, pruneEvery)
}

func (s *Sweeper) failed(ctx context.Context, what string, err error) {
	if ctx.Err() == nil {
		s.log.Error(what, events.FlowsNotSwept.Field(), zap.Error(err))
	}
}

// cut goes on with the targets whose flows are being ended. Those that are due
// share each look at the flows: it costs the kernel a walk of all flows there
// are, whoever is looked for.
func (s *Sweeper) cut(ctx context.Context, groups []TargetGroupStatus, now time.Time) time.Duration {
	going, due := make(map[TargetKey]*cut), make(map[TargetKey]*cut)
	for _, g := range groups {
		for _, t := range g.Targets {
			if !t.Terminate {
				continue
			}
			key := t.key(g.Name)
			c := s.cuts[key]
			if c == nil {
				c = &cut{begun: now}
			}
			going[key] = c
			if !c.done && !now.Before(c.next()) {
				due[key] = c
			}
		}
	}
	s.cuts = going
	if len(due) > 0 {
		s.step(ctx, due, now)
	}
	wait := pruneEvery
	var ended []TargetKey
	for key, c := range going {
		if c.done {
			ended = append(ended, key)
		} else {
			wait = min(wait, max(0, c.next().Sub(now)))
		}
	}
	s.reconciler.ended(ended)
	return wait
}

// step prompts the targets' flows, forgets those whose ends were both told, and
// at last those that are left.
func (s *Sweeper) step(ctx context.Context, due map[TargetKey]*cut, now time.Time) {
	forgotten := s.forget(ctx, due, now)
	ask := make(map[TargetKey]*cut)
	for key, c := range due {
		switch {
		case c.last(now) && !forgotten:
			c.tried = now
		case c.last(now):
			c.done = true
			if c.ended > 0 {
				s.log.Info("flows of a target ended", events.FlowsEnded.Field(), zap.String("target_group", key.Group),
					zap.Stringer("target", key.AddrPort), zap.Int("flows", c.ended))
			}
		case c.prompted < prompts && !now.Before(c.begun.Add(time.Duration(c.prompted)*promptEvery)):
			ask[key] = c
			c.prompted++
			c.looks = 0
		case !c.held.IsZero():
			ask[key] = c
		default:
			c.looks++
		}
	}
	if len(ask) > 0 {
		s.prompt(ctx, ask, now)
	}
}

// last says whether whatever is left is to be forgotten.
func (c *cut) last(now time.Time) bool { return !now.Before(c.begun.Add(forgetAfter)) }

// end is when whatever is left is to be forgotten next.
func (c *cut) end() time.Time {
	if !c.tried.IsZero() {
		return c.tried.Add(sweepRetry)
	}
	return c.begun.Add(forgetAfter)
}

// next is when there is something to do: looks come quickly after a prompt, when
// the near ends answer, and then seldom. Where nobody is to answer there are none,
// since each costs a walk of all flows, until what slipped through is forgotten.
func (c *cut) next() time.Time {
	end := c.end()
	switch {
	case c.prompted == 0:
		return c.begun
	case !c.held.IsZero() && c.tried.IsZero():
		if again := c.held.Add(lookEvery); again.Before(end) {
			return again
		}
		return end
	case c.nobody, !c.tried.IsZero():
		return end
	}
	if c.prompted < prompts {
		end = c.begun.Add(time.Duration(c.prompted) * promptEvery)
	}
	look := c.begun.Add(time.Duration(c.prompted-1)*promptEvery + lookEvery<<c.looks)
	if c.looks > 3 || look.After(end) {
		return end
	}
	return look
}

// forget removes the flows that are over: there was no connection when they were
// looked at, or both ends have spoken since the rule was there that answers with
// a reset. That a flow looks closed is no sign that both were told: the first
// reset closes it in the kernel's eyes (nf_ct_set_closing, Linux 6.3). It reports
// whether it could do so with all of them.
func (s *Sweeper) forget(ctx context.Context, due map[TargetKey]*cut, now time.Time) bool {
	judgedAll := true
	n, err := s.flows.Forget(ctx, slices.Collect(maps.Keys(due)), func(f Flow) bool {
		ending, ok := s.ending.get()
		if !ok || !ending[f.To] {
			judgedAll = false
			return false
		}
		c := due[f.To]
		w, asked := c.waiting[f.ends()]
		return c.last(now) || f.Protocol == ProtoTCP && (!asked && !f.Live || asked && f.Sent > w.before.Sent && f.Answered > w.before.Answered)
	})
	for key, ended := range n {
		due[key].ended += ended
	}
	if err != nil {
		s.failed(ctx, "flows of targets cannot be ended", err)
	}
	return err == nil && judgedAll
}

// prompt asks those ends that have not spoken, each of them once in a round.
func (s *Sweeper) prompt(ctx context.Context, due map[TargetKey]*cut, now time.Time) {
	for _, c := range due {
		c.held = time.Time{}
	}
	flows, err := s.flows.FlowsTo(ctx, slices.Collect(maps.Keys(due)))
	if err == nil {
		before := make(map[TargetKey]map[flowEnds]askedFlow, len(due))
		for key, c := range due {
			before[key], c.waiting = c.waiting, make(map[flowEnds]askedFlow)
		}
		ask := flows[:0]
		for _, f := range flows {
			c := due[f.To]
			w, again := before[f.To][f.ends()]
			if f.Protocol != ProtoTCP || !f.Live && !again || f.Target != f.To.AddrPort {
				continue
			}
			if f.Offloaded {
				c.held = now
				continue
			}
			if !again {
				w.before = f
			}
			if w.prompt < c.prompted {
				w.prompt = c.prompted
				ask = append(ask, f)
			}
			c.waiting[f.ends()] = w
		}
		for _, c := range due {
			c.nobody = len(c.waiting) == 0 && c.held.IsZero()
		}
		if len(ask) > 0 {
			err = s.flows.Prompt(ask)
		}
	}
	if err != nil {
		// Those who speak by themselves are told in any case.
		s.failed(ctx, "the ends of flows cannot be told that their target is gone", err)
	}
}

// findLeftover looks for flows of targets that should have none and are not
// being cut: those that were cut while nobody was there to do it.
func (s *Sweeper) findLeftover(ctx context.Context, groups []TargetGroupStatus) {
	var idle []TargetKey
	for _, g := range groups {
		for _, t := range g.Targets {
			if t.Cut && !t.Terminate && t.State != Unused {
				idle = append(idle, t.key(g.Name))
			}
		}
	}
	if len(idle) == 0 {
		return
	}
	flows, err := s.flows.FlowsTo(ctx, idle)
	if err != nil {
		s.failed(ctx, "flows of failed targets cannot be listed", err)
	}
	found := make(map[TargetKey]bool)
	for _, f := range flows {
		found[f.To] = true
	}
	if len(found) > 0 {
		s.reconciler.leftover(slices.Collect(maps.Keys(found)))
	}
}
