// Package healthcheck finds out whether targets answer.
//
//	[]Check ──Set──► Scheduler ──due──► Probe ──► target
//	                     │                │
//	   OnChange ◄── Tracker ◄───Result────┘
//
// A Check says what to ask of one address and port. A Probe asks once and
// never outlives its deadline. A Tracker turns answers into a state by
// ELBv2's thresholds. A Scheduler asks every Check once per interval, and
// tells about states that changed.
//
// The package knows nothing of target groups: groups that would ask the same
// question of the same address and port share one Check, hence one probe.
package healthcheck
