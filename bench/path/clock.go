package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// pinned is in the environment of a process that has been given its core.
const pinned = "NLB_BENCH_PATH_CORE"

// pin confines this program, and with it all that it starts, to one core, and
// returns its number; for -1, the last one allowed. It executes the program
// anew, because affinity belongs to threads and a Go program has several before
// main begins; a thread's affinity outlives execve(2).
func pin(core int) (int, error) {
	if n, err := strconv.Atoi(os.Getenv(pinned)); err == nil {
		return n, nil
	}
	runtime.LockOSThread()
	var allowed, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		return 0, os.NewSyscallError("sched_getaffinity", err)
	}
	if core < 0 {
		core = last(&allowed)
	}
	one.Set(core)
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return 0, fmt.Errorf("core %d: %w", core, os.NewSyscallError("sched_setaffinity", err))
	}
	err := syscall.Exec("/proc/self/exe", os.Args, append(os.Environ(), fmt.Sprint(pinned, "=", core)))
	return 0, fmt.Errorf("execute itself: %w", err)
}

func last(s *unix.CPUSet) (core int) {
	for n, left := 0, s.Count(); left > 0; n++ {
		if s.IsSet(n) {
			core, left = n, left-1
		}
	}
	return core
}

// A clock tells how long the core worked on a path: the time that passed, less
// the time that the calling thread waited while others had the core, plus what
// ksoftirqd had of it, which takes packets over from a thread that has had many.
// On an idle machine that is the time that passed. It is not the thread's CPU
// time, which lacks the packets where the kernel accounts for softirqs
// separately (CONFIG_IRQ_TIME_ACCOUNTING).
type clock struct {
	schedstat string // of the thread
	helpers   []int  // processes on the path
	began     reading
}

// A reading is what is known at one moment.
type reading struct {
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

// elapsed is the time that passed, and how much of it was the path's.
func (c clock) elapsed() (passed, worked time.Duration, err error) {
	now, err := c.read()
	passed = now.at.Sub(c.began.at)
	return passed, passed - (now.waited - c.began.waited) + (now.helpers - c.began.helpers), err
}

// read reads again until the thread did not have to wait meanwhile: a wait must
// be in the time and in the sum of waits, or in neither.
func (c clock) read() (r reading, err error) {
	for {
		if r.waited, err = c.waited(); err != nil {
			return r, err
		}
		r.helpers = 0
		for _, pid := range c.helpers {
			used, err := cpuTime(pid)
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

// cpuTime is the CPU time of a process, all its threads together. The clock's
// number is made as by clock_getcpuclockid(3).
func cpuTime(pid int) (time.Duration, error) {
	const cpuclockSched = 2
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|cpuclockSched), &ts); err != nil {
		return 0, fmt.Errorf("CPU time of process %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}

// ksoftirqd is the process that does a core's softirqs when they are many.
func ksoftirqd(core int) (pid int, err error) {
	name := []byte(fmt.Sprintf("ksoftirqd/%d\n", core))
	files, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return 0, err
	}
	for _, f := range files {
		if text, err := os.ReadFile(f); err == nil && bytes.Equal(text, name) {
			return strconv.Atoi(filepath.Base(filepath.Dir(f)))
		}
	}
	return 0, errors.New("there is no " + string(bytes.TrimSpace(name)))
}
