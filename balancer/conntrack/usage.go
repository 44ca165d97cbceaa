package conntrack

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// A Usage is how full the connection tracking table is, and what did not get
// into it: of all flows of the network namespace, ours and others'.
type Usage struct {
	// Entries are in the table now. Limit is how many may be
	// (net.netfilter.nf_conntrack_max), 0 for without a limit.
	Entries, Limit uint64
	// InsertFailed, Dropped and EarlyDropped count as conntrack -S does.
	//
	// InsertFailed is how many flows were dropped because another one had the same
	// tuple already: of TCP and SNAT, above all, because every source port towards
	// a target was taken.
	InsertFailed uint64
	// Dropped is how many packets conntrack dropped: those of InsertFailed, and
	// those that it could not track, because the table was full.
	Dropped uint64
	// EarlyDropped is how many unanswered flows made room for others in a full table.
	EarlyDropped uint64
}

// Percent is how much of the table is in use, rounded down. One without a limit is
// empty.
func (u Usage) Percent() int {
	if u.Limit == 0 {
		return 0
	}
	return int(u.Entries * 100 / u.Limit)
}

// Usage asks the kernel for its counters. That reads no flow, however many there
// are. The totals are 32 bits wide for each processor and begin anew when they
// are full.
func (t *Tracker) Usage(ctx context.Context) (Usage, error) {
	var u Usage
	err := t.conns.use(func(c *conn) error {
		u = Usage{}
		if err := c.stats(ctx, msgStats, 0, u.addGlobal); err != nil {
			return fmt.Errorf("read the size of the conntrack table: %w", err)
		}
		if err := c.stats(ctx, msgPerCPU, unix.NLM_F_DUMP, u.addCPU); err != nil {
			return fmt.Errorf("read the counters of conntrack: %w", err)
		}
		return nil
	})
	return u, err
}

// stats calls f for each attribute of the answers to a request. One that is no
// dump has a single answer.
func (c *conn) stats(ctx context.Context, typ, flags uint16, f func(attr)) error {
	c.seq++
	if err := c.send(appendMessage(nil, typ, flags, c.seq, unix.AF_UNSPEC, nil)); err != nil {
		return err
	}
	return c.answers(ctx, func(m message) (done bool, err error) {
		switch m.typ {
		case unix.NLMSG_DONE, unix.NLMSG_ERROR:
			if errno := m.errno(); errno != 0 {
				return true, errno
			}
			return true, nil
		}
		rest := m.body
		for a, after, ok := next(rest); ok; a, after, ok = next(after) {
			rest = after
			f(a)
		}
		if len(rest) != 0 {
			return true, errMalformed
		}
		return flags&unix.NLM_F_DUMP == 0, nil
	})
}

func (u *Usage) addGlobal(a attr) {
	switch a.typ {
	case ctaStatsGlobalEntries:
		u.Entries = uint64(be32(a.data))
	case ctaStatsGlobalMaxEntries:
		u.Limit = uint64(be32(a.data))
	}
}

func (u *Usage) addCPU(a attr) {
	switch a.typ {
	case ctaStatsInsertFailed:
		u.InsertFailed += uint64(be32(a.data))
	case ctaStatsDrop:
		u.Dropped += uint64(be32(a.data))
	case ctaStatsEarlyDrop:
		u.EarlyDropped += uint64(be32(a.data))
	}
}

// Marks of an Alarm, in percent of the table. The lower one is so far away that a table
// about the upper does not tell of it all the time.
const (
	alarmAt = 80
	clearAt = 70
)

// An Alarm is on from when the table is 80 % full until it is below 70 %. The zero value
// is off.
type Alarm struct{ on bool }

// On reports whether the alarm is on.
func (a *Alarm) On() bool { return a.on }

// Hear takes in a reading, and reports whether it turned the alarm on or off.
func (a *Alarm) Hear(u Usage) (changed bool) {
	mark := alarmAt
	if a.on {
		mark = clearAt
	}
	was := a.on
	a.on = u.Percent() >= mark
	return a.on != was
}

// quiet is how long no flow may fail to get into the table before a Shortage is over.
const quiet = time.Minute

// A Shortage is under way from when the table refuses flows for their addresses and
// ports (Usage.InsertFailed) until it has refused none for a minute. The zero value has
// heard nothing yet.
type Shortage struct {
	heard  bool
	failed uint64 // as of the last reading
	over   time.Time
}

// Hear takes in a reading, and returns how many flows were refused since the last one if
// a shortage begins with them, else 0. What was refused before the first is not told.
func (s *Shortage) Hear(u Usage, now time.Time) (refused uint64) {
	grown := s.heard && u.InsertFailed > s.failed // the kernel's counters begin anew when they are full
	if grown && !now.Before(s.over) {
		refused = u.InsertFailed - s.failed
	}
	if grown {
		s.over = now.Add(quiet)
	}
	s.heard, s.failed = true, u.InsertFailed
	return refused
}
