package traps

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"unicode/utf8"
)

// The drawing's measures, in pixels.
const (
	svgWidth   = 900
	svgMargin  = 24
	svgIndent  = 80 // of prose, which has a word before it
	arrowHead  = 8
	numberSize = 9  // a number's radius
	bump       = 5  // the radius of an arrow's jump over a line that it does not end at
	loopWidth  = 46 // of an arrow that comes back
	loopHeight = 16
	nodeWidth  = 180 // of a node's box, if its text needs no more
	stubWidth  = 70  // of an arrow from or to nobody
)

// A typeface is a class of the style with its measures. A character's advance, in
// tenths of a pixel, is that of wide fonts (Verdana, DejaVu Sans Mono), so that
// text has room whatever font the reader has.
type typeface struct {
	class               string
	size, line, advance int
}

var (
	titleFace  = typeface{"title", 18, 25, 115}
	wordFace   = typeface{"word", 14, 20, 95}
	proseFace  = typeface{"prose", 14, 20, 85}
	nodeFace   = typeface{"node", 14, 18, 95}
	addrFace   = typeface{"addr", 11, 15, 68}
	packetFace = typeface{"packet", 12, 16, 74}
	noteFace   = typeface{"note", 12, 16, 76}
	remarkFace = typeface{"remark", 12, 16, 76}
	numberFace = typeface{"number", 10, 12, 70}
)

// svgStyle is all the drawing has of colour. It has a background of its own: the
// page's may not follow the reader's preference.
const svgStyle = `
text{font-family:system-ui,"Segoe UI","Helvetica Neue",Arial,sans-serif;fill:#1f2328}
.addr,.packet{font-family:ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.title{font-size:18px;font-weight:600}
.word{font-size:14px;font-weight:600}
.prose{font-size:14px}
.node{font-size:14px;font-weight:600}
.addr{font-size:11px}
.packet{font-size:12px}
.what{font-weight:700}
.note,.remark{font-size:12px}
.number{font-size:10px;font-weight:700;fill:#fff}
.paper{fill:#fff}
.box{fill:#f3f5f7;stroke:#8c959f}
.life{stroke:#b6bec7;stroke-dasharray:4 4}
.rule{stroke:#d0d7de}
.way{fill:none;stroke:#3d4650;stroke-width:1.6}
.head,.dot{fill:#3d4650}
.changed,.note{fill:#0a56c2;font-weight:700}
.note{font-weight:400}
.end{fill:none;stroke:#c11f2b;stroke-width:2.6;stroke-linecap:round}
.remark,.fails{fill:#b3151f}
.works{fill:#116329}
.good{fill:none;stroke:#116329;stroke-width:2.6;stroke-linecap:round;stroke-linejoin:round}
@media (prefers-color-scheme:dark){
text{fill:#e6edf3}
.paper{fill:#0d1117}
.number{fill:#0d1117}
.box{fill:#1b222c;stroke:#6e7681}
.life{stroke:#4b535d}
.rule{stroke:#30363d}
.way{stroke:#b9c3cd}
.head,.dot{fill:#b9c3cd}
.changed,.note{fill:#6cb0ff}
.end{stroke:#ff7b72}
.remark,.fails{fill:#ff8d85}
.works{fill:#56d364}
.good{stroke:#56d364}
}
`

// The elements of a drawing (SVG 2).
type (
	svgRect struct {
		XMLName xml.Name `xml:"rect"`
		Class   string   `xml:"class,attr"`
		X       int      `xml:"x,attr"`
		Y       int      `xml:"y,attr"`
		Width   int      `xml:"width,attr"`
		Height  int      `xml:"height,attr"`
		Round   int      `xml:"rx,attr,omitempty"`
	}
	svgPath struct {
		XMLName xml.Name `xml:"path"`
		Class   string   `xml:"class,attr"`
		D       string   `xml:"d,attr"`
	}
	svgCircle struct {
		XMLName xml.Name `xml:"circle"`
		Class   string   `xml:"class,attr"`
		X       int      `xml:"cx,attr"`
		Y       int      `xml:"cy,attr"`
		R       int      `xml:"r,attr"`
	}
	svgText struct {
		XMLName xml.Name  `xml:"text"`
		Class   string    `xml:"class,attr"`
		X       int       `xml:"x,attr"`
		Y       int       `xml:"y,attr"`
		Anchor  string    `xml:"text-anchor,attr,omitempty"`
		Space   string    `xml:"xml:space,attr,omitempty"`
		Spans   []svgSpan `xml:"tspan"`
	}
	svgSpan struct {
		Class string `xml:"class,attr,omitempty"`
		Text  string `xml:",chardata"`
	}
	svgNamed struct {
		XMLName xml.Name
		ID      string `xml:"id,attr,omitempty"`
		Text    string `xml:",chardata"`
	}
)

// A canvas takes a drawing from its top to its bottom.
type canvas struct {
	y      int // where what comes next begins
	lines  []svgPath
	shapes []any
	texts  []svgText
	boxes  []svgRect // of the texts, in their order
}

// SVG draws the walk: a column for each node, an arrow for each packet on a link.
// Two of the same walk are the same.
func (w Walk) SVG() ([]byte, error) {
	return w.layout().encode(w)
}

func (w Walk) layout() *canvas {
	c := &canvas{y: svgMargin}
	c.paragraph(titleFace, svgMargin, w.Title)
	columns := w.columns()
	for _, p := range w.Parts {
		c.y += 10
		c.lines = append(c.lines, svgPath{Class: "rule", D: fmt.Sprintf("M%d %dH%d", svgMargin, c.y, svgWidth-svgMargin)})
		c.y += 12
		c.labelled(p.Name, "", p.SetUp)
		c.y += 10
		c.diagram(p, columns)
		c.y += 8
		c.outcome(p)
	}
	c.y += svgMargin
	return c
}

func (c *canvas) outcome(p Part) {
	y := c.y
	word := outcome(p.Finding)
	c.labelled(word, word, p.Finding.proof())
	// Beside the word, in what colour does not say to everybody.
	x := svgMargin + width(wordFace, word) + 8
	if p.Finding.Works {
		c.shapes = append(c.shapes, svgPath{Class: "good", D: fmt.Sprintf("M%d %dl4 4l7 -9", x, y+11)})
	} else {
		c.shapes = append(c.shapes, cross(x+5, y+10))
	}
	if p.Why != "" {
		c.y += 4
		c.labelled("why", "", p.Why)
	}
}

func cross(x, y int) svgPath {
	return svgPath{Class: "end", D: fmt.Sprintf("M%d %dl10 10m0 -10l-10 10", x-5, y-5)}
}

// labelled is prose with a word before it.
func (c *canvas) labelled(word, class, text string) {
	y := c.y
	c.text(wordFace, svgMargin, svgSpan{class, word})
	c.y = y
	c.paragraph(proseFace, svgMargin+svgIndent, text)
}

// paragraph fills lines up to the right margin.
func (c *canvas) paragraph(f typeface, x int, text string) {
	for _, line := range wrap(text, (svgWidth-svgMargin-x)*10/f.advance) {
		c.text(f, x, svgSpan{Text: line})
	}
}

// width is the room that text needs.
func width(f typeface, text string) int {
	return (utf8.RuneCountInString(text)*f.advance + 9) / 10
}

// text puts a line that begins at an x.
func (c *canvas) text(f typeface, x int, spans ...svgSpan) {
	c.put(f, x, c.y, "", spans)
	c.y += f.line
}

// centred puts a line around an x, but within the margins.
func (c *canvas) centred(f typeface, x int, spans ...svgSpan) {
	w := spansWidth(f, spans)
	left := min(max(x-w/2, svgMargin), svgWidth-svgMargin-w)
	c.put(f, left, c.y, "middle", spans)
	c.y += f.line
}

func spansWidth(f typeface, spans []svgSpan) int {
	var all strings.Builder
	for _, s := range spans {
		all.WriteString(s.Text)
	}
	return width(f, all.String())
}

// put sets a line into the box that begins at left and top.
func (c *canvas) put(f typeface, left, top int, anchor string, spans []svgSpan) {
	w := spansWidth(f, spans)
	x := left
	if anchor == "middle" {
		x += w / 2
	}
	c.boxes = append(c.boxes, svgRect{Class: "paper", X: left, Y: top, Width: w, Height: f.line})
	line := svgText{Class: f.class, X: x, Y: top + (f.line+f.size)/2 - f.size/6, Anchor: anchor, Spans: spans}
	if len(spans) > 1 { // or spaces at the ends of spans are lost
		line.Space = "preserve"
	}
	c.texts = append(c.texts, line)
}

// wrap breaks text into lines of so many characters, and words that are longer.
func wrap(text string, most int) []string {
	lines := []string{""}
	last := func() *string { return &lines[len(lines)-1] }
	for _, word := range strings.Fields(text) {
		if *last() != "" && utf8.RuneCountInString(*last())+1+utf8.RuneCountInString(word) > most {
			lines = append(lines, "")
		}
		if *last() != "" {
			word = " " + word
		}
		for _, r := range word {
			if utf8.RuneCountInString(*last()) == most {
				lines = append(lines, "")
			}
			*last() += string(r)
		}
	}
	return lines
}

// column is the x of a node's line.
func column(columns []string, name string) int {
	room := (svgWidth - 2*svgMargin) / max(1, len(columns))
	return svgMargin + room/2 + room*slices.Index(columns, name)
}

func (c *canvas) diagram(p Part, columns []string) {
	if len(p.Finding.Path) == 0 {
		c.paragraph(proseFace, svgMargin+svgIndent, "no packet was captured")
		return
	}
	c.nodes(p, columns)
	begin := c.y
	for i := range p.Finding.Path {
		c.hop(p, i, columns)
	}
	for _, name := range columns {
		c.lines = append(c.lines, svgPath{Class: "life", D: fmt.Sprintf("M%d %dV%d", column(columns, name), begin, c.y)})
	}
}

// nodes is a row of boxes, as wide as their texts and no wider than their columns.
func (c *canvas) nodes(p Part, columns []string) {
	const inside = 5
	room := (svgWidth-2*svgMargin)/len(columns) - 8
	top, bottom := c.y, c.y
	first := len(c.boxes)
	for _, name := range columns {
		x := column(columns, name)
		c.y = top + inside
		for _, line := range wrap(name, (room-2*inside)*10/nodeFace.advance) {
			c.centred(nodeFace, x, svgSpan{Text: line})
		}
		for _, a := range p.addresses(name) {
			for _, line := range wrap(a, (room-2*inside)*10/addrFace.advance) {
				c.centred(addrFace, x, svgSpan{Text: line})
			}
		}
		bottom = max(bottom, c.y+inside)
	}
	wide := min(room, nodeWidth)
	for _, box := range c.boxes[first:] {
		wide = max(wide, box.Width+2*inside)
	}
	for _, name := range columns {
		c.shapes = append(c.shapes, svgRect{Class: "box", X: column(columns, name) - wide/2, Y: top, Width: wide, Height: bottom - top, Round: 5})
	}
	c.y = bottom + 8
}

// hop is a row: what the sender changed, the packet, the arrow, and what the
// captures tell of it.
func (c *canvas) hop(p Part, i int, columns []string) {
	h := p.Finding.Path[i]
	from, to := hopEnds(h, columns)
	middle := (from + to) / 2
	c.caption(noteFace, middle, h.Note)
	c.packet(middle, packetSpans(p.Finding.Path, i))
	c.y += numberSize + 2
	gone := lost(p.Finding.Path, i)
	if h.From == h.To {
		c.loop(from)
	} else {
		c.arrow(from, to, gone, columns)
	}
	if h.From == "" || h.To == "" {
		c.nobody(h, from, to)
	}
	c.number(from, i+1)
	if h.From == h.To {
		if gone {
			c.shapes = append(c.shapes, cross(from, c.y+loopHeight))
		}
		c.y += loopHeight
	}
	c.y += numberSize + 2
	about := from // the end that the remark is about
	if gone {
		about = to
	}
	c.caption(remarkFace, about, p.remark(i))
	c.y += 6
}

// caption is a line around an x, or more if they are needed; none for "".
func (c *canvas) caption(f typeface, x int, text string) {
	if text == "" {
		return
	}
	for _, line := range wrap(text, (svgWidth-2*svgMargin)*10/f.advance) {
		c.centred(f, x, svgSpan{Text: line})
	}
}

// packet is a line, or two where addresses are long.
func (c *canvas) packet(x int, spans []svgSpan) {
	if spansWidth(packetFace, spans) > svgWidth-2*svgMargin {
		i := slices.IndexFunc(spans, func(s svgSpan) bool { return s.Text == between })
		c.centred(packetFace, x, spans[:i]...)
		spans = spans[i:]
	}
	c.centred(packetFace, x, spans...)
}

// hopEnds are the x of an arrow's ends. An end that nobody saw is near the other.
func hopEnds(h Hop, columns []string) (from, to int) {
	from, to = column(columns, h.From), column(columns, h.To)
	aside := func(x int) int {
		if x+stubWidth > svgWidth-svgMargin {
			return x - stubWidth
		}
		return x + stubWidth
	}
	switch {
	case h.To == "":
		to = aside(from)
	case h.From == "":
		from = aside(to)
	}
	return from, to
}

// arrow goes from x to x, at the height that comes next.
func (c *canvas) arrow(from, to int, gone bool, columns []string) {
	step := 1
	if to < from {
		step = -1
	}
	var d strings.Builder
	fmt.Fprintf(&d, "M%d %d", from, c.y)
	crossed := make([]int, 0, len(columns))
	for _, name := range columns {
		if x := column(columns, name); (x-from)*step > 0 && (to-x)*step > 0 {
			crossed = append(crossed, x)
		}
	}
	slices.Sort(crossed)
	if step < 0 {
		slices.Reverse(crossed)
	}
	for _, x := range crossed {
		// Over the line, whichever way the arrow goes.
		fmt.Fprintf(&d, "H%da%d %d 0 0 %d %d 0", x-bump*step, bump, bump, max(0, step), 2*bump*step)
	}
	if gone {
		fmt.Fprintf(&d, "H%d", to-10*step)
		c.shapes = append(c.shapes, svgPath{Class: "way", D: d.String()}, cross(to, c.y))
		return
	}
	fmt.Fprintf(&d, "H%d", to-arrowHead*step)
	c.shapes = append(c.shapes, svgPath{Class: "way", D: d.String()}, svgPath{
		Class: "head", D: fmt.Sprintf("M%d %dl%d -5v10z", to, c.y, -(arrowHead+2)*step),
	})
}

// loop is a packet to the node itself, by lo.
func (c *canvas) loop(x int) {
	side := 1
	if x+loopWidth+30 > svgWidth-svgMargin {
		side = -1
	}
	c.shapes = append(c.shapes, svgPath{
		Class: "way",
		D:     fmt.Sprintf("M%d %dh%da8 8 0 0 %d 0 %dh%d", x, c.y, loopWidth*side, max(0, side), loopHeight, -(loopWidth-arrowHead)*side),
	}, svgPath{Class: "head", D: fmt.Sprintf("M%d %dl%d -5v10z", x, c.y+loopHeight, (arrowHead+2)*side)})
	left := x + loopWidth + 12
	if side < 0 {
		left = x - loopWidth - 12 - width(addrFace, "lo")
	}
	c.put(addrFace, left, c.y+loopHeight/2-addrFace.line/2, "", []svgSpan{{Text: "lo"}})
}

// nobody is where an arrow comes from or goes to that no capture saw.
func (c *canvas) nobody(h Hop, from, to int) {
	far, near := to, from
	if h.From == "" {
		far, near = from, to
	}
	w := width(nodeFace, "?")
	left := far + 6
	if far < near {
		left = far - 6 - w
	}
	if h.From == "" { // its number is there
		left += numberSize * max(-1, min(1, far-near))
	}
	c.put(nodeFace, left, c.y-nodeFace.line/2, "", []svgSpan{{Text: "?"}})
}

func (c *canvas) number(x, n int) {
	c.shapes = append(c.shapes, svgCircle{Class: "dot", X: x, Y: c.y, R: numberSize})
	text := fmt.Sprint(n)
	c.put(numberFace, x-width(numberFace, text)/2, c.y-numberFace.line/2, "middle", []svgSpan{{Text: text}})
}

// between is what separates a packet's ends.
const between = " > "

// packetSpans are a packet's ends and kind, with what its sender changed told
// apart.
func packetSpans(path []Hop, i int) []svgSpan {
	h := path[i]
	was := h
	if j := cameAs(path, i); j >= 0 && h.Note != "" {
		was = path[j]
	}
	spans := endSpans(h.Src, was.Src)
	spans = append(spans, svgSpan{Text: between})
	spans = append(spans, endSpans(h.Dst, was.Dst)...)
	return append(spans, svgSpan{Text: " "}, svgSpan{"what", kind(h)})
}

func endSpans(now, was netip.AddrPort) []svgSpan {
	class := func(changed bool) string {
		if changed {
			return "changed"
		}
		return ""
	}
	text := ends(now)
	colon := strings.LastIndexByte(text, ':')
	if now.Port() == 0 || now.Addr() != was.Addr() && now.Port() != was.Port() {
		return []svgSpan{{class(now != was), text}}
	}
	return []svgSpan{{class(now.Addr() != was.Addr()), text[:colon]}, {Text: ":"}, {class(now.Port() != was.Port()), text[colon+1:]}}
}

// encode writes an element a line.
func (c *canvas) encode(w Walk) ([]byte, error) {
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" role="img" aria-labelledby="title desc">`+"\n",
		svgWidth, c.y, svgWidth, c.y)
	elements := []any{
		svgNamed{xml.Name{Local: "title"}, "title", w.Title},
		svgNamed{xml.Name{Local: "desc"}, "desc", w.describe()},
	}
	for _, e := range elements {
		if err := encodeLine(&b, e); err != nil {
			return nil, err
		}
	}
	fmt.Fprintf(&b, "<style>%s</style>\n", svgStyle)
	elements = []any{svgRect{Class: "paper", Width: svgWidth, Height: c.y}}
	for _, l := range c.lines {
		elements = append(elements, l)
	}
	for i, t := range c.texts {
		if slices.Contains([]string{packetFace.class, noteFace.class, remarkFace.class, addrFace.class}, t.Class) {
			elements = append(elements, c.boxes[i])
		}
	}
	elements = append(elements, c.shapes...)
	for _, t := range c.texts {
		elements = append(elements, t)
	}
	for _, e := range elements {
		if err := encodeLine(&b, e); err != nil {
			return nil, err
		}
	}
	b.WriteString("</svg>\n")
	return b.Bytes(), nil
}

func encodeLine(b *bytes.Buffer, element any) error {
	text, err := xml.Marshal(element)
	if err != nil {
		return err
	}
	b.Write(text)
	b.WriteByte('\n')
	return nil
}
