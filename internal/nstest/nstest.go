// Package nstest runs a test binary in a network namespace of its own, for
// tests that program the kernel:
//
//	func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }
//
// The whole process is started inside the namespace. Moving into one later
// (setns(2)) moves a single thread, while goroutines go from thread to thread.
package nstest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// marker names the network namespace a re-executed test binary was started
// from, as /proc/self/ns/net shows it. A marker that a shell or a child process
// merely inherited is recognised, since it has to differ from the present one.
const marker = "NLB_NSTEST_OUTSIDE"

// Main runs the tests of m in a network namespace and a mount namespace that
// nobody else is in, and returns the exit code for TestMain. The namespace has
// nothing but its loopback, which is up, and /sys shows that namespace. Both
// vanish with the process.
//
// Outside such a namespace Main starts the same binary again inside one, with
// the same arguments, environment and standard streams, hands it the signals it
// gets, and returns its exit code, or 128 and the signal's number. The inner
// process is killed if the outer one dies.
//
// Without root there is no namespace to be had: Main says so and returns 1,
// because a skipped test would look like a passed one.
func Main(m *testing.M) int {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "nstest:", err)
		return 1
	}
	return code
}

func run(m *testing.M) (int, error) {
	here, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return 0, err
	}
	if outside := os.Getenv(marker); outside == "" || outside == here {
		return reexec(here)
	}
	if err := furnish(); err != nil {
		return 0, err
	}
	return m.Run(), nil
}

// reexec runs this binary in new namespaces and returns its exit code.
func reexec(here string) (int, error) {
	if os.Geteuid() != 0 {
		return 0, errors.New("a network namespace needs root: run these tests as root")
	}
	// PR_SET_PDEATHSIG fires when the *thread* that forked ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), marker+"="+here)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS,
		Pdeathsig:  unix.SIGKILL,
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGQUIT, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2)
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start the tests in a new network namespace: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case s := <-signals:
			// The process may have ended just now; its code says the rest.
			_ = cmd.Process.Signal(s)
		case err := <-ended:
			return exitCode(cmd.ProcessState, err)
		}
	}
}

func exitCode(state *os.ProcessState, err error) (int, error) {
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 0, fmt.Errorf("wait for the tests: %w", err)
	}
	if ws, ok := state.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal()), nil
	}
	return state.ExitCode(), nil
}

// furnish completes the namespaces that this process is in.
func furnish() error {
	// A slave mount tree keeps our mounts to ourselves, yet sees the host's
	// unmounts; a private one would keep every network namespace alive whose
	// name was mounted when the tests began.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make the mounts ours alone: %w", err)
	}
	// A fuzzing worker is a child of the tests and finds it mounted: EBUSY.
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil && err != unix.EBUSY {
		return fmt.Errorf("mount the namespace's /sys: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find the loopback: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring the loopback up: %w", err)
	}
	return nil
}
