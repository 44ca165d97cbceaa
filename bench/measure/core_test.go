package measure

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pinVariable is in the environment of a process that pins itself and prints
// the core and how many it may run on.
const pinVariable = "NLB_BENCH_MEASURE_TEST_PIN"

func TestMain(m *testing.M) {
	if _, ok := os.LookupEnv(pinVariable); ok {
		core, err := Pin(-1)
		var allowed unix.CPUSet
		if err == nil {
			err = unix.SchedGetaffinity(os.Getpid(), &allowed)
		}
		fmt.Println(core, allowed.Count(), allowed.IsSet(core), err)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestPin(t *testing.T) {
	var allowed unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), pinVariable+"=")
	got, err := cmd.CombinedOutput()
	if want := fmt.Sprintln(last(&allowed), 1, true, nil); err != nil || string(got) != want {
		t.Errorf("%q, %v; want %q", got, err, want)
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

func TestCPUTime(t *testing.T) {
	var own unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &own); err != nil {
		t.Fatal(err)
	}
	got, err := CPUTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if got < time.Duration(own.Nano()) {
		t.Errorf("%v by the process id, and %v before that by the process' own clock", got, time.Duration(own.Nano()))
	}
	// Beyond the kernel's greatest (PID_MAX_LIMIT is 1<<22).
	if _, err := CPUTime(1<<22 + 1); err == nil {
		t.Error("a process that cannot be has used CPU time")
	}
}

func TestKsoftirqd(t *testing.T) {
	pid, err := Ksoftirqd(0)
	if err != nil {
		t.Fatal(err)
	}
	if name, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/comm"); err != nil || string(name) != "ksoftirqd/0\n" {
		t.Errorf("%d is %q, %v", pid, name, err)
	}
	if _, err := Ksoftirqd(1 << 20); err == nil {
		t.Error("found that of a core that is not there")
	}
}
