package report

import (
	"bytes"
	"encoding/xml"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/html"

	"nlb/internal/golden"
)

func filesOf(t *testing.T, r *Run) map[string][]byte {
	t.Helper()
	files, err := Files(r)
	if err != nil {
		t.Fatal(err)
	}
	byName := make(map[string][]byte)
	for _, f := range files {
		byName[f.Name] = f.Content
	}
	if len(byName) != len(files) {
		t.Error("two files have one name")
	}
	return byName
}

func TestFiles(t *testing.T) {
	files := filesOf(t, example(t, 1, 0.03, unchanged))
	for name, content := range files {
		golden.Check(t, name, content)
	}
	for _, chart := range []string{"01-udp-packets", "02-balancers-cpu-for-a-connection", "03-p50-of-4000-requests-a-second", "04-p99-of-4000-requests-a-second"} {
		if files["charts/"+chart+".svg"] == nil {
			t.Errorf("there is no chart %s", chart)
		}
	}
}

// TestInterrupted has a run that ended in its third round, and in the middle of
// a line.
func TestInterrupted(t *testing.T) {
	var b bytes.Buffer
	writeExample(t, &b, 1, 0.03, unchanged, 50)
	b.WriteString(`{"measurement":{"round":3,"met`)
	run, err := Read(&b)
	if err != nil {
		t.Fatal(err)
	}
	golden.Check(t, "interrupted.md", filesOf(t, run)["report.md"])
}

// TestNothingMeasured has a header alone.
func TestNothingMeasured(t *testing.T) {
	var b bytes.Buffer
	writeExample(t, &b, 1, 0.03, unchanged, 0)
	run, err := Read(&b)
	if err != nil {
		t.Fatal(err)
	}
	files := filesOf(t, run)
	if len(files) != 2 {
		t.Errorf("%d files", len(files))
	}
	for _, want := range []string{"Nothing of nlb can be compared.", "listeners=1000: not measured.", "interrupted"} {
		if !strings.Contains(string(files["report.md"]), want) {
			t.Errorf("it does not say %q", want)
		}
	}
}

func TestWriteFiles(t *testing.T) {
	run, dir := example(t, 1, 0.03, unchanged), filepath.Join(t.TempDir(), "new")
	for range 2 { // again over the same
		if err := WriteFiles(dir, run); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range filesOf(t, run) {
		got, err := os.ReadFile(filepath.Join(dir, filepath.FromSlash(name)))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(want, got) {
			t.Errorf("%s: is another one", name)
		}
	}
}

// hostile is text that would be something else if it were not escaped.
const hostile = "</style></pre><script>x</script> & \"'`|[a](b) <img src=//c> 漢"

// hostileRun has it wherever a run has text.
func hostileRun() *Run {
	long := hostile + "\x00\x1b[31m\n```\n# heading\n"
	h := exampleHeader()
	h.Command, h.Flags = long, map[string]string{long: long}
	h.Machine.CPU, h.Machine.Kernel = long, long
	h.Contestants = []Contestant{
		{Name: "direct", Role: Baseline},
		{Name: hostile, Role: NLB, Job: hostile, Version: long, Commands: []string{long}, Config: long},
		{Name: hostile + "2", Role: Peer, Job: hostile},
	}
	h.Metrics = []Metric{{Name: hostile, Unit: hostile, Better: More, Cases: []string{hostile}}}
	r := &Run{Header: h, Notes: []Note{{Text: long}, {Metric: hostile, Case: hostile, Contestant: hostile, Text: long}}}
	for _, c := range h.Contestants {
		r.Measurements = append(r.Measurements, Measurement{1, hostile, hostile, c.Name, 1, hostile})
	}
	return r
}

// TestEscaped parses what was made: none of the text is an element, and the page
// loads and runs nothing.
func TestEscaped(t *testing.T) {
	run := hostileRun()
	if err := run.Header.check(); err != nil {
		t.Fatal(err)
	}
	for name, content := range filesOf(t, run) {
		switch filepath.Ext(name) {
		case ".svg":
			checkXML(t, name, content)
		case ".html":
			checkPage(t, content)
		case ".md":
			golden.Check(t, "hostile.md", content)
		}
	}
}

func checkXML(t *testing.T, name string, content []byte) {
	t.Helper()
	d := xml.NewDecoder(bytes.NewReader(content))
	for {
		token, err := d.Token()
		if err == io.EOF {
			return
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if e, ok := token.(xml.StartElement); ok && !strings.Contains(" svg g path text ", " "+e.Name.Local+" ") {
			t.Errorf("%s has an element %s", name, e.Name.Local)
		}
	}
}

func checkPage(t *testing.T, content []byte) {
	t.Helper()
	root, err := html.Parse(bytes.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	styles := 0
	for n := range root.Descendants() {
		if n.Type != html.ElementNode {
			continue
		}
		switch n.Data {
		case "script", "img", "link", "iframe", "object", "a", "image", "use":
			t.Errorf("there is an element %s", n.Data)
		case "style":
			styles++
		}
		for _, a := range n.Attr {
			if a.Key == "src" || a.Key == "href" || strings.HasPrefix(a.Key, "on") {
				t.Errorf("%s has %s", n.Data, a.Key)
			}
		}
	}
	if styles != 1 {
		t.Errorf("%d style sheets", styles)
	}
	if m := regexp.MustCompile(`url\(|@import`).Find(content); m != nil {
		t.Errorf("a style has %s", m)
	}
}

// TestDark has each colour of a chart in the rules for dark pages: one without
// would be dark on dark.
func TestDark(t *testing.T) {
	known := make(map[string]bool)
	for _, d := range dark {
		known[d.Property+":"+d.Light] = true
	}
	colours := regexp.MustCompile(`(fill|stroke):#[0-9A-Fa-f]+`)
	found := 0
	for name, content := range filesOf(t, example(t, 1, 0.03, unchanged)) {
		if filepath.Ext(name) != ".svg" {
			continue
		}
		for _, c := range colours.FindAllString(string(content), -1) {
			found++
			if !known[c] {
				t.Errorf("%s: %s", name, c)
			}
		}
	}
	if found == 0 {
		t.Error("no chart has a colour")
	}
}

func TestEscape(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"nlb hairpin_snat, 0.84", "nlb hairpin_snat, 0.84"},
		{"_a_ a_ _", `\_a\_ a\_ \_`},
		{"a|b\\|<c>", `a\|b\\\|\<c\>`},
		{"*a* ~~b~~ [c](d) `e` &amp;", "\\*a\\* \\~\\~b\\~\\~ \\[c\\](d) \\`e\\` \\&amp;"},
		{"# a", `\# a`},
		{"1. a", `1\. a`},
		{"12) a", `12\) a`},
		{"- a", `\- a`},
		{"---", `--\-`},
		{"1.5 a -1 #2", "1.5 a -1 #2"},
		{" a\n\x00# b ", "a  # b"},
	} {
		if diff := cmp.Diff(c.want, escape(c.text)); diff != "" {
			t.Errorf("%q: %s", c.text, diff)
		}
	}
}

func TestShow(t *testing.T) {
	for _, c := range []struct {
		v        float64
		decimals int
		want     string
	}{
		{0, 0, "0"}, {999, 0, "999"}, {1000, 0, "1,000"}, {1234567.891, 2, "1,234,567.89"},
		{-1234, 0, "-1,234"}, {-123, 1, "-123.0"}, {-123456, 0, "-123,456"},
	} {
		m := Metric{Decimals: c.decimals}
		if diff := cmp.Diff(c.want, m.show(c.v)); diff != "" {
			t.Error(diff)
		}
	}
}
