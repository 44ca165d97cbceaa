package balancer

import (
	"context"
	"errors"
	"fmt"
)

// A PartPlan is what one Part would change.
type PartPlan struct {
	Part string
	Plan Plan
}

// PlanAll asks every Part what it would change, and changes nothing.
func PlanAll(ctx context.Context, parts []Part, want *Desired) ([]PartPlan, error) {
	plans := make([]PartPlan, 0, len(parts))
	for _, p := range parts {
		plan, err := p.Plan(ctx, want)
		if err != nil {
			return nil, fmt.Errorf("plan %s: %w", p.Name(), err)
		}
		plans = append(plans, PartPlan{Part: p.Name(), Plan: plan})
	}
	return plans, nil
}

// Converge makes every Part hold want, in order, and calls changed after each
// Plan that was carried out. It stops at the first error, because each Part
// relies on the ones before it: no VIP may be announced while the rules that
// serve and guard it are missing.
func Converge(ctx context.Context, parts []Part, want *Desired, changed func(PartPlan)) error {
	for _, p := range parts {
		if err := convergeStep(ctx, p, want, changed); err != nil {
			return err
		}
	}
	return nil
}

// ConvergeSparing is Converge that goes on without those Sparable Parts that failed
// and are spared. What was wrong with them is spared, and err what it stopped at.
func ConvergeSparing(ctx context.Context, parts []Part, want *Desired, changed func(PartPlan)) (spared, err error) {
	for _, p := range parts {
		s, sparable := p.(Sparable)
		if sparable {
			p = s.Hasty()
		}
		err := convergeStep(ctx, p, want, changed)
		switch {
		case err == nil:
		case sparable && ctx.Err() == nil && s.Spared(want):
			spared = errors.Join(spared, err)
		default:
			return spared, err
		}
	}
	return spared, nil
}

func convergeStep(ctx context.Context, p Part, want *Desired, changed func(PartPlan)) error {
	plan, err := convergePart(ctx, p, want)
	if err == nil && !plan.Empty() {
		changed(PartPlan{Part: p.Name(), Plan: plan})
	}
	return err
}

// convergePart makes one Part hold want and returns the Plan that did it. Being
// overtaken is no failure on a busy host; being overtaken again and again is.
func convergePart(ctx context.Context, p Part, want *Desired) (Plan, error) {
	const attempts = 5
	for i := 1; ; i++ {
		plan, err := p.Plan(ctx, want)
		if err != nil {
			return nil, fmt.Errorf("plan %s: %w", p.Name(), err)
		}
		if plan.Empty() {
			return plan, nil
		}
		err = p.Apply(ctx, plan)
		if err == nil {
			return plan, nil
		}
		if i == attempts || !errors.Is(err, ErrOvertaken) {
			return nil, fmt.Errorf("apply %s: %w", p.Name(), err)
		}
	}
}
