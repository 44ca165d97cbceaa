package top

import (
	"strings"

	"github.com/charmbracelet/x/ansi"
)

// A Style is how a piece of text looks. It repeats what the text says, for the eye.
type Style struct {
	Bold, Faint, Reverse bool
	Color                Color
}

// A Color is one of the terminal's own, whose shades its user chose.
type Color uint8

// Colors; the zero value is the terminal's default.
const (
	Plain Color = iota
	Red
	Green
	Yellow
)

// A Span is a piece of a line in one style.
type Span struct {
	Text  string
	Style Style
}

// A Line is one line of the screen, no longer than the screen is wide.
type Line []Span

// String is the text alone.
func (l Line) String() string {
	var b strings.Builder
	for _, s := range l {
		b.WriteString(s.Text)
	}
	return b.String()
}

// ANSI is the text with the sequences that style it (ECMA-48, SGR), colors only if
// they are wanted.
func (l Line) ANSI(colors bool) string {
	var b strings.Builder
	for _, s := range l {
		b.WriteString(s.Style.ansi(colors).Styled(s.Text))
	}
	return b.String()
}

func (s Style) ansi(colors bool) ansi.Style {
	var out ansi.Style
	if s.Bold {
		out = out.Bold()
	}
	if s.Faint {
		out = out.Faint()
	}
	if s.Reverse {
		out = out.Reverse(true)
	}
	if colors && s.Color != Plain {
		out = out.ForegroundColor(map[Color]ansi.BasicColor{Red: ansi.Red, Green: ansi.Green, Yellow: ansi.Yellow}[s.Color])
	}
	return out
}

// all gives every span a style besides its own.
func (l Line) all(change func(*Style)) Line {
	for i := range l {
		change(&l[i].Style)
	}
	return l
}

func faint(s *Style) { s.Faint = true }

func reverse(s *Style) { s.Reverse = true }

// line is one text in one style.
func line(text string, style Style) Line { return Line{{text, style}} }
