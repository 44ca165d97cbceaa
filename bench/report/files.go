package report

import (
	"os"
	"path/filepath"
)

// A File is a part of a report.
type File struct {
	Name    string // with slashes
	Content []byte
}

// Files makes the report of a run: report.md with its charts beside it, and the
// same as report.html, which needs no other file. A run always makes the same.
func Files(r *Run) ([]File, error) {
	d, err := newDocument(r)
	if err != nil {
		return nil, err
	}
	html, err := d.html()
	if err != nil {
		return nil, err
	}
	files := []File{{"report.md", d.markdown()}, {"report.html", html}}
	for _, b := range d.Blocks {
		if b.Chart != nil {
			files = append(files, File{b.Chart.Name, b.Chart.SVG})
		}
	}
	return files, nil
}

// WriteFiles writes the report of a run to a directory, which it makes if there
// is none. Files of the same names are overwritten, others stay.
func WriteFiles(dir string, r *Run) error {
	files, err := Files(r)
	if err != nil {
		return err
	}
	for _, f := range files {
		path := filepath.Join(dir, filepath.FromSlash(f.Name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, f.Content, 0o644); err != nil {
			return err
		}
	}
	return nil
}
