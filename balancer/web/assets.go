package web

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"fmt"
	"net/http"
	"time"
)

var (
	//go:embed assets/index.html
	indexHTML []byte
	//go:embed assets/page.css
	pageCSS []byte
	//go:embed assets/page.js
	pageJS []byte
	//go:embed assets/icon.svg
	iconSVG []byte
)

// An asset is a file of the page.
type asset struct {
	pattern string // of http.ServeMux, without a method
	kind    string // Content-Type
	content []byte
	tag     string // strong, of the content
}

func assets() []asset {
	all := []asset{
		{pattern: "/{$}", kind: "text/html; charset=utf-8", content: indexHTML},
		{pattern: "/page.css", kind: "text/css; charset=utf-8", content: pageCSS},
		{pattern: "/page.js", kind: "text/javascript; charset=utf-8", content: pageJS},
		{pattern: "/icon.svg", kind: "image/svg+xml", content: iconSVG},
	}
	for i := range all {
		all[i].tag = fmt.Sprintf(`"%x"`, sha256.Sum256(all[i].content))
	}
	return all
}

// ServeHTTP has browsers ask each time whether their copy still holds, so that the
// page of a new version is not run with the script of the old one.
func (a asset) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", a.kind)
	w.Header().Set("Cache-Control", "no-cache")
	w.Header().Set("ETag", a.tag)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(a.content))
}
