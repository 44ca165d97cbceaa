package report

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"time"
	"unicode"
	"unicode/utf8"
)

// Schema is the version of the records. It changes when an older reader would
// misunderstand a file.
const Schema = 1

// Limits of what a file may hold.
const (
	// mostRunes lets a name fit beside a chart.
	mostRunes = 64
	// largest is a value's limit, with its reciprocal for values that are
	// divided: sums and quotients of two stay finite, and print.
	largest = 1e15
	// mostDecimals is about what a float64 has, for a value near 1.
	mostDecimals = 12
)

// A Header is what is known before anything is measured.
type Header struct {
	Schema int       `json:"schema"` // set by NewWriter
	Start  time.Time `json:"start"`
	// Command is the command line of the run itself, and Flags are all of its
	// flags, also those left at their defaults.
	Command string            `json:"command"`
	Flags   map[string]string `json:"flags,omitempty"`
	Mode    Mode              `json:"mode"`
	// Rounds is how many are planned at most. The first is 1.
	Rounds  int     `json:"rounds"`
	Machine Machine `json:"machine"`
	// LoadBefore has the load averages of 1, 5 and 15 minutes, as proc(5) says.
	LoadBefore [3]float64 `json:"load_before"`
	// Contestants and Metrics are shown in this order.
	Contestants []Contestant `json:"contestants"`
	Metrics     []Metric     `json:"metrics"`
	// Goals are judged by what was measured.
	Goals []Goal `json:"goals,omitempty"`
}

// A Mode says how much care was taken.
type Mode string

// A full run is for conclusions, a quick one to see that all works.
const (
	Quick Mode = "quick"
	Full  Mode = "full"
)

// A Machine is what the run ran on.
type Machine struct {
	CPU   string `json:"cpu"` // the model's name
	Cores int    `json:"cores"`
	// Core is the one that everything was confined to; -1 for none.
	Core     int    `json:"core"`
	RAMBytes uint64 `json:"ram_bytes"`
	Kernel   string `json:"kernel"` // uname -r
}

// A Contestant is one way from a client to a target.
type Contestant struct {
	Name string `json:"name"`
	Role Role   `json:"role"`
	// Job is what it does, if not all do the same: only contestants that do the
	// same are peers.
	Job string `json:"job,omitempty"`
	// Version is what its program says of itself.
	Version string `json:"version,omitempty"`
	// Commands are the command lines that set it up, and Config is what it was
	// given: a ruleset or a file.
	Commands []string `json:"commands,omitempty"`
	Config   string   `json:"config,omitempty"`
}

// A Role is what a contestant is there for.
type Role string

// There is one Baseline at most: the way without a balancer.
const (
	Baseline Role = "baseline"
	NLB      Role = "nlb"
	Peer     Role = "peer"
)

// A Metric is something that was measured.
type Metric struct {
	Name   string    `json:"name"`
	Unit   string    `json:"unit"`
	Better Direction `json:"better"`
	// Decimals are how many are shown of values.
	Decimals int `json:"decimals"`
	// PrintedOnly is for values that are too much chance for ratios: p99, or
	// bulk over two cores.
	PrintedOnly bool `json:"printed_only,omitempty"`
	// Counted says that chance has no part in the values, so that one round is
	// enough: instructions, but not times.
	Counted bool `json:"counted,omitempty"`
	// Limited says that the load generator may be what limits it: see Headroom.
	Limited bool `json:"limited,omitempty"`
	// Rounds is how many are planned, if they are not the header's.
	Rounds int `json:"rounds,omitempty"`
	// Cases are what it is measured for, such as listeners=1 and listeners=100.
	// None means one without a name.
	Cases []string `json:"cases,omitempty"`
}

// A Direction says which of two values is the better one.
type Direction string

// Rates are better when More, costs and latencies when Less.
const (
	More Direction = "more"
	Less Direction = "less"
)

// A Measurement is one value. There is one for each round, metric, case and
// contestant at most; there may be none.
type Measurement struct {
	Round      int     `json:"round"`
	Metric     string  `json:"metric"`
	Case       string  `json:"case,omitempty"`
	Contestant string  `json:"contestant"`
	Value      float64 `json:"value"`
	Unit       string  `json:"unit"` // that of the metric
}

// A Note says what values do not. It is about the whole run, or about the
// metric, case and contestant that it names.
type Note struct {
	Metric     string `json:"metric,omitempty"`
	Case       string `json:"case,omitempty"`
	Contestant string `json:"contestant,omitempty"`
	Text       string `json:"text"`
}

// An End is what is known afterwards.
type End struct {
	Seconds   float64    `json:"seconds"` // from Header.Start
	LoadAfter [3]float64 `json:"load_after"`
}

// A Run is what a file holds.
type Run struct {
	Header       Header
	Measurements []Measurement
	Notes        []Note
	// End is nil if the run was interrupted.
	End *End
	// Torn is the number of the last line if it is only the beginning of a
	// record, as an interruption can leave it. Nothing of it is here.
	Torn int
}

// rounds is how many are planned for a metric.
func (h *Header) rounds(m *Metric) int {
	if m.Rounds > 0 {
		return m.Rounds
	}
	return h.Rounds
}

// cases are the metric's, at least one.
func (m *Metric) cases() []string {
	if len(m.Cases) == 0 {
		return []string{""}
	}
	return m.Cases
}

// checkText is for what stands in a line of a table or a chart.
func checkText(what, s string) error {
	switch {
	case s == "":
		return fmt.Errorf("%s: is missing", what)
	case utf8.RuneCountInString(s) > mostRunes:
		return fmt.Errorf("%s: has more than %d characters: %.20q…", what, mostRunes, s)
	case !utf8.ValidString(s) || slices.ContainsFunc([]rune(s), func(r rune) bool { return !unicode.IsPrint(r) }):
		return fmt.Errorf("%s: %q is not one line of printable text", what, s)
	}
	return nil
}

// checkUTF8 is for text of any form.
func checkUTF8(what string, texts ...string) error {
	for _, s := range texts {
		if !utf8.ValidString(s) {
			return fmt.Errorf("%s: %.20q is not UTF-8", what, s)
		}
	}
	return nil
}

func checkNumber(what string, v float64) error {
	if math.IsNaN(v) || math.Abs(v) > largest {
		return fmt.Errorf("%s: %g is not a number between %g and %g", what, v, -largest, largest)
	}
	return nil
}

func checkLoad(what string, load [3]float64) error {
	for _, v := range load {
		if err := checkNumber(what, v); err != nil {
			return err
		}
	}
	return nil
}

// check says all that is wrong with a header.
func (h *Header) check() error {
	errs := []error{
		checkUTF8("command", h.Command),
		checkLoad("load_before", h.LoadBefore),
		checkUTF8("machine", h.Machine.CPU, h.Machine.Kernel),
	}
	if h.Start.IsZero() {
		errs = append(errs, errors.New("start: is missing"))
	} else if _, err := h.Start.MarshalText(); err != nil {
		errs = append(errs, fmt.Errorf("start: %w", err))
	}
	if h.Mode != Quick && h.Mode != Full {
		errs = append(errs, fmt.Errorf("mode: %q is neither %s nor %s", h.Mode, Quick, Full))
	}
	if h.Rounds < 1 {
		errs = append(errs, fmt.Errorf("rounds: %d is less than 1", h.Rounds))
	}
	for name, value := range h.Flags {
		errs = append(errs, checkUTF8("flags", name, value))
	}
	errs = append(errs, h.checkContestants(), h.checkMetrics())
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return h.checkGoals()
}

func (h *Header) checkContestants() error {
	var errs []error
	seen := make(map[string]bool)
	baseline := ""
	for i, c := range h.Contestants {
		at := fmt.Sprintf("contestants[%d]", i)
		errs = append(errs, checkText(at+".name", c.Name), checkUTF8(at, append(c.Commands, c.Version, c.Config)...))
		if c.Job != "" {
			errs = append(errs, checkText(at+".job", c.Job))
		}
		if seen[c.Name] {
			errs = append(errs, fmt.Errorf("%s.name: there is another %q", at, c.Name))
		}
		seen[c.Name] = true
		switch {
		case !slices.Contains([]Role{Baseline, NLB, Peer}, c.Role):
			errs = append(errs, fmt.Errorf("%s.role: %q is neither %s nor %s nor %s", at, c.Role, Baseline, NLB, Peer))
		case c.Role == Baseline && baseline != "":
			errs = append(errs, fmt.Errorf("%s.role: %q is the baseline already", at, baseline))
		case c.Role == Baseline:
			baseline = c.Name
		}
	}
	return errors.Join(errs...)
}

func (h *Header) checkMetrics() error {
	var errs []error
	seen := make(map[string]bool)
	for i, m := range h.Metrics {
		at := fmt.Sprintf("metrics[%d]", i)
		errs = append(errs, checkText(at+".name", m.Name), checkText(at+".unit", m.Unit))
		if seen[m.Name] {
			errs = append(errs, fmt.Errorf("%s.name: there is another %q", at, m.Name))
		}
		seen[m.Name] = true
		if m.Better != More && m.Better != Less {
			errs = append(errs, fmt.Errorf("%s.better: %q is neither %s nor %s", at, m.Better, More, Less))
		}
		if m.Decimals < 0 || m.Decimals > mostDecimals {
			errs = append(errs, fmt.Errorf("%s.decimals: %d is not between 0 and %d", at, m.Decimals, mostDecimals))
		}
		if m.Rounds < 0 || m.Rounds > h.Rounds {
			errs = append(errs, fmt.Errorf("%s.rounds: %d is not between 0 and the header's %d", at, m.Rounds, h.Rounds))
		}
		for n, name := range m.Cases {
			field := fmt.Sprintf("%s.cases[%d]", at, n)
			errs = append(errs, checkText(field, name))
			if slices.Index(m.Cases, name) < n {
				errs = append(errs, fmt.Errorf("%s: there is another %q", field, name))
			}
		}
	}
	return errors.Join(errs...)
}

// A key is a row of a table.
type key struct{ metric, cas, contestant string }

// A cell is where a value belongs.
type cell struct {
	key
	round int
}

// A ledger knows what has been recorded, and refuses what does not belong to it.
// Writing and reading ask the same one, so that what was written can be read.
type ledger struct {
	header      *Header
	metrics     map[string]*Metric
	contestants map[string]bool
	cells       map[cell]bool
	ended       bool
}

func newLedger(h *Header) *ledger {
	l := &ledger{
		header: h, cells: make(map[cell]bool),
		metrics: make(map[string]*Metric), contestants: make(map[string]bool),
	}
	for i := range h.Metrics {
		l.metrics[h.Metrics[i].Name] = &h.Metrics[i]
	}
	for _, c := range h.Contestants {
		l.contestants[c.Name] = true
	}
	return l
}

var errEnded = errors.New("the run has ended already")

// place finds the metric of a case, and that there is such a contestant.
func (l *ledger) place(metric, cas, contestant string) (*Metric, error) {
	m := l.metrics[metric]
	switch {
	case m == nil:
		return nil, fmt.Errorf("metric: the header has no %q", metric)
	case !slices.Contains(m.cases(), cas):
		return nil, fmt.Errorf("case: the header has no %q for %q", cas, metric)
	case !l.contestants[contestant]:
		return nil, fmt.Errorf("contestant: the header has no %q", contestant)
	}
	return m, nil
}

// measure records a measurement.
func (l *ledger) measure(v *Measurement) error {
	if l.ended {
		return errEnded
	}
	m, err := l.place(v.Metric, v.Case, v.Contestant)
	if err != nil {
		return err
	}
	at := cell{key{v.Metric, v.Case, v.Contestant}, v.Round}
	switch {
	case v.Unit != m.Unit:
		return fmt.Errorf("unit: %q is in %q, not in %q", v.Metric, m.Unit, v.Unit)
	case v.Round < 1 || v.Round > l.header.rounds(m):
		return fmt.Errorf("round: %d is not between 1 and %d", v.Round, l.header.rounds(m))
	case !m.PrintedOnly && !(v.Value >= 1/largest && v.Value <= largest):
		return fmt.Errorf("value: %g cannot be compared: it is not between %g and %g", v.Value, 1/largest, largest)
	case l.cells[at]:
		return fmt.Errorf("round %d has %q, case %q, of %q already", v.Round, v.Metric, v.Case, v.Contestant)
	}
	if err := checkNumber("value", v.Value); err != nil {
		return err
	}
	l.cells[at] = true
	return nil
}

// note says whether a note is about something that there is.
func (l *ledger) note(n *Note) error {
	m := l.metrics[n.Metric]
	switch {
	case l.ended:
		return errEnded
	case n.Text == "":
		return errors.New("text: is missing")
	case n.Metric != "" && m == nil:
		return fmt.Errorf("metric: the header has no %q", n.Metric)
	case n.Case != "" && (m == nil || !slices.Contains(m.Cases, n.Case)):
		return fmt.Errorf("case: the header has no %q for %q", n.Case, n.Metric)
	case n.Contestant != "" && !l.contestants[n.Contestant]:
		return fmt.Errorf("contestant: the header has no %q", n.Contestant)
	}
	return checkUTF8("text", n.Text)
}

func (l *ledger) end(e *End) error {
	if l.ended {
		return errEnded
	}
	if !(e.Seconds >= 0) {
		return fmt.Errorf("seconds: %g is not a duration", e.Seconds)
	}
	if err := errors.Join(checkNumber("seconds", e.Seconds), checkLoad("load_after", e.LoadAfter)); err != nil {
		return err
	}
	l.ended = true
	return nil
}
