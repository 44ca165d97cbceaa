package main

import (
	"fmt"
	"io"

	"nlb/balancer"
)

// printHeaderChanges says which targets begin or cease to get PROXY headers. One
// that reads headers and gets none serves nobody, and the other way round, so
// that both ends have to change at the same moment.
func printHeaderChanges(w io.Writer, inForce, wanted *balancer.Spec) error {
	for _, c := range headerChanges(inForce, wanted) {
		what := "begin to get PROXY v2 headers, and must read them from then on"
		if !c.begin {
			what = "get no PROXY v2 headers any more, and must not expect them from then on"
		}
		_, err := fmt.Fprintf(w, "# note: target group %s: %s %s; nlb verify %s asks them, "+
			"and client_ip of a target of its own changes them one by one\n", c.group, several(c.targets, "target"), what, c.group)
		if err != nil {
			return err
		}
	}
	return nil
}

type headerChange struct {
	group   string
	begin   bool
	targets int
}

func headerChanges(inForce, wanted *balancer.Spec) []headerChange {
	if inForce == nil {
		return nil
	}
	before := make(map[balancer.TargetKey]bool)
	eachTarget(inForce, func(k balancer.TargetKey, headers bool) { before[k] = headers })
	var changes []headerChange
	for _, begin := range []bool{true, false} {
		counts := make(map[string]int)
		eachTarget(wanted, func(k balancer.TargetKey, headers bool) {
			if was, known := before[k]; known && headers == begin && was != headers {
				counts[k.Group]++
			}
		})
		for _, g := range wanted.TargetGroups {
			if n := counts[g.Name]; n > 0 {
				changes = append(changes, headerChange{g.Name, begin, n})
			}
		}
	}
	return changes
}

// eachTarget calls f with each target and whether it gets headers.
func eachTarget(spec *balancer.Spec, f func(k balancer.TargetKey, headers bool)) {
	for i := range spec.TargetGroups {
		g := &spec.TargetGroups[i]
		for _, t := range g.Targets {
			f(balancer.TargetKey{Group: g.Name, AddrPort: t.AddrPort()}, g.ClientIPOf(t) == balancer.ProxyProtocolV2)
		}
	}
}
