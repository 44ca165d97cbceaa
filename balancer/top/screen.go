package top

import (
	"slices"
	"time"

	"nlb/balancer/control"
)

// Intervals are those that keys choose among.
var Intervals = []time.Duration{
	500 * time.Millisecond, time.Second, 2 * time.Second, 5 * time.Second, 10 * time.Second, 30 * time.Second, time.Minute,
}

// Options are how a Screen begins.
type Options struct {
	// Interval is the time between two answers of the daemon.
	Interval time.Duration
	Sort     Sort
	// Filter has the words that a row must match; see Press.
	Filter string
	// Socket is what is said to be asked.
	Socket string
}

// A Screen is what the daemon answered last and how its reader wants to see it.
// It has no clock, terminal or socket. One goroutine uses it at a time.
type Screen struct {
	socket        string
	interval      time.Duration
	width, height int

	latest *picture // nil before the first answer
	failed error    // what came instead of an answer, since then
	paused bool

	order   order
	rows    []row // of latest, by order
	passed  int   // how many targets the filter lets through
	longest int   // cells of the longest name in rows

	cursor, offset int // indices in rows; offset is the first that is visible
	visible        int // how many of rows were, when they were last drawn

	dialog dialog
	note   note
}

// A note is said once, until the next key.
type note struct {
	text string
	bad  bool
}

// New returns a Screen of 80 × 24 cells that was told nothing yet.
func New(o Options) *Screen {
	return &Screen{
		socket: o.Socket, interval: o.Interval, width: 80, height: 24,
		order: order{by: o.Sort, filter: newFilter(o.Filter), collapsed: make(map[rowID]bool)},
	}
}

// Interval is how much time there should be between two answers.
func (s *Screen) Interval() time.Duration { return s.interval }

// Paused says that no answers are wanted.
func (s *Screen) Paused() bool { return s.paused }

// Resize says how many cells the terminal has.
func (s *Screen) Resize(width, height int) { s.width, s.height = max(1, width), max(1, height) }

// Take shows an answer, which nobody may change from here on. At is when it came.
// An answer that comes while the Screen is paused is not shown.
func (s *Screen) Take(status *control.Status, at time.Time) {
	if s.paused {
		return
	}
	s.latest = newPicture(status, at, s.latest)
	s.failed = nil
	s.arrange()
}

// Fail says that the daemon did not answer. The last picture stays, marked as old.
func (s *Screen) Fail(err error) { s.failed = err }

// Changed says what came of an Action that Press asked for.
func (s *Screen) Changed(a Action, err error) {
	if err != nil {
		s.note = note{a.Verb.String() + " " + targetName(a.Target) + ": " + err.Error(), true}
		return
	}
	done := "draining "
	if a.Verb == Undrain {
		done = "registered again: "
	}
	s.note = note{done + targetName(a.Target), false}
}

// arrange makes the rows anew and keeps the cursor on what it was on, or else
// where it was.
func (s *Screen) arrange() {
	if s.latest == nil {
		return
	}
	was, known := s.selected()
	s.rows, s.passed = s.order.rows(s.latest)
	s.longest = 0
	for i := range s.rows {
		if t := s.rows[i].target; t != nil {
			s.longest = max(s.longest, len(t.name)) // an address: one cell a byte
		} else {
			s.longest = max(s.longest, width(s.rows[i].name))
		}
	}
	if known {
		s.selectRow(was.rowID)
	}
	s.move(0)
}

// selected is the row that the cursor is on, if there is any.
func (s *Screen) selected() (row, bool) {
	if s.cursor >= len(s.rows) {
		return row{}, false
	}
	return s.rows[s.cursor], true
}

// selectRow puts the cursor on a row, or on the one that it is hidden with.
func (s *Screen) selectRow(id rowID) {
	for _, want := range []rowID{id, id.heading()} {
		if i := slices.IndexFunc(s.rows, func(r row) bool { return r.rowID == want }); i >= 0 {
			s.cursor = i
			return
		}
	}
}

// move moves the cursor, as far as there are rows.
func (s *Screen) move(by int) {
	s.cursor = max(0, min(s.cursor+by, len(s.rows)-1))
}

// patience is how late an answer may be before that is said. The daemon is asked
// to count ten thousand targets in much less.
const patience = 3 * time.Second

// stale says that what is shown is not how things are now.
func (s *Screen) stale(now time.Time) bool {
	return s.failed != nil || s.latest != nil && !s.paused && now.Sub(s.latest.at) > s.interval+patience
}
