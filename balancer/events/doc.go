// Package events is what a daemon says happened: a name for each thing that can
// happen, and a ring of those that did.
//
// An event is a log entry that has one more field, its name:
//
//	log.Info("target health changed", events.TargetStateChanged.Field(), …)
//
// A Ring is filled by a core beside the one that writes the log, from the same
// entries, so that both agree. It takes entries whatever the log's level is.
//
// docs/events.md lists the kinds. Tests hold it, the kinds and the calls of the
// program to each other.
package events
