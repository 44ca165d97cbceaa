package worker

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"
)

const (
	// grace is how long others wait for a worker: many times what an answer takes,
	// or a worker to begin.
	grace = time.Second
	// littleGrace is how long they do when the last answer took longer than that.
	littleGrace = 20 * time.Millisecond
)

// A silentError says that a worker has not answered, and that others did not wait for
// it. What it was asked goes on.
type silentError struct {
	// For is how long it has not.
	For time.Duration
}

func (e *silentError) Error() string {
	return fmt.Sprintf("the relay worker has not answered for %s", e.For.Round(10*time.Millisecond))
}

// A line is what the Parts talk to the worker by: about one thing at a time.
type line struct {
	turn  chan struct{} // holds one while they talk
	begun atomic.Int64  // when they began, Unix time in nanoseconds
	slow  atomic.Bool   // the last answer took longer than grace
}

func newLine() *line { return &line{turn: make(chan struct{}, 1)} }

func (l *line) silent() error {
	return &silentError{time.Since(time.Unix(0, l.begun.Load()))}
}

// converse does something that the worker may keep waiting. Where others wait, which
// spared is for, it gives up after grace with a *silentError if spared says that
// they can; what it did goes on, and until it is over it gives up at once.
func converse[T any](ctx context.Context, l *line, spared func() bool, do func(context.Context) (T, error)) (answer T, err error) {
	select {
	case l.turn <- struct{}{}:
	default:
		if spared != nil && spared() {
			return answer, l.silent()
		}
		select {
		case l.turn <- struct{}{}:
		case <-ctx.Done():
			return answer, ctx.Err()
		}
	}
	begun := time.Now()
	l.begun.Store(begun.UnixNano())
	var giveUp <-chan time.Time
	if spared != nil {
		patience := grace
		if l.slow.Load() {
			patience = littleGrace
		}
		giveUp = time.After(patience)
	}
	type outcome struct {
		answer T
		err    error
	}
	done := make(chan outcome, 1)
	go func() {
		answer, err := do(ctx)
		l.slow.Store(time.Since(begun) >= grace)
		<-l.turn
		done <- outcome{answer, err}
	}()
	select {
	case o := <-done:
		return o.answer, o.err
	case <-giveUp:
		if spared() {
			return answer, l.silent()
		}
	}
	o := <-done
	return o.answer, o.err
}
