package main

import (
	"go.uber.org/zap"

	"nlb/balancer"
	"nlb/balancer/events"
)

// recallRegistered reads what was registered when a daemon last ran, nil if
// nobody knows. A file that makes no sense is worth a warning, not a refusal:
// what it should say would only spare flows an end that they may never meet.
func recallRegistered(dir string, log *zap.Logger) *balancer.Spec {
	spec, err := balancer.LoadRegistered(dir)
	if err != nil {
		log.Warn("what was registered cannot be read, targets that left meanwhile are not drained", events.StateCannotBeRead.Field(), zap.Error(err))
	}
	return spec
}
