// Package docs_test holds the documentation to what the program does.
package docs_test

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"nlb/balancer/doctor"
	"nlb/config"
)

// root is the module's folder.
const root = ".."

// pages are the documents for users, by path from root.
func pages(t *testing.T) map[string]string {
	t.Helper()
	text := make(map[string]string)
	for _, name := range []string{"README.md", "deploy/target/README.md"} {
		text[name] = read(t, name)
	}
	err := filepath.WalkDir(".", func(path string, _ fs.DirEntry, err error) error {
		if filepath.Ext(path) == ".md" {
			name := "docs/" + filepath.ToSlash(path)
			text[name] = read(t, name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestEveryPageIsFound follows the links from README.md: what they do not lead to
// is found by nobody.
func TestEveryPageIsFound(t *testing.T) {
	all := pages(t)
	found, next := map[string]bool{"README.md": true}, []string{"README.md"}
	for len(next) > 0 {
		from := next[0]
		next = next[1:]
		for _, to := range links(from, all[from]) {
			if _, isPage := all[to.file]; isPage && !found[to.file] {
				found[to.file] = true
				next = append(next, to.file)
			}
		}
	}
	for page := range all {
		if !found[page] {
			t.Errorf("no link leads from README.md to %s", page)
		}
	}
}

// leaves lists the keys of the reference file that have values of their own,
// such as listeners[].port. A list is a leaf as well if it may be empty or its
// entries are plain values.
func leaves(path string, n *yaml.Node, found map[string]bool) {
	switch n.Kind {
	case yaml.DocumentNode:
		leaves(path, n.Content[0], found)
	case yaml.MappingNode:
		for i := 0; i < len(n.Content); i += 2 {
			leaves(strings.TrimPrefix(path+"."+n.Content[i].Value, "."), n.Content[i+1], found)
		}
	case yaml.SequenceNode:
		if n.Content[0].Kind != yaml.MappingNode {
			found[path] = true
			return
		}
		for _, c := range n.Content {
			leaves(path+"[]", c, found)
		}
	default:
		found[path] = true
	}
}

// row matches the beginning of a row about a key.
var row = regexp.MustCompile("(?m)^\\| `([a-z0-9_.\\[\\]]+)` \\|(.*)$")

// rows are the cells of configuration.md about each key, the key's not included.
func rows(t *testing.T) map[string][]string {
	t.Helper()
	found := make(map[string][]string)
	for _, m := range row.FindAllStringSubmatch(read(t, "docs/configuration.md"), -1) {
		if found[m[1]] != nil {
			t.Errorf("%s has two rows", m[1])
		}
		for cell := range strings.SplitSeq(strings.TrimSuffix(strings.TrimSpace(m[2]), "|"), "|") {
			found[m[1]] = append(found[m[1]], strings.TrimSpace(cell))
		}
	}
	return found
}

func TestEveryKeyIsDescribed(t *testing.T) {
	keys := referenceKeys(t)
	described := rows(t)
	for key := range keys {
		if described[key] == nil {
			t.Errorf("%s is not in configuration.md", key)
		}
	}
	lists := map[string]bool{"listeners[].forward": true}
	for key, cells := range described {
		if !keys[key] && !lists[key] {
			t.Errorf("%s is in configuration.md and is no key", key)
		}
		if len(cells) != 4 || slices.Contains(cells, "") {
			t.Errorf("%s: a row is key, meaning, values, default, example, and not %q", key, cells)
		}
	}
}

// A schema is what these tests read of a JSON Schema.
type schema struct {
	Ref        string            `json:"$ref"`
	Defs       map[string]schema `json:"$defs"`
	Properties map[string]schema `json:"properties"`
	Items      *schema           `json:"items"`
	Required   []string          `json:"required"`
	Default    any               `json:"default"`
}

func TestDefaultsAreTheProgramsOwn(t *testing.T) {
	text, err := config.Schema()
	if err != nil {
		t.Fatal(err)
	}
	var s schema
	if err := json.Unmarshal(text, &s); err != nil {
		t.Fatal(err)
	}
	described, checked := rows(t), 0
	var walk func(path string, of schema)
	walk = func(path string, of schema) {
		if of.Ref != "" {
			of = s.Defs[strings.TrimPrefix(of.Ref, "#/$defs/")]
		}
		for name, p := range of.Properties {
			key := strings.TrimPrefix(path+"."+name, ".")
			if p.Items != nil {
				walk(key+"[]", *p.Items)
			}
			walk(key, p)
			cells := described[key]
			if len(cells) != 4 {
				continue // the other test's business
			}
			want, known := "", true
			switch d := p.Default.(type) {
			case nil:
				want, known = "required", slices.Contains(of.Required, name)
			case []any:
				known = false // in words
			case string:
				want = fmt.Sprintf("`%s`", d)
				if d == "" {
					want = "`\"\"`"
				}
			default:
				want = fmt.Sprintf("`%v`", d)
			}
			if !known {
				continue
			}
			checked++
			if cells[2] != want {
				t.Errorf("the default of %s is %s, not %s", key, want, cells[2])
			}
		}
	}
	walk("", s)
	if checked < 20 {
		t.Errorf("only %d defaults were compared", checked)
	}
}

func TestConfigurationsAreValid(t *testing.T) {
	files := map[string]string{"deploy/nlb.yaml": read(t, "deploy/nlb.yaml")}
	for name, page := range pages(t) {
		for i, b := range blocks(page) {
			at := fmt.Sprintf("%s, block %d", name, i+1)
			switch {
			case b.language() != "yaml":
			case b.has("fragment"):
				checkFragment(t, at, b.text)
			case b.has("refused"):
				if _, err := config.Parse(at, []byte(b.text)); err == nil {
					t.Errorf("%s: is not refused", at)
				}
			default:
				files[at] = b.text
			}
		}
	}
	if len(files) < 3 {
		t.Errorf("only %d configurations were found", len(files))
	}
	for name, text := range files {
		if _, err := config.Parse(name, []byte(text)); err != nil {
			t.Error(err)
		}
	}
}

// checkFragment demands that a part of a configuration has keys that there are,
// somewhere.
func checkFragment(t *testing.T, at, text string) {
	t.Helper()
	var fragment yaml.Node
	if err := yaml.Unmarshal([]byte(text), &fragment); err != nil {
		t.Errorf("%s: %v", at, err)
		return
	}
	found := make(map[string]bool)
	leaves("", &fragment, found)
	for key := range found {
		if !slices.ContainsFunc(slices.Collect(maps.Keys(referenceKeys(t))), func(known string) bool {
			return known == key || strings.HasSuffix(known, "."+key)
		}) {
			t.Errorf("%s: there is no key %s", at, key)
		}
	}
}

// referenceKeys are the keys of the reference file that have values of their own.
func referenceKeys(t *testing.T) map[string]bool {
	t.Helper()
	var reference yaml.Node
	if err := yaml.Unmarshal(config.Reference(), &reference); err != nil {
		t.Fatal(err)
	}
	keys := make(map[string]bool)
	leaves("", &reference, keys)
	return keys
}

var (
	// translated matches a row about an option of another program, and takes its
	// second cell.
	translated = regexp.MustCompile(`(?m)^\|[^|]*\|([^|]*)\|[^|]*\|$`)
	code       = regexp.MustCompile("`([^`]+)`")
	word       = regexp.MustCompile(`[A-Za-z][A-Za-z0-9_]+`)
)

// TestOptionsAreTranslatedIntoOurs: what an option of another program is here has
// to be words that there are: keys, or values that configuration.md knows.
func TestOptionsAreTranslatedIntoOurs(t *testing.T) {
	known := make(map[string]bool)
	for key := range referenceKeys(t) {
		for _, w := range word.FindAllString(key, -1) {
			known[w] = true
		}
	}
	for _, m := range code.FindAllStringSubmatch(fence.ReplaceAllString(read(t, "docs/configuration.md"), ""), -1) {
		for _, w := range word.FindAllString(m[1], -1) {
			known[w] = true
		}
	}
	found := 0
	for name, page := range pages(t) {
		if !strings.HasPrefix(name, "docs/migrate/") {
			continue
		}
		for _, cells := range translated.FindAllStringSubmatch(page, -1) {
			for _, m := range code.FindAllStringSubmatch(cells[1], -1) {
				if strings.HasPrefix(m[1], "nlb ") {
					continue // TestCommandsExist
				}
				found++
				for _, w := range word.FindAllString(m[1], -1) {
					if !known[w] {
						t.Errorf("%s: %q: there is no %s", name, m[1], w)
					}
				}
			}
		}
	}
	if found < 40 {
		t.Errorf("only %d translations were found", found)
	}
}

// spoken matches nlb and its arguments as code in a sentence, typed as a line of
// a shell block.
var (
	spoken = regexp.MustCompile("`nlb ([^`]*)`")
	typed  = regexp.MustCompile(`(?m)^(?:bin/)?nlb ([^#\n]*)`)
)

// commands are the arguments of nlb wherever a page names it.
func commands(page string) (found [][]string) {
	prose := fence.ReplaceAllString(page, "")
	matches := spoken.FindAllStringSubmatch(prose, -1)
	for _, b := range blocks(page) {
		if b.language() == "sh" {
			matches = append(matches, typed.FindAllStringSubmatch(b.text, -1)...)
		}
	}
	for _, m := range matches {
		found = append(found, strings.Fields(m[1]))
	}
	return found
}

func TestCommandsExist(t *testing.T) {
	program := filepath.Join(programs, "nlb")
	help := func(t *testing.T, command string) string {
		out, err := exec.Command(program, command, "--help").CombinedOutput()
		if err != nil {
			t.Errorf("there is no nlb %s: %s", command, out)
		}
		return string(out)
	}
	found := 0
	for name, page := range pages(t) {
		for _, words := range commands(page) {
			t.Run(fmt.Sprint(name, "/", strings.Join(words, " ")), func(t *testing.T) {
				known := help(t, words[0])
				for _, w := range words[1:] {
					if strings.HasPrefix(w, "-") && !strings.Contains(known, w) {
						t.Errorf("nlb %s has no %s", words[0], w)
					}
				}
			})
			found++
		}
	}
	if found < 10 {
		t.Errorf("only %d commands were found", found)
	}
}

// A place is where a link leads: a file, by path from root, and a heading in it.
type place struct{ file, anchor string }

// link matches a link to a file of this repository, or to a heading.
var link = regexp.MustCompile(`\]\(([^):#]*)(?:#([^)]+))?\)`)

func links(from, text string) (found []place) {
	for _, m := range link.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
		to := place{from, m[2]}
		if m[1] != "" {
			to.file = filepath.ToSlash(filepath.Join(filepath.Dir(from), m[1]))
		}
		found = append(found, to)
	}
	return found
}

func TestLinksLeadSomewhere(t *testing.T) {
	for name, page := range pages(t) {
		for _, to := range links(name, page) {
			if _, err := os.Stat(filepath.Join(root, to.file)); err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if to.anchor != "" && section(read(t, to.file), to.anchor) == "" {
				t.Errorf("%s: %s has no heading #%s", name, to.file, to.anchor)
			}
		}
	}
}

// target matches a make target in a sentence or a shell block.
var target = regexp.MustCompile("(?m)(?:`|^|PATH\" )make ([a-z-]+)")

func TestMakeTargetsExist(t *testing.T) {
	makefile := read(t, "Makefile")
	for name, page := range pages(t) {
		for _, m := range target.FindAllStringSubmatch(page, -1) {
			if !regexp.MustCompile(`(?m)^` + m[1] + `:`).MatchString(makefile) {
				t.Errorf("%s: there is no make %s", name, m[1])
			}
		}
	}
}

// counter matches the name of a counter.
var counter = regexp.MustCompile("`([a-z_]+_drops|hairpins)`")

func TestCountersAreTheDataplanesOwn(t *testing.T) {
	// A field of an event may be called like a counter.
	source := read(t, "balancer/nft/render.go") + read(t, "balancer/events/kinds.go")
	for name, page := range pages(t) {
		for _, m := range counter.FindAllStringSubmatch(page, -1) {
			if !strings.Contains(source, `"`+m[1]+`"`) {
				t.Errorf("%s: there is no counter %s", name, m[1])
			}
		}
	}
}

// check matches the name of a check of nlb doctor in parentheses.
var (
	checks = regexp.MustCompile("\\((?:[^()`]*`[^`]+`[^()`]*)+\\)")
	check  = regexp.MustCompile("`([a-z0-9]+(?:-[a-z0-9]+)+)`")
)

func TestChecksOfDoctorExist(t *testing.T) {
	found := 0
	for _, group := range checks.FindAllString(read(t, "docs/troubleshooting.md"), -1) {
		for _, m := range check.FindAllStringSubmatch(group, -1) {
			found++
			if !slices.ContainsFunc(doctor.Checks(), func(c doctor.Check) bool { return c.ID == m[1] }) {
				t.Errorf("nlb doctor has no check %s", m[1])
			}
		}
	}
	if found < 10 {
		t.Errorf("only %d names of checks were found", found)
	}
}
