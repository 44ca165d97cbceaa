package traffic

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
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	before, grouped, err := groupNice(text)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: %w", name, err)
	case !grouped:
		return hurryThreads(pid)
	}
	if err := os.WriteFile(name, []byte(strconv.Itoa(urgency)), 0); err != nil {
		return nil, err
	}
	return func() { _ = os.WriteFile(name, []byte(before), 0) }, nil
}

// groupNice reads the nice value of a session from its /proc/PID/autogroup,
// which is empty where the kernel has no autogroups, and in the group of the
// kernel's own that everything is in until somebody calls setsid(2).
func groupNice(text []byte) (nice string, grouped bool, err error) {
	if len(text) == 0 {
		return "", false, nil
	}
	found := autogroup.FindSubmatch(text)
	if found == nil {
		return "", false, fmt.Errorf("%q is not understood", text)
	}
	return string(found[1]), true, nil
}

// hurryThreads gives urgency to the threads of a process one by one: Linux has
// nice values of threads, and later threads inherit them (setpriority(2), "C
// library/kernel differences").
func hurryThreads(pid int) (calm func(), err error) {
	raw, err := unix.Getpriority(unix.PRIO_PROCESS, pid)
	if err != nil {
		return nil, err
	}
	before := 20 - raw // the system call's own form, which is never negative
	return func() { _ = reniceThreads(pid, before) }, reniceThreads(pid, urgency)
}

func reniceThreads(pid, nice int) error {
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return err
	}
	for _, t := range threads {
		id, err := strconv.Atoi(t.Name())
		if err != nil {
			return err
		}
		err = unix.Setpriority(unix.PRIO_PROCESS, id, nice)
		if err != nil && !errors.Is(err, unix.ESRCH) { // it has ended
			return err
		}
	}
	return nil
}

// A meter tells what a window of time cost. The core's work is the CPU time of
// all that takes part: this program, the balancer, and the kernel's softirq
// thread of the core. Packets are in it, where the kernel charges softirqs to
// whom they interrupt. Where it has them apart, the work is the time that passed:
// the core is never idle under load, but what other programs had is in it.
type meter struct {
	balancer []int // its processes
	softirqd int
	apart    bool // softirqs are
}

// newMeter makes the meter of a core. It is an error if there is no such core.
func newMeter(core int) (m meter, err error) {
	if m.apart, err = measure.SoftirqsApart(); err != nil {
		return m, err
	}
	m.softirqd, err = measure.Ksoftirqd(core)
	return m, err
}

// start is when all times are counted from.
var start = time.Now()

// read is the core's work until now.
func (m *meter) read() (sum time.Duration, err error) {
	if m.apart {
		return time.Since(start), nil
	}
	for _, pid := range append([]int{os.Getpid(), m.softirqd}, m.balancer...) {
		used, err := measure.CPUTime(pid)
		if err != nil {
			return 0, err
		}
		sum += used
	}
	return sum, nil
}

// A window is what was done by so much work of the core.
type window struct {
	done   float64 // connections, bytes or packets
	worked time.Duration
}

func (w *window) add(done float64, worked time.Duration) {
	w.done += done
	w.worked += worked
}

// rate is per second that the core worked.
func (w window) rate() float64 { return w.done / w.worked.Seconds() }

// cost is how much the core worked for each, in a unit.
func (w window) cost(unit time.Duration) float64 {
	return float64(w.worked) / float64(unit) / w.done
}
