package balancer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"reflect"
	"time"

	"go.uber.org/zap"

	"nlb/balancer/events"
)

// slowWriting is after how long a writing is called slow.
const slowWriting = 5 * time.Second

// A change is a request that waits until its drains are on disk.
type change struct {
	request
	drains Drains
	do     func(context.Context) error // makes drains those in force
}

// A writing is what goes to the state folder at once, on a goroutine of its own:
// a disk that is busy takes seconds to say that something is on it, and one that is
// broken never does. Verdicts and the ends of drains reach the kernel meanwhile. Only
// what must be on disk before it takes effect waits.
type writing struct {
	change *change // waits for drains; nil: nothing does
	drains Drains  // nil: not they
	// registered is the part of spec that is kept, nil: not that. It is written
	// after drains: a target must not be missing from both.
	registered, spec *Spec
	parts            []Keeper
}

// writeErrors are what came of a writing. What was not tried has no error.
type writeErrors struct{ drains, registered, parts error }

// do writes. It touches nothing that is the loop's.
func (w *writing) do(r *Reconciler) (errs writeErrors) {
	if w.drains != nil {
		errs.drains = r.keepDrains(w.drains)
	}
	if w.registered != nil && errs.drains == nil {
		errs.registered = r.keepRegistered(w.registered)
	}
	for _, k := range w.parts {
		errs.parts = errors.Join(errs.parts, k.Keep())
	}
	return errs
}

// write begins to write what is not on disk, unless a writing is under way: the
// loop asks with each turn. What failed is tried again after the next look, or
// along with what comes next.
func (l *loop) write() {
	if l.writing != nil {
		return
	}
	var w *writing
	switch {
	case l.waiting != nil:
		w = &writing{change: l.waiting, drains: l.waiting.drains}
	case l.spec != nil && !l.resting:
		w = l.collect()
	}
	if w == nil {
		return
	}
	l.writing, l.slowAt = w, time.Now().Add(slowWriting)
	go func() { l.written <- w.do(l.Reconciler) }()
}

// collect finds what is not on disk; nil stands for nothing. What is registered is
// noted once the kernel holds it. A crash before that is harmless: the next start
// drains what has left since the last note, unless it drains already.
func (l *loop) collect() *writing {
	w := new(writing)
	if l.unkept {
		w.drains = l.drains
	}
	if l.keptSpec != l.spec && l.held != nil && l.counts.Err == nil {
		if now := Registered(l.spec); reflect.DeepEqual(now, l.registered) {
			l.keptSpec = l.spec
		} else {
			w.registered, w.spec = now, l.spec
		}
	}
	if l.unkeptParts {
		for _, p := range l.parts {
			if k, keeps := p.(Keeper); keeps {
				w.parts = append(w.parts, k)
			}
		}
		l.unkeptParts = false
	}
	if w.drains == nil && w.registered == nil && w.parts == nil {
		return nil
	}
	return w
}

// finish takes in what came of the writing under way, and carries out the change
// that waited for it.
func (l *loop) finish(ctx context.Context, errs writeErrors) {
	w := l.writing
	l.writing, l.slowAt = nil, time.Time{}
	if w.change != nil {
		l.waiting = nil
		w.change.reply <- l.carryOut(ctx, w.change, errs.drains)
		return
	}
	if w.drains != nil && errs.drains == nil {
		l.unkept = !reflect.DeepEqual(w.drains, l.drains)
	}
	if w.registered != nil && errs.drains == nil && errs.registered == nil {
		l.registered, l.keptSpec = w.registered, w.spec
	}
	if errs.parts != nil {
		l.unkeptParts = true
	}
	l.complain(errs)
	l.resting = errs != writeErrors{}
}

// carryOut makes a change whose drains are on disk, unless nobody waits for it any
// more.
func (l *loop) carryOut(ctx context.Context, c *change, err error) error {
	if err != nil {
		return fmt.Errorf("write down which targets drain: %w", err)
	}
	l.resting = false
	if err := cmp.Or(c.ctx.Err(), ctx.Err()); err != nil {
		l.unkept = true // the file has drains that are not in force
		return err
	}
	return c.do(ctx)
}

// complain tells of what cannot be written, once until it can.
func (l *loop) complain(errs writeErrors) {
	for _, c := range []struct {
		now, before error
		what        string
	}{
		{errs.drains, l.unwritten.drains, "which targets drain cannot be written down, trying on: " +
			"after a restart, those that have left would drain anew"},
		{errs.registered, l.unwritten.registered, "what is registered cannot be written down, trying on: " +
			"targets that leave while no daemon runs would not be drained"},
		{errs.parts, l.unwritten.parts, "what the kernel was given cannot be written down, trying on: " +
			"after a restart, some flows may be taken for those of other targets"},
	} {
		if c.now != nil && c.before == nil {
			l.log.Error(c.what, events.StateCannotBeKept.Field(), zap.Error(c.now))
		}
	}
	l.unwritten = errs
}

// complainOfSlow tells that the disk does not answer.
func (l *loop) complainOfSlow() {
	l.slowAt = time.Time{}
	l.log.Warn("the state folder's disk does not answer: reloads and drains may have to wait, verdicts do not",
		events.StateIsSlow.Field(), zap.Duration("for", slowWriting))
}

// flush waits for the writing under way, and writes what is left.
func (l *loop) flush(ctx context.Context) {
	if l.writing != nil {
		l.finish(ctx, <-l.written)
	}
	l.waiting, l.resting = nil, false // those who wait see that the Reconciler stops
	l.write()
	if l.writing != nil {
		l.finish(ctx, <-l.written)
	}
}
