package docs_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// A block is a fenced block of a page. The first word of its info string is the
// language, the others say what a test does with it:
//
//	sh                    runs in the page's session; every command has to succeed
//	console               each line that begins with "$ " runs, and prints what follows
//	console fails         the same, and the commands fail
//	console eventually    the same, but a command is repeated until it prints that
//	yaml                  is a configuration, and valid
//	yaml refused          is a configuration, and refused
//	yaml fragment         is YAML, and part of a configuration
//	LANGUAGE file=NAME    is written to that file, for the session
//	LANGUAGE by=TEST      is run, or printed, by that test
//	LANGUAGE unrun=REASON isn't run, for one of the reasons in unrun
//	text drawing          is no command and no output
//
// A session is a page's blocks in their order, in one shell.
type block struct {
	info string
	text string
}

var fence = regexp.MustCompile("(?ms)^```([^\n]*)\n(.*?)^```$")

func blocks(page string) []block {
	var found []block
	for _, m := range fence.FindAllStringSubmatch(page, -1) {
		found = append(found, block{m[1], m[2]})
	}
	return found
}

func (b block) language() string {
	language, _, _ := strings.Cut(b.info, " ")
	return language
}

func (b block) has(word string) bool { return slices.Contains(b.words(), word) }

// value is what follows a word and "=", or "".
func (b block) value(word string) string {
	for _, w := range b.words() {
		if value, ok := strings.CutPrefix(w, word+"="); ok {
			return value
		}
	}
	return ""
}

func (b block) words() []string {
	words := strings.Fields(b.info)
	if len(words) == 0 {
		return nil
	}
	return words[1:]
}

// runs says whether the block is commands of a session.
func (b block) runs() bool {
	return (b.language() == "sh" || b.language() == "console") && b.value("by") == "" && b.value("unrun") == ""
}

// A command is a line of a console, and what it prints.
type command struct{ line, prints string }

func (b block) commands() (found []command) {
	for line := range strings.Lines(b.text) {
		if typed, ok := strings.CutPrefix(line, "$ "); ok {
			found = append(found, command{line: strings.TrimSpace(typed)})
		} else if len(found) > 0 {
			found[len(found)-1].prints += line
		}
	}
	return found
}

// unrun are the reasons for not running a block of commands, with what each line
// of such a block has to look like.
var unrun = map[string]*regexp.Regexp{
	// A list of what can be typed. TestCommandsExist holds it to the program.
	"synopsis": regexp.MustCompile(`^(bin/)?nlb |^make build$`),
	// It takes minutes. TestMakeTargetsExist holds it to the Makefile.
	"minutes": regexp.MustCompile(`^make [a-z-]+|^bench/run\.sh|^([A-Z_]+=\S+ )*go test `),
	// It asks a daemon, or a manager of services, that a session does not have.
	"service": regexp.MustCompile(`^curl .*(/run/nlb/nlb\.sock|127\.0\.0\.1:9469)|^journalctl |^systemctl `),
	// The kernel may lack a module that it needs.
	"module": regexp.MustCompile(`OFFLOAD|flowtables`),
}

// section is the part of a page that begins with a heading, without its
// subsections; "" if there is no such heading. The anchor is the heading's, as
// GitHub makes it.
func section(page, anchor string) string {
	var b strings.Builder
	fenced, inside := false, false
	for line := range strings.Lines(page) {
		if strings.HasPrefix(line, "```") {
			fenced = !fenced
		}
		if title := strings.TrimLeft(line, "#"); title != line && !fenced {
			inside = slug(title) == anchor
		}
		if inside {
			b.WriteString(line)
		}
	}
	return b.String()
}

var notInAnchors = regexp.MustCompile(`[^\p{L}\p{N} _-]`)

func slug(heading string) string {
	plain := notInAnchors.ReplaceAllString(strings.ToLower(strings.TrimSpace(heading)), "")
	return strings.ReplaceAll(plain, " ", "-")
}

// TestEveryBlockIsChecked: there is no block that nothing is done with, unless it
// says why.
func TestEveryBlockIsChecked(t *testing.T) {
	tests := testNames(t)
	for name, page := range pages(t) {
		all := blocks(page)
		for i, b := range all {
			if err := b.check(all, tests); err != nil {
				t.Errorf("%s, block %d (%s): %v", name, i+1, b.info, err)
			}
		}
	}
}

// check says what is wrong with the block's info string.
func (b block) check(page []block, tests map[string]bool) error {
	if by := b.value("by"); by != "" {
		if !tests[by] {
			return fmt.Errorf("there is no test %s", by)
		}
		return nil
	}
	if reason := b.value("unrun"); reason != "" {
		return b.checkReason(reason)
	}
	for _, w := range b.words() {
		if !slices.Contains([]string{"fails", "eventually", "refused", "fragment", "drawing"}, w) && !strings.HasPrefix(w, "file=") {
			return fmt.Errorf("what does %q mean?", w)
		}
	}
	switch {
	case b.value("file") != "":
		return b.checkFile(page)
	case b.language() == "sh", b.language() == "yaml":
		return nil
	case b.language() == "console":
		if len(b.commands()) == 0 {
			return fmt.Errorf("has no line that begins with $")
		}
		return nil
	case b.info == "text drawing":
		if strings.Contains(b.text, "$ ") {
			return fmt.Errorf("has commands")
		}
		return nil
	}
	return fmt.Errorf("nothing is done with it")
}

func (b block) checkReason(reason string) error {
	form := unrun[reason]
	if form == nil {
		return fmt.Errorf("%s is no reason", reason)
	}
	for line := range strings.Lines(b.text) {
		if !form.MatchString(strings.TrimSpace(line)) {
			return fmt.Errorf("the reason %s is not for %q", reason, strings.TrimSpace(line))
		}
	}
	return nil
}

// checkFile demands that a command has the file's name: this content of it, or a
// former one, is made use of.
func (b block) checkFile(page []block) error {
	for _, other := range page {
		if other.runs() && strings.Contains(other.text, b.value("file")) {
			return nil
		}
	}
	return fmt.Errorf("no command has the file's name")
}

var testFunc = regexp.MustCompile(`(?m)^func (Test[A-Za-z0-9_]+)\(`)

// testNames are the names of all tests of this repository.
func testNames(t *testing.T) map[string]bool {
	t.Helper()
	names := make(map[string]bool)
	err := filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		for _, m := range testFunc.FindAllSubmatch(text, -1) {
			names[string(m[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}
