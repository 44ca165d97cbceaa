package main

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"nlb/balancer/control"
	"nlb/balancer/top"
)

// renderStatus writes a status for people.
func renderStatus(w io.Writer, s *control.Status, now time.Time) error {
	var b bytes.Buffer
	renderApply(&b, s, now)
	renderListeners(&b, s.Listeners)
	for _, g := range s.TargetGroups {
		renderGroup(&b, g, now)
	}
	renderTotals(&b, s.Totals)
	_, err := b.WriteTo(w)
	return err
}

func renderApply(b *bytes.Buffer, s *control.Status, now time.Time) {
	fmt.Fprintf(b, "%s, configuration %d, ", s.Dataplane, s.Apply.Generation)
	switch {
	case s.Apply.Error == "":
		fmt.Fprintf(b, "in force as of %s ago\n", age(now, s.Apply.ConvergedAt))
	case s.Apply.Held:
		fmt.Fprintf(b, "in force, by what was known before\nERROR: %s\n", s.Apply.Error)
	case s.Apply.ConvergedAt.IsZero():
		fmt.Fprintf(b, "NEVER IN FORCE\nERROR: %s\n", s.Apply.Error)
	default:
		fmt.Fprintf(b, "NOT IN FORCE since %s ago\nERROR: %s\n", age(now, s.Apply.ConvergedAt), s.Apply.Error)
	}
	if s.Apply.CountersError != "" {
		fmt.Fprintf(b, "COUNTERS: %s\n", s.Apply.CountersError)
	}
	if c := s.Conntrack; c != nil && c.Alarm {
		fmt.Fprintf(b, "CONNTRACK NEARLY FULL: %d of %d flows, %d dropped so far\n", c.Count, c.Max, c.DropsTotal)
	}
}

func renderListeners(b *bytes.Buffer, listeners []control.Listener) {
	rows := [][]string{{"LISTENER", "ADDRESS", "PROTOCOL", "FORWARD"}}
	for _, l := range listeners {
		rows = append(rows, []string{l.Name, netip.AddrPortFrom(l.VIP, l.Port).String(), l.Protocol.String(), forwardWords(l.Forward)})
	}
	b.WriteString("\n")
	renderRows(b, rows)
}

// forwardWords names the groups, and their weights where there is a choice.
func forwardWords(forward []control.Forward) string {
	if len(forward) == 1 {
		return forward[0].TargetGroup
	}
	var words []string
	for _, f := range forward {
		words = append(words, fmt.Sprintf("%s (%d)", f.TargetGroup, f.Weight))
	}
	return strings.Join(words, ", ")
}

func renderGroup(b *bytes.Buffer, g control.TargetGroup, now time.Time) {
	fmt.Fprintf(b, "\ntarget group %s, %s, %s\n", g.Name, g.Protocol, g.ClientIP)
	if g.FailOpen {
		b.WriteString("FAIL OPEN: too few targets are healthy, new flows go to all of them\n")
	}
	rows := [][]string{{"TARGET", "WEIGHT", "STATE", "SINCE", "FLOWS", "NEW", "BYTES", "REASON"}}
	for _, t := range g.Targets {
		rows = append(rows, []string{
			t.AddrPort().String(), weightWords(t), stateWords(t, now), age(now, t.Since),
			count(t.ActiveFlows), count(t.NewFlowsTotal), count(t.BytesTotal),
			cmp.Or(strings.TrimSuffix(t.Reason+": "+t.Description, ": "), "-"),
		})
	}
	renderRows(b, rows)
}

// renderTotals names what was counted, and is silent about what never happened.
func renderTotals(b *bytes.Buffer, totals map[string]uint64) {
	var words []string
	for _, name := range slices.Sorted(maps.Keys(totals)) {
		if n := totals[name]; n > 0 {
			words = append(words, fmt.Sprintf("%s %d", name, n))
		}
	}
	if len(words) > 0 {
		fmt.Fprintf(b, "\n%s\n", strings.Join(words, ", "))
	}
}

// weightWords shows what new flows see, where it is not what was configured.
func weightWords(t control.Target) string {
	if t.EffectiveWeight == t.Weight {
		return strconv.Itoa(t.Weight)
	}
	return fmt.Sprintf("%d of %d", t.EffectiveWeight, t.Weight)
}

// stateWords has the time left of a state that ends by itself.
func stateWords(t control.Target, now time.Time) string {
	words := t.State.String()
	if !t.Until.IsZero() {
		words += ", " + age(t.Until, now) + " left"
	}
	if t.Removed {
		words += ", not in the file"
	}
	return words
}

func count(n *uint64) string {
	if n == nil {
		return "?"
	}
	return strconv.FormatUint(*n, 10)
}

// age is rounded so that it fits in the eye.
func age(now, then time.Time) string { return top.Elapsed(now.Sub(then)) }

func renderRows(b *bytes.Buffer, rows [][]string) {
	w := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	_ = w.Flush() // a Buffer takes everything
}
