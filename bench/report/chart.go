package report

import (
	"bytes"
	"fmt"
	"image/color"
	"regexp"
	"strconv"
	"strings"

	xfont "golang.org/x/image/font"
	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// The colours of charts. As files of their own these are light, and have paper
// of their own; a page that can be dark changes them by its style sheet.
var (
	paper    = color.RGBA{0xff, 0xff, 0xff, 0xff}
	ink      = color.RGBA{0x24, 0x29, 0x2f, 0xff}
	rule     = color.RGBA{0xd8, 0xde, 0xe4, 0xff}
	barColor = map[Role]color.RGBA{
		Baseline: {0xaf, 0xb8, 0xc1, 0xff},
		NLB:      {0x2d, 0xa4, 0x4e, 0xff},
		Peer:     {0x6c, 0xb0, 0xf5, 0xff},
	}
)

// A recolour is a rule of a style sheet: what has one colour in a file gets
// another one on a dark page.
type recolour struct{ Property, Light, Dark string }

var dark = []recolour{
	{"fill", hex(paper), "transparent"},
	{"fill", hex(ink), "#e6edf3"},
	{"stroke", hex(ink), "#e6edf3"},
	{"stroke", hex(rule), "#30363d"},
	{"fill", hex(barColor[Baseline]), "#57606a"},
	{"fill", hex(barColor[NLB]), "#238636"},
	{"fill", hex(barColor[Peer]), "#1f6feb"},
}

// hex is a colour as vgsvg writes it.
func hex(c color.RGBA) string { return fmt.Sprintf("#%02X%02X%02X", c.R, c.G, c.B) }

const (
	chartWidth = 8 * vg.Inch
	slotHeight = 17.0 // points, for a bar or the name of a case
	barHeight  = vg.Length(10)
	textSize   = vg.Length(9)
	margin     = vg.Length(8)
	indent     = vg.Length(8) // of contestants below their case
	// wider is how much wider text may be than Liberation Sans, which the library
	// measures with: what shows the chart may have another font. Text is therefore
	// put so that it grows to the right, where there is room.
	wider = 1.2
)

// newChart draws a metric: a bar for each median, with whiskers from the least
// to the most of the rounds, and the median and its ratio to the baseline beside
// it. Without any row it is nil.
func newChart(number int, tables []Table) (*chart, error) {
	m := tables[0].Metric
	slots := 0
	for _, t := range tables {
		if len(t.Rows) > 0 {
			slots += len(t.Rows)
			if t.Case != "" {
				slots++
			}
		}
	}
	if slots == 0 {
		return nil, nil
	}
	d := newDrawing(m, slots)
	for _, t := range tables {
		if err := d.table(&t); err != nil {
			return nil, err
		}
	}
	svg, err := d.svg()
	return &chart{
		Name: fmt.Sprintf("charts/%02d-%s.svg", number+1, slug(m.Name)),
		Alt:  m.Name + ": medians of the rounds, and how far these spread",
		SVG:  svg,
	}, err
}

// slug is a name as a part of the name of a file.
func slug(name string) string {
	return strings.Trim(notSlug.ReplaceAllString(strings.ReplaceAll(strings.ToLower(name), "'", ""), "-"), "-")
}

var notSlug = regexp.MustCompile(`[^a-z0-9]+`)

// A drawing is a chart that is being made, from the top down.
type drawing struct {
	plot   *plot.Plot
	metric *Metric
	slots  int
	free   int    // the y of the next slot
	names  []name // in the column on the left
	// The room that names, and texts beside bars, need.
	left, right vg.Length
}

// A name is text beside a slot.
type name struct {
	text   string
	slot   int
	indent vg.Length
	style  text.Style
}

func newDrawing(m *Metric, slots int) *drawing {
	p := plot.New()
	p.BackgroundColor = nil // there is paper below all of the chart
	p.Title.Text = m.Name
	p.Title.TextStyle.Font, p.Title.TextStyle.Color = face(textSize+3, bold), ink
	p.Title.Padding = 6
	p.X.Label.Text = fmt.Sprintf("%s, %s is better; medians, and the least and the most of the rounds", m.Unit, m.Better)
	p.X.Label.Padding = 4
	for _, a := range []*plot.Axis{&p.X, &p.Y} {
		a.Label.TextStyle.Font, a.Label.TextStyle.Color = face(textSize, regular), ink
		a.Tick.Label.Font, a.Tick.Label.Color = face(textSize, regular), ink
		a.Tick.Length, a.Padding = 0, 0
		a.LineStyle.Color, a.LineStyle.Width = rule, 0.5
	}
	p.X.Padding = 3
	p.X.Tick.Marker = valueTicks{}
	p.Y.Tick.Marker = plot.ConstantTicks(nil)
	lines := plotter.NewGrid()
	lines.Horizontal.Color = nil
	lines.Vertical = draw.LineStyle{Color: rule, Width: 0.5}
	p.Add(lines)
	// The axis begins at 0: bars are compared by their lengths.
	p.X.Min, p.X.Max = 0, 0
	p.Y.Min, p.Y.Max = -0.5, float64(slots)-0.5
	return &drawing{plot: p, metric: m, slots: slots, free: slots - 1}
}

const (
	regular = xfont.WeightNormal
	bold    = xfont.WeightBold
)

// face is a font whose measures the library knows.
func face(size vg.Length, weight xfont.Weight) font.Font {
	return font.Font{Typeface: "Liberation", Variant: "Sans", Size: size, Weight: weight}
}

// table draws the rows of a case.
func (d *drawing) table(t *Table) error {
	if len(t.Rows) == 0 {
		return nil
	}
	if t.Case != "" {
		d.name(t.Case, 0, bold)
		d.free--
	}
	for i := range t.Rows {
		if t.Case != "" {
			d.name(t.Rows[i].Contestant.Name, indent, regular)
		} else {
			d.name(t.Rows[i].Contestant.Name, 0, regular)
		}
		if err := d.row(&t.Rows[i]); err != nil {
			return err
		}
		d.free--
	}
	return nil
}

func (d *drawing) row(r *Row) error {
	bar, err := plotter.NewBarChart(plotter.Values{r.Value.Median}, barHeight)
	if err != nil {
		return err
	}
	bar.Horizontal, bar.XMin = true, float64(d.free)
	bar.Color, bar.LineStyle.Width = barColor[r.Contestant.Role], 0
	d.plot.Add(bar)
	whiskers, err := plotter.NewXErrorBars(struct {
		plotter.XYs
		plotter.XErrors
	}{
		plotter.XYs{{X: r.Value.Median, Y: float64(d.free)}},
		plotter.XErrors{{Low: r.Value.Median - r.Value.Min, High: r.Value.Max - r.Value.Median}},
	})
	if err != nil {
		return err
	}
	whiskers.LineStyle, whiskers.CapWidth = draw.LineStyle{Color: ink, Width: 0.75}, barHeight/2
	d.plot.Add(whiskers)
	beside := d.metric.show(r.Value.Median)
	if r.ToBaseline != nil {
		beside += fmt.Sprintf("  (%.3f of %s)", r.ToBaseline.Median, r.ToBaseline.To)
	}
	return d.label(beside, max(0, r.Value.Max))
}

// name writes text on the left of the slot.
func (d *drawing) name(s string, by vg.Length, weight xfont.Weight) {
	style := text.Style{
		Font: face(textSize, weight), Color: ink, YAlign: draw.YCenter,
		Handler: plot.DefaultTextHandler,
	}
	d.names = append(d.names, name{s, d.free, by, style})
	d.left = max(d.left, by+wider*style.Width(s)+2)
}

// label writes text in the slot, to the right of x.
func (d *drawing) label(s string, x float64) error {
	l, err := plotter.NewLabels(plotter.XYLabels{XYs: plotter.XYs{{X: x, Y: float64(d.free)}}, Labels: []string{s}})
	if err != nil {
		return err
	}
	style := &l.TextStyle[0]
	style.Font, style.Color, style.YAlign = face(textSize, regular), ink, draw.YCenter
	l.Offset.X = 5
	d.right = max(d.right, (wider-1)*style.Width(s))
	d.plot.Add(l)
	return nil
}

func (d *drawing) svg() ([]byte, error) {
	p := d.plot
	p.Y.Min, p.Y.Max = -0.5, float64(d.slots)-0.5
	if p.X.Min == p.X.Max {
		p.X.Max = 1 // nothing but zeros
	}
	canvas := vgsvg.New(chartWidth, vg.Length(slotHeight*float64(d.slots))+60+2*margin)
	whole := draw.New(canvas)
	whole.SetColor(paper)
	whole.Fill(whole.Rectangle.Path())
	whole = draw.Crop(whole, margin, -margin, margin, -margin)
	area := draw.Crop(whole, d.left, -d.right, 0, 0)
	p.Draw(area)
	data := p.DataCanvas(area)
	_, y := p.Transforms(&data)
	for _, n := range d.names {
		whole.FillText(n.style, vg.Point{X: margin + n.indent, Y: y(float64(n.slot))}, n.text)
	}
	var b bytes.Buffer
	if _, err := canvas.WriteTo(&b); err != nil {
		return nil, err
	}
	// Where there is no Liberation Sans, Arial and Helvetica are as wide. The
	// quotation mark is of the attribute: in text it would be escaped.
	return bytes.ReplaceAll(b.Bytes(),
		[]byte(`style="font-family:Liberation Sans;`),
		[]byte(`style="font-family:Liberation Sans,Arial,Helvetica,sans-serif;`)), nil
}

// valueTicks are the library's, with numbers as in tables.
type valueTicks struct{}

func (valueTicks) Ticks(least, most float64) []plot.Tick {
	ticks := plot.DefaultTicks{}.Ticks(least, most)
	for i := range ticks {
		if !ticks[i].IsMinor() {
			ticks[i].Label = thousands(strconv.FormatFloat(ticks[i].Value, 'f', -1, 64))
		}
	}
	return ticks
}
