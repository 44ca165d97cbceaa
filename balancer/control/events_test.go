package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"nlb/balancer/events"
)

// A recorder is a daemon that has events, and the logger that makes them.
type recorder struct {
	fakeDaemon
	ring *events.Ring
	log  *zap.Logger
}

func newRecorder(size int) *recorder {
	ring := events.NewRing(size, time.Now())
	return &recorder{ring: ring, log: zap.New(ring.Core(zap.NewProductionEncoderConfig()))}
}

func (r *recorder) Events() *events.Ring { return r.ring }

// happen makes an event that has a text to tell it by.
func (r *recorder) happen(part string) {
	r.log.Info("somebody changed it", events.KernelDriftRepaired.Field(), zap.String("part", part))
}

// word is what an item has to tell it by, or how many were lost.
func word(item *EventItem) string {
	if item.Event == nil {
		return fmt.Sprintf("lost %d", item.Lost)
	}
	return strings.TrimSuffix(strings.TrimPrefix(string(item.Fields), `{"part":"`), `"}`)
}

func TestEventsComeAcross(t *testing.T) {
	d := newRecorder(4)
	path, _ := serve(t, d)
	c := NewClient(path)
	ask := func(q EventQuery) (words []string, last *events.Event) {
		t.Helper()
		err := c.Events(t.Context(), q, func(item *EventItem) error {
			words = append(words, word(item))
			if item.Event != nil {
				last = item.Event
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return words, last
	}
	if got, _ := ask(EventQuery{}); got != nil {
		t.Errorf("nothing happened: %v", got)
	}
	for _, part := range []string{"a", "b", "c"} {
		d.happen(part)
	}
	got, last := ask(EventQuery{})
	if diff := cmp.Diff([]string{"a", "b", "c"}, got); diff != "" {
		t.Errorf("all (-want +got):\n%s", diff)
	}
	if last.Level != "info" || last.Name != events.KernelDriftRepaired.Name() || last.Message != "somebody changed it" {
		t.Errorf("the last one: %+v", last)
	}
	d.happen("d")
	got, _ = ask(EventQuery{After: last.Sequence})
	if diff := cmp.Diff([]string{"d"}, got); diff != "" {
		t.Errorf("after c (-want +got):\n%s", diff)
	}
	got, _ = ask(EventQuery{Since: time.Now().Add(time.Hour)})
	if got != nil {
		t.Errorf("of the future: %v", got)
	}
	for _, part := range []string{"e", "f", "g", "h", "i"} {
		d.happen(part)
	}
	got, _ = ask(EventQuery{After: last.Sequence})
	if diff := cmp.Diff([]string{"lost 2", "f", "g", "h", "i"}, got); diff != "" {
		t.Errorf("a late reader (-want +got):\n%s", diff)
	}
	got, _ = ask(EventQuery{})
	if diff := cmp.Diff([]string{"f", "g", "h", "i"}, got); diff != "" {
		t.Errorf("who knew nothing misses nothing (-want +got):\n%s", diff)
	}
	enough := errors.New("enough")
	if err := c.Events(t.Context(), EventQuery{}, func(*EventItem) error { return enough }); !errors.Is(err, enough) {
		t.Error(err)
	}
}

// Who follows hears at once, until the daemon stops, and then of all that was before.
func TestFollow(t *testing.T) {
	d := newRecorder(64)
	d.happen("before")
	path, stop := serve(t, d)
	heard := make(chan string)
	ended := make(chan error, 1)
	go func() {
		ended <- NewClient(path).Events(t.Context(), EventQuery{Follow: true}, func(item *EventItem) error {
			heard <- word(item)
			return nil
		})
	}()
	for _, want := range []string{"before", "one", "two"} {
		if want != "before" {
			d.happen(want)
		}
		if got := <-heard; got != want {
			t.Errorf("heard %q, want %q", got, want)
		}
	}
	d.happen("last")
	var stopped sync.WaitGroup
	stopped.Go(stop)
	if got := <-heard; got != "last" {
		t.Errorf("heard %q", got)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	stopped.Wait()
}

// A reader that stands still holds up nobody. When it reads on, it is told how much it
// missed.
func TestStalledReaderIsToldWhatItMissed(t *testing.T) {
	const all = 20_000 // more than the socket's buffers take
	d := newRecorder(100)
	path, stop := serve(t, d)
	var dialer net.Dialer
	conn, err := dialer.DialContext(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprintf(conn, "GET %s?follow=true&after=1 HTTP/1.1\r\nHost: nlb\r\n\r\n", eventsPath); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil) // with nothing read of the body
	if err != nil {
		t.Fatal(err)
	}
	for i := range all {
		d.happen(fmt.Sprint(i))
	}
	d.happen("last")
	told, lost, last := 0, 0, ""
	for lines := bufio.NewScanner(resp.Body); last != "last" && lines.Scan(); {
		var n int
		if _, err := fmt.Sscanf(lines.Text(), `{"lost":%d}`, &n); err == nil {
			lost += n
			continue
		}
		told++
		_, last, _ = strings.Cut(lines.Text(), `"part":"`)
		last, _, _ = strings.Cut(last, `"`)
	}
	if told+lost != all+1 || lost == 0 || last != "last" {
		t.Errorf("told %d and %d lost of %d, the last one %q", told, lost, all+1, last)
	}
	stop()
}

// What a client asks is what the daemon understands, or it is refused.
func FuzzEventQuery(f *testing.F) {
	f.Add("after=1767366245000000&follow=true&since=2026-01-02T15:04:05.5Z")
	f.Add("after=-1")
	f.Add("follow=perhaps")
	f.Add("since=yesterday")
	f.Fuzz(func(t *testing.T, text string) {
		query, err := url.ParseQuery(text)
		if err != nil {
			return
		}
		q, err := parseEventQuery(query)
		if err != nil {
			return
		}
		again, err := parseEventQuery(q.query())
		if err != nil || again.After != q.After || again.Follow != q.Follow || !again.Since.Equal(q.Since) {
			t.Errorf("%q: %v and %v, %v", text, q, again, err)
		}
	})
}

func TestEventQueriesThatMakeNoSense(t *testing.T) {
	path, _ := serve(t, newRecorder(4))
	c := NewClient(path)
	for text, says := range map[string]string{
		"after=-1":        `after: strconv.ParseUint: parsing "-1": invalid syntax`,
		"follow=perhaps":  `follow: strconv.ParseBool: parsing "perhaps": invalid syntax`,
		"since=yesterday": `since: parsing time "yesterday" as "2006-01-02T15:04:05.999999999Z07:00": cannot parse "yesterday" as "2006"`,
	} {
		_, err := c.send(context.Background(), http.MethodGet, eventsPath+"?"+text, nil)
		if err == nil || err.Error() != says {
			t.Errorf("%s: %v, want %s", text, err, says)
		}
	}
}
