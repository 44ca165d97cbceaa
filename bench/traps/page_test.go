package traps

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the tables of the documentation")

// labPage has a table of the scenarios.
const labPage = "../../docs/lab.md"

// TestPage holds the page's table to the scenarios.
func TestPage(t *testing.T) {
	var rows strings.Builder
	for _, sc := range All() {
		fmt.Fprintf(&rows, "| `%s` | %s: %s | %s | %s |\n", sc.Name, sc.Title, sc.Naive, sc.Why, sc.Cure)
	}
	compareTable(t, labPage, "| scenario |", rows.String())
}

// compareTable compares the rows of the table whose heading begins a certain way,
// or rewrites them.
func compareTable(t *testing.T, page, heading, want string) {
	t.Helper()
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, found := strings.Cut(string(text), "\n"+heading)
	if !found {
		t.Fatalf("%s has no table %q", page, heading)
	}
	titles, rest, _ := strings.Cut(rest, "\n")
	rule, rest, _ := strings.Cut(rest, "\n")
	got, after := rest, ""
	if end := strings.Index(rest, "\n\n"); end >= 0 {
		got, after = rest[:end+1], rest[end+1:]
	}
	if *update {
		text := head + "\n" + heading + titles + "\n" + rule + "\n" + want + after
		if err := os.WriteFile(page, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s is not what it shows: run the test with -update (-want +got):\n%s", page, diff)
	}
}
