package healthcheck

import (
	"context"
	"crypto/x509"
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"
)

const (
	// launchStep is how exactly a probe's start is kept. Starts within one
	// step share a wake-up: 10,000 timers a second cost more than the probes'
	// own system calls.
	launchStep = 2 * time.Millisecond
	// startSpacing is the mean distance of the first probes of checks that
	// arrive together: the first 400 are out within 100 ms, so that a small
	// configuration is healthy at once, and 10,000 take 2.5s instead of
	// filling every queue on the way in one burst.
	startSpacing = 250 * time.Microsecond
	// burst is how many checks may stay as close together as they started.
	burst = 400
)

// Options are what a Scheduler needs from its owner.
type Options struct {
	// Mark, Forbidden, Instead and Roots are those of Prober.
	Mark      uint32
	Forbidden func(netip.Addr) bool
	Instead   func(target netip.Addr) netip.Addr
	Roots     *x509.CertPool
	// OnChange is told of states that changed, in one goroutine, a batch at a
	// time. It may take its time: probes do not wait for it, and what changes
	// meanwhile is summed up, at most one Transition per check. Nil: nobody
	// wants to know.
	OnChange func([]Transition)
	// OnResult is told how each probe of a check in the set ended, in the probe's
	// goroutine: by many at once. The check's next probe waits until it returns.
	// Nil: nobody wants to know.
	OnResult func(Key, Result)
	// Probe replaces Prober.Probe. It must end when its context does.
	Probe func(context.Context, Check) Result
}

// A Transition is a change of state. The first state of a check, Initial, is
// not told, nor is a state that was left and entered again before OnChange
// returned from the batch before.
type Transition struct {
	Key      Key
	From, To State
	// Status is what Scheduler.Status said right after the last change.
	Status Status
}

// A Status is what is known of one check.
type Status struct {
	Check Check
	State State
	// Reason is a reason code and Description the last error in words, both
	// empty for a healthy target.
	Reason      string
	Description string
	// Since is when State was entered, for Initial when the check was set.
	Since time.Time
	// Last is how the last probe ended.
	Last Result
	// Probes were made, Failures of them failed. Unmade are those that could
	// not be made, and count neither for nor against the target.
	Probes, Failures, Unmade uint64
}

// A Scheduler probes each of its checks once per interval. Each probe in
// flight has a goroutine of its own, so a target that hangs delays no other;
// no check has two probes in flight, so their number is that of the checks.
type Scheduler struct {
	probe    func(context.Context, Check) Result
	onChange func([]Transition)
	onResult func(Key, Result)
	epoch    time.Time       // zero of clock
	base     context.Context // ends all probes
	stop     context.CancelFunc
	wake     chan struct{} // the next start may be earlier than Run believes
	told     chan struct{} // pending is not empty

	mu      sync.Mutex
	started bool
	entries map[Key]*entry
	queue   queue         // when entries without a probe in flight start theirs
	sleep   time.Duration // when Run wakes up by itself, by clock
	// pending are the transitions that OnChange has not been told yet, in the
	// order of their first change; pendingAt finds them.
	pending   []Transition
	pendingAt map[Key]int
}

// An entry is a check and what was found out. It is guarded by Scheduler.mu,
// except for what never changes: check, key, ctx.
type entry struct {
	check Check
	key   Key
	ctx   context.Context // ends with the check
	stop  context.CancelFunc

	due     time.Duration // of the next probe, or of the one in flight, by clock
	begun   time.Duration // of the probe in flight, by clock; 0: there is none
	phase   time.Duration // if not 0: from the first probe's start to the second's
	tracker Tracker
	since   time.Time
	failure Result // the last failure
	last    Result // the last probe

	probes, failures, unmade uint64
}

// New returns a Scheduler without checks. It does nothing until Run.
func New(opts Options) *Scheduler {
	probe := opts.Probe
	if probe == nil {
		prober := &Prober{Mark: opts.Mark, Forbidden: opts.Forbidden, Instead: opts.Instead, Roots: opts.Roots}
		probe = prober.Probe
	}
	base, stop := context.WithCancel(context.Background())
	return &Scheduler{
		probe: probe, onChange: opts.OnChange, onResult: opts.OnResult, epoch: time.Now(), base: base, stop: stop,
		wake: make(chan struct{}, 1), told: make(chan struct{}, 1),
		entries: make(map[Key]*entry), pendingAt: make(map[Key]int),
	}
}

// clock is the time that schedules are kept in: monotonic, and small enough to
// be compared by the ten thousand.
func (s *Scheduler) clock() time.Duration { return time.Since(s.epoch) }

// Set makes checks the whole set. Checks that are already there, by Key, keep
// their state and schedule; others end, their probes in flight included. A new
// check is Initial and is probed soon.
//
// A new check of an address and port whose other checks all end at the same
// time adopts their state, if they agree on it: an operator who changes an
// interval or a path does not want every target to be new. It is probed soon,
// too, and judged by its own thresholds from then on.
func (s *Scheduler) Set(checks []Check) {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	wanted := make(map[Key]Check, len(checks))
	for _, c := range checks {
		c = c.complete()
		wanted[c.key()] = c
	}
	former := s.retain(wanted)
	fresh := make([]*entry, 0, len(wanted)-len(s.entries))
	for key, c := range wanted {
		if s.entries[key] == nil {
			fresh = append(fresh, s.newEntry(key, c, former[c.Target], now))
		}
	}
	for _, e := range fresh {
		s.entries[e.key] = e
		e.due, e.phase = firstStart(s.clock(), e.check.Interval, len(fresh))
		s.queue = append(s.queue, start{e.due, e})
	}
	s.queue.init()
	signal(s.wake)
}

// retain ends the checks that are not wanted, and returns one of those that
// ended per target, nil when they disagree or when another check of the target
// goes on.
func (s *Scheduler) retain(wanted map[Key]Check) (former map[netip.AddrPort]*entry) {
	former = make(map[netip.AddrPort]*entry)
	for key, e := range s.entries {
		other, seen := former[e.check.Target]
		_, kept := wanted[key]
		switch {
		case kept || seen && (other == nil || other.tracker.State() != e.tracker.State()):
			former[e.check.Target] = nil
		default:
			former[e.check.Target] = e
		}
		if !kept {
			e.stop()
			delete(s.entries, key)
		}
	}
	s.queue = slices.DeleteFunc(s.queue, func(st start) bool { return s.entries[st.e.key] != st.e })
	return former
}

func (s *Scheduler) newEntry(key Key, c Check, former *entry, now time.Time) *entry {
	e := &entry{check: c, key: key, tracker: NewTracker(c.HealthyThreshold, c.UnhealthyThreshold), since: now}
	e.ctx, e.stop = context.WithCancel(s.base)
	if former != nil {
		e.tracker = e.tracker.adopt(former.tracker)
		e.since, e.failure = former.since, former.failure
	}
	return e
}

// firstStart returns when the first of count checks that arrive together is
// probed, and how much later for the second time.
//
// A crowd whose first probes share a window shorter than the interval would
// come as a crowd for ever: its second probes are spread over a whole interval.
func firstStart(now, interval time.Duration, count int) (due, phase time.Duration) {
	window := min(interval, max(time.Duration(count)*startSpacing, launchStep))
	due = now + rand.N(window)
	if count > burst && window < interval {
		phase = 1 + rand.N(interval)
	}
	return due, phase
}

// Run probes until ctx ends, and returns nil after the last probe and the last
// OnChange have. It can be called once.
func (s *Scheduler) Run(ctx context.Context) error {
	s.mu.Lock()
	again := s.started
	s.started = true
	s.mu.Unlock()
	if again {
		return errors.New("healthcheck: a Scheduler runs once")
	}

	var running sync.WaitGroup
	defer running.Wait()
	defer s.stop()
	running.Go(func() { s.tell(ctx) })

	timer := time.NewTimer(s.launch(&running))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-s.wake:
		}
		timer.Reset(s.launch(&running))
	}
}

// launch starts the probes that are due and returns how long there is nothing
// to start.
func (s *Scheduler) launch(running *sync.WaitGroup) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.clock()
	for len(s.queue) > 0 && s.queue[0].due <= now {
		e := s.queue.pop()
		e.begun = max(1, now) // by a clock that stands still it may be 0
		running.Go(func() { s.observe(e, s.probe(e.ctx, e.check)) })
	}
	wait := time.Hour
	if len(s.queue) > 0 {
		wait = max(s.queue[0].due-now, launchStep)
	}
	s.sleep = now + wait
	return wait
}

// observe takes in how a probe ended and plans the next.
func (s *Scheduler) observe(e *entry, r Result) {
	if s.onResult != nil && e.ctx.Err() == nil {
		s.onResult(e.key, r)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.ctx.Err() != nil {
		return
	}
	s.judge(e, r)
	e.begun = 0
	e.plan(s.clock())
	s.queue.push(e)
	if e.due < s.sleep-launchStep {
		signal(s.wake)
	}
}

// judge counts a result. One that is not conclusive is shown, and changes
// nothing: a balancer that is out of file descriptors has no reason to believe
// that its targets are down.
func (s *Scheduler) judge(e *entry, r Result) {
	e.last = r
	if !r.Conclusive() {
		e.unmade++
		return
	}
	e.probes++
	if !r.OK() {
		e.failures++
		e.failure = r
	}
	from, changed := e.tracker.State(), false
	if e.tracker, changed = e.tracker.Observe(r.OK()); changed {
		e.since = time.Now()
		s.report(Transition{Key: e.key, From: from, To: e.tracker.State(), Status: e.status()})
	}
}

// plan sets when the next probe starts: one interval after this one did, or at
// once when this one took longer.
func (e *entry) plan(now time.Duration) {
	next := e.check.Interval
	if e.phase > 0 {
		next, e.phase = e.phase, 0
	}
	e.due = max(e.due+next, now)
}

// report adds a transition to what OnChange is told next.
func (s *Scheduler) report(t Transition) {
	if s.onChange == nil {
		return
	}
	if i, ok := s.pendingAt[t.Key]; ok {
		t.From = s.pending[i].From
		s.pending[i] = t
	} else {
		s.pendingAt[t.Key] = len(s.pending)
		s.pending = append(s.pending, t)
	}
	signal(s.told)
}

// tell calls OnChange until ctx ends.
func (s *Scheduler) tell(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.told:
		}
		if batch := s.takePending(); len(batch) > 0 {
			s.onChange(batch)
		}
	}
}

// takePending returns the transitions of checks that still exist and that are
// not back where they were.
func (s *Scheduler) takePending() []Transition {
	s.mu.Lock()
	defer s.mu.Unlock()
	var batch []Transition
	for _, t := range s.pending {
		if s.entries[t.Key] != nil && t.From != t.To {
			batch = append(batch, t)
		}
	}
	s.pending = nil
	clear(s.pendingAt)
	return batch
}

// Status returns what is known of one check, and whether it is in the set.
func (s *Scheduler) Status(key Key) (Status, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.entries[key]; e != nil {
		return e.status(), true
	}
	return Status{}, false
}

// Overdue is how long ago the result of a probe should have been there, of the check
// that waits longest: its start was missed, or it has not ended although its timeout is
// over. It is 0 where none is late, and before Run. On a host that keeps up it stays
// below a second.
func (s *Scheduler) Overdue() (longest time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sleep == 0 {
		return 0 // Run has not looked yet
	}
	now := s.clock()
	for _, e := range s.entries {
		late := now - e.due
		if e.begun > 0 {
			late = now - e.begun - e.check.Timeout
		}
		longest = max(longest, late)
	}
	return longest
}

// Snapshot returns what is known of all checks.
func (s *Scheduler) Snapshot() map[Key]Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make(map[Key]Status, len(s.entries))
	for key, e := range s.entries {
		all[key] = e.status()
	}
	return all
}

func (e *entry) status() Status {
	st := Status{
		Check: e.check, State: e.tracker.State(), Since: e.since, Last: e.last,
		Probes: e.probes, Failures: e.failures, Unmade: e.unmade,
	}
	switch st.State {
	case Initial:
		st.Reason = ReasonInitialHealthChecking
	case Unhealthy:
		st.Reason = e.failure.Reason()
	}
	switch {
	case e.last.Kind == Unmade:
		st.Description = e.last.String()
	case st.State != Healthy && e.failure.Conclusive():
		st.Description = e.failure.String()
	}
	return st
}

func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default: // one is waiting already
	}
}

// A start is when an entry is probed next. The time is here and not behind the
// pointer: a heap of 10,000 compares 26 of them per probe, and a cache miss for
// each was a quarter of the scheduler's cost.
type start struct {
	due time.Duration // by clock
	e   *entry
}

// A queue is a binary heap of starts by due. It is container/heap without an
// interface per element, which would be an allocation per probe.
type queue []start

func (q queue) init() {
	for i := len(q)/2 - 1; i >= 0; i-- {
		q.down(i)
	}
}

func (q *queue) push(e *entry) {
	*q = append(*q, start{e.due, e})
	h := *q
	for i := len(h) - 1; i > 0; {
		parent := (i - 1) / 2
		if h[parent].due <= h[i].due {
			return
		}
		h[parent], h[i] = h[i], h[parent]
		i = parent
	}
}

func (q *queue) pop() *entry {
	h := *q
	e, last := h[0].e, len(h)-1
	h[0], h[last] = h[last], start{}
	*q = h[:last]
	q.down(0)
	return e
}

func (q queue) down(i int) {
	for {
		least := i
		for child := 2*i + 1; child <= 2*i+2 && child < len(q); child++ {
			if q[child].due < q[least].due {
				least = child
			}
		}
		if least == i {
			return
		}
		q[least], q[i] = q[i], q[least]
		i = least
	}
}
