package balancer

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/internal/bubble"
)

// A hastyPart is overtaken a number of times before it succeeds.
type hastyPart struct{ overtaken, planned, applied int }

func (p *hastyPart) Name() string { return "hasty" }

func (p *hastyPart) Plan(context.Context, *Desired) (Plan, error) {
	p.planned++
	return onePlan{}, nil
}

func (p *hastyPart) Apply(context.Context, Plan) error {
	p.applied++
	if p.applied <= p.overtaken {
		return fmt.Errorf("commit: %w", ErrOvertaken)
	}
	return nil
}

type onePlan struct{}

func (onePlan) Empty() bool     { return false }
func (onePlan) Lines() []string { return []string{"change"} }

func TestConvergePlansAfreshWhenOvertaken(t *testing.T) {
	p := &hastyPart{overtaken: 3}
	changed := 0
	if err := Converge(t.Context(), []Part{p}, &Desired{}, func(PartPlan) { changed++ }); err != nil {
		t.Fatal(err)
	}
	if p.planned != 4 || p.applied != 4 || changed != 1 {
		t.Errorf("planned %d, applied %d, changed %d times; want 4, 4 and 1", p.planned, p.applied, changed)
	}
	p = &hastyPart{overtaken: 1 << 20}
	if err := Converge(t.Context(), []Part{p}, &Desired{}, func(PartPlan) {}); !errors.Is(err, ErrOvertaken) {
		t.Errorf("overtaken for ever: %v", err)
	}
}

// A talker is a Part that talks to a process.
type talker struct {
	silent, spared atomic.Bool
	hasty, patient atomic.Int32 // how often it was asked so
}

var errSilent = errors.New("no answer")

func (*talker) Name() string                      { return "talker" }
func (*talker) Apply(context.Context, Plan) error { return nil }
func (p *talker) Plan(context.Context, *Desired) (Plan, error) {
	p.patient.Add(1)
	return fakePlan(nil), p.err()
}
func (p *talker) Spared(*Desired) bool { return p.spared.Load() }
func (p *talker) Hasty() Part          { return hastyTalker{p} }

func (p *talker) err() error {
	if p.silent.Load() {
		return errSilent
	}
	return nil
}

type hastyTalker struct{ *talker }

func (p hastyTalker) Plan(context.Context, *Desired) (Plan, error) {
	p.hasty.Add(1)
	return fakePlan(nil), p.err()
}

func TestConvergeSparing(t *testing.T) {
	for _, tt := range []struct {
		name           string
		silent, spared bool
		ended          bool
		next           int // how often the next Part is asked
		wantSpared     error
		wantErr        error
	}{
		{name: "it answers", next: 1},
		{name: "it is silent", silent: true, wantErr: errSilent},
		{name: "it is silent and spared", silent: true, spared: true, next: 1, wantSpared: errSilent},
		{name: "it is silent at the end", silent: true, spared: true, ended: true, wantErr: errSilent},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, next := new(talker), new(hastyPart)
			p.silent.Store(tt.silent)
			p.spared.Store(tt.spared)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if tt.ended {
				cancel()
			}
			spared, err := ConvergeSparing(ctx, []Part{p, next}, &Desired{}, func(PartPlan) {})
			if !errors.Is(spared, tt.wantSpared) || !errors.Is(err, tt.wantErr) {
				t.Errorf("spared %v, error %v", spared, err)
			}
			if next.applied != tt.next || p.hasty.Load() != 1 || p.patient.Load() != 0 {
				t.Errorf("the next was applied %d times, it was asked %d times hastily, %d patiently", next.applied, p.hasty.Load(), p.patient.Load())
			}
		})
	}
}

// A process that is silent holds up what it is told alone: a verdict reaches the
// kernel, which holds it. A reload needs all of them.
func TestSilentPartHoldsNobodyUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, p := newWorld(), new(talker)
		p.spared.Store(true)
		r, stop := start(Options{Parts: append([]Part{p}, w.parts()...), Spec: webSpec(2)})
		defer stop()
		synctest.Wait()
		p.silent.Store(true)
		now := time.Now()
		r.SetHealth(map[TargetKey]Health{webKey("10.0.1.11"): healthy(now), webKey("10.0.1.12"): unhealthy(now)})
		synctest.Wait()
		if got, want := w.dump()["pool web"], "hairpin_snat 10.0.1.11:8080=1 10.0.1.12:8080=0 ends"; got != want {
			t.Errorf("pool web: %s, want %s", got, want)
		}
		if s := r.Snapshot(); !s.Held || !errors.Is(s.Err, errSilent) || s.Latency.Count != 2 {
			t.Errorf("held %v, error %v, %d verdicts in the kernel", s.Held, s.Err, s.Latency.Count)
		}
		before := w.dump()
		if err := r.SetSpec(t.Context(), webSpec(1)); !errors.Is(err, errSilent) {
			t.Errorf("reload: %v", err)
		}
		if diff := cmp.Diff(before, w.dump()); diff != "" {
			t.Errorf("the reload that failed changed the kernel (-before +after):\n%s", diff)
		}
		p.silent.Store(false)
		bubble.Pass(lastBackOff)
		if s := r.Snapshot(); s.Err != nil {
			t.Errorf("it answers again: %v", s.Err)
		}
		hasty, patient := p.hasty.Load(), p.patient.Load()
		if err := r.SetSpec(t.Context(), webSpec(1)); err != nil {
			t.Error(err)
		}
		// What would fail is found first, and then it is done.
		if h, n := p.hasty.Load()-hasty, p.patient.Load()-patient; h != 0 || n != 2 {
			t.Errorf("a reload asked it %d times hastily, %d times patiently", h, n)
		}
	})
}
