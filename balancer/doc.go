// Package balancer has the nouns of the load balancer, the pure decisions and
// the one loop that carries them out.
//
//	config ──Spec──► Reconciler ◄──health── healthcheck
//	                     │
//	     Forward(spec, seen) ──► Table      pure: no clock, kernel or file
//	                     │
//	     Part.Plan(table) ──► Plan ──► Part.Apply
//
// The sub-packages know one kernel interface each and never each other.
package balancer
