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
		plan, err := convergePart(ctx, p, want)
		if err != nil {
			return err
		}
		if !plan.Empty() {
			changed(PartPlan{Part: p.Name(), Plan: plan})
		}
	}
	return nil
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
