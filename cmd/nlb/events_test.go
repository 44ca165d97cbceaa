package main

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/balancer/control"
	"nlb/balancer/events"
)

func TestPrintEvents(t *testing.T) {
	at := time.Date(2026, 1, 2, 15, 4, 5, 678e6, time.UTC)
	event := func(name, fields string) *control.EventItem {
		return &control.EventItem{Event: &events.Event{
			Sequence: 7, Time: at, Level: "info", Name: name, Message: "it happened", Fields: json.RawMessage(fields),
		}}
	}
	local := at.Local().Format("2006-01-02 15:04:05.000")
	for _, c := range []struct {
		item      *control.EventItem
		row, line string
	}{
		{
			event("target.drain_ended", `{"target_group":"web","target":"10.0.1.11:8080","outcome":"expired"}`),
			local + "  info   target.drain_ended          target_group=web target=10.0.1.11:8080 outcome=expired",
			`{"sequence":7,"time":"2026-01-02T15:04:05.678Z","level":"info","event":"target.drain_ended","message":"it happened",` +
				`"fields":{"target_group":"web","target":"10.0.1.11:8080","outcome":"expired"}}`,
		}, {
			event("daemon.ready", `{}`),
			local + "  info   daemon.ready",
			`{"sequence":7,"time":"2026-01-02T15:04:05.678Z","level":"info","event":"daemon.ready","message":"it happened","fields":{}}`,
		}, {
			event("x", `{"flows":3,"removed":true,"empty":"","error":"two words\nand \u001b[2J","vips":["198.51.100.10"]}`),
			local + `  info   x                           flows=3 removed=true empty="" error="two words\nand \x1b[2J" vips=["198.51.100.10"]`,
			`{"sequence":7,"time":"2026-01-02T15:04:05.678Z","level":"info","event":"x","message":"it happened",` +
				`"fields":{"flows":3,"removed":true,"empty":"","error":"two words\nand \u001b[2J","vips":["198.51.100.10"]}}`,
		}, {
			&control.EventItem{Lost: 12},
			"… 12 events are missing here: they were forgotten before they could be read",
			`{"lost":12}`,
		},
	} {
		var row, line strings.Builder
		if err := printEventRow(&row, c.item); err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(c.row+"\n", row.String()); diff != "" {
			t.Errorf("table (-want +got):\n%s", diff)
		}
		if err := printEventJSON(&line, c.item); err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(c.line+"\n", line.String()); diff != "" {
			t.Errorf("JSON (-want +got):\n%s", diff)
		}
	}
	if err := printEventRow(new(strings.Builder), event("x", `[]`)); err == nil || err.Error() != "event 7: fields are no object: []" {
		t.Error(err)
	}
}

func TestSince(t *testing.T) {
	now := time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)
	for _, c := range []struct {
		text string
		want time.Time
		err  string
	}{
		{"", time.Time{}, ""},
		{"0s", now, ""},
		{"1h30m", now.Add(-90 * time.Minute), ""},
		{"2026-01-01T00:00:00Z", time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), ""},
		{"-10m", time.Time{}, `--since "-10m": want a duration, such as 10m, or a time, such as 2026-01-02T15:04:05Z`},
		{"yesterday", time.Time{}, `--since "yesterday": want a duration, such as 10m, or a time, such as 2026-01-02T15:04:05Z`},
	} {
		got, err := parseSince(c.text, now)
		said := ""
		if err != nil {
			said = err.Error()
		}
		if !got.Equal(c.want) || said != c.err {
			t.Errorf("%q: %v, %q, want %v, %q", c.text, got, said, c.want, c.err)
		}
	}
}
