package measure

import (
	"encoding/json"
	"fmt"
	"io"
)

// A Report is the outcome of a benchmark. Its JSON form is that of its fields.
type Report interface {
	// Table writes it for people.
	Table(io.Writer) error
}

// Write writes a report in a format: json, or else the table. The error is w's.
func Write(w io.Writer, format string, r Report) error {
	if format == "json" {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(r)
	}
	return r.Table(w)
}

// WriteSection writes a part of a table, after an empty line: a title, and rows
// as in Columns.
func WriteSection(w io.Writer, title string, rows [][]string) error {
	_, err := fmt.Fprintf(w, "\n%s\n%s", title, Columns(rows))
	return err
}
