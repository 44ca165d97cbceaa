package config

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// A Problem is one thing that is wrong with a configuration.
type Problem struct {
	// File is the file's name, or the flag or environment variable that
	// brought the value; then Line and Column are 0.
	File         string
	Line, Column int    // from 1; columns count characters
	Path         string // the field, such as listeners[1].port; empty for the file as a whole
	What         string // what is wrong
	Want         string // what would be right; may be empty
}

// Error says it all in one line:
//
//	nlb.yaml:12:11: listeners[1].port: 70000 is not a port (1-65535)
func (p Problem) Error() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d:%d", p.Line, p.Column)
	}
	b.WriteString(": ")
	if p.Path != "" {
		b.WriteString(p.Path + ": ")
	}
	b.WriteString(p.What)
	if p.Want != "" {
		b.WriteString(" (" + p.Want + ")")
	}
	return b.String()
}

// Problems is everything that is wrong with a configuration, sorted by line.
type Problems []Problem

// Error has one line for each problem.
func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap lets errors.As find the single Problem.
func (ps Problems) Unwrap() []error {
	errs := make([]error, len(ps))
	for i, p := range ps {
		errs[i] = p
	}
	return errs
}

// maxProblems bounds a report: nobody reads more, and a large file of the wrong
// kind would otherwise be answered with a larger one.
const maxProblems = 1000

// A place is where something is written: a value, or for what is missing, the
// mapping it is missing from.
type place struct {
	File         string // empty: the file of the report
	Line, Column int
	Path         string
}

// child is the same position with the path of one of its fields.
func (p place) child(key string) place {
	if p.Path != "" {
		key = p.Path + "." + key
	}
	p.Path = key
	return p
}

// A report collects the problems of one run.
type report struct {
	file     string
	lines    int // of the file; yaml counts a line past the end for some empty values
	problems Problems
	overflow bool
}

func newReport(file string, data []byte) *report {
	lines := bytes.Count(data, []byte("\n"))
	if n := len(data); n == 0 || data[n-1] != '\n' {
		lines++
	}
	return &report{file: file, lines: lines}
}

// full says that further problems would not be shown, so that looking for them
// is wasted work. Who asks and hears yes leaves something out.
func (r *report) full() bool {
	r.overflow = len(r.problems) >= maxProblems
	return r.overflow
}

func (r *report) add(at place, what, want string) {
	if r.full() {
		return
	}
	p := Problem{File: r.file, Line: at.Line, Column: at.Column, Path: at.Path, What: what, Want: want}
	if at.File != "" {
		p.File = at.File
	} else {
		p.Line = max(1, min(p.Line, r.lines))
		p.Column = max(1, p.Column)
	}
	r.problems = append(r.problems, p)
}

// err returns what was found, or an untyped nil.
func (r *report) err() error {
	if len(r.problems) == 0 {
		return nil
	}
	slices.SortStableFunc(r.problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	if r.overflow {
		last := r.problems[len(r.problems)-1]
		last.Path, last.What, last.Want = "", fmt.Sprintf("only %d problems are shown", maxProblems), "correct these first"
		r.problems = append(r.problems, last)
	}
	return r.problems
}

// quote shows text of the file in a message: on one line, and not at length.
func quote(s string) string {
	const most = 60
	if len(s) <= most {
		return strconv.Quote(s)
	}
	cut := most
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return strconv.Quote(s[:cut]) + "..."
}
