// Package docs_test holds the documentation to what the program does.
package docs_test

import (
	"encoding/json"
	"fmt"
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
	paths, err := filepath.Glob("*.md")
	if err != nil {
		t.Fatal(err)
	}
	text := map[string]string{"README.md": read(t, "README.md")}
	for _, p := range paths {
		text["docs/"+p] = read(t, "docs/"+p)
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

// A block is a fenced block of a page.
type block struct {
	info string // what follows the opening fence: the language, and for us "fragment"
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

// TestReadmeListsEveryPage: a page that it doesn't name is found by nobody.
func TestReadmeListsEveryPage(t *testing.T) {
	all := pages(t)
	for page := range all {
		if page != "README.md" && !strings.Contains(all["README.md"], "]("+page+")") {
			t.Errorf("README.md has no link to %s", page)
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
	var reference yaml.Node
	if err := yaml.Unmarshal(config.Reference(), &reference); err != nil {
		t.Fatal(err)
	}
	keys := make(map[string]bool)
	leaves("", &reference, keys)
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
			switch b.info {
			case "yaml":
				files[fmt.Sprintf("%s, block %d", name, i+1)] = b.text
			case "yaml fragment":
				var any yaml.Node
				if err := yaml.Unmarshal([]byte(b.text), &any); err != nil {
					t.Errorf("%s, block %d: %v", name, i+1, err)
				}
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
		if b.info == "sh" {
			matches = append(matches, typed.FindAllStringSubmatch(b.text, -1)...)
		}
	}
	for _, m := range matches {
		found = append(found, strings.Fields(m[1]))
	}
	return found
}

func TestCommandsExist(t *testing.T) {
	program := filepath.Join(t.TempDir(), "nlb")
	if out, err := exec.Command("go", "build", "-o", program, "nlb/cmd/nlb").CombinedOutput(); err != nil {
		t.Fatalf("build nlb: %v\n%s", err, out)
	}
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

// link matches a link to a file of this repository.
var link = regexp.MustCompile(`\]\(([^):#]+)\)`)

func TestLinksLeadSomewhere(t *testing.T) {
	for name, page := range pages(t) {
		for _, m := range link.FindAllStringSubmatch(page, -1) {
			if _, err := os.Stat(filepath.Join(root, filepath.Dir(name), m[1])); err != nil {
				t.Errorf("%s: %v", name, err)
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
	source := read(t, "balancer/nft/render.go")
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
