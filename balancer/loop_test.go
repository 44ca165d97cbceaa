package balancer

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

// The end of a drain that could not be written down is, once that is possible.
func TestDrainsAreWrittenLater(t *testing.T) {
	core, logs := observer.New(zapcore.ErrorLevel)
	synctest.Test(t, func(t *testing.T) {
		s := &shelf{}
		o := s.options(newWorld(), minuteSpec(2))
		o.Log = zap.New(core)
		r, stop := start(o)
		defer stop()
		synctest.Wait()
		if err := r.SetSpec(t.Context(), minuteSpec(1)); err != nil {
			t.Fatal(err)
		}
		full := errors.New("no space left on device")
		s.fail(full, nil)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if drains, _ := s.kept(); len(drains) != 1 {
			t.Errorf("drains: %v; the one that is over cannot have been removed", drains)
		}
		if n := len(logs.TakeAll()); n != 1 {
			t.Errorf("said %d times", n)
		}
		// Nor may a reload rely on what is not written.
		if err := r.SetSpec(t.Context(), minuteSpec(1)); !errors.Is(err, full) {
			t.Errorf("a reload is taken although drains cannot be written: %v", err)
		}
		s.fail(nil, nil)
		time.Sleep(DefaultResync)
		synctest.Wait()
		if drains, _ := s.kept(); len(drains) != 0 {
			t.Errorf("drains: %v; the one that is over is still there", drains)
		}
	})
}
