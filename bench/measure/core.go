// Package measure has what the benchmarks, and in part the demo, share: networks,
// the sockets and batches by which one thread is both sides of the traffic, nlb
// and other programs that run meanwhile, one core for everything, the CPU time
// that processes have had, summaries of rounds, and reports.
package measure

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// pinned is in the environment of a process that has been given its core.
const pinned = "NLB_BENCH_CORE"

// Pin confines this program, and with it all that it starts, to one core, and
// returns its number; for -1, the last one allowed. It executes the program
// anew, because affinity belongs to threads and a Go program has several before
// main begins; a thread's affinity outlives execve(2). So main calls it before
// anything that must not happen twice. It is an error if the program may not run
// on that core.
func Pin(core int) (int, error) {
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

// CPUTime is the CPU time of a process, all its threads together, also those
// that have ended. The clock's number is made as by clock_getcpuclockid(3). It
// is an error if there is no such process.
func CPUTime(pid int) (time.Duration, error) {
	const cpuclockSched = 2
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|cpuclockSched), &ts); err != nil {
		return 0, fmt.Errorf("CPU time of process %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}

// Ksoftirqd is the process that does a core's softirqs when they are many. It is
// an error if there is none, as on a core that the machine does not have.
func Ksoftirqd(core int) (pid int, err error) {
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
