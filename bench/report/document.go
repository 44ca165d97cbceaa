package report

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A document is what a report says, before it is Markdown or HTML: both have the
// same, because both are made of it.
type document struct {
	Title  string
	Blocks []block
}

// A block has one of these.
type block struct {
	Heading   string
	Paragraph string
	Items     []string
	Table     *grid
	Chart     *chart
	Code      string
}

// A grid is rows of as many cells as the first of them, which names the columns.
type grid struct {
	Rows  [][]string
	Right []bool // columns of numbers
}

// A chart is a picture in a file of its own.
type chart struct {
	Name string // of the file, with its folder
	Alt  string
	SVG  []byte
}

func (d *document) heading(text string) { d.Blocks = append(d.Blocks, block{Heading: text}) }
func (d *document) paragraph(format string, args ...any) {
	d.Blocks = append(d.Blocks, block{Paragraph: fmt.Sprintf(format, args...)})
}
func (d *document) code(text string) { d.Blocks = append(d.Blocks, block{Code: text}) }

func (d *document) list(items []string) {
	if len(items) > 0 {
		d.Blocks = append(d.Blocks, block{Items: items})
	}
}

// table adds rows, without the columns that only have a name. The columns from
// left to right-1 have numbers.
func (d *document) table(rows [][]string, left, right int) {
	var used []int
	for i := range rows[0] {
		if slices.ContainsFunc(rows[1:], func(row []string) bool { return row[i] != "" }) {
			used = append(used, i)
		}
	}
	g := &grid{}
	for _, i := range used {
		g.Right = append(g.Right, left <= i && i < right)
	}
	for _, row := range rows {
		var cells []string
		for _, i := range used {
			cells = append(cells, row[i])
		}
		g.Rows = append(g.Rows, cells)
	}
	d.Blocks = append(d.Blocks, block{Table: g})
}

// newDocument says all there is to say about a run.
func newDocument(r *Run) (*document, error) {
	d := &document{Title: "Benchmark of nlb, " + r.Header.Start.UTC().Format("2 January 2006, 15:04 UTC")}
	tables := r.Tables()
	d.summary(r, tables)
	d.goals(r)
	for i := range r.Header.Metrics {
		m := &r.Header.Metrics[i]
		of := slices.DeleteFunc(slices.Clone(tables), func(t Table) bool { return t.Metric != m })
		if err := d.metric(r, i, of); err != nil {
			return nil, fmt.Errorf("metric %q: %w", m.Name, err)
		}
	}
	d.conditions(r)
	d.contestants(r)
	return d, nil
}

// summary has what most readers want to know, and what keeps the run from being
// trusted first of all.
func (d *document) summary(r *Run, tables []Table) {
	d.caveats(r)
	d.heading("Summary")
	counts := make(map[Standing]int)
	rows := [][]string{{"metric", "case", "contestant", r.ofBaseline(), "of the best peer", "standing", "remarks"}}
	for _, t := range tables {
		for i := range t.Rows {
			row := &t.Rows[i]
			if row.Contestant.Role != NLB || row.ToBaseline == nil && row.ToPeer == nil {
				continue
			}
			standing := ""
			if row.ToPeer != nil {
				s := t.Metric.Standing(row.ToPeer)
				counts[s]++
				standing = string(s)
			}
			rows = append(rows, []string{
				t.Metric.Name, t.Case, row.Contestant.Name, median(row.ToBaseline), against(row.ToPeer), standing,
				strings.Join(row.remarks(r.Header.rounds(t.Metric)), ", "),
			})
		}
	}
	if len(rows) == 1 {
		d.paragraph("Nothing of nlb can be compared.")
		return
	}
	d.paragraph("Comparisons of nlb with the best peer that does the same job: ahead in %d, level in %d, behind in %d, unclear in %d.",
		counts[Ahead], counts[Level], counts[Behind], counts[Unclear])
	d.table(rows, 3, 4)
	d.paragraph("Ratios are of two contestants within a round, and then the median over the rounds. "+
		"Ahead and behind mean: in three quarters of the rounds, of which there are enough. "+
		"Noisy means that the quartiles of a ratio are more than %g %% of it apart, or that it has fewer than %d rounds, unless it is of what is merely counted. "+
		"Bounded by the generator means that without any balancer it would be less than %g times as good: "+
		"then the load generator is most of what was measured, and contestants differ by more than the ratios say.",
		100*NoisySpread, EnoughRounds, Headroom)
}

func (d *document) caveats(r *Run) {
	var items []string
	if r.End == nil {
		items = append(items, "The run was interrupted: what follows is what it had measured.")
	}
	if r.Torn > 0 {
		items = append(items, fmt.Sprintf("Line %d of the file is torn and was left out.", r.Torn))
	}
	if r.Header.Mode == Quick {
		items = append(items, "This was a quick run. It shows that everything works; its figures are not for conclusions.")
	}
	d.list(items)
}

// metric has the chart of a metric and a table of each case.
func (d *document) metric(r *Run, number int, tables []Table) error {
	m := tables[0].Metric
	d.heading(fmt.Sprintf("%s (%s)", m.Name, m.Unit))
	text := "More is better."
	if m.Better == Less {
		text = "Less is better."
	}
	if m.PrintedOnly {
		text += " It is printed and not compared: too much of it is chance."
	}
	d.paragraph("%s", text)
	c, err := newChart(number, tables)
	if err != nil {
		return err
	}
	if c != nil {
		d.Blocks = append(d.Blocks, block{Chart: c})
	}
	for _, t := range tables {
		switch {
		case len(t.Rows) == 0 && t.Case != "":
			d.paragraph("%s: not measured.", t.Case)
		case len(t.Rows) == 0:
			d.paragraph("Not measured.")
		default:
			d.rows(r, &t)
		}
	}
	d.list(r.notes(func(n *Note) bool { return n.Metric == m.Name }))
	return nil
}

func (d *document) rows(r *Run, t *Table) {
	rows := [][]string{{t.Case, "median", "min .. max", "quartiles", r.ofBaseline(), "min .. max", "quartiles", "of the best peer", "remarks"}}
	if t.Case == "" {
		rows[0][0] = "contestant"
	}
	for i := range t.Rows {
		row := &t.Rows[i]
		cells := []string{
			row.Contestant.Name, t.Metric.show(row.Value.Median),
			t.Metric.show(row.Value.Min) + " .. " + t.Metric.show(row.Value.Max),
			t.Metric.show(row.Value.Q1) + " .. " + t.Metric.show(row.Value.Q3),
			median(row.ToBaseline), "", "", against(row.ToPeer), strings.Join(row.remarks(r.Header.rounds(t.Metric)), ", "),
		}
		if b := row.ToBaseline; b != nil {
			cells[5], cells[6] = fmt.Sprintf("%.3f .. %.3f", b.Min, b.Max), fmt.Sprintf("%.3f .. %.3f", b.Q1, b.Q3)
		}
		rows = append(rows, cells)
	}
	d.table(rows, 1, 7)
}

// ofBaseline names the column of ratios to the baseline.
func (r *Run) ofBaseline() string {
	for _, c := range r.Header.Contestants {
		if c.Role == Baseline {
			return "of " + c.Name
		}
	}
	return "of a baseline"
}

// notes are those that are about something.
func (r *Run) notes(about func(*Note) bool) []string {
	var items []string
	for i := range r.Notes {
		n := &r.Notes[i]
		if !about(n) {
			continue
		}
		place := strings.Join(slices.DeleteFunc([]string{n.Case, n.Contestant}, func(s string) bool { return s == "" }), ", ")
		if place != "" {
			place += ": "
		}
		items = append(items, place+n.Text)
	}
	return items
}

// remarks mark a row.
func (r *Row) remarks(planned int) []string {
	var remarks []string
	if r.BestPeer {
		remarks = append(remarks, "best peer")
	}
	if r.Bounded {
		remarks = append(remarks, "bounded by the generator")
	}
	if r.Noisy() {
		remarks = append(remarks, "noisy")
	}
	if r.Rounds < planned {
		remarks = append(remarks, fmt.Sprintf("%d of %d rounds", r.Rounds, planned))
	}
	return remarks
}

func median(r *Ratio) string {
	if r == nil {
		return ""
	}
	return fmt.Sprintf("%.3f", r.Median)
}

func against(r *Ratio) string {
	if r == nil {
		return ""
	}
	return fmt.Sprintf("%.3f of %s", r.Median, r.To)
}

// show is a value of the metric, with commas between thousands.
func (m *Metric) show(v float64) string {
	return thousands(strconv.FormatFloat(v, 'f', m.Decimals, 64))
}

func thousands(text string) string {
	whole, rest := text, ""
	if dot := strings.IndexByte(text, '.'); dot >= 0 {
		whole, rest = text[:dot], text[dot:]
	}
	first := 0
	if whole[0] == '-' {
		first = 1
	}
	for i := len(whole) - 3; i > first; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	return whole + rest
}

// conditions are those under which all that was measured.
func (d *document) conditions(r *Run) {
	h := &r.Header
	d.heading("Conditions")
	core := "on none in particular"
	if h.Machine.Core >= 0 {
		core = fmt.Sprintf("everything on core %d", h.Machine.Core)
	}
	length := "unknown: it was interrupted"
	after := "unknown"
	if r.End != nil {
		length = time.Duration(r.End.Seconds * float64(time.Second)).Round(time.Second).String()
		after = load(r.End.LoadAfter)
	}
	rows := [][]string{
		{"", ""},
		{"CPU", fmt.Sprintf("%s, %d cores, %s", h.Machine.CPU, h.Machine.Cores, core)},
		{"RAM", fmt.Sprintf("%.1f GiB", float64(h.Machine.RAMBytes)/(1<<30))},
		{"kernel", "Linux " + h.Machine.Kernel},
		{"load average", load(h.LoadBefore) + " before, " + after + " after"},
		{"run", fmt.Sprintf("%s, %d rounds, %d measurements", h.Mode, h.Rounds, len(r.Measurements))},
		{"duration", length},
		{"schema", strconv.Itoa(h.Schema)},
	}
	for _, name := range slices.Sorted(maps.Keys(h.Flags)) {
		rows = append(rows, []string{"flag " + name, h.Flags[name]})
	}
	d.table(rows, 0, 0)
	if h.Command != "" {
		d.code(h.Command)
	}
	d.list(r.notes(func(n *Note) bool { return n.Metric == "" }))
}

// load is load averages as in proc(5).
func load(l [3]float64) string { return fmt.Sprintf("%.2f %.2f %.2f", l[0], l[1], l[2]) }

// contestants says who took part and how to set each of them up.
func (d *document) contestants(r *Run) {
	d.heading("Contestants")
	rows := [][]string{{"contestant", "role", "job", "version"}}
	for _, c := range r.Header.Contestants {
		rows = append(rows, []string{c.Name, string(c.Role), c.Job, c.Version})
	}
	d.table(rows, 0, 0)
	for _, c := range r.Header.Contestants {
		if len(c.Commands) == 0 && c.Config == "" {
			continue
		}
		d.paragraph("%s:", c.Name)
		if len(c.Commands) > 0 {
			d.code(strings.Join(c.Commands, "\n"))
		}
		if c.Config != "" {
			d.code(c.Config)
		}
	}
}
