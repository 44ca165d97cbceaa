package balancer

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/zap"

	"nlb/internal/bubble"
)

func TestHoldsGrow(t *testing.T) {
	start := time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)
	p := PassiveCheck{MaxFailures: 3, Hold: 10 * time.Second, MaxHold: time.Minute}
	for _, c := range []struct {
		name string
		// after has how long after the former hold's end each failure comes.
		after []time.Duration
		want  []time.Duration
	}{
		{"again and again", []time.Duration{0, 0, 0, 0, 0},
			[]time.Duration{10 * time.Second, 20 * time.Second, 40 * time.Second, time.Minute, time.Minute}},
		{"just remembered", []time.Duration{0, time.Minute - 1}, []time.Duration{10 * time.Second, 20 * time.Second}},
		{"just forgotten", []time.Duration{0, 0, time.Minute}, []time.Duration{10 * time.Second, 20 * time.Second, 10 * time.Second}},
	} {
		t.Run(c.name, func(t *testing.T) {
			now := start
			var h Hold
			var got []time.Duration
			for _, after := range c.after {
				now = now.Add(after)
				h = h.next(p, 3, now)
				got = append(got, h.Until.Sub(now))
				if !h.inForce(now) || h.inForce(h.Until) {
					t.Errorf("%+v is not in force from its beginning to its end", h)
				}
				now = h.Until
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestStreaks(t *testing.T) {
	for _, c := range []struct {
		name string
		seen []Outcomes
		want []uint64
	}{
		{"failures add up", []Outcomes{{1, 0}, {1, 0}, {3, 0}}, []uint64{1, 1, 3}},
		{"an answer ends it", []Outcomes{{4, 0}, {4, 1}, {5, 1}}, []uint64{4, 0, 1}},
		{"an answer in between counts as the last", []Outcomes{{4, 0}, {9, 1}}, []uint64{4, 0}},
		{"counters begin anew", []Outcomes{{4, 9}, {2, 0}, {3, 0}}, []uint64{0, 2, 3}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var s streak
			var got []uint64
			for _, o := range c.seen {
				s = s.next(o)
				got = append(got, s.failed)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// outcomes is an OutcomeCounter that is told what to count.
type outcomes struct {
	mu    sync.Mutex
	known map[TargetKey]Outcomes
	err   error
	looks int
}

func (o *outcomes) Outcomes(context.Context) (map[TargetKey]Outcomes, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.looks++
	return maps.Clone(o.known), o.err
}

func (o *outcomes) add(k TargetKey, failed, answered uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	was := o.known[k]
	o.known[k] = Outcomes{was.Failed + failed, was.Answered + answered}
}

func (o *outcomes) fail(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.err = err
}

// observing runs f in a bubble with an Observer of a group of two targets.
func observing(t *testing.T, p PassiveCheck, f func(t *testing.T, o *outcomes, r *Reconciler)) {
	spec := webSpec(2)
	spec.TargetGroups[0].Passive = p
	inBubble(t, spec, func(t *testing.T, _ *world, r *Reconciler) {
		o := &outcomes{known: make(map[TargetKey]Outcomes)}
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		defer running.Wait()
		defer cancel()
		running.Go(func() { _ = NewObserver(r, o, zap.NewNop()).Run(ctx) })
		now := time.Now()
		r.SetHealth(map[TargetKey]Health{webKey("10.0.1.11"): healthy(now), webKey("10.0.1.12"): healthy(now)})
		bubble.Pass(outcomeEvery)
		f(t, o, r)
	})
}

func TestFailedConnectionsHoldATarget(t *testing.T) {
	p := PassiveCheck{MaxFailures: 3, Hold: 10 * time.Second, MaxHold: time.Minute}
	observing(t, p, func(t *testing.T, o *outcomes, r *Reconciler) {
		one := webKey("10.0.1.11")
		first := func() TargetStatus { return r.Snapshot().Groups[0].Targets[0] }
		bubble.Pass(outcomeEvery)
		o.add(one, 2, 0)
		o.add(webKey("10.0.1.12"), 2, 5)
		bubble.Pass(outcomeEvery)
		if s := first(); s.State != Healthy || s.Share != 1 {
			t.Errorf("one too few: %+v", s)
		}
		o.add(one, 1, 0)
		bubble.Pass(outcomeEvery)
		since := time.Now()
		want := TargetStatus{
			Target: target("10.0.1.11"),
			Health: Health{Unhealthy, ReasonFailedHealthChecks, "3 connections of clients in a row refused or not answered", since},
			Until:  since.Add(10 * time.Second),
			Probed: first().Probed, Held: true,
			Hold: Hold{Since: since, Until: since.Add(10 * time.Second), Times: 1, Failures: 3},
		}
		if diff := cmp.Diff(want, first(), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
			t.Errorf("held, and its flows not cut:\n%s", diff)
		}
		// What a hold's flows come to, such as those that had begun, extends nothing.
		o.add(one, 100, 0)
		bubble.Pass(5 * time.Second)
		// The health checks agree that it is dead, and then that it is not.
		r.SetHealth(map[TargetKey]Health{one: unhealthy(time.Now())})
		synctest.Wait()
		if s := first(); s.Held || s.Reason != ReasonTimeout {
			t.Errorf("the health check's verdict is hidden: %+v", s)
		}
		r.SetHealth(map[TargetKey]Health{one: healthy(time.Now())})
		synctest.Wait()
		if s := first(); !s.Held {
			t.Errorf("a health check ends a hold: %+v", s)
		}
		bubble.Pass(5 * time.Second)
		if s := first(); s.State != Healthy || s.Share != 1 || !s.Until.IsZero() {
			t.Errorf("the hold has ended: %+v", s)
		}
		o.add(one, 3, 0)
		bubble.Pass(outcomeEvery)
		if s := first(); !s.Held || s.Until.Sub(s.Since) != 20*time.Second {
			t.Errorf("the second hold: %+v", s)
		}
		// A reload without the passive check ends it.
		if err := r.SetSpec(t.Context(), webSpec(2)); err != nil {
			t.Error(err)
		}
		if s := first(); s.Held || s.Share != 1 {
			t.Errorf("without a passive check: %+v", s)
		}
		looks := o.looks
		bubble.Pass(time.Second)
		if o.looks != looks {
			t.Errorf("%d looks at outcomes that nobody judges", o.looks-looks)
		}
	})
}

func TestUnreadableOutcomesHoldNobody(t *testing.T) {
	observing(t, PassiveCheck{MaxFailures: 1, Hold: time.Second, MaxHold: time.Second}, func(t *testing.T, o *outcomes, r *Reconciler) {
		bubble.Pass(outcomeEvery)
		o.fail(errors.New("no buffer space available"))
		o.add(webKey("10.0.1.11"), 5, 0)
		bubble.Pass(time.Second)
		if s := r.Snapshot().Groups[0].Targets[0]; s.Held {
			t.Errorf("held by what could not be read: %+v", s)
		}
		o.fail(nil)
		bubble.Pass(outcomeEvery)
		if s := r.Snapshot().Groups[0].Targets[0]; !s.Held || s.Hold.Failures != 5 {
			t.Errorf("not held by what was read late: %+v", s)
		}
	})
}

func TestHoldsSurviveARestart(t *testing.T) {
	spec := webSpec(2)
	spec.TargetGroups[0].Passive = PassiveCheck{MaxFailures: 1, Hold: time.Minute, MaxHold: time.Hour}
	synctest.Test(t, func(t *testing.T) {
		one, gone := webKey("10.0.1.11"), webKey("10.0.1.99")
		hold := Hold{Since: time.Now(), Until: time.Now().Add(time.Minute), Times: 3, Failures: 1}
		r, stop := start(Options{
			Parts: newWorld().parts(), Spec: spec, Log: zap.NewNop(), Holds: Holds{one: hold, gone: hold},
			Health: HealthView{one: healthy(time.Now()), webKey("10.0.1.12"): healthy(time.Now())},
		})
		defer stop()
		synctest.Wait()
		s := r.Snapshot().Groups[0].Targets[0]
		if !s.Held || s.Share != 0 || s.Hold != hold {
			t.Errorf("after the restart: %+v", s)
		}
	})
}
