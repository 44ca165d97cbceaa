package report

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"unicode/utf8"
)

// A record is a line of a file. It has one of these.
type record struct {
	Header      *Header          `json:"header,omitempty"`
	Measurement *measurementLine `json:"measurement,omitempty"`
	Note        *Note            `json:"note,omitempty"`
	End         *endLine         `json:"end,omitempty"`
}

// In a line that lacks its number, the number is not 0 but missing.
type measurementLine struct {
	Measurement
	Value *float64 `json:"value"`
}

type endLine struct {
	End
	Seconds *float64 `json:"seconds"`
}

// A Writer writes a run while it is measured. It is for one goroutine.
type Writer struct {
	w      io.Writer
	ledger *ledger
}

// NewWriter writes the header to w. What it names is what there can be in the
// run; errors say what is wrong with it, or are w's.
func NewWriter(w io.Writer, h Header) (*Writer, error) {
	h.Schema = Schema
	if err := h.check(); err != nil {
		return nil, fmt.Errorf("header: %w", err)
	}
	out := &Writer{w, newLedger(&h)}
	return out, out.write(record{Header: &h})
}

// Measure writes a measurement. It refuses one that the header does not provide
// for, that there is already, or that has no usable value.
func (w *Writer) Measure(m Measurement) error {
	if err := w.ledger.measure(&m); err != nil {
		return fmt.Errorf("measurement: %w", err)
	}
	return w.write(record{Measurement: &measurementLine{m, &m.Value}})
}

// Note writes a note. It refuses one about what the header does not have.
func (w *Writer) Note(n Note) error {
	if err := w.ledger.note(&n); err != nil {
		return fmt.Errorf("note: %w", err)
	}
	return w.write(record{Note: &n})
}

// End says that the run is complete. Nothing may follow.
func (w *Writer) End(e End) error {
	if err := w.ledger.end(&e); err != nil {
		return fmt.Errorf("end: %w", err)
	}
	return w.write(record{End: &endLine{e, &e.Seconds}})
}

// write writes a line with one call, so that an interruption between two of them
// leaves whole lines.
func (w *Writer) write(r record) error {
	var line bytes.Buffer
	e := json.NewEncoder(&line)
	e.SetEscapeHTML(false) // rulesets are to be read
	if err := e.Encode(r); err != nil {
		return err
	}
	_, err := w.w.Write(line.Bytes())
	return err
}

// ReadFile reads a file that a Writer wrote; see Read.
func ReadFile(name string) (*Run, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	run, err := Read(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return run, nil
}

// Read reads what a Writer wrote, and nothing else: what a Writer would refuse
// is an error here too, with the number of its line. Only a last line without
// its end may be unreadable: see Run.Torn.
func Read(r io.Reader) (*Run, error) {
	text, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	in := &reader{run: new(Run)}
	n := 0
	for line := range bytes.Lines(text) {
		n++
		if line[len(line)-1] != '\n' && !json.Valid(line) {
			in.run.Torn = n
			break
		}
		if err := in.line(line); err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
	}
	if in.ledger == nil {
		return nil, errors.New("line 1: there is no header")
	}
	return in.run, nil
}

// A reader has what has been read. Its ledger is nil before the header.
type reader struct {
	run    *Run
	ledger *ledger
}

func (in *reader) line(line []byte) error {
	if in.ledger == nil {
		if err := checkSchema(line); err != nil {
			return err
		}
	}
	r, err := decode(line)
	switch {
	case err != nil:
		return err
	case r.Header != nil:
		return in.header(r.Header)
	case r.Measurement != nil:
		return in.measurement(r.Measurement)
	case r.Note != nil:
		if err := in.ledger.note(r.Note); err != nil {
			return fmt.Errorf("note: %w", err)
		}
		in.run.Notes = append(in.run.Notes, *r.Note)
		return nil
	}
	return in.end(r.End)
}

// checkSchema comes before all else: other versions may have other fields.
func checkSchema(line []byte) error {
	var first struct {
		Header *struct {
			Schema *int `json:"schema"`
		} `json:"header"`
	}
	if err := json.Unmarshal(line, &first); err != nil {
		return fmt.Errorf("is not a header: %w", err)
	}
	switch {
	case first.Header == nil:
		return errors.New("there is no header")
	case first.Header.Schema == nil:
		return errors.New("header: schema: is missing")
	case *first.Header.Schema != Schema:
		return fmt.Errorf("header: schema: %d is unknown, this program reads %d", *first.Header.Schema, Schema)
	}
	return nil
}

// decode makes a record of a line, with exactly one of its parts.
func decode(line []byte) (*record, error) {
	switch {
	case !utf8.Valid(line):
		return nil, errors.New("is not UTF-8")
	case len(bytes.TrimSpace(line)) == 0:
		return nil, errors.New("is empty")
	}
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	r := new(record)
	if err := d.Decode(r); err != nil {
		return nil, fmt.Errorf("is not a record: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("has more than one record")
	}
	parts := 0
	for _, there := range []bool{r.Header != nil, r.Measurement != nil, r.Note != nil, r.End != nil} {
		if there {
			parts++
		}
	}
	if parts != 1 {
		return nil, fmt.Errorf("has %d of header, measurement, note and end instead of one", parts)
	}
	return r, nil
}

func (in *reader) header(h *Header) error {
	if in.ledger != nil {
		return errors.New("header: there is one already")
	}
	if err := h.check(); err != nil {
		return fmt.Errorf("header: %w", err)
	}
	in.run.Header, in.ledger = *h, newLedger(h)
	return nil
}

func (in *reader) measurement(l *measurementLine) error {
	if l.Value == nil {
		return errors.New("measurement: value: is missing")
	}
	m := l.Measurement
	m.Value = *l.Value
	if err := in.ledger.measure(&m); err != nil {
		return fmt.Errorf("measurement: %w", err)
	}
	in.run.Measurements = append(in.run.Measurements, m)
	return nil
}

func (in *reader) end(l *endLine) error {
	if l.Seconds == nil {
		return errors.New("end: seconds: is missing")
	}
	e := l.End
	e.Seconds = *l.Seconds
	if err := in.ledger.end(&e); err != nil {
		return fmt.Errorf("end: %w", err)
	}
	in.run.End = &e
	return nil
}
