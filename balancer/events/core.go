package events

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// longest is how many bytes a text in a field may have: an error that lists every
// line of a file must not fill the memory. The log has it in full.
const longest = 2 << 10

// Core returns the core that fills the ring, to stand beside the one that writes the
// log. Encoding is the log's: values look the same in both.
func (r *Ring) Core(encoding zapcore.EncoderConfig) zapcore.Core {
	encoding.TimeKey, encoding.LevelKey, encoding.NameKey = "", "", ""
	encoding.CallerKey, encoding.MessageKey, encoding.StacktraceKey = "", "", ""
	encoding.SkipLineEnding = true
	return &core{LevelEnabler: zapcore.InfoLevel, ring: r, encoder: zapcore.NewJSONEncoder(encoding)}
}

// A core keeps the log entries that are events.
type core struct {
	zapcore.LevelEnabler
	ring    *Ring
	encoder zapcore.Encoder // has the fields of With
}

// With implements zapcore.Core.
func (c *core) With(fields []zapcore.Field) zapcore.Core {
	with := *c
	with.encoder = c.encoder.Clone()
	for _, f := range fields {
		bounded(f).AddTo(with.encoder)
	}
	return &with
}

// Check implements zapcore.Core. Which entries are events shows in their fields.
func (c *core) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

// Write implements zapcore.Core.
func (c *core) Write(e zapcore.Entry, fields []zapcore.Field) error {
	at := slices.IndexFunc(fields, func(f zapcore.Field) bool { return f.Key == Key && f.Type == zapcore.StringType })
	if at < 0 {
		return nil
	}
	others := make([]zapcore.Field, 0, len(fields)-1)
	for i, f := range fields {
		if i != at {
			others = append(others, bounded(f))
		}
	}
	text, err := c.encoder.EncodeEntry(zapcore.Entry{}, others)
	if err != nil {
		return fmt.Errorf("event %s: %w", fields[at].String, err)
	}
	c.ring.add(Event{
		Time: e.Time.UTC(), Level: e.Level.String(), Name: fields[at].String, Message: e.Message,
		Fields: json.RawMessage(bytes.Clone(text.Bytes())),
	})
	text.Free()
	return nil
}

// Sync implements zapcore.Core.
func (*core) Sync() error { return nil }

// bounded is the field with no more than so much text.
func bounded(f zapcore.Field) zapcore.Field {
	text := f.String
	if err, is := f.Interface.(error); is && f.Type == zapcore.ErrorType {
		text = err.Error()
	}
	if len(text) <= longest {
		return f
	}
	return zap.String(f.Key, text[:longest]+"…")
}
