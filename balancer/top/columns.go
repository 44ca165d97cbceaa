package top

import (
	"strings"
	"time"

	"nlb/balancer"
)

// prefix is how many cells come before a name: the cursor, the fold, a blank.
const prefix = 3

// A layout is how wide each column is; 0 leaves it out.
type layout struct {
	name, state, since, flows, newFlows, bytes, weight, note int
}

// Cells that columns want: numbers have five at most (number, short), a name begins
// to be squeezed below nameWidth, and noteWidth is what the longest reason but its
// prefix takes.
const (
	nameWidth   = 22 // [2001:db8::11]:8080
	widestName  = 60
	noteWidth   = 21 // InitialHealthChecking
	stateWidth  = 9  // unhealthy
	longState   = 18 // unhealthy.draining
	numberWidth = 5
	bytesWidth  = 7 // BYTES/S
	weightWidth = 8 // 0 of 256
)

// columns chooses what there is room for: all but the weight at 80 cells, that and
// whole names of states and reasons from 100 on, and what matters most below.
func (s *Screen) columns() layout {
	l := layout{}
	if s.width >= 20 {
		l.state = stateWidth
	}
	if s.width >= 32 {
		l.newFlows = numberWidth
	}
	if s.width >= 48 {
		l.flows = numberWidth
	}
	if s.width >= 56 {
		l.note = noteWidth
	}
	if s.width >= 72 {
		l.since, l.bytes = numberWidth, bytesWidth
	}
	if s.width >= 100 {
		l.state, l.weight = longState, weightWidth
	}
	rest := s.width
	for _, w := range []int{l.state, l.since, l.flows, l.newFlows, l.bytes, l.weight} {
		if w > 0 {
			rest -= w + 1
		}
	}
	l.name = max(0, rest)
	if l.note > 0 {
		rest--
		l.name = min(max(nameWidth, min(s.longest+prefix, rest-noteWidth, widestName)), rest-1)
		l.note = rest - l.name
	}
	return l
}

// wide says that there is room for whole words.
func (l layout) wide() bool { return l.state == longState }

// A cell is a text in its column.
type cell struct {
	text  string
	width int
	align func(string, int) string
	style Style
}

// cells joins those that there is room for.
func cells(all ...cell) Line {
	var out Line
	for _, c := range all {
		if c.width <= 0 {
			continue
		}
		if len(out) > 0 {
			out = append(out, Span{" ", Style{}})
		}
		out = append(out, Span{c.align(c.text, c.width), c.style})
	}
	return out
}

func (l layout) heading() Line {
	return cells(
		cell{"   TARGET", l.name, left, title}, cell{"STATE", l.state, left, title}, cell{"SINCE", l.since, right, title},
		cell{"FLOWS", l.flows, right, title}, cell{"NEW/S", l.newFlows, right, title}, cell{"BYTES/S", l.bytes, right, title},
		cell{"WEIGHT", l.weight, right, title}, cell{"NOTE", l.note, left, title},
	).all(reverse)
}

// row is one line of the list.
func (s *Screen) row(l layout, r *row, selected bool) Line {
	mark := " "
	if selected {
		mark = ">"
	}
	fold := " "
	if r.isHeading() {
		fold = "-"
		if s.order.collapsed[r.rowID] {
			fold = "+"
		}
	}
	var out Line
	switch mark += fold + " "; r.kind {
	case listenersRow:
		out = line(left(mark+plural(len(s.latest.status.Listeners), "listener"), s.width), title)
	case listenerRow:
		name := left(mark+squeeze(printable(r.name), l.name-prefix), l.name)
		out = line(left(name+" "+r.forwarding(s.latest), s.width), Style{})
	case groupRow:
		out = l.group(mark, r.group)
	default:
		out = l.target(mark, r.target, s.latest.at)
	}
	if selected {
		out.all(reverse)
	}
	return out
}

func (l layout) group(mark string, g *group) Line {
	style := title
	if g.FailOpen {
		style = alarm
	}
	over := l.state
	if l.since > 0 {
		over += 1 + l.since // nothing is said of when
	}
	return cells(
		cell{mark + squeeze(printable(g.Name), l.name-prefix), l.name, left, title},
		cell{l.health(g, over), over, left, style},
		cell{g.flows.String(), l.flows, right, title}, cell{g.newFlows.String(), l.newFlows, right, title},
		cell{g.bytes.String(), l.bytes, right, title}, cell{"", l.weight, right, title}, cell{l.groupNote(g), l.note, left, style},
	)
}

// health is how many targets of a group are healthy, in as many words as fit.
func (l layout) health(g *group, room int) string {
	if g.FailOpen && l.note == 0 {
		return "FAIL OPEN"
	}
	words := number(float64(g.healthy)) + "/" + number(float64(g.all))
	if full := words + " healthy"; width(full) <= room {
		return full
	}
	return words
}

func (l layout) groupNote(g *group) string {
	var words []string
	if g.FailOpen {
		words = append(words, "FAIL OPEN")
	}
	if g.DeregistrationDelay == nil {
		words = append(words, "not in the file")
	}
	return strings.Join(append(words, g.Protocol.String()+" "+g.ClientIP.String()), ", ")
}

func (l layout) target(mark string, t *target, at time.Time) Line {
	state := t.State.String()
	if width(state) > l.state {
		state = balancer.Unhealthy.String() // the note says that it is draining
	}
	since := "-"
	if !t.Since.IsZero() {
		since = short(at.Sub(t.Since))
	}
	return cells(
		cell{mark + squeeze(t.name, l.name-prefix), l.name, left, Style{}},
		cell{state, l.state, left, stateStyle(t.State)}, cell{since, l.since, right, Style{}},
		cell{t.flows.String(), l.flows, right, Style{}}, cell{t.newFlows.String(), l.newFlows, right, Style{}},
		cell{t.bytes.String(), l.bytes, right, Style{}}, cell{t.weightWords(), l.weight, right, Style{}},
		cell{t.circumstances(at, l.wide()), l.note, left, Style{}},
	)
}

func stateStyle(s balancer.State) Style {
	switch s {
	case balancer.Healthy:
		return Style{Color: Green}
	case balancer.Unhealthy, balancer.UnhealthyDraining:
		return alarm
	case balancer.Unused:
		return Style{}
	}
	return warn
}

// circumstances are what there is to know besides the state, what ends first. The
// codes lose their prefix unless they are to be whole.
func (t *target) circumstances(at time.Time, whole bool) string {
	var words []string
	if !t.Until.IsZero() {
		left := Elapsed(t.Until.Sub(at)) + " left"
		switch {
		case t.Held != nil:
			left = "held, " + left
		case t.State == balancer.UnhealthyDraining && !whole:
			left = "draining, " + left
		}
		words = append(words, left)
	}
	if t.EndsFlowsUntil.After(at) {
		words = append(words, "ending its flows")
	}
	if t.Removed {
		words = append(words, "not in the file")
	}
	if t.Weight == 0 {
		words = append(words, "weight 0")
	}
	// Draining is its own reason.
	if reason := t.Reason; reason != "" && reason != balancer.ReasonDeregistrationInProgress {
		if !whole {
			_, reason, _ = strings.Cut(reason, ".")
		}
		if t.Description != "" {
			reason += ": " + t.Description
		}
		words = append(words, reason)
	}
	return printable(strings.Join(words, ", "))
}
