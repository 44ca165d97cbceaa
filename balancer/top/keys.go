package top

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unicode"

	"nlb/balancer"
	"nlb/balancer/control"
)

// A Verb is what a key asks of whoever owns the terminal and the socket.
type Verb uint8

const (
	// Nothing is to be done.
	Nothing Verb = iota
	// Look asks the daemon again at once, and from then on by the Screen's interval.
	Look
	// Drain and Undrain are for the daemon; Changed wants to know what came of it.
	Drain
	Undrain
	// Redraw writes every cell anew.
	Redraw
	// Suspend stops the process, as ^Z does.
	Suspend
	// Quit ends it.
	Quit
)

func (v Verb) String() string {
	return [...]string{"nothing", "look", "drain", "undrain", "redraw", "suspend", "quit"}[v]
}

// An Action is what a key asks for.
type Action struct {
	Verb   Verb
	Target control.TargetName // of Drain and Undrain
}

// A dialog is what takes the keys; the zero value is none.
type dialog struct {
	kind dialogKind
	// ask is what is to be confirmed.
	ask Action
	// typed is the filter as it is being typed, before is what it was.
	typed  string
	before filter
	// page is how far the help screen was read.
	page int
}

type dialogKind uint8

const (
	noDialog dialogKind = iota
	helping
	filtering
	confirming
)

// A binding is a key, or several that do the same.
type binding struct {
	keys []string
	help string // for the help screen
	do   func(*Screen) Action
}

// bindings are in the order of the help screen.
var bindings = []binding{
	{[]string{"up", "k"}, "line up", moving(func(*Screen) int { return -1 })},
	{[]string{"down", "j"}, "line down", moving(func(*Screen) int { return 1 })},
	{[]string{"pgup", "ctrl+b"}, "page up", moving(func(s *Screen) int { return -s.page() })},
	{[]string{"pgdown", "ctrl+f"}, "page down", moving(func(s *Screen) int { return s.page() })},
	{[]string{"home", "g"}, "first line", moving(func(s *Screen) int { return -len(s.rows) })},
	{[]string{"end", "G"}, "last line", moving(func(s *Screen) int { return len(s.rows) })},
	{[]string{"tab"}, "next group", func(s *Screen) Action { return s.toHeading(1) }},
	{[]string{"shift+tab"}, "previous group", func(s *Screen) Action { return s.toHeading(-1) }},
	{[]string{"enter", "space"}, "fold, unfold", (*Screen).toggle},
	{[]string{"left", "h"}, "fold", func(s *Screen) Action { return s.fold(true) }},
	{[]string{"right", "l"}, "unfold", func(s *Screen) Action { return s.fold(false) }},
	{[]string{"c"}, "fold all", func(s *Screen) Action { return s.foldAll(true) }},
	{[]string{"e"}, "unfold all", func(s *Screen) Action { return s.foldAll(false) }},
	{[]string{"s"}, "next order", func(s *Screen) Action { return s.sort(1) }},
	{[]string{"S"}, "previous order", func(s *Screen) Action { return s.sort(-1) }},
	{[]string{"r"}, "reverse order", (*Screen).reverse},
	{[]string{"/"}, "filter", (*Screen).beginFilter},
	{[]string{"esc"}, "no filter", (*Screen).dropFilter},
	{[]string{"p"}, "pause", (*Screen).pause},
	{[]string{"+", "="}, "look more often", func(s *Screen) Action { return s.pace(-1) }},
	{[]string{"-"}, "look less often", func(s *Screen) Action { return s.pace(1) }},
	{[]string{"d"}, "drain target", (*Screen).askDrain},
	{[]string{"u"}, "undrain target", (*Screen).askUndrain},
	{[]string{"ctrl+l"}, "redraw", doing(Redraw)},
	{[]string{"ctrl+z"}, "suspend", doing(Suspend)},
	{[]string{"?"}, "help", func(s *Screen) Action { s.dialog.kind = helping; return Action{} }},
	{[]string{"q", "ctrl+c"}, "quit", doing(Quit)},
}

// A Key is a key of the help screen.
type Key struct {
	Names []string
	Does  string
}

// Keys lists all keys, for whoever documents them.
func Keys() []Key {
	var all []Key
	for _, b := range bindings {
		all = append(all, Key{slices.Clone(b.keys), b.help})
	}
	return all
}

func doing(v Verb) func(*Screen) Action { return func(*Screen) Action { return Action{Verb: v} } }

func moving(by func(*Screen) int) func(*Screen) Action {
	return func(s *Screen) Action {
		s.move(by(s))
		return Action{}
	}
}

// Press says that a key was pressed, by a name such as "d", "G", "up", "pgdown",
// "enter", "space" or "ctrl+c". Text is what it would type. Keys lists what they do;
// a dialog has keys of its own, and keys without a meaning do nothing.
//
// A filter is words; a row stays if each of them is part of its name, its group's
// name or its reason, or is what its state begins with.
func (s *Screen) Press(key, text string) Action {
	s.note = note{}
	if key == "ctrl+c" {
		return Action{Verb: Quit}
	}
	switch s.dialog.kind {
	case helping:
		if s.dialog.page++; s.dialog.page >= len(s.helpPages()) {
			s.dialog = dialog{}
		}
		return Action{}
	case filtering:
		s.typeFilter(key, text)
		return Action{}
	case confirming:
		return s.confirm(key)
	}
	for _, b := range bindings {
		if slices.Contains(b.keys, key) {
			return b.do(s)
		}
	}
	return Action{}
}

// Paste says that text came from a clipboard. It is typed into a filter, and never
// taken for keys.
func (s *Screen) Paste(text string) {
	if s.dialog.kind == filtering {
		s.typeFilter("", text)
	}
}

// page is a screenful less a line, so that the eye finds its place again.
func (s *Screen) page() int { return max(1, s.visible-1) }

// toHeading goes to the next heading in a direction, or stays.
func (s *Screen) toHeading(by int) Action {
	for i := s.cursor + by; i >= 0 && i < len(s.rows); i += by {
		if s.rows[i].isHeading() {
			s.cursor = i
			break
		}
	}
	return Action{}
}

func (s *Screen) toggle() Action {
	if r, ok := s.selected(); ok {
		return s.fold(!s.order.collapsed[r.heading()])
	}
	return Action{}
}

// fold hides or shows what belongs together with the selected row.
func (s *Screen) fold(away bool) Action {
	if r, ok := s.selected(); ok {
		s.order.collapsed[r.heading()] = away
		s.arrange()
	}
	return Action{}
}

func (s *Screen) foldAll(away bool) Action {
	clear(s.order.collapsed)
	if away && s.latest != nil {
		s.order.collapsed[rowID{kind: listenersRow}] = true
		for i := range s.latest.groups {
			s.order.collapsed[rowID{kind: groupRow, name: s.latest.groups[i].Name}] = true
		}
	}
	s.arrange()
	return Action{}
}

func (s *Screen) sort(by int) Action {
	s.order.by = s.order.by.next(by)
	s.arrange()
	return Action{}
}

func (s *Screen) reverse() Action {
	s.order.reverse = !s.order.reverse
	s.arrange()
	return Action{}
}

func (s *Screen) beginFilter() Action {
	s.dialog = dialog{kind: filtering, typed: strings.Join(s.order.filter, " "), before: s.order.filter}
	return Action{}
}

func (s *Screen) dropFilter() Action {
	s.order.filter = nil
	s.arrange()
	return Action{}
}

// typeFilter edits the filter, which is in force while it is being typed.
func (s *Screen) typeFilter(key, text string) {
	d := &s.dialog
	switch key {
	case "enter":
		s.dialog = dialog{}
		return
	case "esc":
		s.order.filter = d.before
		s.dialog = dialog{}
		s.arrange()
		return
	case "backspace":
		runes := []rune(d.typed)
		d.typed = string(runes[:max(0, len(runes)-1)])
	case "ctrl+u":
		d.typed = ""
	default:
		d.typed += strings.Map(func(r rune) rune {
			if unicode.IsPrint(r) {
				return r
			}
			return -1
		}, text)
	}
	s.order.filter = newFilter(d.typed)
	s.arrange()
}

func (s *Screen) pause() Action {
	s.paused = !s.paused
	if s.paused {
		return Action{}
	}
	return Action{Verb: Look}
}

// pace chooses the next longer or shorter interval.
func (s *Screen) pace(by int) Action {
	next, longer := s.interval, by > 0
	for _, i := range Intervals {
		if longer && i > s.interval {
			next = i
			break
		}
		if !longer && i < s.interval {
			next = i
		}
	}
	s.interval = next
	s.note = note{"every " + next.String(), false}
	return Action{Verb: Look}
}

// askDrain wants the draining of the selected target to be confirmed.
func (s *Screen) askDrain() Action {
	t := s.selectedTarget("drain")
	switch {
	case t == nil:
	case t.Removed:
		s.refuse("%v is not in the file any more: it leaves by itself", t.name)
	case drained(t):
		s.refuse("%v is drained already", t.name)
	default:
		s.ask(Drain)
	}
	return Action{}
}

// askUndrain wants the selected target's coming back to be confirmed.
func (s *Screen) askUndrain() Action {
	t := s.selectedTarget("undrain")
	switch {
	case t == nil:
	case t.Removed:
		s.refuse("%v is not in the file any more: put it back there", t.name)
	case !drained(t) && t.State != balancer.Unused: // whose drain may not show
		s.refuse("%v is not drained", t.name)
	default:
		s.ask(Undrain)
	}
	return Action{}
}

// drained reports whether a target was deregistered.
func drained(t *target) bool {
	return t.State == balancer.Draining || t.State == balancer.Unused && t.Reason == balancer.ReasonNotRegistered
}

// selectedTarget is what a key is about; if that is none, the key is told why.
func (s *Screen) selectedTarget(verb string) *target {
	r, ok := s.selected()
	switch {
	case s.failed != nil:
		s.refuse("the daemon does not answer: nobody to %s", verb)
	case !ok || r.target == nil:
		s.refuse("select a target to %s", verb)
	default:
		return r.target
	}
	return nil
}

func (s *Screen) refuse(format string, args ...any) {
	s.note = note{fmt.Sprintf(format, args...), true}
}

func (s *Screen) ask(v Verb) {
	r, _ := s.selected()
	s.dialog = dialog{kind: confirming, ask: Action{v, control.TargetName{Group: r.name, Address: r.target.Address, Port: r.target.Port}}}
}

// confirm does what was asked for if the answer is yes, and nothing otherwise.
func (s *Screen) confirm(key string) Action {
	a := s.dialog.ask
	s.dialog = dialog{}
	if key != "y" {
		s.note = note{fmt.Sprintf("no %s: %s stays as it is", a.Verb, targetName(a.Target)), false}
		return Action{}
	}
	s.note = note{a.Verb.String() + " " + targetName(a.Target) + " …", false}
	return a
}

// targetName is a target as nlb drain wants it.
func targetName(t control.TargetName) string {
	return t.Group + " " + netip.AddrPortFrom(t.Address, t.Port).String()
}

// question is the text of a confirmation: what it is about, and what follows.
func (s *Screen) question() (title string, text []string) {
	a := s.dialog.ask
	at := netip.AddrPortFrom(a.Target.Address, a.Target.Port)
	g, t := s.latest.find(a.Target.Group, at)
	if a.Verb == Undrain {
		return fmt.Sprintf("Undrain %v of %s?", at, a.Target.Group), []string{
			"It takes new flows as soon as it is healthy, and keeps " + theFlows(t) + ".",
		}
	}
	text = []string{"New flows go elsewhere. " + delayWords(g, theFlows(t))}
	if t != nil && t.State == balancer.Healthy && g.healthy == 1 {
		text = append(text, "It is the group's LAST HEALTHY target.")
	}
	return fmt.Sprintf("Drain %v of %s?", at, a.Target.Group), append(text, "u undrains it.")
}

// theFlows are those that a target has, as part of a sentence.
func theFlows(t *target) string {
	switch {
	case t == nil || t.ActiveFlows == nil:
		return "its flows"
	case *t.ActiveFlows == 1:
		return "its 1 flow"
	}
	return fmt.Sprintf("its %d flows", *t.ActiveFlows)
}

// delayWords say what the deregistration delay of a group does to flows.
func delayWords(g *group, flows string) string {
	if g == nil || g.DeregistrationDelay == nil {
		return "How long " + flows + " may go on is not known: the group is gone."
	}
	delay := Elapsed(time.Duration(g.DeregistrationDelay.TimeoutSeconds * float64(time.Second)))
	words := "For " + delay + ", the deregistration delay of " + g.Name + ", " + flows + " may go on; "
	if g.DeregistrationDelay.ConnectionTermination {
		return words + "then those left are ENDED (connection_termination)."
	}
	return words + "those left then are not ended (no connection_termination)."
}
