package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"nlb/balancer/events"
)

// An EventQuery says which events to tell. Its zero value means all that the daemon
// remembers.
type EventQuery struct {
	// After is the sequence of the last event that is known already; 0: none is.
	After uint64
	// Since leaves out what happened before.
	Since time.Time
	// Follow waits for what happens next, until the daemon stops.
	Follow bool
}

func (q EventQuery) query() url.Values {
	query := url.Values{}
	if q.After > 0 {
		query.Set("after", strconv.FormatUint(q.After, 10))
	}
	if !q.Since.IsZero() {
		query.Set("since", q.Since.Format(time.RFC3339Nano))
	}
	if q.Follow {
		query.Set("follow", "true")
	}
	return query
}

func parseEventQuery(query url.Values) (q EventQuery, err error) {
	if text := query.Get("after"); text != "" {
		if q.After, err = strconv.ParseUint(text, 10, 64); err != nil {
			return q, fmt.Errorf("after: %w", err)
		}
	}
	if text := query.Get("since"); text != "" {
		if q.Since, err = time.Parse(time.RFC3339Nano, text); err != nil {
			return q, fmt.Errorf("since: %w", err)
		}
	}
	if text := query.Get("follow"); text != "" {
		if q.Follow, err = strconv.ParseBool(text); err != nil {
			return q, fmt.Errorf("follow: %w", err)
		}
	}
	return q, nil
}

// An EventItem is an event, or says how many are missing in its place: those that the
// daemon forgot before they could be told.
type EventItem struct {
	*events.Event
	Lost uint64 `json:"lost,omitempty"`
}

// An eventLine is one line of the answer: an item, or the proper end of the stream.
// Without that it is cut short.
type eventLine struct {
	EventItem
	End bool `json:"end,omitempty"`
}

// A source has events; see [events.Ring].
type source interface {
	Read(after uint64, into []events.Event) (n int, lost uint64, news <-chan struct{})
}

// onEvents streams events, one JSON object a line. Nobody waits for a reader: one that
// is too slow misses what is forgotten meanwhile, and is told how much that was.
func onEvents(from source) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		q, err := parseEventQuery(r.URL.Query())
		if err != nil {
			answer(w, http.StatusBadRequest, failure{err.Error()})
			return
		}
		w.Header().Set("Content-Type", "application/x-ndjson")
		lines := json.NewEncoder(w)
		tell := func(l eventLine) error { return lines.Encode(l) }
		// With an error the client is gone, and there is nobody to tell.
		if err := streamEvents(r.Context(), from, q, tell, http.NewResponseController(w).Flush); err == nil {
			_ = tell(eventLine{End: true})
		}
	}
}

// batch is how many events are taken from the source at once.
const batch = 64

// streamEvents tells events until there are no more, or q follows and ctx ends. What
// has happened until then is told.
func streamEvents(ctx context.Context, from source, q EventQuery, tell func(eventLine) error, flush func() error) error {
	var taken [batch]events.Event
	after, told := q.After, q.After > 0
	for last := false; ; {
		n, lost, news := from.Read(after, taken[:])
		// What was forgotten before a reader came who knows nothing is not missed.
		if lost > 0 && told {
			if err := tell(eventLine{EventItem: EventItem{Lost: lost}}); err != nil {
				return err
			}
		}
		for i := range taken[:n] {
			e := &taken[i]
			after, told = e.Sequence, true
			if e.Time.Before(q.Since) {
				continue
			}
			if err := tell(eventLine{EventItem: EventItem{Event: e}}); err != nil {
				return err
			}
		}
		if n > 0 {
			continue
		}
		if err := flush(); err != nil {
			return err
		}
		if last || !q.Follow {
			return nil
		}
		select {
		case <-news:
		case <-ctx.Done():
			last = true
		}
	}
}

// Events shows events, oldest first, and ends with the first error of show. When it
// follows, it returns nil once the daemon stops; an error says that the stream was cut
// short, and the sequence of the last event says where to go on.
func (c *Client) Events(ctx context.Context, q EventQuery, show func(*EventItem) error) error {
	resp, err := c.send(ctx, http.MethodGet, eventsPath+"?"+q.query().Encode(), nil)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	lines := json.NewDecoder(resp.Body)
	for {
		var line eventLine
		if err := lines.Decode(&line); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("the daemon's events are cut short: %w", err)
		}
		if line.End {
			return nil
		}
		if err := show(&line.EventItem); err != nil {
			return err
		}
	}
}
