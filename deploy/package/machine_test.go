package packaging_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nlb/internal/wait"
)

// A machine is a set of namespaces whose first process is systemd. Its root folder
// is an overlay over this machine's, or over the one that NLB_PACKAGE_ROOT names.
type machine struct{ pid int }

// patience bounds every wait.
const patience = 60 * time.Second

// boot starts a machine, which ends with the test.
func boot(t *testing.T) machine {
	t.Helper()
	if filesystems := string(readFile(t, "/proc/filesystems")); !strings.Contains(filesystems, "\toverlay\n") || !strings.Contains(filesystems, "\tcgroup2\n") {
		t.Skip("this kernel lacks overlayfs or control groups of version 2")
	}
	folder, group := t.TempDir(), fmt.Sprintf("nlb-package-%d-%d", os.Getpid(), time.Now().UnixNano())
	below := "/"
	if r := os.Getenv("NLB_PACKAGE_ROOT"); r != "" {
		below = r
	}
	script, err := filepath.Abs("testdata/boot")
	if err != nil {
		t.Fatal(err)
	}
	output, err := os.Create(filepath.Join(t.TempDir(), "output"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = output.Close() }() // the machine has its own
	said := func() string { return string(readFile(t, output.Name())) }
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "--pid", "--net", "--uts", "--ipc", "--fork", "--kill-child",
		script, folder, group, below)
	cmd.Stdout, cmd.Stderr = output, output
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error), make(chan struct{})
	go func() {
		// The kernel takes the end of the thread that started it for our end.
		runtime.LockOSThread()
		defer close(ended)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // it is killed
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
		removeGroup(t, group)
	})
	var m machine
	wait.For(t, patience, "the machine to be up", func() error {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", cmd.Process.Pid))
		if err != nil {
			return fmt.Errorf("%w: %s", err, said())
		}
		if m.pid, err = strconv.Atoi(strings.TrimSpace(string(children))); err != nil {
			return fmt.Errorf("it has not begun: %s", said())
		}
		// Degraded is one where a unit of this machine failed, which is not our business.
		state, err := m.try("systemctl", "is-system-running")
		if state := strings.TrimSpace(state); state != "running" && state != "degraded" {
			return fmt.Errorf("%s, %w: %s", state, err, said())
		}
		return nil
	})
	return m
}

// removeGroup removes a control group and those below it, once the kernel has
// buried their processes.
func removeGroup(t *testing.T, name string) {
	t.Helper()
	const script = `mount -t cgroup2 cgroup2 "$1" && find "$1/$2" -depth -type d -exec rmdir {} +`
	wait.For(t, patience, "the control group to be empty", func() error {
		out, err := exec.Command("unshare", "--mount", "sh", "-c", script, "sh", t.TempDir(), name).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

func (m machine) command(words ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--target", strconv.Itoa(m.pid), "--all", "--"}, words...)...)
}

// try runs a command in the machine and returns all that it prints.
func (m machine) try(words ...string) (string, error) {
	out, err := m.command(words...).CombinedOutput()
	return string(out), err
}

// run is try for what has to succeed.
func (m machine) run(t *testing.T, words ...string) string {
	t.Helper()
	out, err := m.try(words...)
	if err != nil {
		journal, _ := m.try("journalctl", "--no-pager", "-n", "60", "-u", "nlb", "-u", "nlb-relay")
		t.Fatalf("%s: %v\n%s\njournal:\n%s", strings.Join(words, " "), err, out, journal)
	}
	return out
}

// path is where we find a file of the machine.
func (m machine) path(name string) string {
	return filepath.Join("/proc", strconv.Itoa(m.pid), "root", name)
}

// take copies a file of ours to /srv in the machine and returns its name there.
func (m machine) take(t *testing.T, file string) string {
	t.Helper()
	name := filepath.Join("/srv", filepath.Base(file))
	m.write(t, name, readFile(t, file), 0o755)
	return name
}

func (m machine) write(t *testing.T, name string, content []byte, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(m.path(name)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.path(name), content, mode); err != nil {
		t.Fatal(err)
	}
}

// property asks systemd about a unit.
func (m machine) property(t *testing.T, unit, name string) string {
	t.Helper()
	return strings.TrimSpace(m.run(t, "systemctl", "show", "--value", "--property", name, unit))
}

// status is a line of /proc/PID/status of the unit's main process.
func (m machine) status(t *testing.T, unit, name string) string {
	t.Helper()
	text := m.run(t, "cat", "/proc/"+m.property(t, unit, "MainPID")+"/status")
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.Join(strings.Fields(value), " ")
		}
	}
	t.Fatalf("the main process of %s has no %s:\n%s", unit, name, text)
	return ""
}

// capabilities are the bits of CapEff and others.
func capabilities(all ...int) string {
	var bits uint64
	for _, c := range all {
		bits |= 1 << c
	}
	return fmt.Sprintf("%016x", bits)
}

var daemonCapabilities = capabilities(unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_NET_BIND_SERVICE)
