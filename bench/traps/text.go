package traps

import (
	"fmt"
	"net/netip"
	"strings"
	"unicode/utf8"
)

// MinWidth is the narrowest a Result is printed, in columns: what the drawings
// and the packets need.
const MinWidth = 80

// A page is text that is written in lines of a width, in columns.
type page struct {
	strings.Builder
	width int
}

// Text is a scenario's Result for people, in lines of a width in columns, but at
// least MinWidth.
func Text(sc Scenario, r Result, width int) string {
	b := page{width: max(width, MinWidth)}
	switch r.Verdict {
	case Unsupported:
		b.paragraph(sc.Name+": ", "not supported by this kernel: "+r.Missing)
		return b.String()
	case Inapplicable:
		b.paragraph(sc.Name+": ", fmt.Sprintf("does not apply to dataplane %v: %s", r.Dataplane, r.Missing))
		return b.String()
	}
	mark := map[string]string{Pass: "PASS", Broken: "BROKEN"}[r.Verdict]
	b.paragraph(sc.Name+": ", sc.Title)
	fmt.Fprintf(&b, "%s\n\n", sc.Drawing)
	b.setUp("naive", sc.Naive, r.Naive)
	b.paragraph("  why    ", sc.Why)
	b.WriteString("\n")
	b.setUp("cure", sc.Cure, r.Cure)
	if r.Note != "" {
		b.paragraph("  note   ", r.Note)
	}
	fmt.Fprintf(&b, "\n%s  %s\n", mark, verdictWords(r))
	return b.String()
}

func (b *page) setUp(name, text string, f Finding) {
	b.paragraph(fmt.Sprintf("%-9s", name), text)
	b.path(f.Path)
	b.paragraph("  "+outcome(f)+"  ", f.proof())
}

func outcome(f Finding) string {
	if f.Works {
		return "works"
	}
	return "fails"
}

func (f Finding) proof() string {
	if f.Evidence == "" {
		return "the reason was not seen"
	}
	return f.Evidence
}

func verdictWords(r Result) string {
	switch {
	case r.Verdict == Pass:
		return fmt.Sprintf("fails as described, and nlb works with dataplane %v (%.1f s)", r.Dataplane, r.Seconds)
	case r.Naive.Works:
		return "the naive set-up works here"
	case r.Naive.Evidence == "":
		return "the naive set-up fails, but not for the reason given"
	}
	return "the cure does not work"
}

// path has a line for each hop: who to whom, the packet's ends, what it is.
func (b *page) path(path []Hop) {
	nodes, src, dst, column := 0, 0, 0, 0
	for _, h := range path {
		nodes = max(nodes, utf8.RuneCountInString(way(h)))
		src, dst = max(src, len(ends(h.Src))), max(dst, len(ends(h.Dst)))
	}
	lines := make([]string, len(path))
	for i, h := range path {
		times := ""
		if h.Times > 1 {
			times = fmt.Sprintf(" x%d", h.Times)
		}
		lines[i] = fmt.Sprintf("  %2d  %s  %-*s > %-*s  %s%s", i+1, pad(way(h), nodes), src, ends(h.Src), dst, ends(h.Dst), h.What, times)
		column = max(column, utf8.RuneCountInString(lines[i]))
	}
	for i, h := range path {
		line := lines[i]
		if h.Note != "" {
			if beside := pad(line, column) + "  " + h.Note; utf8.RuneCountInString(beside) <= b.width {
				line = beside
			} else {
				line += fmt.Sprintf("\n      %s  └ %s", pad("", nodes), h.Note)
			}
		}
		fmt.Fprintln(b, line)
	}
}

// ends is one end of a packet; ICMP has no ports.
func ends(a netip.AddrPort) string {
	if a.Port() == 0 {
		return a.Addr().String()
	}
	return a.String()
}

func way(h Hop) string {
	from, to := h.From, h.To
	if from == "" {
		from = "?"
	}
	if to == "" {
		to = "?"
	}
	if from == to {
		return from + " ↺ lo"
	}
	return from + " → " + to
}

func pad(s string, width int) string {
	return s + strings.Repeat(" ", max(0, width-utf8.RuneCountInString(s)))
}

// paragraph writes text after a label, in lines that are as wide as may be and
// begin below the text.
func (b *page) paragraph(label, text string) {
	indent := utf8.RuneCountInString(label)
	b.WriteString(label)
	column := indent
	for i, word := range strings.Fields(text) {
		n := utf8.RuneCountInString(word)
		switch {
		case i > 0 && column+1+n > b.width:
			b.WriteString("\n" + strings.Repeat(" ", indent))
			column = indent
		case i > 0:
			b.WriteString(" ")
			column++
		}
		b.WriteString(word)
		column += n
	}
	b.WriteString("\n")
}

// List has the name and the title of each scenario, in lines of a width in
// columns, but at least MinWidth.
func List(scenarios []Scenario, width int) string {
	b, name := page{width: max(width, MinWidth)}, 0
	for _, sc := range scenarios {
		name = max(name, len(sc.Name))
	}
	for _, sc := range scenarios {
		b.paragraph(fmt.Sprintf("%-*s  ", name, sc.Name), sc.Title)
	}
	return b.String()
}
