package lab

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// A Stream is TCP connections that are never silent. Each sends numbered lines, a
// few at a time, and reads the answers: they have to come complete, in their
// order, and from the target that gave the first one.
type Stream struct {
	Call // N connections, which all open at once; Timeout is for each burst
	// Burst is how many lines of 100 bytes are on their way at a time; default 8.
	// A target answers each with twice as much.
	Burst int
	// Interval is the time from one burst to the next; default 50 ms.
	Interval time.Duration
	// Reopen has another connection take the place of one that failed.
	Reopen bool
}

// A Streamed is what a Stream has met so far.
type Streamed struct {
	Open   int    `json:"open"`   // connections that work
	Opened int    `json:"opened"` // that have ever worked
	Lines  uint64 `json:"lines"`  // that were answered
	// Failed counts the connections that broke or could not be opened, Failures
	// are the first of them.
	Failed   int       `json:"failed"`
	Failures []Failure `json:"failures,omitempty"`
}

// OutOfOrder begins the Err of a Failure whose answer was not the one that was
// due; Moved that of one whose answer came from another target.
const (
	OutOfOrder = "out of order"
	Moved      = "moved"
)

// Streaming is a Stream that goes on until it is closed. Open is then how many
// connections worked until it was stopped.
type Streaming = Going[Streamed]

// Stream opens the connections.
func (a *Agent) Stream(ctx context.Context, o Stream) (*Streaming, error) {
	return begin[Streamed](ctx, a, "stream", o)
}

// streaming is the state of a Stream.
type streaming struct {
	Stream
	workers

	mu  sync.Mutex
	met Streamed // guarded by mu
}

func (s *server) stream(_ context.Context, id uint64, o Stream) (none, error) {
	if err := o.complete(); err != nil {
		return none{}, err
	}
	if o.Network != "tcp" {
		return none{}, errors.New("streams are for tcp")
	}
	if o.Interval == 0 {
		o.Interval = 50 * time.Millisecond
	}
	if o.Burst == 0 {
		o.Burst = 8
	}
	run := &streaming{Stream: o}
	run.start(o.N, o.Call, run.work)
	s.keep(id, run)
	return none{}, nil
}

// work keeps one connection, or one after another.
func (s *streaming) work(ctx context.Context, call Call) {
	tick := time.NewTicker(s.Interval)
	defer tick.Stop()
	for s.connection(ctx, call, tick.C); s.Reopen && ctx.Err() == nil; s.connection(ctx, call, tick.C) {
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

// connection is one of them, to its end.
func (s *streaming) connection(ctx context.Context, call Call, tick <-chan time.Time) {
	begun := time.Now()
	f, err := call.dial(ctx)
	if err != nil {
		if ctx.Err() == nil {
			s.fail(Failure{begun, time.Now(), failure(err), ""})
		}
		return
	}
	defer f.close()
	who := ""
	for ctx.Err() == nil {
		begun = time.Now()
		now, err := f.burst(s.Burst, who, s.Timeout)
		if err != nil {
			s.fail(Failure{begun, time.Now(), failure(err), who})
			return
		}
		s.answered(who == "")
		who = now
		select {
		case <-ctx.Done():
		case <-tick:
		}
	}
}

// burst sends some lines and reads their answers, all from the same target; who
// is the one that they have to come from, if it is known.
func (f *flow) burst(lines int, who string, timeout time.Duration) (string, error) {
	if err := f.SetDeadline(time.Now().Add(timeout)); err != nil {
		return who, err
	}
	var text []byte
	for i := range lines {
		text = append(text, numbered(f.asked+i)...)
		text = append(text, '\n')
	}
	if _, err := f.Write(text); err != nil {
		return who, err
	}
	for range lines {
		a, err := f.answer()
		switch want := numbered(f.asked); {
		case err != nil:
			return who, err
		case a.Got != want:
			return who, fmt.Errorf("%s: the answer to %q, want that to %q", OutOfOrder, a.Got, want)
		case who != "" && a.Who != who:
			return who, fmt.Errorf("%s: from %s to %s", Moved, who, a.Who)
		}
		who = a.Who
		f.asked++
	}
	return who, nil
}

// numbered is line n of a stream, as long as an answer can repeat it.
func numbered(n int) string { return fmt.Sprintf("%0*d", gotLimit-1, n) }

// answered counts a burst. A connection works from its first one on: that it could
// be opened says nothing of the target behind a relay.
func (s *streaming) answered(first bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.met.Lines += uint64(s.Burst)
	if first {
		s.met.Open++
		s.met.Opened++
	}
}

func (s *streaming) fail(f Failure) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.met.Failed++
	s.met.Failures = note(s.met.Failures, f)
	if f.Who != "" {
		s.met.Open-- // it had worked
	}
}

func (s *streaming) counts() any {
	s.mu.Lock()
	defer s.mu.Unlock()
	met := s.met
	met.Failures = slices.Clone(met.Failures)
	return met
}

// Close ends the connections and waits for the last bursts.
func (s *streaming) Close() error {
	s.end()
	return nil
}

// String is the counts and the first failure.
func (s Streamed) String() string {
	text := fmt.Sprintf("%d of %d connections work, %d lines answered, %d failed", s.Open, s.Opened, s.Lines, s.Failed)
	if len(s.Failures) > 0 {
		text += fmt.Sprintf(", the first: %+v", s.Failures[0])
	}
	return text
}
