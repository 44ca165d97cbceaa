package report

import (
	"bytes"
	_ "embed"
	"html/template"
)

//go:embed page.html
var pageText string

var page = template.Must(template.New("page").Funcs(template.FuncMap{
	"inline":    inline,
	"printable": printable,
	"dark":      func() []recolour { return dark },
}).Parse(pageText))

// html is a document as one page that needs nothing else.
func (d *document) html() ([]byte, error) {
	var b bytes.Buffer
	if err := page.Execute(&b, d); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// inline is a chart without what only belongs at the beginning of a file. What
// is text in it, newChart's library has escaped.
func inline(c *chart) template.HTML {
	return template.HTML(c.SVG[bytes.Index(c.SVG, []byte("<svg")):])
}
