package main

import (
	"os"
	"runtime"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestRunDelay(t *testing.T) {
	for _, c := range []struct {
		text string
		want time.Duration
		ok   bool
	}{
		{"52 1500 3\n", 1500, true},
		{"0 0 0\n", 0, true},
		{"52 1500\n", 0, false},
		{"52 much 3\n", 0, false},
		{"", 0, false},
	} {
		got, err := runDelay(c.text)
		if got != c.want || (err == nil) != c.ok {
			t.Errorf("%q: %v, %v", c.text, got, err)
		}
	}
}

func TestCPUTime(t *testing.T) {
	var own unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &own); err != nil {
		t.Fatal(err)
	}
	got, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if got < time.Duration(own.Nano()) {
		t.Errorf("%v by the process id, and %v before that by the process' own clock", got, time.Duration(own.Nano()))
	}
	// Beyond the kernel's greatest (PID_MAX_LIMIT is 1<<22).
	if _, err := cpuTime(1<<22 + 1); err == nil {
		t.Error("a process that cannot be has used CPU time")
	}
}

func TestKsoftirqd(t *testing.T) {
	pid, err := ksoftirqd(0)
	if err != nil {
		t.Fatal(err)
	}
	if name, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/comm"); err != nil || string(name) != "ksoftirqd/0\n" {
		t.Errorf("%d is %q, %v", pid, name, err)
	}
	if _, err := ksoftirqd(1 << 20); err == nil {
		t.Error("found that of a core that is not there")
	}
}

func TestLast(t *testing.T) {
	for _, cores := range [][]int{{0}, {0, 1}, {2, 65}} {
		var s unix.CPUSet
		for _, n := range cores {
			s.Set(n)
		}
		if got, want := last(&s), cores[len(cores)-1]; got != want {
			t.Errorf("%v: %d", cores, got)
		}
	}
}

// TestClockCountsNoMoreThanWhatPassed has no helpers, so that the correction
// can only be a subtraction.
func TestClockCountsNoMoreThanWhatPassed(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	c, err := newClock(nil)
	if err != nil {
		t.Fatal(err)
	}
	passed, worked, err := c.elapsed()
	if err != nil || worked > passed {
		t.Errorf("worked %v of %v, %v", worked, passed, err)
	}
}
