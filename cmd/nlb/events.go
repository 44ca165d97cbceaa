package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"nlb/balancer/control"
	"nlb/balancer/events"
)

func newEvents() *cobra.Command {
	var (
		socket string
		out    output
		since  string
		query  control.EventQuery
	)
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Show what happened",
		Long: `events shows what happened to the daemon, its targets and the kernel, oldest first: as
much as the daemon remembers, which is the last ` + strconv.Itoa(events.DefaultSize) + ` events since its start. As JSON, each
line is an object; one with nothing but "lost" says how many events are missing there.

What each event means, and its fields: docs/events.md.`,
		Example: `  nlb events --since 10m
  nlb events --follow -o json | jq -c 'select(.event == "target.state_changed")'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if query.Since, err = parseSince(since, time.Now()); err != nil {
				return err
			}
			return showEvents(cmd.Context(), cmd.OutOrStdout(), control.NewClient(socket), out, query)
		},
	}
	addSocket(cmd.Flags(), &socket)
	addOutput(cmd, &out)
	cmd.Flags().BoolVarP(&query.Follow, "follow", "f", false, "go on with what happens next, until the daemon stops")
	cmd.Flags().StringVar(&since, "since", "", "only what happened since then: a duration back from now, such as 10m, or a time (RFC 3339)")
	cmd.Flags().Uint64Var(&query.After, "after", 0, "only what follows the event of this sequence")
	return cmd
}

// parseSince reads a duration back from now or a time; empty is the zero time.
func parseSince(text string, now time.Time) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(text); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return t, usageError{fmt.Errorf("--since %q: want a duration, such as 10m, or a time, such as %s", text, now.UTC().Format(time.RFC3339))}
	}
	return t, nil
}

// showEvents ends without an error when it is interrupted.
func showEvents(ctx context.Context, w io.Writer, client *control.Client, out output, q control.EventQuery) error {
	printItem := printEventRow
	if out == jsonText {
		printItem = printEventJSON
	}
	err := client.Events(ctx, q, func(item *control.EventItem) error {
		if err := printItem(w, item); err != nil {
			return fmt.Errorf("print: %w", err)
		}
		return nil
	})
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func printEventJSON(w io.Writer, item *control.EventItem) error {
	return json.NewEncoder(w).Encode(item)
}

// printEventRow has the time where an operator's clock is, and columns as wide as
// names mostly are: the next event is not known yet.
func printEventRow(w io.Writer, item *control.EventItem) error {
	if item.Event == nil {
		_, err := fmt.Fprintf(w, "… %d events are missing here: they were forgotten before they could be read\n", item.Lost)
		return err
	}
	fields, err := fieldWords(item.Fields)
	if err != nil {
		return fmt.Errorf("event %d: %w", item.Sequence, err)
	}
	row := fmt.Sprintf("%s  %-5s  %-26s  %s", item.Time.Local().Format("2006-01-02 15:04:05.000"), item.Level, item.Name, fields)
	_, err = fmt.Fprintln(w, strings.TrimRight(row, " "))
	return err
}

// fieldWords writes a JSON object as words of the form name=value, in its order.
func fieldWords(object json.RawMessage) (string, error) {
	d := json.NewDecoder(bytes.NewReader(object))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return "", fmt.Errorf("fields are no object: %s", object)
	}
	var words []string
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return "", err
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return "", err
		}
		words = append(words, fmt.Sprintf("%s=%s", name, valueWord(value)))
	}
	return strings.Join(words, " "), nil
}

// valueWord drops the quotes of a text that is one printable word.
func valueWord(value json.RawMessage) string {
	var text string
	if json.Unmarshal(value, &text) != nil {
		return string(value)
	}
	plain := text != "" && !strings.ContainsFunc(text, func(r rune) bool {
		return unicode.IsSpace(r) || !unicode.IsPrint(r) || r == '"'
	})
	if plain {
		return text
	}
	return strconv.Quote(text)
}
