package balancer

import (
	"context"
	"errors"
	"fmt"
	"testing"
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
