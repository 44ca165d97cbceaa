package top

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/charmbracelet/x/ansi"
)

// ellipsis stands for what is left out.
const ellipsis = "…"

// printable replaces what a terminal might obey: descriptions quote what targets
// answered, and an escape sequence in there must not reach the screen.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, text)
}

// width is how many cells of a terminal a text takes.
func width(text string) int { return ansi.StringWidth(text) }

// cut shortens text at its end.
func cut(text string, cells int) string {
	return ansi.Truncate(text, max(0, cells), ellipsis)
}

// squeeze shortens text in its middle: names differ at both ends.
func squeeze(text string, cells int) string {
	w := width(text)
	if w <= cells {
		return text
	}
	if cells < 3 {
		return cut(text, cells)
	}
	head := cells / 2
	tail := cells - head - 1
	return ansi.Truncate(text, head, "") + ellipsis + ansi.TruncateLeft(text, w-tail, "")
}

// left and right fill text up to the cells of its column, or cut it.
func left(text string, cells int) string {
	text = cut(text, cells)
	return text + strings.Repeat(" ", max(0, cells-width(text)))
}

func right(text string, cells int) string {
	text = cut(text, cells)
	return strings.Repeat(" ", max(0, cells-width(text))) + text
}

// wrap breaks text between words into at most the given number of lines, of
// which the last is cut if that is not enough.
func wrap(text string, cells, lines int) []string {
	if lines <= 0 || cells <= 0 {
		return nil
	}
	all := strings.Split(ansi.Wrap(text, cells, ""), "\n")
	if len(all) <= lines {
		return all
	}
	kept := all[:lines]
	kept[lines-1] = cut(strings.Join(all[lines-1:], " "), cells)
	return kept
}

// number writes n in at most five cells, with decimal prefixes (SI): 0, 0.5, 12,
// 999, 1.5k, 12k, 999k, 1.5M.
func number(n float64) string {
	switch {
	case n == 0:
		return "0"
	case n < 0.1:
		return "<0.1"
	case n < 9.95 && n != math.Trunc(n):
		return strconv.FormatFloat(n, 'f', 1, 64)
	}
	prefixes := []string{"", "k", "M", "G", "T", "P", "E"}
	i := 0
	for ; n >= 999.5 && i < len(prefixes)-1; i++ {
		n /= 1000
	}
	decimals := 0
	if i > 0 && n < 9.95 {
		decimals = 1
	}
	return strconv.FormatFloat(n, 'f', decimals, 64) + prefixes[i]
}

// Elapsed writes a duration with its two largest units.
func Elapsed(d time.Duration) string {
	d = max(0, d)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd%02dh", int(d.Hours())/24, int(d.Hours())%24)
}

// short writes a duration in at most five cells, for ages of less than a hundred
// thousand days.
func short(d time.Duration) string {
	d = max(0, d)
	switch days := int(d.Hours()) / 24; {
	case d >= 10*24*time.Hour:
		return fmt.Sprintf("%dd", days)
	case d >= 10*time.Hour && d < 24*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	case d >= 10*time.Minute && d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	}
	return Elapsed(d)
}

// plural is n things.
func plural(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return strconv.Itoa(n) + " " + thing + "s"
}
