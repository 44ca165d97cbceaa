package traffic

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/measure"
)

// A clock tells how long the core worked on a path: the time that passed, less
// the time that the calling thread waited while others had the core, plus what
// ksoftirqd had of it, which takes packets over from a thread that has had many.
// On an idle machine that is the time that passed. It is not the thread's CPU
// time, which lacks the packets where the kernel accounts for softirqs
// separately (CONFIG_IRQ_TIME_ACCOUNTING).
type clock struct {
	schedstat string // of the thread
	helpers   []int  // processes on the path
	began     moment
}

// A moment is what a clock has read at once.
type moment struct {
	at      time.Time
	waited  time.Duration // by the thread, for the core
	helpers time.Duration // CPU time
}

// newClock starts a clock for the calling thread, which must be locked.
func newClock(helpers []int) (c clock, err error) {
	c = clock{schedstat: fmt.Sprintf("/proc/self/task/%d/schedstat", unix.Gettid()), helpers: helpers}
	c.began, err = c.read()
	return c, err
}

// worked is how much of the time that passed was the path's.
func (c clock) worked() (time.Duration, error) {
	now, err := c.read()
	return now.at.Sub(c.began.at) - (now.waited - c.began.waited) + (now.helpers - c.began.helpers), err
}

// read reads again until the thread did not have to wait meanwhile: a wait must
// be in the time and in the sum of waits, or in neither.
func (c clock) read() (r moment, err error) {
	for {
		if r.waited, err = c.waited(); err != nil {
			return r, err
		}
		r.helpers = 0
		for _, pid := range c.helpers {
			used, err := measure.CPUTime(pid)
			if err != nil {
				return r, err
			}
			r.helpers += used
		}
		r.at = time.Now()
		if again, err := c.waited(); err != nil || again == r.waited {
			return r, err
		}
	}
}

func (c clock) waited() (time.Duration, error) {
	text, err := os.ReadFile(c.schedstat)
	if err != nil {
		return 0, err
	}
	d, err := runDelay(string(text))
	if err != nil {
		return 0, fmt.Errorf("%s: %w", c.schedstat, err)
	}
	return d, nil
}

// runDelay is the second field of schedstat, nanoseconds on a run queue (Linux,
// Documentation/scheduler/sched-stats.rst).
func runDelay(schedstat string) (time.Duration, error) {
	fields := strings.Fields(schedstat)
	if len(fields) != 3 {
		return 0, fmt.Errorf("%q are not three fields", schedstat)
	}
	ns, err := strconv.ParseInt(fields[1], 10, 64)
	return time.Duration(ns), err
}
