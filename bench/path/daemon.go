package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"nlb/balancer"
	"nlb/balancer/control"
)

// awaitHealthy waits until nlb has found every target healthy and the kernel
// has what the file says.
func (s *site) awaitHealthy(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	client := control.NewClient(s.path("nlb.sock"))
	for {
		status, err := client.Status(ctx)
		if err == nil {
			if err = healthy(status); err == nil {
				return nil
			}
		}
		select {
		case <-tick.C:
		case <-s.ended:
			return fmt.Errorf("nlb serve has ended: %s", &s.log)
		case <-ctx.Done():
			return fmt.Errorf("waited in vain for nlb: %w\n%s", err, &s.log)
		}
	}
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

// A logBuffer keeps what a process prints.
type logBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer // guarded by mu
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.TrimSpace(l.text.String())
}
