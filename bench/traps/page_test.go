package traps

import (
	"flag"
	"fmt"
	"net/netip"
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

// comparePage has the table of nlb lab compare.
const comparePage = "../../docs/compare.md"

// TestCompare holds the page to what the modes really do.
func TestCompare(t *testing.T) {
	t.Parallel()
	c, err := Compare(soon(t), Options{Program: program})
	if err != nil {
		t.Fatal(err)
	}
	var rows strings.Builder
	for _, done := range c.Cases {
		fmt.Fprintf(&rows, "| %s: %s |", done.Name, done.Title)
		for _, cell := range done.Cells {
			fmt.Fprintf(&rows, " %s |", cell.Says)
		}
		rows.WriteString("\n")
	}
	if len(c.Cases) != len(caseOrder) {
		t.Errorf("%d cases, want %d", len(c.Cases), len(caseOrder))
	}
	compareTable(t, comparePage, "| case |", rows.String())
	for line := range strings.Lines(ComparisonText(c)) {
		if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > MinWidth {
			t.Errorf("%d columns wide: %s", n, line)
		}
	}
}

// TestMeasureRates measures; what comes out is the machine's affair.
func TestMeasureRates(t *testing.T) {
	t.Parallel()
	rates, err := MeasureRates(soon(t), Options{Program: program}, 1)
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range rates {
		if r.Mode != Modes[i] || r.Relative <= 0 {
			t.Errorf("%+v", r)
		}
	}
	if len(rates) != len(Modes) {
		t.Errorf("%d rates for %d modes", len(rates), len(Modes))
	}
}

// TestText has no line that is wider than was asked for, whatever happened.
func TestText(t *testing.T) {
	long := Finding{Evidence: strings.Repeat("evidence ", 30), Path: []Hop{
		{From: "p1x2", To: "n1", Src: netip.MustParseAddrPort("198.51.100.10:65535"), Dst: netip.MustParseAddrPort("203.0.113.109:65535"), What: "SYN+ACK", Times: 12, Note: "p1x2 rewrote the destination"},
	}}
	for _, sc := range All() {
		for _, width := range []int{0, 80, 120} {
			for line := range strings.Lines(Text(sc, Result{Naive: long, Cure: long, Verdict: Broken}, width)) {
				if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > max(width, MinWidth) {
					t.Errorf("%s at %d: %d columns: %s", sc.Name, width, n, line)
				}
			}
		}
	}
}
