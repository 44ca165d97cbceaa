package doctor

import (
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"unicode"
)

// A Severity says how bad a finding is.
type Severity string

const (
	// Error is something that makes flows fail, or will for certain.
	Error Severity = "error"
	// Warning makes some flows fail, or may, or exposes something.
	Warning Severity = "warning"
	// Notice is worth knowing and may be meant so.
	Notice Severity = "notice"
)

// Severities are all of them, the worst first.
var Severities = []Severity{Error, Warning, Notice}

// A Command is a program and its arguments. It is one line for a shell in text
// and in JSON.
type Command []string

// String quotes what a shell would take for more than one word.
func (c Command) String() string {
	quoted := make([]string, len(c))
	for i, w := range c {
		quoted[i] = w
		if w == "" || strings.Trim(w, plain) != "" {
			quoted[i] = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
	}
	return strings.Join(quoted, " ")
}

// plain are the characters that mean nothing to a shell.
const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:=,@%+"

// MarshalText implements encoding.TextMarshaler.
func (c Command) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// Run runs the command without a shell, in the network namespace of the calling
// thread. An error has what the program said.
func (c Command) Run(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, c[0], c[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", c, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// A Finding is one thing that is wrong.
type Finding struct {
	// Check is the ID of the check that found it.
	Check    string   `json:"id"`
	Severity Severity `json:"severity"`
	// What was found, with the value that was measured.
	What string `json:"what"`
	// Consequence is what follows, in one sentence.
	Consequence string `json:"consequence"`
	// Cure has the commands that cure it here, in order. Empty when only a
	// person can: then Advice says how.
	Cure   []Command `json:"cure"`
	Advice string    `json:"advice,omitempty"`
	// Recipe runs the script of deploy/target that cures it as well, and can be
	// undone and made to last. Empty if there is none.
	Recipe Command `json:"recipe,omitempty"`
}

// A Check looks for one kind of mistake.
type Check struct {
	// ID is the check's name, and does not change.
	ID   string
	Role Role
	// Severity is that of its findings; a doubtful one is a Warning at most.
	Severity Severity
	// Seeks is what the check looks for, Consequence what follows from it, Cure
	// what its findings advise, with upper-case words for what is measured.
	Seeks, Consequence, Cure string

	look func(*Facts) []symptom
}

// A symptom is what a check contributes to a Finding.
type symptom struct {
	what   string
	cure   []Command
	advice string
	recipe Command
	// doubtful says that not all was known that would decide it.
	doubtful bool
}

// found is a symptom with commands that cure it.
func found(what string, cure ...Command) symptom { return symptom{what: what, cure: cure} }

// Checks lists all checks in the order of docs/doctor.md: balancers', then
// targets', roughly as a packet meets what they look at.
func Checks() []Check {
	return slices.Concat(forwardingChecks(), conntrackChecks(), pathChecks(), addressChecks(), firewallChecks(), flowChecks(), targetChecks())
}

// Diagnose says what is wrong, the worst first, and otherwise in the order of
// Checks. The same facts have the same findings.
func Diagnose(f *Facts) []Finding {
	var all []Finding
	for _, c := range Checks() {
		if c.Role != f.Role {
			continue
		}
		for _, s := range c.look(f) {
			all = append(all, c.finding(s))
		}
	}
	slices.SortStableFunc(all, func(a, b Finding) int {
		return slices.Index(Severities, a.Severity) - slices.Index(Severities, b.Severity)
	})
	return all
}

func (c Check) finding(s symptom) Finding {
	severity := c.Severity
	if s.doubtful && severity == Error {
		severity = Warning
	}
	return Finding{
		Check: c.ID, Severity: severity, What: s.what, Consequence: c.Consequence,
		Cure: append([]Command{}, s.cure...), Advice: s.advice, Recipe: s.recipe, // a list in JSON, also when it is empty
	}
}

// Script is the cures as a shell script. What only a person can do is a comment
// in it, and so are recipes, which may not be on this host.
func Script(findings []Finding) string {
	var b strings.Builder
	b.WriteString("#!/bin/sh\nset -e\n")
	for _, f := range findings {
		fmt.Fprintf(&b, "\n# %s: %s\n", f.Check, oneLine(f.What))
		if f.Advice != "" {
			fmt.Fprintf(&b, "# by hand: %s\n", oneLine(f.Advice))
		}
		if len(f.Recipe) > 0 {
			fmt.Fprintf(&b, "# recipe of deploy/target: %s\n", oneLine(f.Recipe.String()))
		}
		for _, c := range f.Cure {
			fmt.Fprintln(&b, c)
		}
	}
	return b.String()
}

// oneLine keeps a comment of a script one: names of tables may hold any byte.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return '?'
		}
		return r
	}, s)
}

// Cures lists the commands of all findings in order, each once: two findings may
// have the same cure.
func Cures(findings []Finding) []Command {
	var all []Command
	for _, f := range findings {
		for _, c := range f.Cure {
			if !slices.ContainsFunc(all, func(o Command) bool { return slices.Equal(o, c) }) {
				all = append(all, c)
			}
		}
	}
	return all
}
