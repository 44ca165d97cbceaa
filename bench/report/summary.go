package report

import (
	"fmt"
	"io"
	"strings"

	"nlb/bench/measure"
)

// WriteSummary writes to a terminal what a report begins with: what keeps the run
// from being trusted, how nlb compares, and which goals it meets.
func WriteSummary(w io.Writer, r *Run) error {
	d := &document{}
	d.summary(r, r.Tables())
	d.goals(r)
	var b strings.Builder
	for i, block := range d.Blocks {
		if i > 0 {
			b.WriteString("\n")
		}
		switch {
		case block.Table != nil:
			b.WriteString(measure.Columns(block.Table.Rows))
		case block.Heading != "":
			fmt.Fprintf(&b, "%s\n", strings.ToUpper(block.Heading))
		case block.Paragraph != "":
			fmt.Fprintf(&b, "%s\n", block.Paragraph)
		}
		for _, item := range block.Items {
			fmt.Fprintf(&b, "%s\n", item)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}
