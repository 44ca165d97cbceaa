package top

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	"nlb/balancer/control"
)

// A Sort is what rows are ordered by.
type Sort uint8

// Orders, in the order in which a key goes through them. By name is ascending, by
// state the worst comes first, by since the latest change, by the others the most.
const (
	ByName Sort = iota
	ByState
	BySince
	ByFlows
	ByNewFlows
	ByBytes
)

var sortNames = []string{"name", "state", "since", "flows", "new", "bytes"}

// Sorts are the names of all orders.
func Sorts() []string { return slices.Clone(sortNames) }

func (s Sort) String() string { return sortNames[s] }

// ParseSort is the order of that name.
func ParseSort(name string) (Sort, bool) {
	i := slices.Index(sortNames, name)
	return Sort(max(0, i)), i >= 0
}

// next goes through the orders, in either direction.
func (s Sort) next(by int) Sort {
	n := len(sortNames)
	return Sort((int(s) + by + n) % n)
}

// A kind is what a row shows.
type kind uint8

const (
	listenersRow kind = iota // the heading of all listeners
	listenerRow
	groupRow
	targetRow
)

// A rowID names what a row shows, from one picture to the next.
type rowID struct {
	kind   kind
	name   string // of the listener or group; a target's group
	target netip.AddrPort
}

// A row is one line of the list.
type row struct {
	rowID
	listener *control.Listener
	group    *group
	target   *target
}

// heading is the row that this one is hidden with.
func (id rowID) heading() rowID {
	switch id.kind {
	case listenerRow:
		return rowID{kind: listenersRow}
	case targetRow:
		return rowID{kind: groupRow, name: id.name}
	}
	return id
}

func (id rowID) isHeading() bool { return id == id.heading() }

// An order is how a list is arranged.
type order struct {
	by        Sort
	reverse   bool
	filter    filter
	collapsed map[rowID]bool
}

// rows arranges a picture, and counts the targets that pass the filter.
func (o order) rows(p *picture) (all []row, targets int) {
	listeners := []row{}
	for i := range p.status.Listeners {
		l := &p.status.Listeners[i]
		if o.filter.listener(l) {
			listeners = append(listeners, row{rowID: rowID{kind: listenerRow, name: l.Name}, listener: l})
		}
	}
	if len(listeners) > 0 {
		all = append(all, row{rowID: rowID{kind: listenersRow}})
		if !o.collapsed[all[0].rowID] {
			all = append(all, listeners...)
		}
	}
	groups := make([]*group, len(p.groups))
	for i := range p.groups {
		groups[i] = &p.groups[i]
	}
	slices.SortStableFunc(groups, o.groups)
	for _, g := range groups {
		kept := o.targets(g)
		targets += len(kept)
		if len(kept) == 0 && !(len(g.targets) == 0 && o.filter.group(g)) {
			continue
		}
		heading := row{rowID: rowID{kind: groupRow, name: g.Name}, group: g}
		all = append(all, heading)
		if !o.collapsed[heading.rowID] {
			all = append(all, kept...)
		}
	}
	return all, targets
}

// targets are a group's rows, which the daemon sorts by name.
func (o order) targets(g *group) []row {
	kept := make([]row, 0, len(g.targets))
	for i := range g.targets {
		t := &g.targets[i]
		if o.filter.target(g, t) {
			kept = append(kept, row{rowID: rowID{targetRow, g.Name, t.AddrPort()}, group: g, target: t})
		}
	}
	slices.SortStableFunc(kept, func(a, b row) int { return o.compare(a.target, b.target) })
	return kept
}

func (o order) compare(a, b *target) int {
	c := 0
	switch o.by {
	case ByName:
		c = a.AddrPort().Compare(b.AddrPort())
	case ByState:
		c = cmp.Compare(badness(b.State), badness(a.State))
	case BySince:
		c = b.Since.Compare(a.Since)
	default:
		c = b.load.compare(a.load, o.by)
	}
	return o.signed(c)
}

func (o order) groups(a, b *group) int {
	c := 0
	switch o.by {
	case ByName:
		c = cmp.Compare(a.Name, b.Name)
	case ByState:
		c = cmp.Compare(a.soundness(), b.soundness())
	case BySince:
		c = b.latest.Compare(a.latest)
	default:
		c = b.load.compare(a.load, o.by)
	}
	return o.signed(c)
}

// compare is for what rows are sorted by that is in a load.
func (l load) compare(m load, by Sort) int {
	switch by {
	case ByFlows:
		return l.flows.compare(m.flows)
	case ByNewFlows:
		return l.newFlows.compare(m.newFlows)
	case ByBytes:
		return l.bytes.compare(m.bytes)
	}
	return 0
}

func (o order) signed(c int) int {
	if o.reverse {
		return -c
	}
	return c
}

// soundness is the part of the targets that is healthy; a group that fails open
// is below all others.
func (g *group) soundness() float64 {
	switch {
	case g.FailOpen:
		return -1
	case g.all == 0:
		return 1
	}
	return float64(g.healthy) / float64(g.all)
}

// A filter has the words that a row must match, all of them, in lower case.
type filter []string

func newFilter(text string) filter { return strings.Fields(strings.ToLower(text)) }

func (f filter) target(g *group, t *target) bool {
	for _, word := range f {
		// A state by its beginning, so that "healthy" does not find the unhealthy.
		if !strings.HasPrefix(t.State.String(), word) && !contain(word, g.Name, t.name, t.Reason) {
			return false
		}
	}
	return true
}

func (f filter) group(g *group) bool {
	for _, word := range f {
		if !contain(word, g.Name) {
			return false
		}
	}
	return true
}

func (f filter) listener(l *control.Listener) bool {
	for _, word := range f {
		if contain(word, l.Name, addressOf(l)) {
			continue
		}
		if !slices.ContainsFunc(l.Forward, func(to control.Forward) bool { return contain(word, to.TargetGroup) }) {
			return false
		}
	}
	return true
}

// contain reports whether one of the texts has the word in it.
func contain(word string, texts ...string) bool {
	return slices.ContainsFunc(texts, func(text string) bool { return strings.Contains(strings.ToLower(text), word) })
}

func addressOf(l *control.Listener) string { return netip.AddrPortFrom(l.VIP, l.Port).String() }
