package web

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"nlb/balancer/control"
)

const (
	// usualStep is the time from one sample to the next while somebody looks, and
	// window how long they are kept.
	usualStep = 2 * time.Second
	window    = 5 * time.Minute
	// fresh is how old an answer to who asks for the status may be. Each look at the
	// flows of a busy host reads a table of a million entries.
	fresh = 500 * time.Millisecond
	// maxHistory bounds the memory of samples, in bytes. 10,000 targets take 120 kB
	// a sample, so their whole window is 18 MB; more of them have a shorter one.
	maxHistory = 24 << 20
	// maxSeries is how many targets one answer about the past may have. A thousand
	// are 3 MB of JSON.
	maxSeries = 1000
)

// A recorder remembers what its Source said. It has no goroutine of its own: who
// wants to know takes the sample that is due, for all.
type recorder struct {
	source Source
	step   time.Duration // usualStep but for tests
	limit  int           // maxHistory but for tests

	// turn is held, by sending, while the source is asked and the rest is used.
	turn    chan struct{}
	known   *control.Status
	asked   time.Time // when known was told
	newest  *frame    // nil before the first
	samples []sample  // oldest first, none older than window
	size    int       // bytes that samples take
}

func newRecorder(source Source) *recorder {
	return &recorder{source: source, step: usualStep, limit: maxHistory, turn: make(chan struct{}, 1)}
}

// A sample is what all targets did in one step.
type sample struct {
	at     time.Time
	layout *layout
	points []point // of the layout's targets
	size   int     // bytes, with the layout if it is the first to have it
}

// A layout says whose points are where. It is shared by samples between which no
// target came or went, and never modified.
type layout struct {
	groups  map[string]span
	targets []netip.AddrPort // of all groups, one after the other
}

// A span is a group's part of a layout's targets.
type span struct{ first, end int }

// targetSize is about what a target takes in a layout, in bytes.
const targetSize = 32

func newLayout(s *control.Status) *layout {
	l := &layout{groups: make(map[string]span, len(s.TargetGroups))}
	for _, g := range s.TargetGroups {
		first := len(l.targets)
		for _, t := range g.Targets {
			l.targets = append(l.targets, t.AddrPort())
		}
		l.groups[g.Name] = span{first, len(l.targets)}
	}
	return l
}

func (l *layout) same(o *layout) bool {
	return maps.Equal(l.groups, o.groups) && slices.Equal(l.targets, o.targets)
}

// of are the points of a group's targets; none if there is no such group.
func (s sample) of(group string) []point {
	part := s.layout.groups[group]
	return s.points[part.first:part.end]
}

// A frame is a sample with the status it was taken from. Only the newest is kept.
type frame struct {
	sample
	number uint64 // one more than the former's, from 1
	status *control.Status
	// whole is an event with all of the frame; change one with what is different in
	// it from the frame before, or nil if that takes a whole one. Both are made once
	// for all streams, if there is one that wants them.
	whole, change func() []byte
}

// take waits for its turn.
func (r *recorder) take(ctx context.Context) error {
	select {
	case r.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (r *recorder) release() { <-r.turn }

// status is what the source says now, or said a moment ago.
func (r *recorder) status(ctx context.Context) (*control.Status, error) {
	if err := r.take(ctx); err != nil {
		return nil, err
	}
	defer r.release()
	if r.known != nil && time.Since(r.asked) < fresh {
		return r.known, nil
	}
	return r.ask(ctx)
}

// ask needs the turn.
func (r *recorder) ask(ctx context.Context) (*control.Status, error) {
	status, err := r.source.Status(ctx)
	if err != nil {
		return nil, err
	}
	// The time after it: a source that takes long to answer has a rest then.
	r.known, r.asked = status, time.Now()
	return status, nil
}

// frame is the newest one, taken now if the last is a step old.
func (r *recorder) frame(ctx context.Context) (*frame, error) {
	if err := r.take(ctx); err != nil {
		return nil, err
	}
	defer r.release()
	return r.current(ctx)
}

// current needs the turn.
func (r *recorder) current(ctx context.Context) (*frame, error) {
	if r.newest != nil && time.Since(r.newest.at) < r.step {
		return r.newest, nil
	}
	status, err := r.ask(ctx)
	if err != nil {
		return nil, err
	}
	r.newest = r.record(status, r.asked)
	return r.newest, nil
}

// A past is what was seen until a moment.
type past struct {
	step    time.Duration
	status  *control.Status
	samples []sample
}

// seen is all that is remembered, the present included.
func (r *recorder) seen(ctx context.Context) (past, error) {
	if err := r.take(ctx); err != nil {
		return past{}, err
	}
	defer r.release()
	f, err := r.current(ctx)
	if err != nil {
		return past{}, err
	}
	return past{r.step, f.status, slices.Clone(r.samples)}, nil
}

// record makes a sample of a status and forgets those that are too old or too
// many. It needs the turn.
func (r *recorder) record(status *control.Status, at time.Time) *frame {
	before := r.newest
	if before != nil && at.Sub(before.at) > window {
		before = nil // a rate over such a time is not one of now
	}
	f := &frame{sample: sample{at: at, layout: newLayout(status)}, status: status, number: 1}
	if r.newest != nil {
		f.number = r.newest.number + 1
	}
	f.size = len(f.layout.targets) * (pointSize + targetSize)
	if before != nil && f.layout.same(before.layout) {
		f.layout = before.layout
		f.size = len(f.layout.targets) * pointSize
	}
	f.points = pointsOf(before, f)
	f.whole = sync.OnceValue(func() []byte { return wholeEvent(f.sample, status, r.step) })
	f.change = func() []byte { return nil }
	if before != nil {
		was, wasStatus := before.sample, before.status // and not before, or all frames would be kept
		f.change = sync.OnceValue(func() []byte { return changeEvent(was, f.sample, wasStatus, status) })
	}
	r.keep(f.sample)
	return f
}

// keep adds a sample, which it keeps in any case. It needs the turn.
func (r *recorder) keep(s sample) {
	r.samples = append(r.samples, s)
	r.size += s.size
	drop := 0
	for ; drop < len(r.samples)-1; drop++ {
		if s.at.Sub(r.samples[drop].at) < window && r.size <= r.limit {
			break
		}
		r.size -= r.samples[drop].size
	}
	r.samples = slices.Delete(r.samples, 0, drop)
}

// pointsOf are the points of is, compared with was if there is one.
func pointsOf(was, is *frame) []point {
	points := make([]point, 0, len(is.layout.targets))
	former, seconds := formerTargets(was, is)
	for i := range is.status.TargetGroups {
		g := &is.status.TargetGroups[i]
		for j := range g.Targets {
			points = append(points, between(former(i, j), &g.Targets[j], seconds))
		}
	}
	return points
}

// formerTargets tells, for the target of is at some place, what it was in was.
func formerTargets(was, is *frame) (at func(group, target int) *control.Target, seconds float64) {
	switch {
	case was == nil:
		return func(int, int) *control.Target { return nil }, 0
	case was.layout == is.layout:
		at = func(i, j int) *control.Target { return &was.status.TargetGroups[i].Targets[j] }
	default:
		byName := targetsByName(was.status)
		at = func(i, j int) *control.Target {
			g := &is.status.TargetGroups[i]
			return byName[targetName{g.Name, g.Targets[j].AddrPort()}]
		}
	}
	return at, is.at.Sub(was.at).Seconds()
}

// A targetName tells a target from all others.
type targetName struct {
	group  string
	target netip.AddrPort
}

func targetsByName(s *control.Status) map[targetName]*control.Target {
	byName := make(map[targetName]*control.Target)
	for i := range s.TargetGroups {
		g := &s.TargetGroups[i]
		for j := range g.Targets {
			byName[targetName{g.Name, g.Targets[j].AddrPort()}] = &g.Targets[j]
		}
	}
	return byName
}
