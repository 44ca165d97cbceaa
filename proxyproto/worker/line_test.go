package worker

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A silence is a worker that answers when it is told to.
type silence struct {
	t     *testing.T
	l     *line
	calls atomic.Int32
	end   chan struct{}
}

func newSilence(t *testing.T) *silence { return &silence{t: t, l: newLine(), end: make(chan struct{})} }

// ask returns how long somebody waited, and why no longer.
func (s *silence) ask(ctx context.Context, spared func() bool) (time.Duration, error) {
	begun, end := time.Now(), s.end
	answer, err := converse(ctx, s.l, spared, func(ctx context.Context) (string, error) {
		s.calls.Add(1)
		select {
		case <-end:
			return "answer", nil
		case <-ctx.Done():
			return "", ctx.Err()
		}
	})
	if err == nil && answer != "answer" {
		s.t.Errorf("answer %q", answer)
	}
	return time.Since(begun), err
}

func (s *silence) wantSilent(what string, want time.Duration) {
	s.t.Helper()
	took, err := s.ask(s.t.Context(), yes)
	if _, silent := errors.AsType[*silentError](err); !silent || took != want {
		s.t.Errorf("%s: %v after %v, want a silentError after %v", what, err, took, want)
	}
}

func yes() bool { return true }
func no() bool  { return false }

// TestNobodyWaitsLong: one waits for grace, the others not at all until the worker has
// answered, and then a little, until it answers in time.
func TestNobodyWaitsLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSilence(t)
		s.wantSilent("the first", grace)
		s.wantSilent("the second", 0)
		if n := s.calls.Load(); n != 1 {
			t.Errorf("asked %d times at once", n)
		}
		s.end <- struct{}{}
		synctest.Wait()
		s.wantSilent("after a late answer", littleGrace)
		close(s.end)
		synctest.Wait()
		if took, err := s.ask(t.Context(), yes); took != 0 || err != nil {
			t.Errorf("it answers: %v after %v", err, took)
		}
		s.end = make(chan struct{})
		s.wantSilent("after an answer in time", grace)
		close(s.end)
	})
}

// TestWhoIsNotSparedIsWaitedFor: as long as it takes, and until the end of ctx.
func TestWhoIsNotSparedIsWaitedFor(t *testing.T) {
	for name, spared := range map[string]func() bool{"patient": nil, "hasty": no} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSilence(t)
				time.AfterFunc(10*grace, func() { s.end <- struct{}{} })
				if took, err := s.ask(t.Context(), spared); took != 10*grace || err != nil {
					t.Errorf("%v after %v", err, took)
				}
				go func() { _, _ = s.ask(t.Context(), spared) }()
				synctest.Wait()
				ctx, cancel := context.WithTimeout(t.Context(), 2*grace)
				defer cancel()
				if took, err := s.ask(ctx, spared); took != 2*grace || !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("behind another, to the end of its time: %v after %v", err, took)
				}
				close(s.end)
			})
		})
	}
}
