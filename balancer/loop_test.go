package balancer

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"nlb/balancer/events"
	"nlb/internal/bubble"
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
		bubble.Pass(2 * time.Minute)
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
		bubble.Pass(DefaultResync)
		if drains, _ := s.kept(); len(drains) != 0 {
			t.Errorf("drains: %v; the one that is over is still there", drains)
		}
	})
}

// A loop that lives turns in each resync, and one that hangs does not.
func TestLoopTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		r, stop := start(Options{Parts: w.parts(), Spec: webSpec(1)})
		defer stop()
		began := time.Now()
		for range 60 {
			bubble.Pass(time.Second)
			if still := time.Since(r.Turned()); still > DefaultResync {
				t.Fatalf("after %v: no turn for %v", time.Since(began), still)
			}
		}
		release := make(chan struct{})
		w.setFault(func(step) error {
			<-release
			return nil
		})
		w.tamper("pool web", "snat", true)
		bubble.Pass(time.Minute)
		if still := time.Since(r.Turned()); still < time.Minute-driftDelay-time.Second {
			t.Errorf("hangs for a minute, and turned %v ago", still)
		}
		close(release)
		w.setFault(nil)
		synctest.Wait()
		if still := time.Since(r.Turned()); still > DefaultResync {
			t.Errorf("goes on, and turned %v ago", still)
		}
	})
}

// What becomes of drains is said, whatever began and ended them.
func TestDrainsAreSaid(t *testing.T) {
	core, logs := observer.New(zapcore.InfoLevel)
	synctest.Test(t, func(t *testing.T) {
		spec := minuteSpec(2)
		r, stop := start(Options{Parts: newWorld().parts(), Spec: spec, Log: zap.New(core)})
		defer stop()
		synctest.Wait()
		said := func(what string, want ...string) {
			t.Helper()
			synctest.Wait()
			var got []string
			for _, e := range logs.TakeAll() {
				f := e.ContextMap()
				switch f[events.Key] {
				case events.DrainStarted.Name():
					got = append(got, fmt.Sprintf("%v begins, for %v, removed %v", f["target"], time.Until(f["until"].(time.Time)), f["removed"]))
				case events.DrainEnded.Name():
					got = append(got, fmt.Sprintf("%v ends, %v", f["target"], f["outcome"]))
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", what, diff)
			}
		}
		do := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		do(r.Drain(t.Context(), "web", addr("10.0.1.12"), 0))
		said("drain", "10.0.1.12:8080 begins, for 1m0s, removed false")
		do(r.Undrain(t.Context(), "web", addr("10.0.1.12"), 0))
		said("undrain", "10.0.1.12:8080 ends, registered")
		do(r.SetSpec(t.Context(), minuteSpec(1)))
		said("leaves the file", "10.0.1.12:8080 begins, for 1m0s, removed true")
		do(r.SetSpec(t.Context(), spec))
		said("comes back", "10.0.1.12:8080 ends, registered")
		do(r.SetSpec(t.Context(), minuteSpec(1)))
		said("leaves again", "10.0.1.12:8080 begins, for 1m0s, removed true")
		bubble.Pass(2 * time.Minute)
		said("its time is over", "10.0.1.12:8080 ends, expired")
		do(r.Drain(t.Context(), "web", addr("10.0.1.11"), 0))
		said("drain the other", "10.0.1.11:8080 begins, for 1m0s, removed false")
		bubble.Pass(2 * time.Minute)
		said("and its time is over", "10.0.1.11:8080 ends, expired")
		do(r.Undrain(t.Context(), "web", addr("10.0.1.11"), 0))
		said("nothing drains any more")
		do(r.Drain(t.Context(), "web", addr("10.0.1.11"), 0))
		said("drain it again", "10.0.1.11:8080 begins, for 1m0s, removed false")
		unused := minuteSpec(1)
		unused.Listeners = nil
		do(r.SetSpec(t.Context(), unused))
		said("its group is not in use", "10.0.1.11:8080 ends, not_in_use")
	})
}
