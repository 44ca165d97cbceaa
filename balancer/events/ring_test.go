package events

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

var began = time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)

// first is the sequence of the first event of a daemon that began then.
var first = uint64(began.UnixMicro())

// ringOf has seen so many events, named by their number.
func ringOf(size, seen int) *Ring {
	r := NewRing(size, began)
	for range seen {
		r.add(Event{})
	}
	return r
}

func TestRead(t *testing.T) {
	type read struct {
		Sequences []uint64 // from the first event's on
		Lost      uint64
		Waits     bool
	}
	for _, c := range []struct {
		name       string
		size, seen int
		after      uint64
		want       read
	}{
		{"nothing happened", 4, 0, 0, read{Waits: true}},
		{"all", 4, 3, 0, read{Sequences: []uint64{0, 1, 2}}},
		{"as many as are asked for", 8, 8, 0, read{Sequences: []uint64{0, 1, 2, 3, 4}}},
		{"the rest", 4, 3, first + 1, read{Sequences: []uint64{2}}},
		{"none is left", 4, 3, first + 2, read{Waits: true}},
		{"the first ones are forgotten", 4, 6, 0, read{Sequences: []uint64{2, 3, 4, 5}, Lost: 2}},
		{"the reader was slow", 4, 9, first + 1, read{Sequences: []uint64{5, 6, 7, 8}, Lost: 3}},
		{"the reader was just in time", 4, 9, first + 4, read{Sequences: []uint64{5, 6, 7, 8}}},
		{"a former daemon's", 4, 2, first - 7, read{Sequences: []uint64{0, 1}}},
		{"a later daemon's", 4, 2, first + 7, read{Sequences: []uint64{0, 1}}},
		{"nobody's", 4, 2, 1<<64 - 1, read{Sequences: []uint64{0, 1}}},
	} {
		var into [5]Event
		n, lost, news := ringOf(c.size, c.seen).Read(c.after, into[:])
		got := read{Lost: lost, Waits: news != nil}
		for _, e := range into[:n] {
			got.Sequences = append(got.Sequences, e.Sequence-first)
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
	}
}

// Who waits is woken by the next event, however many wait.
func TestNews(t *testing.T) {
	r := ringOf(4, 1)
	var into [4]Event
	_, _, one := r.Read(first, into[:])
	_, _, two := r.Read(first, into[:])
	select {
	case <-one:
		t.Error("woken by nothing")
	default:
	}
	r.add(Event{})
	<-one
	<-two
}

// What a reader got and what it was told to have missed is all there was, in order,
// while others write without waiting for it.
func TestSlowReaderIsToldWhatItMissed(t *testing.T) {
	const all = 20_000
	r := NewRing(16, began)
	written := make(chan struct{})
	go func() {
		defer close(written)
		for range all {
			r.add(Event{})
		}
	}()
	after, seen := uint64(0), uint64(0)
	for seen < all {
		var into [8]Event
		n, lost, news := r.Read(after, into[:])
		seen += lost
		for _, e := range into[:n] {
			if e.Sequence != first+seen {
				t.Fatalf("sequence %d after %d events", e.Sequence-first, seen)
			}
			seen++
			after = e.Sequence
		}
		if news != nil {
			<-news
		}
	}
	<-written
	if seen != all {
		t.Errorf("%d events read or missed, want %d", seen, all)
	}
}

// What is an event goes to the ring, whatever the log's level is and with the values
// that the log has.
func TestCore(t *testing.T) {
	r := NewRing(8, began)
	encoding := zap.NewProductionEncoderConfig()
	encoding.EncodeDuration = zapcore.StringDurationEncoder
	log := zap.New(r.Core(encoding))
	log.Info("no event", zap.String("part", "nft"))
	log.Debug("too fine", KernelDriftRepaired.Field())
	log.Warn("drift", KernelDriftRepaired.Field(), zap.String("part", "nft"))
	log.With(zap.Int("pid", 7)).Error("gone", zap.Duration("after", 1500*time.Millisecond), RelayGone.Field())
	log.Error("failed", KernelApplyFailed.Field(), zap.Error(errors.New(strings.Repeat("x", longest+1))))
	log.Error("failed", KernelApplyFailed.Field(), zap.Error(nil))
	var into [8]Event
	n, _, _ := r.Read(0, into[:])
	var got []Event
	for _, e := range into[:n] {
		if e.Time.IsZero() || e.Time.Location() != time.UTC {
			t.Errorf("%s happened at %v", e.Name, e.Time)
		}
		e.Time = time.Time{}
		got = append(got, e)
	}
	want := []Event{
		{first, time.Time{}, "warn", "kernel.drift_repaired", "drift", json.RawMessage(`{"part":"nft"}`)},
		{first + 1, time.Time{}, "error", "relay.gone", "gone", json.RawMessage(`{"pid":7,"after":"1.5s"}`)},
		{first + 2, time.Time{}, "error", "kernel.apply_failed", "failed", json.RawMessage(`{"error":"` + strings.Repeat("x", longest) + `…"}`)},
		{first + 3, time.Time{}, "error", "kernel.apply_failed", "failed", json.RawMessage(`{}`)},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
