package vm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"sync"
)

// A Kind says what a frame of the guest's port carries.
type Kind byte

// What the guest reports. The runs of a job come in order, and each ends with
// its Exit; Done comes after the last.
const (
	Stdout Kind = 'o' // output of the run
	Stderr Kind = 'e' // the same, from its standard error
	File   Kind = 'f' // a name below OutDir, a zero byte, more of its content
	Exit   Kind = 'x' // exit status of the run, in decimal
	Broken Kind = 'b' // the guest itself failed; the text says how
	Done   Kind = 'z' // nothing follows
)

// maxFrame bounds a payload: a damaged length must not become an allocation.
const maxFrame = 1 << 20

// A FrameWriter writes frames, for several goroutines. A frame is its kind, the
// length of the payload (4 bytes, big endian) and the payload.
type FrameWriter struct {
	mu sync.Mutex
	w  io.Writer
}

// NewFrameWriter writes to w, one Write for each frame.
func NewFrameWriter(w io.Writer) *FrameWriter { return &FrameWriter{w: w} }

// Write writes one frame. A payload over 1 MiB is an error.
func (f *FrameWriter) Write(k Kind, payload []byte) error {
	if len(payload) > maxFrame {
		return fmt.Errorf("a frame of %d bytes is over the limit of %d", len(payload), maxFrame)
	}
	frame := make([]byte, 0, 5+len(payload))
	frame = append(frame, byte(k))
	frame = binary.BigEndian.AppendUint32(frame, uint32(len(payload)))
	frame = append(frame, payload...)
	f.mu.Lock()
	defer f.mu.Unlock()
	_, err := f.w.Write(frame)
	return err
}

// As returns a writer that turns each Write into frames of kind k.
func (f *FrameWriter) As(k Kind) io.Writer { return frames{f, k, ""} }

// File returns a writer for the content of a file below OutDir.
func (f *FrameWriter) File(name string) io.Writer {
	return frames{f, File, name + "\x00"}
}

type frames struct {
	to     *FrameWriter
	kind   Kind
	prefix string
}

func (f frames) Write(p []byte) (int, error) {
	const chunk = 64 << 10
	for written := 0; ; {
		n := min(chunk, len(p)-written)
		payload := append([]byte(f.prefix), p[written:written+n]...)
		if err := f.to.Write(f.kind, payload); err != nil {
			return written, err
		}
		if written += n; written == len(p) {
			return written, nil
		}
	}
}

// ReadFrame reads one frame. The error is io.EOF before the first byte of a
// frame, io.ErrUnexpectedEOF inside one.
func ReadFrame(r io.Reader) (Kind, []byte, error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	kind, n := Kind(head[0]), binary.BigEndian.Uint32(head[1:])
	switch kind {
	case Stdout, Stderr, File, Exit, Broken, Done:
	default:
		return 0, nil, fmt.Errorf("the guest sent a frame of kind %q", byte(kind))
	}
	if n > maxFrame {
		return 0, nil, fmt.Errorf("the guest announced a frame of %d bytes, over the limit of %d", n, maxFrame)
	}
	payload := make([]byte, n)
	if _, err := io.ReadFull(r, payload); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return kind, payload, nil
}

// parseFile splits the payload of a File frame. Names that lead out of the
// folder for output are refused.
func parseFile(payload []byte) (name string, content []byte, err error) {
	n, content, found := bytes.Cut(payload, []byte{0})
	if !found || !filepath.IsLocal(string(n)) {
		return "", nil, fmt.Errorf("the guest sent a file with the name %q", n)
	}
	return string(n), content, nil
}

func parseExit(payload []byte) (int, error) {
	status, err := strconv.Atoi(string(payload))
	if err != nil || status < 0 || status > 255 {
		return 0, fmt.Errorf("the guest sent the exit status %q", payload)
	}
	return status, nil
}

// ErrNoExit means that the guest ended, or its time, before the run did.
var ErrNoExit = errors.New("no exit status arrived from the guest")
