package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/measure"
)

// headroom is how much faster than a way the way without any balancer has to
// be. With less, the generator is most of what was measured.
const headroom = 1.1

// A report is the outcome; its JSON form is stable, but for more fields.
type report struct {
	Kernel  string         `json:"kernel"`
	Core    int            `json:"core"`
	Rounds  int            `json:"rounds"`
	Seconds float64        `json:"seconds"`
	Metrics []metricReport `json:"metrics"`
}

type metricReport struct {
	Name string      `json:"name"`
	Ways []wayReport `json:"ways"`
}

type wayReport struct {
	Name string `json:"name"`
	// Rates are per second that the core worked on the path, by round.
	Rates []float64       `json:"rates"`
	Rate  measure.Summary `json:"rate"`
	// WallRate is per second that passed. It is lower where other programs had
	// the core.
	WallRate measure.Summary `json:"wall_rate"`
	Lost     int             `json:"lost"` // packets, in all rounds
	// Daemon is nlb's own CPU time, per second of the whole benchmark. What of it
	// fell into this way's turns is in Rates; the rest would show here if the
	// daemon put off work that flows make for it.
	Daemon float64 `json:"daemon_seconds_per_second"`
	// AddedNS is what a packet or connection costs more than without a balancer.
	AddedNS measure.Summary `json:"added_ns"`
	// Against is the way that this one is compared with, and Ratio this one's
	// rate divided by that one's.
	Against string           `json:"against,omitempty"`
	Ratio   *measure.Summary `json:"ratio,omitempty"`
	// BoundedByGenerator says that the rate is too near that without a balancer.
	BoundedByGenerator bool `json:"bounded_by_generator"`
}

func newReport(o options, all []samples) (*report, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, err
	}
	r := &report{Kernel: unix.ByteSliceToString(u.Release[:]), Core: o.core, Rounds: o.rounds, Seconds: o.seconds}
	for i, m := range metrics {
		r.Metrics = append(r.Metrics, metricReport{m.name, compare(ways, all[i])})
	}
	return r, nil
}

// costMore is how many nanoseconds more one thing takes at the rate a than at b.
func costMore(a, b float64) float64 { return 1e9/a - 1e9/b }

// compare makes the report of one metric. The first way is the one without a
// balancer.
func compare(ways []way, all samples) []wayReport {
	reports := make([]wayReport, len(ways))
	at := map[string]int{}
	for i, w := range ways {
		at[w.name] = i
		r := &reports[i]
		r.Name, r.Against = w.name, w.against
		var wall []float64
		var daemon, around time.Duration
		for _, s := range all[i] {
			r.Rates = append(r.Rates, s.rate())
			wall = append(wall, float64(s.received)/s.passed.Seconds())
			r.Lost += s.sent - s.received
			around += s.around
			daemon += s.daemon
		}
		r.Daemon = daemon.Seconds() / around.Seconds()
		r.Rate, r.WallRate = measure.Summarize(r.Rates), measure.Summarize(wall)
		r.AddedNS = measure.Compare(r.Rates, reports[0].Rates, costMore)
		r.BoundedByGenerator = i > 0 && measure.Compare(reports[0].Rates, r.Rates, measure.Ratio).Median < headroom
		if w.against == "" {
			continue
		}
		other := reports[at[w.against]].Rates
		between := measure.Compare(r.Rates, other, measure.Ratio)
		r.Ratio = &between
	}
	return reports
}

// Table has the metrics one after the other.
func (r *report) Table(w io.Writer) error {
	fmt.Fprintf(w, "Linux %s, core %d, %d rounds of %g s. Rates are per second that the core worked on them.\n", r.Kernel, r.Core, r.Rounds, r.Seconds)
	for _, m := range r.Metrics {
		if err := measure.WriteSection(w, m.Name, m.rows()); err != nil {
			return err
		}
	}
	return nil
}

func (m *metricReport) rows() [][]string {
	rows := [][]string{{"", "median", "min .. max", "added", "ratio", "min .. max", "to", ""}}
	for _, row := range m.Ways {
		rows = append(rows, row.cells())
	}
	return rows
}

// cells are as many for every way: a column ends where a line has none.
func (r *wayReport) cells() []string {
	cells := []string{"  " + r.Name, fmt.Sprintf("%.0f", r.Rate.Median), fmt.Sprintf("%.0f .. %.0f", r.Rate.Min, r.Rate.Max), "-", "", "", ""}
	if r.AddedNS != (measure.Summary{}) {
		cells[3] = fmt.Sprintf("%+.0f ns", r.AddedNS.Median)
	}
	if r.Ratio != nil {
		cells[4] = fmt.Sprintf("%.3f", r.Ratio.Median)
		cells[5] = fmt.Sprintf("%.3f .. %.3f", r.Ratio.Min, r.Ratio.Max)
		cells[6] = r.Against
	}
	var remarks []string
	if r.BoundedByGenerator {
		remarks = append(remarks, "bounded by the generator")
	}
	if r.Lost > 0 {
		remarks = append(remarks, fmt.Sprintf("%d lost", r.Lost))
	}
	return append(cells, strings.Join(remarks, ", "))
}
