package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"nlb/bench/measure"
	"nlb/bench/part"
	"nlb/bench/report"
)

// runFile is in the folder of the result.
const runFile = "run.jsonl"

// newFolder makes the folder of the result. One that the user names may exist, but
// not have a run.
func newFolder(name string, now time.Time) (string, error) {
	if name == "" {
		name = filepath.Join("bench", "results", now.UTC().Format("20060102-150405"))
	}
	if err := os.MkdirAll(name, 0o755); err != nil {
		return "", err
	}
	if _, err := os.Stat(filepath.Join(name, runFile)); !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("--out %s: there is a %s already", name, runFile)
	}
	return name, nil
}

// race measures, and returns what it has, also after an error.
func race(ctx context.Context, p *plan, h report.Header, dir string, stderr io.Writer) (r *report.Run, err error) {
	name := filepath.Join(dir, runFile)
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	w, err := report.NewWriter(f, h)
	if err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(name))
	}
	err = measureAll(ctx, p, w, newProgress(stderr, p))
	if err == nil {
		err = end(w, h.Start)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		r, unread := report.ReadFile(name)
		return r, errors.Join(err, unread)
	}
	return report.ReadFile(name)
}

func end(w *report.Writer, start time.Time) error {
	load, err := loadAverage()
	if err != nil {
		return err
	}
	return w.End(report.End{Seconds: time.Since(start).Seconds(), LoadAfter: load})
}

// measureAll lets one part after the other measure.
func measureAll(ctx context.Context, p *plan, out part.Recorder, progress *progress) error {
	for i := range p.parts {
		if err := measurePart(ctx, &p.parts[i], p.options, out, progress); err != nil {
			return fmt.Errorf("%s: %w", p.parts[i].Name, err)
		}
	}
	return nil
}

func measurePart(ctx context.Context, p *planned, o part.Options, out part.Recorder, progress *progress) (err error) {
	round, around := p.Estimate(o)
	progress.next(p.Name + ", getting ready")
	runner, err := p.Open(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, runner.Close()) }()
	progress.advance(around)
	for n := 1; n <= p.rounds; n++ {
		progress.next(fmt.Sprintf("%s, round %d of %d", p.Name, n, p.rounds))
		if err := runner.Round(ctx, n, out); err != nil {
			return err
		}
		progress.advance(round)
	}
	return nil
}

// newHeader says what will be measured, of whom, where and how.
func newHeader(ctx context.Context, p *plan, o *options, command []string) (h report.Header, err error) {
	h = report.Header{
		Start: time.Now(), Command: strings.Join(command, " "), Flags: o.flags, Mode: report.Full, Rounds: p.rounds(),
	}
	if o.quick {
		h.Mode = report.Quick
	}
	if h.Machine, err = newMachine(o.core); err != nil {
		return h, err
	}
	if h.LoadBefore, err = loadAverage(); err != nil {
		return h, err
	}
	versions, err := versions(ctx, p)
	if err != nil {
		return h, err
	}
	for _, c := range p.contestants() {
		h.Contestants = append(h.Contestants, described(p, c, versions[c.Program]))
	}
	for _, one := range p.parts {
		for _, m := range one.metrics {
			m.Rounds = one.rounds
			h.Metrics = append(h.Metrics, m.Metric)
		}
	}
	h.Goals = reachable(p, &h)
	return h, nil
}

// described is a contestant with what each part sets it up by.
func described(p *plan, c part.Contestant, version string) report.Contestant {
	r := report.Contestant{Name: c.Name, Role: c.Role, Job: c.Job, Version: version}
	var configs []string
	for _, one := range p.parts {
		setup := one.Setups[c.Name]
		for _, command := range setup.Commands {
			if !slices.Contains(r.Commands, command) {
				r.Commands = append(r.Commands, command)
			}
		}
		if setup.Config != "" {
			configs = append(configs, "# "+one.Name+"\n"+setup.Config)
		}
	}
	r.Config = strings.Join(configs, "\n")
	return r
}

// publish writes the report of a run, and what it begins with to the terminal.
func publish(dir string, r *report.Run, stdout io.Writer) error {
	if err := report.WriteFiles(dir, r); err != nil {
		return err
	}
	if err := report.WriteSummary(stdout, r); err != nil {
		return err
	}
	_, err := fmt.Fprintf(stdout, "\n%s\n", measure.Columns([][]string{
		{"report", filepath.Join(dir, "report.html")},
		{"", filepath.Join(dir, "report.md")},
		{"raw data", filepath.Join(dir, runFile)},
		{"compare", "go run ./bench/compare OLD.jsonl " + filepath.Join(dir, runFile)},
	}))
	return err
}
