package measure

import (
	"fmt"
	"strings"
	"text/tabwriter"
)

// Columns aligns rows of equally many cells, one to a line, with no spaces at
// the lines' ends.
func Columns(rows [][]string) string {
	var b, trimmed strings.Builder
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		fmt.Fprintln(t, strings.Join(row, "\t"))
	}
	_ = t.Flush() // to memory
	for line := range strings.Lines(b.String()) {
		trimmed.WriteString(strings.TrimRight(line, " \n") + "\n")
	}
	return trimmed.String()
}
