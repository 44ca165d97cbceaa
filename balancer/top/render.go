package top

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"nlb/balancer"
)

// A tall screen has room for a header of three lines and a few words about what is
// selected.
const (
	tallHeight   = 20
	detailHeight = 3
)

// Styles by meaning.
var (
	title = Style{Bold: true}
	alarm = Style{Bold: true, Color: Red}
	warn  = Style{Color: Yellow}
)

// Lines is the screen, from its first line to its last, at most as many as it is
// high and each at most as wide. Of the list it has what is visible, and keeps the
// selected row in there.
func (s *Screen) Lines(now time.Time) []Line {
	lines := s.header(now)
	if s.latest == nil {
		return s.fit(s.fill(lines, nil))
	}
	switch s.dialog.kind {
	case helping:
		return s.fit(s.fill(append(lines, s.helpLines()...), nil))
	case confirming:
		lines = append(lines, s.list(now, s.height-len(lines)-1-len(s.panel()))...)
		return s.fit(s.fill(lines, s.panel()))
	}
	panel := s.panel()
	lines = append(lines, s.list(now, s.height-len(lines)-1-len(panel))...)
	return s.fit(s.fill(lines, panel))
}

// Page is everything there is to show, in as many lines as it takes.
func (s *Screen) Page(now time.Time) []Line {
	lines := s.headerOf(now, true)
	if s.latest == nil {
		return lines
	}
	l := s.columns()
	lines = append(lines, l.heading())
	for i := range s.rows {
		lines = append(lines, s.row(l, &s.rows[i], false))
	}
	return lines
}

// fill puts the panel and the keys at the bottom.
func (s *Screen) fill(lines, panel []Line) []Line {
	for len(lines)+len(panel)+1 < s.height {
		lines = append(lines, nil)
	}
	room := max(0, s.height-1-len(panel))
	lines = append(lines[:min(len(lines), room)], panel...)
	return append(lines[:min(len(lines), s.height-1)], s.keysLine())
}

// fit cuts what the screen has no cells for.
func (s *Screen) fit(lines []Line) []Line {
	for i, l := range lines {
		used := 0
		for j := range l {
			l[j].Text = cut(l[j].Text, s.width-used)
			used += width(l[j].Text)
		}
		lines[i] = l
	}
	return lines
}

func (s *Screen) tall() bool { return s.height >= tallHeight }

func (s *Screen) header(now time.Time) []Line { return s.headerOf(now, s.tall()) }

// headerOf is what holds for the whole picture, and what is wrong with it.
func (s *Screen) headerOf(now time.Time, tall bool) []Line {
	problems := s.problems(now)
	if s.latest == nil {
		if len(problems) == 0 {
			return []Line{line("asking the daemon on "+printable(s.socket)+" …", Style{})}
		}
		return problems
	}
	if !tall {
		return append([]Line{s.summary(now)}, problems[:min(1, len(problems))]...)
	}
	return append([]Line{
		s.apart(s.force(), s.manner(now), title),
		line(s.population(), Style{}),
		line(s.activity(), Style{}),
	}, problems...)
}

// apart has one text at the left and one at the right.
func (s *Screen) apart(a, b string, style Style) Line {
	room := s.width - width(b) - 1
	return Line{{left(a, room) + " ", style}, {b, style}}
}

// force says how well the kernel follows, in the words of nlb status.
func (s *Screen) force() string {
	st, at := s.latest.status, s.latest.at
	words := fmt.Sprintf("%s, configuration %d, ", printable(st.Dataplane), st.Apply.Generation)
	switch {
	case st.Apply.Error == "":
		return words + "in force as of " + Elapsed(at.Sub(st.Apply.ConvergedAt)) + " ago"
	case st.Apply.Held:
		return words + "in force, by what was known before"
	case st.Apply.ConvergedAt.IsZero():
		return words + "NEVER IN FORCE"
	}
	return words + "NOT IN FORCE since " + Elapsed(at.Sub(st.Apply.ConvergedAt)) + " ago"
}

// manner says how things are shown.
func (s *Screen) manner(now time.Time) string {
	order := "by " + s.order.by.String()
	if s.order.reverse {
		order += " reversed"
	}
	return order + ", " + s.pacing(now)
}

func (s *Screen) pacing(now time.Time) string {
	if s.paused {
		return "PAUSED, " + Elapsed(now.Sub(s.latest.at)) + " old"
	}
	return "every " + s.interval.String()
}

// population counts what there is.
func (s *Screen) population() string {
	p := s.latest
	words := plural(len(p.groups), "group")
	if n := p.failOpen; n > 0 {
		words += fmt.Sprintf(", %d FAIL OPEN", n)
	}
	words += fmt.Sprintf("; %s, %d healthy", plural(p.sums.all, "target"), p.sums.healthy)
	for _, c := range p.states {
		if c.state != balancer.Healthy {
			words += fmt.Sprintf(", %d %s", c.n, c.state)
		}
	}
	return words
}

// activity adds up what is going on.
func (s *Screen) activity() string {
	p := s.latest
	words := fmt.Sprintf("%v flows, %v new/s, %v bytes/s", p.sums.flows, p.sums.newFlows, p.sums.bytes)
	for _, e := range p.events {
		words += fmt.Sprintf(", %s %v/s", printable(e.name), e.rate)
	}
	return words
}

// summary is the header in one line.
func (s *Screen) summary(now time.Time) Line {
	p := s.latest
	words := fmt.Sprintf("%d/%d healthy", p.sums.healthy, p.sums.all)
	if n := p.failOpen; n > 0 {
		words += fmt.Sprintf(", %d FAIL OPEN", n)
	}
	words += fmt.Sprintf(", %v flows, %v/s", p.sums.flows, p.sums.newFlows)
	if !s.paused {
		return line(words, title)
	}
	return s.apart(words, "PAUSED "+Elapsed(now.Sub(p.at)), title)
}

// problems are lines about what is not as it should be, the worst first.
func (s *Screen) problems(now time.Time) []Line {
	var lines []Line
	add := func(style Style, format string, args ...any) {
		lines = append(lines, line(printable(fmt.Sprintf(format, args...)), style))
	}
	switch {
	case s.failed != nil && s.latest == nil:
		add(alarm, "NO ANSWER: %v", s.failed)
	case s.failed != nil:
		add(alarm, "NO ANSWER, this is %s old: %v", Elapsed(now.Sub(s.latest.at)), s.failed)
	case s.stale(now):
		add(alarm, "NO ANSWER yet, this is %s old", Elapsed(now.Sub(s.latest.at)))
	}
	if s.latest == nil {
		return lines
	}
	if text := s.latest.status.Apply.Error; text != "" {
		add(alarm, "ERROR: %s", text)
	}
	if text := s.latest.status.Apply.CountersError; text != "" {
		add(alarm, "COUNTERS: %s", text)
	}
	if len(s.order.filter) > 0 && s.dialog.kind != filtering {
		add(warn, "filter: %s, %d of %s, esc drops it", strings.Join(s.order.filter, " "), s.passed, plural(s.latest.sums.all, "target"))
	}
	return lines
}

// list is the column heading and what is visible of the rows, in height lines.
func (s *Screen) list(now time.Time, height int) []Line {
	if height < 1 {
		return nil
	}
	s.visible = max(1, height-1)
	s.scroll()
	l := s.columns()
	lines := []Line{l.heading()}
	for i := s.offset; i < min(s.offset+height-1, len(s.rows)); i++ {
		lines = append(lines, s.row(l, &s.rows[i], i == s.cursor))
	}
	if len(s.rows) == 0 {
		lines = append(lines, line("   "+s.emptiness(), Style{}))
	}
	if s.stale(now) {
		for _, l := range lines {
			l.all(faint)
		}
	}
	return lines
}

func (s *Screen) emptiness() string {
	if len(s.order.filter) > 0 {
		return "nothing passes the filter"
	}
	return "no listeners, no target groups"
}

// scroll moves what is visible as little as possible to have the cursor in it.
func (s *Screen) scroll() {
	s.offset = max(s.offset, s.cursor-s.visible+1)
	s.offset = min(s.offset, s.cursor)
	s.offset = max(0, min(s.offset, len(s.rows)-s.visible))
}

// panel is what is at the bottom, above the keys: a question, or more about the
// selected row than its line has room for.
func (s *Screen) panel() []Line {
	if s.dialog.kind == confirming {
		name, text := s.question()
		room := max(1, s.height-2)
		lines := s.rule()
		for _, l := range wrap(name, s.width, room) {
			lines = append(lines, line(l, alarm))
		}
		for _, l := range text {
			for _, l := range wrap(l, s.width, room-len(lines)) {
				lines = append(lines, line(l, title))
			}
		}
		return lines
	}
	lines, height, text := s.rule(), 1, ""
	if s.tall() {
		height = detailHeight
	}
	if r, ok := s.selected(); ok && s.tall() {
		text = r.detail(s.latest)
	} else if ok {
		text = r.brief(s.latest)
	}
	height += len(lines)
	for _, l := range wrap(text, s.width, height-len(lines)) {
		lines = append(lines, line(l, Style{}))
	}
	for len(lines) < height {
		lines = append(lines, nil)
	}
	return lines
}

// rule is a line across the screen, if that is tall.
func (s *Screen) rule() []Line {
	if !s.tall() {
		return nil
	}
	return []Line{line(strings.Repeat("─", s.width), Style{Faint: true})}
}

// keysLine says which keys matter now, or what came of the last one.
func (s *Screen) keysLine() Line {
	switch d := s.dialog; d.kind {
	case helping:
		return line("any key goes on", title)
	case filtering:
		return Line{{"/" + d.typed + "_", title}, {"   enter keeps, esc drops it", Style{}}}
	case confirming:
		return line("y "+d.ask.Verb.String()+"   any other key: no", title)
	}
	if s.note.text != "" {
		style := title
		if s.note.bad {
			style = alarm
		}
		return line(printable(s.note.text), style)
	}
	text := "? help  q quit"
	for _, k := range []string{"/ filter", "d drain", "u undrain", "s order", "p pause", "enter fold", "tab next group"} {
		if width(text)+2+width(k) > s.width {
			break
		}
		text += "  " + k
	}
	return line(text, Style{Faint: true})
}

// helpColumn is how wide an entry of the help screen is.
const helpColumn = 38

// helpPages are the lines of the help screen, a slice for each screenful.
func (s *Screen) helpPages() [][]Line {
	columns := max(1, (s.width+2)/helpColumn)
	rows := (len(bindings) + columns - 1) / columns
	var lines []Line
	for i := range rows {
		var text strings.Builder
		for j := i; j < len(bindings); j += rows {
			b := bindings[j]
			text.WriteString(left(left(strings.Join(b.keys, ", "), 16)+" "+b.help, helpColumn))
		}
		lines = append(lines, line(strings.TrimRight(text.String(), " "), Style{}))
	}
	above := 2 // of a header with a problem
	if s.tall() {
		above = 5
	}
	return slices.Collect(slices.Chunk(lines, max(1, s.height-above-1)))
}

func (s *Screen) helpLines() []Line {
	pages := s.helpPages()
	return pages[min(s.dialog.page, len(pages)-1)]
}

// detail is everything about a row, in sentences.
func (r row) detail(p *picture) string {
	switch r.kind {
	case listenersRow:
		return plural(len(p.status.Listeners), "listener")
	case listenerRow:
		return "listener " + printable(r.name) + ": " + r.forwarding(p)
	case groupRow:
		return r.group.detail()
	}
	return r.target.detail(r.group, p.at)
}

// brief is what the line of a row leaves out on a small screen.
func (r row) brief(p *picture) string {
	switch r.kind {
	case groupRow:
		return layout{}.groupNote(r.group)
	case targetRow:
		words := fmt.Sprintf("%s, %v flows, %v bytes/s", r.target.circumstances(p.at, false), r.target.flows, r.target.bytes)
		return strings.TrimPrefix(words, ", ")
	}
	return r.detail(p)
}

func (g *group) detail() string {
	text := fmt.Sprintf("group %s: %v, %v, %d of %d healthy. ", printable(g.Name), g.Protocol, g.ClientIP, g.healthy, g.all)
	if g.FailOpen {
		text += "FAIL OPEN: too few targets are healthy, new flows go to all of them. "
	}
	d := g.DeregistrationDelay
	if d == nil {
		return text + "It is not in the file any more; its targets may have flows."
	}
	text += "A target that is drained keeps its flows for " + Elapsed(time.Duration(d.TimeoutSeconds*float64(time.Second)))
	if d.ConnectionTermination {
		return text + ", then they are ended."
	}
	return text + ", and those left then are not ended."
}

func (t *target) detail(g *group, at time.Time) string {
	text := fmt.Sprintf("%s of %s: %v", t.name, printable(g.Name), t.State)
	if !t.Since.IsZero() {
		text += fmt.Sprintf(" since %s (%s)", t.Since.UTC().Format(time.DateTime+"Z"), Elapsed(at.Sub(t.Since)))
	}
	text += fmt.Sprintf(", weight %s. %s", t.weightWords(), t.circumstances(at, true))
	text = strings.TrimRight(strings.TrimSuffix(text, ". "), ".")
	return fmt.Sprintf("%s. %v flows, %v new and %v bytes in all.", text, t.flows, read(t.NewFlowsTotal), read(t.BytesTotal))
}

// weightWords shows what new flows see, where it is not what was configured.
func (t *target) weightWords() string {
	if t.EffectiveWeight == t.Weight {
		return fmt.Sprint(t.Weight)
	}
	return fmt.Sprintf("%d of %d", t.EffectiveWeight, t.Weight)
}

// forwarding is where a listener listens and what it forwards to.
func (r row) forwarding(p *picture) string {
	var to []string
	for _, f := range r.listener.Forward {
		words := printable(f.TargetGroup)
		if len(r.listener.Forward) > 1 {
			words += fmt.Sprintf(" (%d)", f.Weight)
		}
		i := slices.IndexFunc(p.groups, func(g group) bool { return g.Name == f.TargetGroup })
		switch {
		case i < 0:
		case p.groups[i].FailOpen:
			words += " FAIL OPEN"
		case p.groups[i].healthy == 0:
			words += " NONE HEALTHY"
		}
		to = append(to, words)
	}
	return fmt.Sprintf("%s %v to %s", addressOf(r.listener), r.listener.Protocol, cmp.Or(strings.Join(to, ", "), "nothing"))
}
