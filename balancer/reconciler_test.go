package balancer

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"nlb/internal/bubble"
)

func healthy(at time.Time) Health { return Health{State: Healthy, Since: at} }

func unhealthy(at time.Time) Health {
	return Health{State: Unhealthy, Reason: ReasonTimeout, Description: "no answer within 10s", Since: at}
}

func TestSpecIsPursuedFromTheStart(t *testing.T) {
	inBubble(t, webSpec(2), func(t *testing.T, w *world, r *Reconciler) {
		want := map[string]string{
			"guard 198.51.100.10":      "on",
			"address 198.51.100.10":    "lo",
			"pool web":                 "hairpin_snat 10.0.1.11:8080=1 10.0.1.12:8080=1",
			"service 198.51.100.10:80": "web",
		}
		if diff := cmp.Diff(want, w.dump()); diff != "" {
			t.Error(diff)
		}
		s := r.Snapshot()
		if s.Err != nil || s.Generation != 1 || s.Writes != 2 || s.Repairs != 0 {
			t.Errorf("snapshot: error %v, generation %d, %d writes, %d repairs", s.Err, s.Generation, s.Writes, s.Repairs)
		}
	})
}

func TestNothingIsTouchedBeforeASpec(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, w *world, r *Reconciler) {
		w.tamper("pool old", "snat", true)
		r.SetHealth(map[TargetKey]Health{webKey("10.0.1.11"): healthy(time.Now())})
		bubble.Pass(time.Minute)
		if w.steps != 0 || r.Snapshot() != nil {
			t.Errorf("%d steps, snapshot %v", w.steps, r.Snapshot())
		}
		if err := r.SetSpec(t.Context(), webSpec(1)); err != nil {
			t.Fatal(err)
		}
		if _, ok := w.dump()["pool old"]; ok {
			t.Error("what the Spec does not have is still there")
		}
	})
}

func TestHealthIsRoutedAtOnce(t *testing.T) {
	inBubble(t, webSpec(2), func(t *testing.T, w *world, r *Reconciler) {
		now := time.Now()
		r.SetHealth(map[TargetKey]Health{
			webKey("10.0.1.11"): healthy(now), webKey("10.0.1.12"): unhealthy(now),
			webKey("10.0.9.9"): healthy(now), // not a target
		})
		synctest.Wait() // the clock stands still meanwhile
		if got, want := w.dump()["pool web"], "hairpin_snat 10.0.1.11:8080=1 10.0.1.12:8080=0 ends"; got != want {
			t.Errorf("pool web: %s, want %s", got, want)
		}
		if n := len(r.Snapshot().Groups[0].Targets); n != 2 {
			t.Errorf("%d targets", n)
		}
	})
}

func TestFailOpenIsSaid(t *testing.T) {
	core, logs := observer.New(zapcore.InfoLevel)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		r, stop := start(Options{Parts: w.parts(), Spec: webSpec(1), Log: zap.New(core)})
		defer stop()
		synctest.Wait()
		r.SetHealth(map[TargetKey]Health{webKey("10.0.1.11"): unhealthy(time.Now())})
		synctest.Wait()
		if !r.Snapshot().Groups[0].FailOpen.Open {
			t.Error("not in fail-open")
		}
		r.SetHealth(map[TargetKey]Health{webKey("10.0.1.11"): healthy(time.Now())})
		synctest.Wait()
		if r.Snapshot().Groups[0].FailOpen.Open {
			t.Error("still in fail-open")
		}
	})
	var got []string
	for _, e := range logs.All() {
		got = append(got, fmt.Sprint(e.Level, " ", e.Message, " ", e.ContextMap()))
	}
	want := []string{
		"info target health changed map[description:no answer within 10s event:target.state_changed from:initial reason:Target.Timeout target:10.0.1.11:8080 target_group:web to:unhealthy]",
		"warn target group fails open: too few targets are healthy, new flows go to all of them map[event:group.fail_open_began target_group:web]",
		"info target health changed map[description: event:target.state_changed from:unhealthy reason: target:10.0.1.11:8080 target_group:web to:healthy]",
		"info target group no longer fails open: new flows go to healthy targets only map[event:group.fail_open_ended target_group:web]",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestStatesEndByThemselves(t *testing.T) {
	spec := webSpec(2)
	g := &spec.TargetGroups[0]
	g.Unhealthy = UnhealthyAction{DrainingInterval: 3 * time.Second}
	g.DeregistrationDelay.Timeout = 5 * time.Second
	inBubble(t, spec, func(t *testing.T, w *world, r *Reconciler) {
		states := func() (s [2]State) {
			for i, t := range r.Snapshot().Groups[0].Targets {
				s[i] = t.State
			}
			return s
		}
		now := time.Now()
		r.SetHealth(map[TargetKey]Health{webKey("10.0.1.11"): unhealthy(now), webKey("10.0.1.12"): healthy(now)})
		if err := r.Drain(t.Context(), "web", addr("10.0.1.12"), 0); err != nil {
			t.Error(err)
		}
		for _, at := range []struct {
			after time.Duration
			want  [2]State
		}{
			{time.Second, [2]State{UnhealthyDraining, Draining}},
			{3 * time.Second, [2]State{Unhealthy, Draining}},
			{5 * time.Second, [2]State{Unhealthy, Unused}},
		} {
			bubble.Pass(time.Until(now.Add(at.after)))
			if got := states(); got != at.want {
				t.Errorf("after %v: %v, want %v", at.after, got, at.want)
			}
		}
		if got, want := w.dump()["pool web"], "hairpin_snat 10.0.1.11:8080=1"; got != want {
			t.Errorf("pool web: %s, want %s", got, want)
		}
		if err := r.Undrain(t.Context(), "web", addr("10.0.1.12"), 8080); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if got, want := states(), [2]State{Unhealthy, Healthy}; got != want {
			t.Errorf("undrained: %v, want %v", got, want)
		}
	})
}

func TestSinceIsKept(t *testing.T) {
	inBubble(t, webSpec(1), func(t *testing.T, w *world, r *Reconciler) {
		began := r.Snapshot().Groups[0].Targets[0].Since
		if began.IsZero() {
			t.Fatal("an initial target has no since")
		}
		bubble.Pass(time.Minute)
		if since := r.Snapshot().Groups[0].Targets[0].Since; !since.Equal(began) {
			t.Errorf("since moved from %v to %v", began, since)
		}
	})
}

func TestDriftIsRepaired(t *testing.T) {
	for _, c := range []struct {
		name   string
		notify bool
		within time.Duration
	}{
		{"told", true, driftDelay},
		{"not told", false, DefaultResync},
	} {
		t.Run(c.name, func(t *testing.T) {
			inBubble(t, webSpec(1), func(t *testing.T, w *world, r *Reconciler) {
				want := w.dump()
				w.tamper("service 198.51.100.10:80", "", c.notify)
				w.tamper("address 198.51.100.99", "lo", c.notify)
				bubble.Pass(c.within)
				if diff := cmp.Diff(want, w.dump()); diff != "" {
					t.Error(diff)
				}
				if s := r.Snapshot(); s.Repairs != 2 || s.Writes != 4 {
					t.Errorf("%d repairs, %d writes", s.Repairs, s.Writes)
				}
			})
		})
	}
}

func TestFailedSpecLeavesTheFormerInForce(t *testing.T) {
	inBubble(t, webSpec(1), func(t *testing.T, w *world, r *Reconciler) {
		before := w.dump()
		now := time.Now()
		r.SetHealth(map[TargetKey]Health{webKey("10.0.1.11"): healthy(now)})
		bad := webSpec(3)
		bad.VIPs = append(bad.VIPs, VIP{Address: addr("198.51.100.11"), Interface: "missing0"})
		err := r.SetSpec(t.Context(), bad)
		if err == nil || !strings.Contains(err.Error(), "no such device") {
			t.Fatalf("error %v", err)
		}
		if diff := cmp.Diff(before, w.dump()); diff != "" {
			t.Error(diff)
		}
		s := r.Snapshot()
		if s.Generation != 1 || s.Err != nil || len(s.Spec.VIPs) != 1 || s.Groups[0].Targets[0].State != Healthy {
			t.Errorf("generation %d, error %v, %d VIPs, target %v", s.Generation, s.Err, len(s.Spec.VIPs), s.Groups[0].Targets[0].State)
		}
	})
}

func TestReloadKeepsHealthOfTargetsThatStay(t *testing.T) {
	inBubble(t, webSpec(2), func(t *testing.T, w *world, r *Reconciler) {
		since := time.Now()
		r.SetHealth(map[TargetKey]Health{webKey("10.0.1.11"): healthy(since), webKey("10.0.1.12"): unhealthy(since)})
		bubble.Pass(time.Second)
		if err := r.SetSpec(t.Context(), webSpec(3)); err != nil {
			t.Fatal(err)
		}
		if got, want := w.dump()["pool web"], "hairpin_snat 10.0.1.11:8080=1 10.0.1.12:8080=0 ends 10.0.1.13:8080=0"; got != want {
			t.Errorf("pool web: %s, want %s", got, want)
		}
		if got := r.Snapshot().Groups[0].Targets[0].Since; !got.Equal(since) {
			t.Errorf("since %v, want %v", got, since)
		}
	})
}

func TestErrorsAreRetriedAndSaidOnce(t *testing.T) {
	core, logs := observer.New(zapcore.InfoLevel)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.fault = func(step) error { return errors.New("device or resource busy") }
		r, stop := start(Options{Parts: w.parts(), Spec: webSpec(1), Log: zap.New(core)})
		defer stop()
		<-r.Attempted()
		if err := r.Snapshot().Err; err == nil || err.Error() != "apply dataplane: device or resource busy" {
			t.Errorf("error %v", err)
		}
		bubble.Pass(time.Minute)
		select {
		case <-r.Converged():
			t.Error("said to have converged")
		default:
		}
		failures := r.Snapshot().Failures
		// 7 in the first 6.4 s at most, then one each 4 to 5 s.
		if failures < 15 || failures > 22 {
			t.Errorf("%d failures in a minute", failures)
		}
		w.setFault(nil)
		<-r.Converged()
		if r.Snapshot().Err != nil || len(w.dump()) != 4 {
			t.Errorf("error %v, kernel %v", r.Snapshot().Err, w.dump())
		}
	})
	if n := len(logs.All()); n != 2 {
		t.Errorf("%d log entries, want the failure and the recovery: %v", n, logs.All())
	}
}

func TestBrokenWatchIsSaidOnceAndTheResyncCovers(t *testing.T) {
	core, logs := observer.New(zapcore.InfoLevel)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		parts := w.parts()
		parts[1].(*fakePart).watchErr = errors.New("no buffer space available")
		_, stop := start(Options{Parts: parts, Spec: webSpec(1), Log: zap.New(core)})
		defer stop()
		bubble.Pass(time.Minute)
		want := w.dump()
		w.tamper("pool web", "snat", false)
		bubble.Pass(DefaultResync)
		if diff := cmp.Diff(want, w.dump()); diff != "" {
			t.Error(diff)
		}
	})
	if n := logs.FilterMessageSnippet("watch").Len(); n != 1 {
		t.Errorf("said %d times", n)
	}
}

func TestLostRoutesDoNotStopHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		router := &fakeRouter{}
		r, stop := start(Options{Parts: w.parts(), Router: router, Spec: webSpec(2)})
		defer stop()
		synctest.Wait()
		lost := errors.New("netlink: interrupted system call")
		router.err.Store(&lost)
		bubble.Pass(DefaultResync)
		if r.Snapshot().Err == nil {
			t.Error("the error is not shown")
		}
		now := time.Now()
		r.SetHealth(map[TargetKey]Health{webKey("10.0.1.11"): healthy(now), webKey("10.0.1.12"): unhealthy(now)})
		synctest.Wait()
		if got, want := w.dump()["pool web"], "hairpin_snat 10.0.1.11:8080=1 10.0.1.12:8080=0 ends"; got != want {
			t.Errorf("pool web: %s, want %s", got, want)
		}
	})
}

// The kernel holds what rests on yesterday's routes: verdicts that it got count,
// and so does the time in which it ends flows.
func TestLostRoutesDoNotHideWhatTheKernelHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		spec := webSpec(2)
		spec.TargetGroups[0].Unhealthy.ConnectionTermination = true
		w, router := newWorld(), &fakeRouter{}
		r, stop := start(Options{Parts: w.parts(), Router: router, Spec: spec})
		defer stop()
		synctest.Wait()
		lost := errors.New("netlink: interrupted system call")
		router.err.Store(&lost)
		w.setFault(func(step) error { return errors.New("busy") })
		now := time.Now()
		r.SetHealth(map[TargetKey]Health{webKey("10.0.1.11"): healthy(now), webKey("10.0.1.12"): unhealthy(now)})
		synctest.Wait()
		w.setFault(nil)
		bubble.Pass(time.Second) // retries, which look for routes
		s := r.Snapshot()
		if s.Err == nil || s.Latency.Count != 2 || s.Latency.Sum < firstBackOff {
			t.Errorf("%d verdicts reached the kernel, in %v; want 2, not at once; error: %v", s.Latency.Count, s.Latency.Sum, s.Err)
		}
		if until := s.Groups[0].Targets[1].TerminateUntil; !until.After(now.Add(terminateFor)) {
			t.Errorf("flows are ended until %v after the verdict, not after the kernel had it", until.Sub(now))
		}
	})
}

// What is known already is no reason to look at the kernel.
func TestNoNewsNoPass(t *testing.T) {
	inBubble(t, webSpec(2), func(t *testing.T, _ *world, r *Reconciler) {
		found := map[TargetKey]Health{webKey("10.0.1.11"): healthy(time.Now())}
		r.SetHealth(found)
		synctest.Wait()
		before := r.Snapshot()
		r.SetHealth(found)
		r.SetHealth(nil)
		r.SetHealth(map[TargetKey]Health{webKey("10.0.1.99"): healthy(time.Now())})
		synctest.Wait()
		if r.Snapshot() != before {
			t.Error("a pass without news")
		}
		worse := found[webKey("10.0.1.11")]
		worse.Description = "slow"
		r.SetHealth(map[TargetKey]Health{webKey("10.0.1.11"): worse})
		synctest.Wait()
		if r.Snapshot() == before {
			t.Error("no pass although there was news")
		}
	})
}

func TestStopLeavesTheKernelAndRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		r, stop := start(Options{Parts: w.parts(), Spec: webSpec(1)})
		synctest.Wait()
		want := w.dump()
		stop()
		if diff := cmp.Diff(want, w.dump()); diff != "" {
			t.Error(diff)
		}
		if err := r.SetSpec(context.Background(), webSpec(2)); !errors.Is(err, ErrStopped) {
			t.Errorf("error %v", err)
		}
	})
}

func TestSetSpecNobodyWaitsFor(t *testing.T) {
	inBubble(t, webSpec(1), func(t *testing.T, w *world, r *Reconciler) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_ = r.SetSpec(ctx, webSpec(2)) // refused by one of two select arms, either way with an error
		synctest.Wait()
		if g := r.Snapshot().Generation; g != 1 {
			t.Errorf("generation %d", g)
		}
	})
}

func TestSnapshotKnowsOnlySpecTargets(t *testing.T) {
	inBubble(t, webSpec(2), func(t *testing.T, w *world, r *Reconciler) {
		now := time.Now()
		r.SetHealth(map[TargetKey]Health{webKey("10.0.1.12"): healthy(now)})
		if err := r.SetSpec(t.Context(), webSpec(1)); err != nil {
			t.Fatal(err)
		}
		if err := r.SetSpec(t.Context(), webSpec(2)); err != nil {
			t.Fatal(err)
		}
		// The target was gone in between, so its health is of another life.
		if s := r.Snapshot().Groups[0].Targets[1]; s.State != Initial || s.Target.Address != netip.MustParseAddr("10.0.1.12") {
			t.Errorf("%v is %v", s.Target.Address, s.State)
		}
	})
}

// A slowPart takes its time to find that nothing is to be done.
type slowPart struct {
	takes time.Duration
	plans atomic.Int32
}

func (p *slowPart) Name() string                      { return "slow" }
func (p *slowPart) Apply(context.Context, Plan) error { return nil }
func (p *slowPart) Plan(context.Context, *Desired) (Plan, error) {
	p.plans.Add(1)
	time.Sleep(p.takes) // of the bubble's time
	return fakePlan{}, nil
}

func TestVerdictsInASwarmShareAPass(t *testing.T) {
	for _, c := range []struct {
		takes time.Duration
		want  int32
	}{{time.Millisecond, 3}, {costly, 1}} {
		synctest.Test(t, func(t *testing.T) {
			part := &slowPart{takes: c.takes}
			r, stop := start(Options{Parts: []Part{part}, Spec: webSpec(3), Log: zap.NewNop()})
			defer stop()
			bubble.Pass(time.Second)
			before := part.plans.Load()
			for _, host := range []string{"10.0.1.11", "10.0.1.12", "10.0.1.13"} {
				r.SetHealth(map[TargetKey]Health{webKey(host): healthy(time.Now())})
				bubble.Pass(2 * time.Millisecond)
			}
			bubble.Pass(100 * time.Millisecond)
			if n := part.plans.Load() - before; n != c.want {
				t.Errorf("a pass of %v: %d passes for three verdicts within 6 ms, want %d", c.takes, n, c.want)
			}
			for _, target := range r.Snapshot().Groups[0].Targets {
				if target.State != Healthy {
					t.Errorf("%v is %v", target.Target.AddrPort(), target.State)
				}
			}
		})
	}
}

// A host that is busy for longer than flows are ended for does not forget to end
// them.
func TestNoPassIsTooLateToEndFlows(t *testing.T) {
	one := webKey("10.0.1.11")
	for name, due := range map[string]func(t *testing.T, r *Reconciler){
		"drain": func(t *testing.T, r *Reconciler) {
			if err := r.Drain(t.Context(), one.Group, one.AddrPort.Addr(), 0); err != nil {
				t.Fatal(err)
			}
			bubble.Pass(time.Minute - time.Second)
		},
		"verdict": func(_ *testing.T, r *Reconciler) {
			time.AfterFunc(time.Second, func() { r.SetHealth(map[TargetKey]Health{one: unhealthy(time.Now())}) })
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, minuteSpec(3), func(t *testing.T, w *world, r *Reconciler) {
				now := time.Now()
				r.SetHealth(map[TargetKey]Health{one: healthy(now), webKey("10.0.1.12"): healthy(now), webKey("10.0.1.13"): healthy(now)})
				due(t, r)
				w.setFault(func(step) error { return errors.New("busy") })
				bubble.Pass(3 * terminateFor)
				w.setFault(nil)
				ended := func() bool {
					s := r.Snapshot()
					return s.Held && s.Groups[0].Targets[0].Terminate
				}
				before := time.Now()
				for !ended() && time.Since(before) < time.Minute {
					bubble.Pass(time.Second)
				}
				if !ended() {
					t.Fatal("its flows were not ended")
				}
				bubble.Pass(2 * terminateFor)
				if ended() {
					t.Error("its flows are ended for ever")
				}
			})
		})
	}
}

// An onlooker counts how often it is asked, and does not care for the Table.
type onlooker struct{ asked atomic.Int64 }

func (*onlooker) Name() string  { return "onlooker" }
func (*onlooker) IgnoresTable() {}
func (o *onlooker) Plan(context.Context, *Desired) (Plan, error) {
	o.asked.Add(1)
	return fakePlan(nil), nil
}
func (*onlooker) Apply(context.Context, Plan) error { return nil }

func TestVerdictsLeaveAloneWhatIgnoresThem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := new(onlooker)
		r, stop := start(Options{Parts: append(newWorld().parts(), o), Spec: webSpec(2), Resync: time.Minute})
		defer stop()
		asked := func(what string, want int64, do func()) {
			t.Helper()
			before := o.asked.Load()
			do()
			synctest.Wait()
			if n := o.asked.Load() - before; n != want {
				t.Errorf("%s: asked %d times, want %d", what, n, want)
			}
		}
		synctest.Wait()
		asked("a verdict", 0, func() { r.SetHealth(map[TargetKey]Health{webKey("10.0.1.11"): unhealthy(time.Now())}) })
		asked("a VIP is bound elsewhere", 2, func() {
			other := webSpec(2)
			other.VIPs[0].Interface = "eth0"
			if err := r.SetSpec(t.Context(), other); err != nil {
				t.Error(err)
			}
		})
		asked("resync", 1, func() { bubble.Pass(time.Minute) })
	})
}
