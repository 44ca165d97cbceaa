package web

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"time"

	"nlb/balancer/control"
)

const (
	// maxStreams is how many may watch at once. Each costs a connection and, every
	// step, what changed; the sample and its text are made once for all.
	maxStreams = 32
	// takenWithin is how long a watcher may take to read an event.
	takenWithin = 10 * time.Second
	// retryAfter is when one who was refused may ask again.
	retryAfter = 10 * time.Second
)

// streams serves the status as server-sent events (HTML standard, section 9.2),
// one every two seconds:
//
//	status   {"at", "step_seconds", "status", "listener_rates", "rates"}: everything.
//	         The first event, and whenever listeners or groups come or go.
//	change   {"at", "apply", "reload", "totals", "conntrack", "listener_rates", "target_groups", "rates"}:
//	         target_groups has those groups, whole, in which more changed than what
//	         is counted; rates those in which that did.
//	failure  {"error"}: why there is nothing to tell.
//
// rates has, by the group's name, [active flows, new flows per second, bytes per
// second] of each of its targets, in their order; listener_rates has the same by
// the listener's name, null where it cannot be told. at is the daemon's clock.
type streams struct {
	recorder *recorder
	places   chan struct{} // held, by sending, while a stream runs
}

func newStreams(r *recorder) *streams {
	return &streams{r, make(chan struct{}, maxStreams)}
}

// ServeHTTP streams until the watcher leaves, or takes too long to read.
func (s *streams) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	select {
	case s.places <- struct{}{}:
		defer func() { <-s.places }()
	default:
		w.Header().Set("Retry-After", fmt.Sprint(int(retryAfter.Seconds())))
		refuse(w, http.StatusServiceUnavailable, fmt.Sprintf("%d watch already, which is as many as may", maxStreams))
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	// A proxy such as nginx would collect events until it has a buffer full of them.
	w.Header().Set("X-Accel-Buffering", "no")
	if r.Method == http.MethodHead {
		return
	}
	out := http.NewResponseController(w)
	// A server's limit for reading a request would end the stream.
	if err := out.SetReadDeadline(time.Time{}); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return
	}
	s.run(r.Context(), func(event []byte) error {
		if err := out.SetWriteDeadline(time.Now().Add(takenWithin)); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return err
		}
		if _, err := w.Write(event); err != nil {
			return err
		}
		return out.Flush()
	})
}

// run sends what is new every step, until that fails or ctx ends.
func (s *streams) run(ctx context.Context, send func([]byte) error) {
	sent := uint64(0) // number of the last frame
	for {
		var event []byte
		pause := s.recorder.step
		f, err := s.recorder.frame(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			event, sent = encodeEvent("failure", failure{err.Error()}), 0
		default:
			pause = time.Until(f.at.Add(s.recorder.step))
			if sent != 0 && f.number == sent+1 {
				event = f.change()
			}
			if event == nil {
				event = f.whole()
			}
			sent = f.number
		}
		if send(event) != nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

type whole struct {
	At            time.Time         `json:"at"`
	StepSeconds   float64           `json:"step_seconds"`
	Status        *control.Status   `json:"status"`
	ListenerRates map[string]point  `json:"listener_rates"`
	Rates         map[string]points `json:"rates"`
}

type change struct {
	At            time.Time             `json:"at"`
	Apply         control.Apply         `json:"apply"`
	Reload        control.Reload        `json:"reload"`
	Totals        map[string]uint64     `json:"totals"`
	Conntrack     *control.Conntrack    `json:"conntrack,omitempty"`
	ListenerRates map[string]point      `json:"listener_rates"`
	TargetGroups  []control.TargetGroup `json:"target_groups"`
	Rates         map[string]points     `json:"rates"`
}

func wholeEvent(s sample, status *control.Status, step time.Duration) []byte {
	rates := make(map[string]points, len(status.TargetGroups))
	for _, g := range status.TargetGroups {
		rates[g.Name] = s.of(g.Name)
	}
	return encodeEvent("status", whole{moment(s.at), step.Seconds(), status, listenerRates(status, s), rates})
}

// changeEvent is nil if only a whole event can tell the difference.
func changeEvent(was, is sample, wasStatus, status *control.Status) []byte {
	sameGroups := slices.EqualFunc(wasStatus.TargetGroups, status.TargetGroups, func(a, b control.TargetGroup) bool { return a.Name == b.Name })
	if !sameGroups || wasStatus.Dataplane != status.Dataplane || !reflect.DeepEqual(wasStatus.Listeners, status.Listeners) {
		return nil
	}
	c := change{
		At: moment(is.at), Apply: status.Apply, Reload: status.Reload, Totals: status.Totals,
		Conntrack: status.Conntrack, ListenerRates: listenerRates(status, is),
		TargetGroups: []control.TargetGroup{}, Rates: map[string]points{},
	}
	for i, g := range status.TargetGroups {
		stands := sameStanding(wasStatus.TargetGroups[i], g)
		if !stands {
			c.TargetGroups = append(c.TargetGroups, g)
		}
		if points := is.of(g.Name); !stands || !slices.EqualFunc(was.of(g.Name), points, point.same) {
			c.Rates[g.Name] = points
		}
	}
	return encodeEvent("change", c)
}

func listenerRates(status *control.Status, s sample) map[string]point {
	rates := make(map[string]point, len(status.Listeners))
	for i, p := range listenerPoints(status, s) {
		rates[status.Listeners[i].Name] = p
	}
	return rates
}

// sameStanding reports whether nothing but what is counted differs.
func sameStanding(a, b control.TargetGroup) bool {
	if !slices.EqualFunc(a.Targets, b.Targets, sameTarget) {
		return false
	}
	a.Targets, b.Targets = nil, nil
	return reflect.DeepEqual(a, b)
}

func sameTarget(a, b control.Target) bool {
	if (a.Held == nil) != (b.Held == nil) || a.Held != nil && *a.Held != *b.Held {
		return false
	}
	a.Held, b.Held = nil, nil
	for _, t := range []*control.Target{&a, &b} {
		for _, i := range counted {
			reflect.ValueOf(t).Elem().Field(i).SetZero()
		}
	}
	return a == b
}

// counted are the indices of a target's fields that change with every flow: all
// that are counted, and may be null for want of somebody who counts.
var counted = func() (indices []int) {
	for f := range reflect.TypeFor[control.Target]().Fields() {
		if f.Type == reflect.TypeFor[*uint64]() {
			indices = append(indices, f.Index[0])
		}
	}
	return indices
}()

// encodeEvent writes JSON, in which there is no line break that would end it.
func encodeEvent(name string, data any) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "event: %s\ndata: ", name)
	if err := json.NewEncoder(&b).Encode(data); err != nil {
		panic("web: " + err.Error()) // our own types
	}
	b.WriteByte('\n')
	return b.Bytes()
}
