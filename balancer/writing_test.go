package balancer

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"nlb/balancer/events"
	"nlb/internal/bubble"
)

// stuck runs f with a Reconciler that holds minuteSpec(2), on a disk that answers
// nothing until release is called.
func stuck(t *testing.T, f func(t *testing.T, w *world, s *shelf, r *Reconciler, release func())) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w, s := newWorld(), &shelf{}
		r, stop := start(s.options(w, minuteSpec(2)))
		defer stop()
		synctest.Wait()
		release := s.stick()
		f(t, w, s, r, release)
	})
}

// drainsOne has a Reconciler that drains one target of three, for a minute.
func drainsOne(t *testing.T, f func(t *testing.T, w *world, s *shelf, r *Reconciler)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w, s := newWorld(), &shelf{}
		r, stop := start(s.options(w, minuteSpec(3)))
		defer stop()
		if err := r.Drain(t.Context(), "web", addr("10.0.1.11"), 0); err != nil {
			t.Fatal(err)
		}
		f(t, w, s, r)
	})
}

// ask begins a request. It has ended when the channel has its error.
func ask(do func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- do() }()
	synctest.Wait()
	return done
}

// waits fails if a request has ended.
func waits(t *testing.T, name string, done <-chan error) {
	t.Helper()
	select {
	case err := <-done:
		t.Errorf("%s did not wait for the disk: %v", name, err)
	default:
	}
}

// states has the state of each target of a group that is registered.
func states(r *Reconciler) map[TargetKey]State {
	found := make(map[TargetKey]State)
	for _, g := range r.Snapshot().Groups {
		for _, t := range g.Targets {
			found[t.key(g.Name)] = t.State
		}
	}
	return found
}

// A drain ends and a target dies while the disk is stuck with the end of that drain.
func TestVerdictsDoNotWaitForTheDisk(t *testing.T) {
	drainsOne(t, func(t *testing.T, w *world, s *shelf, r *Reconciler) {
		release := s.stick()
		bubble.Pass(2 * time.Minute)
		if got := states(r)[webKey("10.0.1.11")]; got != Unused {
			t.Errorf("the drain is not over: %v", got)
		}
		if drains, _ := s.kept(); drains[webKey("10.0.1.11")].Done {
			t.Error("the disk is not stuck")
		}
		before := w.dump()["pool web"]
		r.SetHealth(map[TargetKey]Health{webKey("10.0.1.12"): unhealthy(time.Now()), webKey("10.0.1.13"): healthy(time.Now())})
		synctest.Wait()
		if got := w.dump()["pool web"]; got == before {
			t.Errorf("the verdict is not in the kernel: %s", got)
		}
		if turned := time.Since(r.Turned()); turned > DefaultResync {
			t.Errorf("the loop has not turned for %v", turned)
		}
		release()
		synctest.Wait()
		if drains, _ := s.kept(); !drains[webKey("10.0.1.11")].Done {
			t.Errorf("the end of the drain was never written: %v", drains)
		}
	})
}

func TestRequestsWaitForTheDiskInTurn(t *testing.T) {
	stuck(t, func(t *testing.T, w *world, s *shelf, r *Reconciler, release func()) {
		first, second := webKey("10.0.1.11"), webKey("10.0.1.12")
		drain := ask(func() error { return r.Drain(context.Background(), "web", first.AddrPort.Addr(), 0) })
		reload := ask(func() error { return r.SetSpec(context.Background(), minuteSpec(1)) })
		again := ask(func() error { return r.Undrain(context.Background(), "web", first.AddrPort.Addr(), 0) })
		bubble.Pass(30 * time.Second)
		for name, done := range map[string]<-chan error{"drain": drain, "reload": reload, "undrain": again} {
			waits(t, name, done)
		}
		if drains, _ := s.kept(); len(drains) > 0 {
			t.Errorf("the disk is not stuck: %v", drains)
		}
		r.SetHealth(map[TargetKey]Health{first: healthy(time.Now()), second: unhealthy(time.Now())})
		synctest.Wait()
		if got := states(r); got[first] != Healthy || got[second] == Healthy || len(got) != 2 {
			t.Errorf("while it waits: %v", got)
		}
		release()
		for _, done := range []<-chan error{drain, reload, again} {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		synctest.Wait()
		if drains, registered := s.kept(); len(drains) != 1 || !drains[second].Removed || len(registered.TargetGroups[0].Targets) != 1 {
			t.Errorf("kept: %v, %v", drains, registered)
		}
		if got := s.wrote(); got != "targets drains drains targets drains" {
			t.Errorf("wrote %q", got)
		}
	})
}

// A drain that ends while a reload waits is not begun again by the reload, which was
// planned before that.
func TestDrainEndsWhileAReloadWaits(t *testing.T) {
	drainsOne(t, func(t *testing.T, w *world, s *shelf, r *Reconciler) {
		bubble.Pass(50 * time.Second)
		release := s.stick()
		reload := ask(func() error { return r.SetSpec(context.Background(), minuteSpec(2)) })
		bubble.Pass(30 * time.Second)
		waits(t, "reload", reload)
		if got := w.dump()["pool web"]; strings.Contains(got, "ends") {
			t.Fatalf("the drain is not over: %s", got)
		}
		var again atomic.Value
		w.setFault(func(x step) error {
			if strings.Contains(x.String(), "10.0.1.11:8080=0 ends") {
				again.Store(x.String())
			}
			return nil
		})
		release()
		if err := <-reload; err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if x := again.Load(); x != nil {
			t.Errorf("it ends again: %s", x)
		}
		bubble.Pass(DefaultResync)
		if drains, _ := s.kept(); !drains[webKey("10.0.1.11")].Done || !drains[webKey("10.0.1.13")].Removed {
			t.Errorf("kept: %v", drains)
		}
	})
}

// Who stops waiting has not changed anything, whatever the disk says later.
func TestRequestGivenUp(t *testing.T) {
	stuck(t, func(t *testing.T, w *world, s *shelf, r *Reconciler, release func()) {
		before := w.dump()
		ctx, cancel := context.WithCancel(t.Context())
		drain := ask(func() error { return r.Drain(ctx, "web", addr("10.0.1.11"), 0) })
		waits(t, "drain", drain)
		cancel()
		if err := <-drain; !errors.Is(err, context.Canceled) {
			t.Errorf("it ended with %v", err)
		}
		release()
		synctest.Wait()
		if drains, _ := s.kept(); len(drains) > 0 || !maps.Equal(before, w.dump()) {
			t.Errorf("it drains all the same: %v, %v", drains, w.dump())
		}
		if got := s.wrote(); got != "targets drains drains" {
			t.Errorf("wrote %q", got)
		}
	})
}

// A stop waits for the disk, tells those who wait, and leaves what is in force on it.
func TestStopWithAStuckDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, s := newWorld(), &shelf{}
		r, stop := start(s.options(w, minuteSpec(2)))
		synctest.Wait()
		release := s.stick()
		drain := ask(func() error { return r.Drain(context.Background(), "web", addr("10.0.1.11"), 0) })
		stopped := ask(func() error { stop(); return nil })
		waits(t, "stop", stopped)
		release()
		<-stopped
		if err := <-drain; err == nil {
			t.Error("the drain is in force, by a Reconciler that has stopped")
		}
		if drains, _ := s.kept(); len(drains) > 0 {
			t.Errorf("a start would find a drain that was refused: %v", drains)
		}
	})
}

// What settles just before a stop is on disk after it.
func TestStopWritesWhatIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &shelf{}
		r, stop := start(s.options(newWorld(), minuteSpec(2)))
		if err := r.Drain(t.Context(), "web", addr("10.0.1.11"), 0); err != nil {
			t.Fatal(err)
		}
		s.fail(errors.New("no space left on device"), nil)
		bubble.Pass(2 * time.Minute)
		s.fail(nil, nil)
		stop()
		if drains, _ := s.kept(); !drains[webKey("10.0.1.11")].Done {
			t.Errorf("kept: %v", drains)
		}
	})
}

func TestSlowDiskIsSaidOnce(t *testing.T) {
	core, logs := observer.New(zapcore.WarnLevel)
	synctest.Test(t, func(t *testing.T) {
		s := &shelf{}
		o := s.options(newWorld(), minuteSpec(2))
		o.Log = zap.New(core)
		r, stop := start(o)
		defer stop()
		synctest.Wait()
		for range 2 {
			release := s.stick()
			drain := ask(func() error { return r.Drain(context.Background(), "web", addr("10.0.1.11"), 0) })
			bubble.Pass(slowWriting - time.Millisecond)
			if n := logs.Len(); n != 0 {
				t.Errorf("said too early: %v", logs.All())
			}
			bubble.Pass(time.Minute)
			release()
			if err := <-drain; err != nil {
				t.Error(err)
			}
			if kinds := logs.FilterField(events.StateIsSlow.Field()).Len(); kinds != 1 || logs.Len() != 1 {
				t.Errorf("said: %v", logs.TakeAll())
			}
			logs.TakeAll()
			if err := r.Undrain(t.Context(), "web", addr("10.0.1.11"), 0); err != nil {
				t.Error(err)
			}
		}
	})
}

// A keepingPart is a Part with something to write down.
type keepingPart struct {
	Part
	keep func() error
}

func (p keepingPart) Keep() error { return p.keep() }

// Parts keep what is theirs after passes that changed the kernel, and after errors.
func TestPartsKeep(t *testing.T) {
	core, logs := observer.New(zapcore.ErrorLevel)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		var mu sync.Mutex
		var calls []error // mu
		var err error     // mu
		fail := func(e error) { mu.Lock(); defer mu.Unlock(); err = e }
		parts := w.parts()
		parts[0] = keepingPart{parts[0], func() error {
			mu.Lock()
			defer mu.Unlock()
			calls = append(calls, err)
			return err
		}}
		r, stop := start(Options{Parts: parts, Spec: minuteSpec(2), Log: zap.New(core)})
		defer stop()
		bubble.Pass(time.Minute)
		fail(errors.New("no space left on device"))
		if err := r.SetSpec(t.Context(), minuteSpec(1)); err != nil {
			t.Error(err)
		}
		bubble.Pass(DefaultResync)
		fail(nil)
		bubble.Pass(time.Minute)
		mu.Lock()
		defer mu.Unlock()
		want := []bool{false, true, true, false} // at the start, with the reload, after a look, after the next
		got := make([]bool, len(calls))
		for i, err := range calls {
			got[i] = err != nil
		}
		if !slices.Equal(got[:min(len(want), len(got))], want) {
			t.Errorf("failed: %v, want %v", got, want)
		}
	})
	if n := logs.Len(); n != 1 {
		t.Errorf("said %d times: %v", n, logs.All())
	}
}
