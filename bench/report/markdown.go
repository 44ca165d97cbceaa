package report

import (
	"fmt"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

// markdown is a document in GitHub Flavored Markdown, with tables whose columns
// are also aligned as plain text.
func (d *document) markdown() []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "# %s\n", escape(d.Title))
	for _, bl := range d.Blocks {
		b.WriteByte('\n')
		switch {
		case bl.Heading != "":
			fmt.Fprintf(&b, "## %s\n", escape(bl.Heading))
		case bl.Paragraph != "":
			fmt.Fprintln(&b, escape(bl.Paragraph))
		case bl.Items != nil:
			for _, item := range bl.Items {
				fmt.Fprintf(&b, "- %s\n", escape(item))
			}
		case bl.Table != nil:
			bl.Table.markdown(&b)
		case bl.Chart != nil:
			fmt.Fprintf(&b, "![%s](%s)\n", escape(bl.Chart.Alt), bl.Chart.Name)
		case bl.Code != "":
			fence(&b, bl.Code)
		}
	}
	return []byte(b.String())
}

func (g *grid) markdown(b *strings.Builder) {
	rows := make([][]string, len(g.Rows))
	widths := make([]int, len(g.Right))
	for i, row := range g.Rows {
		for n, c := range row {
			c = escape(c)
			rows[i] = append(rows[i], c)
			widths[n] = max(widths[n], 3, utf8.RuneCountInString(c))
		}
	}
	for i, row := range rows {
		for n, c := range row {
			space := strings.Repeat(" ", widths[n]-utf8.RuneCountInString(c))
			if g.Right[n] {
				c = space + c
			} else {
				c += space
			}
			fmt.Fprintf(b, "| %s ", c)
		}
		b.WriteString("|\n")
		if i == 0 {
			g.rule(b, widths)
		}
	}
}

// rule is the line below the names of the columns.
func (g *grid) rule(b *strings.Builder, widths []int) {
	for n, w := range widths {
		if g.Right[n] {
			fmt.Fprintf(b, "| %s: ", strings.Repeat("-", w-1))
		} else {
			fmt.Fprintf(b, "| %s ", strings.Repeat("-", w))
		}
	}
	b.WriteString("|\n")
}

var (
	// special begins or ends something wherever it stands.
	special = regexp.MustCompile("[\\\\`*<>\\[\\]|~&]")
	// underscores within a word are only underscores.
	underscore = regexp.MustCompile(`(^|[^\pL\pN])(_+)|(_+)([^\pL\pN]|$)`)
	// start is what makes a line a heading, list, quotation or rule.
	start = regexp.MustCompile(`^([#+=-]+|[0-9]+[.)])(\s|$)`)
)

// escape makes text mean itself in a line of Markdown.
func escape(s string) string {
	s = special.ReplaceAllString(oneLine(s), `\$0`)
	s = underscore.ReplaceAllStringFunc(s, func(m string) string { return strings.ReplaceAll(m, "_", `\_`) })
	if m := start.FindStringSubmatchIndex(s); m != nil {
		s = s[:m[3]-1] + `\` + s[m[3]-1:]
	}
	return s
}

// oneLine has a space for whatever is not printable.
func oneLine(s string) string {
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s))
}

// printable keeps lines and tabs, and has U+FFFD for other control characters,
// also those that turn the direction of text.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || !unicode.In(r, unicode.Cc, unicode.Cf) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

var backticks = regexp.MustCompile("`+")

// fence is a block of code in more backticks than there are within it.
func fence(b *strings.Builder, text string) {
	marks := "```"
	for _, m := range backticks.FindAllString(text, -1) {
		if len(m) >= len(marks) {
			marks = m + "`"
		}
	}
	fmt.Fprintf(b, "%s\n%s\n%s\n", marks, strings.TrimRight(printable(text), "\n"), marks)
}
