package report

import (
	"bytes"
	"encoding/json"
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// smallHeader has one of each.
func smallHeader() Header {
	return Header{
		Start: time.Date(2026, 10, 14, 12, 30, 0, 0, time.UTC), Mode: Full, Rounds: 3,
		Contestants: []Contestant{{Name: "direct", Role: Baseline}, {Name: "nlb", Role: NLB}},
		Metrics: []Metric{
			{Name: "rate", Unit: "1/s", Better: More},
			{Name: "p99", Unit: "µs", Better: Less, PrintedOnly: true, Cases: []string{"c=1"}},
		},
	}
}

const smallHeaderLine = `{"header":{"schema":1,"start":"2026-10-14T12:30:00Z","command":"","mode":"full","rounds":3,` +
	`"machine":{"cpu":"","cores":0,"core":0,"ram_bytes":0,"kernel":""},"load_before":[0,0,0],` +
	`"contestants":[{"name":"direct","role":"baseline"},{"name":"nlb","role":"nlb"}],` +
	`"metrics":[{"name":"rate","unit":"1/s","better":"more","decimals":0},` +
	`{"name":"p99","unit":"µs","better":"less","decimals":0,"printed_only":true,"cases":["c=1"]}]}}` + "\n"

// lineCounter counts calls that are not one whole line.
type lineCounter struct {
	bytes.Buffer
	odd int
}

func (l *lineCounter) Write(p []byte) (int, error) {
	if bytes.IndexByte(p, '\n') != len(p)-1 {
		l.odd++
	}
	return l.Buffer.Write(p)
}

func TestWriter(t *testing.T) {
	var b lineCounter
	w, err := NewWriter(&b, smallHeader())
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		w.Measure(Measurement{Round: 1, Metric: "rate", Contestant: "nlb", Value: 1.5e6, Unit: "1/s"}),
		w.Measure(Measurement{Round: 3, Metric: "p99", Case: "c=1", Contestant: "direct", Value: 0, Unit: "µs"}),
		w.Note(Note{Metric: "p99", Text: "a < b\nc"}),
		w.End(End{Seconds: 2.5, LoadAfter: [3]float64{1, 0.5, 0.25}}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	const want = smallHeaderLine +
		`{"measurement":{"round":1,"metric":"rate","contestant":"nlb","unit":"1/s","value":1500000}}` + "\n" +
		`{"measurement":{"round":3,"metric":"p99","case":"c=1","contestant":"direct","unit":"µs","value":0}}` + "\n" +
		`{"note":{"metric":"p99","text":"a < b\nc"}}` + "\n" +
		`{"end":{"load_after":[1,0.5,0.25],"seconds":2.5}}` + "\n"
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
	if b.odd > 0 {
		t.Errorf("%d calls were not one line each", b.odd)
	}
	got, err := Read(&b)
	if err != nil {
		t.Fatal(err)
	}
	h := smallHeader()
	h.Schema = Schema
	wantRun := &Run{
		Header: h,
		Measurements: []Measurement{
			{Round: 1, Metric: "rate", Contestant: "nlb", Value: 1.5e6, Unit: "1/s"},
			{Round: 3, Metric: "p99", Case: "c=1", Contestant: "direct", Unit: "µs"},
		},
		Notes: []Note{{Metric: "p99", Text: "a < b\nc"}},
		End:   &End{Seconds: 2.5, LoadAfter: [3]float64{1, 0.5, 0.25}},
	}
	if diff := cmp.Diff(wantRun, got); diff != "" {
		t.Error(diff)
	}
}

// TestWriterRefuses what a reader would refuse, and goes on after it.
func TestWriterRefuses(t *testing.T) {
	var b bytes.Buffer
	w, err := NewWriter(&b, smallHeader())
	if err != nil {
		t.Fatal(err)
	}
	good := Measurement{Round: 1, Metric: "rate", Contestant: "nlb", Value: 1, Unit: "1/s"}
	printed := Measurement{Round: 1, Metric: "p99", Case: "c=1", Contestant: "nlb", Unit: "µs"}
	if err := w.Measure(good); err != nil {
		t.Fatal(err)
	}
	before := b.String()
	change := func(m Measurement, f func(*Measurement)) Measurement { f(&m); return m }
	for _, c := range []struct {
		m    Measurement
		want string
	}{
		{good, `measurement: round 1 has "rate", case "", of "nlb" already`},
		{change(good, func(m *Measurement) { m.Metric = "rat" }), `measurement: metric: the header has no "rat"`},
		{change(good, func(m *Measurement) { m.Case = "c=1" }), `measurement: case: the header has no "c=1" for "rate"`},
		{change(printed, func(m *Measurement) { m.Case = "" }), `measurement: case: the header has no "" for "p99"`},
		{change(good, func(m *Measurement) { m.Contestant = "" }), `measurement: contestant: the header has no ""`},
		{change(good, func(m *Measurement) { m.Unit = "µs" }), `measurement: unit: "rate" is in "1/s", not in "µs"`},
		{change(good, func(m *Measurement) { m.Round = 0 }), `measurement: round: 0 is not between 1 and 3`},
		{change(good, func(m *Measurement) { m.Round = 4 }), `measurement: round: 4 is not between 1 and 3`},
		{change(good, func(m *Measurement) { m.Round, m.Value = 2, math.NaN() }), `measurement: value: NaN cannot be compared: it is not between 1e-15 and 1e+15`},
		{change(good, func(m *Measurement) { m.Round, m.Value = 2, 0 }), `measurement: value: 0 cannot be compared: it is not between 1e-15 and 1e+15`},
		{change(good, func(m *Measurement) { m.Round, m.Value = 2, math.Inf(1) }), `measurement: value: +Inf cannot be compared: it is not between 1e-15 and 1e+15`},
		{change(printed, func(m *Measurement) { m.Value = math.NaN() }), `measurement: value: NaN is not a number between -1e+15 and 1e+15`},
		{change(printed, func(m *Measurement) { m.Value = math.Inf(-1) }), `measurement: value: -Inf is not a number between -1e+15 and 1e+15`},
	} {
		checkError(t, c.want, w.Measure(c.m))
	}
	checkError(t, "note: text: is missing", w.Note(Note{}))
	checkError(t, "end: seconds: NaN is not a duration", w.End(End{Seconds: math.NaN()}))
	if diff := cmp.Diff(before, b.String()); diff != "" {
		t.Errorf("it has written what it refused: %s", diff)
	}
	if err := w.Measure(printed); err != nil {
		t.Error(err)
	}
	if err := w.End(End{}); err != nil {
		t.Error(err)
	}
	checkError(t, "measurement: the run has ended already", w.Measure(change(good, func(m *Measurement) { m.Round = 2 })))
	checkError(t, "note: the run has ended already", w.Note(Note{Text: "late"}))
	checkError(t, "end: the run has ended already", w.End(End{}))
}

func checkError(t *testing.T, want string, err error) {
	t.Helper()
	got := "none"
	if err != nil {
		got = err.Error()
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// TestHeader has all that is wrong with a header said at once.
func TestHeader(t *testing.T) {
	_, err := NewWriter(new(bytes.Buffer), Header{
		Mode: "slow", Command: "\xff", LoadBefore: [3]float64{math.NaN()},
		Contestants: []Contestant{
			{Name: "a", Role: Baseline}, {Name: "a", Role: Baseline}, {Name: "b\n", Role: "judge"}, {Name: strings.Repeat("c", 65), Role: Peer, Version: "\xff"},
		},
		Metrics: []Metric{
			{Name: "m", Unit: "", Better: More, Decimals: -1, Cases: []string{"x", "x", ""}}, {Name: "m", Unit: "s", Better: "bigger"},
		},
	})
	const want = `header: command: "\xff" is not UTF-8
load_before: NaN is not a number between -1e+15 and 1e+15
start: is missing
mode: "slow" is neither quick nor full
rounds: 0 is less than 1
contestants[1].name: there is another "a"
contestants[1].role: "a" is the baseline already
contestants[2].name: "b\n" is not one line of printable text
contestants[2].role: "judge" is neither baseline nor nlb nor peer
contestants[3].name: has more than 64 characters: "cccccccccccccccccccc"…
contestants[3]: "\xff" is not UTF-8
metrics[0].unit: is missing
metrics[0].decimals: -1 is not between 0 and 12
metrics[0].cases[1]: there is another "x"
metrics[0].cases[2]: is missing
metrics[1].name: there is another "m"
metrics[1].better: "bigger" is neither more nor less`
	checkError(t, want, err)
}

var errBroken = errors.New("no space left")

// broken cannot be written to after some calls.
type broken struct{ calls int }

func (b *broken) Write(p []byte) (int, error) {
	if b.calls--; b.calls < 0 {
		return 0, errBroken
	}
	return len(p), nil
}

func TestWriterError(t *testing.T) {
	if _, err := NewWriter(&broken{}, smallHeader()); !errors.Is(err, errBroken) {
		t.Error(err)
	}
	w, err := NewWriter(&broken{1}, smallHeader())
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Note(Note{Text: "lost"}); !errors.Is(err, errBroken) {
		t.Error(err)
	}
}

func TestRead(t *testing.T) {
	const value = `{"measurement":{"round":1,"metric":"rate","contestant":"nlb","unit":"1/s","value":2}}` + "\n"
	for _, c := range []struct{ name, text, want string }{
		{"nothing", "", "line 1: there is no header"},
		{"only a torn header", smallHeaderLine[:50], "line 1: there is no header"},
		{"no header", value, "line 1: there is no header"},
		{"not JSON", "PK\x03\x04\n", "line 1: is not a header: invalid character 'P' looking for beginning of value"},
		{"another schema", `{"header":{"schema":2,"colour":"red"}}` + "\n", "line 1: header: schema: 2 is unknown, this program reads 1"},
		{"no schema", `{"header":{}}` + "\n", "line 1: header: schema: is missing"},
		{"bad header", strings.Replace(smallHeaderLine, "full", "half", 1), `line 1: header: mode: "half" is neither quick nor full`},
		{"two headers", smallHeaderLine + smallHeaderLine, "line 2: header: there is one already"},
		{"unknown field", smallHeaderLine + `{"note":{"text":"a","colour":"red"}}` + "\n", `line 2: is not a record: json: unknown field "colour"`},
		{"unknown record", smallHeaderLine + `{"verdict":{}}` + "\n", `line 2: is not a record: json: unknown field "verdict"`},
		{"no record", smallHeaderLine + value + "{}\n", "line 3: has 0 of header, measurement, note and end instead of one"},
		{"two records", smallHeaderLine + `{"note":{"text":"a"},"end":{"seconds":1,"load_after":[0,0,0]}}` + "\n", "line 2: has 2 of header, measurement, note and end instead of one"},
		{"two in a line", smallHeaderLine + strings.TrimSpace(value) + value, "line 2: has more than one record"},
		{"empty line", smallHeaderLine + "\n" + value, "line 2: is empty"},
		{"NaN", smallHeaderLine + strings.Replace(value, ":2}", ":NaN}", 1), "line 2: is not a record: invalid character 'N' looking for beginning of value"},
		{"infinite", smallHeaderLine + strings.Replace(value, ":2}", ":1e999}", 1), "line 2: is not a record: json: cannot unmarshal number 1e999 into Go struct field"},
		{"no value", smallHeaderLine + strings.Replace(value, `,"value":2`, "", 1), "line 2: measurement: value: is missing"},
		{"no number", smallHeaderLine + strings.Replace(value, ":2}", ":null}", 1), "line 2: measurement: value: is missing"},
		{"twice", smallHeaderLine + value + value, `line 3: measurement: round 1 has "rate", case "", of "nlb" already`},
		{"after the end", smallHeaderLine + `{"end":{"seconds":1,"load_after":[0,0,0]}}` + "\n" + value, "line 3: measurement: the run has ended already"},
		{"no duration", smallHeaderLine + `{"end":{"load_after":[0,0,0]}}` + "\n", "line 2: end: seconds: is missing"},
		{"not UTF-8", smallHeaderLine + "{\"note\":{\"text\":\"\xff\"}}\n", "line 2: is not UTF-8"},
		{"note on nothing", smallHeaderLine + `{"note":{"metric":"rate","case":"c=1","text":"a"}}` + "\n", `line 2: note: case: the header has no "c=1" for "rate"`},
		{"torn in the middle", smallHeaderLine + value[:20] + "\n" + value, "line 2: is not a record: invalid character"},
	} {
		t.Run(c.name, func(t *testing.T) {
			run, err := Read(strings.NewReader(c.text))
			if err == nil {
				t.Fatalf("it has read %+v", run)
			}
			if !strings.HasPrefix(err.Error(), c.want) {
				t.Errorf("%v\nwant: %s", err, c.want)
			}
		})
	}
}

// TestTorn cuts a file anywhere: what was whole is there, and the line that was
// not is told. A line that only lacks its end is whole.
func TestTorn(t *testing.T) {
	var b bytes.Buffer
	writeExample(t, &b, 1, 0.03, unchanged, 10)
	whole := b.Bytes()
	first := bytes.IndexByte(whole, '\n')
	for cut := first; cut <= len(whole); cut++ {
		run, err := Read(bytes.NewReader(whole[:cut]))
		if err != nil {
			t.Fatalf("%d of %d bytes: %v", cut, len(whole), err)
		}
		lines := bytes.Count(whole[:cut], []byte("\n"))
		torn := 0
		if rest := whole[bytes.LastIndexByte(whole[:cut], '\n')+1 : cut]; json.Valid(rest) {
			lines++
		} else if len(rest) > 0 {
			torn = lines + 1
		}
		if len(run.Measurements) != lines-1 || run.Torn != torn {
			t.Fatalf("%d of %d bytes: %d measurements, line %d torn; want %d and %d",
				cut, len(whole), len(run.Measurements), run.Torn, lines-1, torn)
		}
	}
}

func TestReadFile(t *testing.T) {
	const name = "testdata/none.jsonl"
	_, err := ReadFile(name)
	if err == nil || !strings.Contains(err.Error(), name) {
		t.Error(err)
	}
}

// FuzzRead: what can be read can be written, is the same then, and can be
// compared with itself without a difference.
func FuzzRead(f *testing.F) {
	// Short ones: the fuzzer would spend its time on making long ones shorter.
	f.Add([]byte(smallHeaderLine + `{"measurement":{"round":1,"metric":"rate","contestant":"nlb","unit":"1/s","value":1e15}}` +
		"\n" + `{"measurement":{"round":1,"metric":"rate","contestant":"direct","unit":"1/s","value":1e-15}}` + "\n" + `{"end":{"seconds":1}}`))
	f.Add([]byte(smallHeaderLine + `{"note":{"text":"`))
	f.Fuzz(func(t *testing.T, text []byte) {
		run, err := Read(bytes.NewReader(text))
		if err != nil {
			return
		}
		again, err := Read(bytes.NewReader(written(t, run)))
		if err != nil {
			t.Fatal(err)
		}
		again.Torn = run.Torn
		if a, b := written(t, run), written(t, again); !bytes.Equal(a, b) {
			t.Errorf("%s\n%s", a, b)
		}
		c, err := CompareRuns(run, again, 0)
		if errors.Is(err, ErrNothingInCommon) {
			return
		}
		if err != nil || changed(c) > 0 || len(c.Differences) > 0 {
			t.Errorf("%v %+v", err, c)
		}
		if _, err := json.Marshal(c); err != nil {
			t.Error(err)
		}
	})
}

// written is a run as its file.
func written(t *testing.T, r *Run) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := NewWriter(&b, r.Header)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range r.Measurements {
		if err := w.Measure(m); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range r.Notes {
		if err := w.Note(n); err != nil {
			t.Fatal(err)
		}
	}
	if r.End != nil {
		if err := w.End(*r.End); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

// changed is how many rows are better or worse.
func changed(c *Comparison) (n int) {
	for _, ch := range c.Changes {
		if ch.Verdict == Better || ch.Verdict == Worse {
			n++
		}
	}
	return n
}
