package main

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/measure"
)

// urgency is the nice value of everything that is measured, so that other
// programs on the core disturb less.
const urgency = -15

// autogroup matches /proc/PID/autogroup, as in "/autogroup-123 nice 0".
var autogroup = regexp.MustCompile(`^/autogroup-\d+ nice (-?\d+)\n?$`)

// hurry gives a process, or rather its session, urgency: with autogroups a nice
// value counts among the processes of one session, and sessions have values of
// their own (sched(7), "The autogroup feature"). calm takes it back.
func hurry(pid int) (calm func(), err error) {
	name := fmt.Sprintf("/proc/%d/autogroup", pid)
	text, err := os.ReadFile(name)
	switch {
	case errors.Is(err, os.ErrNotExist): // the kernel has none
		return func() {}, unix.Setpriority(unix.PRIO_PROCESS, pid, urgency)
	case err != nil:
		return nil, err
	}
	before := autogroup.FindSubmatch(text)
	if before == nil {
		return nil, fmt.Errorf("%s: %q is not understood", name, text)
	}
	if err := os.WriteFile(name, []byte(strconv.Itoa(urgency)), 0); err != nil {
		return nil, err
	}
	return func() { _ = os.WriteFile(name, before[1], 0) }, nil
}

// A meter tells what a window of time cost. The core's work is the CPU time of
// all that takes part: this program, the balancer, and the kernel's softirq
// thread of the core. Packets are in it, since the kernel charges softirqs to
// whom they interrupt (without CONFIG_IRQ_TIME_ACCOUNTING).
type meter struct {
	balancer []int // its processes
	softirqd int
}

// A reading is what is known at one moment.
type reading struct {
	at             time.Time
	core, balancer time.Duration // CPU time
}

func (m *meter) read() (r reading, err error) {
	for _, pid := range m.balancer {
		used, err := measure.CPUTime(pid)
		if err != nil {
			return r, err
		}
		r.balancer += used
	}
	r.core = r.balancer
	for _, pid := range []int{os.Getpid(), m.softirqd} {
		used, err := measure.CPUTime(pid)
		if err != nil {
			return r, err
		}
		r.core += used
	}
	r.at = time.Now()
	return r, nil
}

// A window is what was done in a time.
type window struct {
	done   float64 // connections or bytes
	passed time.Duration
	// core and balancer are CPU time; the former has the latter in it.
	core, balancer time.Duration
}

func (r reading) until(now reading, done float64) window {
	return window{done, now.at.Sub(r.at), now.core - r.core, now.balancer - r.balancer}
}

func (w *window) add(o window) {
	w.done += o.done
	w.passed += o.passed
	w.core += o.core
	w.balancer += o.balancer
}

// rate is per second that the core worked.
func (w window) rate() float64 { return w.done / w.core.Seconds() }

// wall is per second that passed.
func (w window) wall() float64 { return w.done / w.passed.Seconds() }

// cost is the balancer's microseconds for each thing done.
func (w window) cost() float64 { return w.balancer.Seconds() * 1e6 / w.done }
