package vm

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"
)

// A receiver takes in what the guest sends.
type receiver struct {
	arguments      []Arguments // of each run
	stdout, stderr io.Writer
	end            func(int, Result)
	begun          time.Time // of the run that is under way
	ended          int       // runs that did
	opened         string    // the file that was written to last
}

// receive reads frames until Done. An error means that not all runs ended.
func (r *receiver) receive(stream io.Reader) error {
	for {
		kind, payload, err := ReadFrame(stream)
		if err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, os.ErrClosed) {
			return ErrNoExit
		}
		if err == nil && kind == Done {
			if r.ended == len(r.arguments) {
				return nil
			}
			return ErrNoExit
		}
		if err == nil {
			err = r.take(kind, payload)
		}
		if err != nil {
			return err
		}
	}
}

func (r *receiver) take(kind Kind, payload []byte) error {
	if kind == Broken {
		return fmt.Errorf("%w: %s", ErrNoExit, payload)
	}
	if r.ended == len(r.arguments) {
		return errors.New("the guest went on after its last run")
	}
	switch kind {
	case Stdout:
		_, err := r.stdout.Write(payload)
		return err
	case Stderr:
		_, err := r.stderr.Write(payload)
		return err
	case File:
		return r.file(payload)
	}
	status, err := parseExit(payload)
	if err != nil {
		return err
	}
	now := time.Now()
	r.end(r.ended, Result{Status: status, Duration: now.Sub(r.begun)})
	r.begun, r.opened = now, ""
	r.ended++
	return nil
}

// file writes to a file of the host. The frames of one file come in a row.
func (r *receiver) file(payload []byte) error {
	name, content, err := parseFile(payload)
	if err != nil {
		return err
	}
	to, ok := r.arguments[r.ended].Host(name)
	if !ok {
		return nil // a test has used the folder for itself
	}
	flags := os.O_WRONLY | os.O_CREATE | os.O_APPEND
	if r.opened != name {
		flags = os.O_WRONLY | os.O_CREATE | os.O_TRUNC
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		r.opened = name
	}
	f, err := os.OpenFile(to, flags, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	return errors.Join(err, f.Close())
}
