package events

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// root is the module's folder.
const root = "../.."

// daemons are the folders whose code runs in the daemon.
var daemons = []string{"balancer", "cmd", "config", "healthcheck", "proxyproto"}

// apart is what runs in a process of its own, the relay worker, whose log the daemon
// does not see.
var apart = []string{
	"proxyproto/relay/", "proxyproto/worker/worker.go", "proxyproto/worker/elder.go", "proxyproto/worker/server.go",
}

// An emission is a call that logs, or looks like one.
type emission struct {
	at     string
	kind   string          // the variable of the Kind; "": it is no event
	fields map[string]bool // those that the function gives to a log entry in any call
	own    map[string]bool // those of this call
}

var levels = map[string]bool{"Info": true, "Warn": true, "Error": true}

// emissions are the calls of the daemon's code.
func emissions(t *testing.T) []emission {
	t.Helper()
	var found []emission
	for _, dir := range daemons {
		err := filepath.WalkDir(filepath.Join(root, dir), func(file string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") {
				return err
			}
			found = append(found, emissionsOf(t, file)...)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return found
}

func emissionsOf(t *testing.T, source string) (found []emission) {
	t.Helper()
	files := token.NewFileSet()
	file, err := parser.ParseFile(files, source, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	name, err := filepath.Rel(root, source)
	if err != nil {
		t.Fatal(err)
	}
	if slices.ContainsFunc(apart, func(a string) bool { return strings.HasPrefix(name, a) }) {
		return nil
	}
	for _, decl := range file.Decls {
		fields := make(map[string]bool)
		var calls []emission
		ast.Inspect(decl, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			if field := fieldOf(call); field != "" {
				fields[field] = true
			}
			if method, ok := call.Fun.(*ast.SelectorExpr); ok && levels[method.Sel.Name] && len(call.Args) > 0 && !fromZap(method) {
				e := emission{at: name + ":" + strconv.Itoa(files.Position(call.Pos()).Line), fields: fields, own: make(map[string]bool)}
				for _, a := range call.Args {
					if arg, ok := a.(*ast.CallExpr); ok {
						e.own[fieldOf(arg)] = true
						e.kind += kindOf(arg)
					}
				}
				calls = append(calls, e)
			}
			return true
		})
		found = append(found, calls...)
	}
	return found
}

// fieldOf is the name of the field that a call of zap makes, if it makes one.
func fieldOf(call *ast.CallExpr) string {
	fun, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return ""
	}
	if !fromZap(fun) {
		return ""
	}
	if fun.Sel.Name == "Error" {
		return "error"
	}
	if len(call.Args) < 2 {
		return ""
	}
	lit, ok := call.Args[0].(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return ""
	}
	return strings.Trim(lit.Value, `"`)
}

func fromZap(fun *ast.SelectorExpr) bool {
	from, ok := fun.X.(*ast.Ident)
	return ok && from.Name == "zap"
}

// kindOf is X of a call of the form events.X.Field().
func kindOf(call *ast.CallExpr) string {
	if fun, ok := call.Fun.(*ast.SelectorExpr); ok && fun.Sel.Name == "Field" {
		if kind, ok := fun.X.(*ast.SelectorExpr); ok {
			if from, ok := kind.X.(*ast.Ident); ok && from.Name == "events" {
				return kind.Sel.Name
			}
		}
	}
	return ""
}

// variables finds the Kinds by the variables of kinds.go.
func variables(t *testing.T) map[string]*Kind {
	t.Helper()
	source, err := os.ReadFile("kinds.go")
	if err != nil {
		t.Fatal(err)
	}
	byName := make(map[string]*Kind)
	for _, k := range All() {
		if byName[k.Name()] != nil {
			t.Errorf("%s is there twice", k.Name())
		}
		byName[k.Name()] = k
	}
	found := make(map[string]*Kind)
	for _, m := range regexp.MustCompile(`(?m)^\t(\w+) += kind\("([a-z_.]+)"`).FindAllStringSubmatch(string(source), -1) {
		found[m[1]] = byName[m[2]]
	}
	if len(found) != len(byName) {
		t.Fatalf("%d variables of %d kinds", len(found), len(byName))
	}
	return found
}

// A package that has events logs nothing else at level info and above, and what an
// event says is what its Kind has. A Kind is emitted, with each of its fields.
func TestWhatIsLoggedIsAnEvent(t *testing.T) {
	kinds := variables(t)
	said := make(map[string]map[string]bool)
	found := emissions(t)
	speaks := make(map[string]bool)
	for _, e := range found {
		speaks[path.Dir(e.at)] = speaks[path.Dir(e.at)] || e.kind != ""
	}
	for _, e := range found {
		k := kinds[e.kind]
		if k == nil && !speaks[path.Dir(e.at)] {
			continue
		}
		if k == nil {
			t.Errorf("%s logs and names no event, or one that there is not: %q", e.at, e.kind)
			continue
		}
		if said[e.kind] == nil {
			said[e.kind] = make(map[string]bool)
		}
		maps.Copy(said[e.kind], e.fields)
		for f := range e.own {
			if f != "" && !slices.Contains(k.fields, f) {
				t.Errorf("%s: %s has no field %s", e.at, k.name, f)
			}
		}
	}
	for name, k := range kinds {
		if said[name] == nil {
			t.Errorf("nobody says %s", k.name)
		}
		for _, f := range k.fields {
			if said[name] != nil && !said[name][f] {
				t.Errorf("%s is never said with %s", k.name, f)
			}
		}
	}
	if len(found) < 40 {
		t.Errorf("only %d calls were found", len(found))
	}
}

// The page lists the kinds with their meanings and fields, and nothing else.
func TestKindsAreDocumented(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(root, "docs/events.md"))
	if err != nil {
		t.Fatal(err)
	}
	var got, want []string
	for line := range strings.Lines(string(page)) {
		if strings.HasPrefix(line, "| `") {
			got = append(got, strings.TrimSpace(line))
		}
	}
	for _, k := range All() {
		want = append(want, row(k))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("rows of docs/events.md (-want +got):\n%s", diff)
	}
}

// row is the kind's in the page.
func row(k *Kind) string {
	fields := "—"
	if len(k.fields) > 0 {
		fields = "`" + strings.Join(k.fields, "`, `") + "`"
	}
	return "| `" + k.name + "` | " + k.meaning + " | " + fields + " |"
}
