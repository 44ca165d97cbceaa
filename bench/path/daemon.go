package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/bench/measure"
)

// awaitHealthy waits until nlb has found every target healthy and the kernel
// has what the file says.
func (s *site) awaitHealthy(ctx context.Context) error {
	client := control.NewClient(s.path("nlb.sock"))
	err := s.daemon.Await(ctx, 15*time.Second, func(ctx context.Context) error {
		status, err := client.Status(ctx)
		if err != nil {
			return err
		}
		return healthy(status)
	})
	switch {
	case errors.Is(err, measure.ErrEnded):
		return fmt.Errorf("nlb serve has ended: %s", &s.daemon.Log)
	case err != nil:
		return fmt.Errorf("waited in vain for nlb: %w\n%s", err, &s.daemon.Log)
	}
	return nil
}

func healthy(s *control.Status) error {
	for _, g := range s.TargetGroups {
		for _, t := range g.Targets {
			if t.State != balancer.Healthy || t.EffectiveWeight != t.Weight {
				return fmt.Errorf("%s is %s: %s", t.AddrPort(), t.State, t.Description)
			}
		}
	}
	switch {
	case s.Apply.Error != "":
		return errors.New(s.Apply.Error)
	case s.Apply.ConvergedAt.IsZero():
		return errors.New("the configuration is not in force yet")
	}
	return nil
}
