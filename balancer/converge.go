package balancer

import (
	"context"
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
		plan, err := p.Plan(ctx, want)
		if err != nil {
			return fmt.Errorf("plan %s: %w", p.Name(), err)
		}
		if plan.Empty() {
			continue
		}
		if err := p.Apply(ctx, plan); err != nil {
			return fmt.Errorf("apply %s: %w", p.Name(), err)
		}
		changed(PartPlan{Part: p.Name(), Plan: plan})
	}
	return nil
}
