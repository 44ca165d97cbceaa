package vm

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// runner is the argument with which init starts itself a second time.
const runner = "run-job"

// InGuest reports whether this process is a guest's /init, which calls Guest
// and nothing else.
func InGuest() bool {
	return os.Getpid() == 1 || len(os.Args) == 2 && os.Args[0] == initPath && os.Args[1] == runner
}

// Guest is what /init does. It ends with the machine.
func Guest() {
	if os.Getpid() != 1 {
		if err := runJob(); err != nil {
			fmt.Fprintln(os.Stderr, "init:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if err := initialize(); err != nil {
		// The port may be what failed: this goes to the console.
		fmt.Println("init:", err)
	}
	unix.Sync()
	// QEMU runs with -no-reboot and ends here.
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

// initialize prepares the machine, and then is what the first process has to
// be: the parent of orphans, of whom no zombies may remain for a test to see.
func initialize() error {
	job, err := readJob()
	if err != nil {
		return err
	}
	for _, m := range []struct{ kind, where, data string }{
		{"proc", "/proc", ""}, {"sysfs", "/sys", ""}, {"devtmpfs", "/dev", ""},
		{"devpts", "/dev/pts", ""}, {"tmpfs", "/dev/shm", ""}, {"tmpfs", "/run", "mode=755"},
	} {
		if err := os.MkdirAll(m.where, 0o755); err != nil {
			return err
		}
		// The kernel may have mounted devtmpfs itself: EBUSY.
		if err := unix.Mount(m.kind, m.where, m.kind, 0, m.data); err != nil && err != unix.EBUSY {
			return fmt.Errorf("mount %s on %s: %w", m.kind, m.where, err)
		}
	}
	for _, file := range job.Modules {
		if err := load(file); err != nil {
			return err
		}
	}
	now := unix.NsecToTimespec(job.Time.UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &now); err != nil {
		return fmt.Errorf("set the clock: %w", err)
	}
	if err := unix.Sethostname([]byte("guest")); err != nil {
		return fmt.Errorf("set the host's name: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return fmt.Errorf("bring the loopback up: %w", err)
	}
	child, err := os.StartProcess(initPath, []string{initPath, runner}, &os.ProcAttr{
		Env: job.Env, Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
	})
	if err != nil {
		return err
	}
	for {
		pid, err := unix.Wait4(-1, nil, 0, nil)
		if pid == child.Pid {
			return nil
		}
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("wait for the job: %w", err)
		}
	}
}

func readJob() (*job, error) {
	text, err := os.ReadFile(jobPath)
	if err != nil {
		return nil, err
	}
	var j job
	return &j, json.Unmarshal(text, &j)
}

func load(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
		return fmt.Errorf("load %s: %w", file, err)
	}
	return nil
}

// loopbackUp is netdevice(7)'s way, so that init needs no netlink.
func loopbackUp() error {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(socket)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(socket), unix.SIOCSIFFLAGS, uintptr(unsafe.Pointer(lo)))
	if errno != 0 {
		return errno
	}
	return nil
}

// runJob runs the programs of the job, one after the other.
func runJob() error {
	job, err := readJob()
	if err != nil {
		return err
	}
	port, err := openPort()
	if err != nil {
		return err
	}
	out := NewFrameWriter(port)
	for _, r := range job.Runs {
		status, err := runOne(out, r)
		if err != nil {
			return errors.Join(err, out.Write(Broken, []byte(err.Error())))
		}
		if err := out.Write(Exit, strconv.AppendInt(nil, int64(status), 10)); err != nil {
			return err
		}
	}
	return out.Write(Done, nil)
}

// openPort opens the port by its name in /sys. Its device comes into being a
// moment after its driver.
func openPort() (*os.File, error) {
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, name := range names {
			text, err := os.ReadFile(name)
			if err != nil || string(text) != portName+"\n" {
				continue
			}
			device := "/dev/" + filepath.Base(filepath.Dir(name))
			fd, err := unix.Open(device, unix.O_WRONLY|unix.O_CLOEXEC, 0)
			if err == nil {
				return os.NewFile(uintptr(fd), device), nil
			}
		}
		if time.Now().After(deadline) {
			return nil, errors.New("there is no virtio port for the results")
		}
	}
}

// runOne runs one program, sends what it writes and what it leaves in OutDir,
// and ends all that it started.
func runOne(out *FrameWriter, r guestRun) (status int, err error) {
	if err := os.MkdirAll(OutDir, 0o755); err != nil {
		return 0, err
	}
	for _, name := range r.Folders {
		if err := os.MkdirAll(filepath.Join(OutDir, name), 0o755); err != nil {
			return 0, err
		}
	}
	cmd := exec.Command(r.Path, r.Args...)
	cmd.Dir = r.Dir
	cmd.Stdout, cmd.Stderr = out.As(Stdout), out.As(Stderr)
	// A process that was left behind may hold our pipes open.
	cmd.WaitDelay = time.Second
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil || errors.As(err, &exit) || errors.Is(err, exec.ErrWaitDelay):
		status = exitStatus(cmd.ProcessState)
	default:
		return 0, err
	}
	// All but the first process and this one (kill(2)).
	if err := unix.Kill(-1, unix.SIGKILL); err != nil && err != unix.ESRCH {
		return 0, fmt.Errorf("kill what %s left behind: %w", r.Path, err)
	}
	if err := sendFiles(out); err != nil {
		return 0, err
	}
	return status, os.RemoveAll(OutDir)
}

// exitStatus is a shell's: 128 and the signal's number for who was killed.
func exitStatus(state *os.ProcessState) int {
	if ws, ok := state.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return state.ExitCode()
}

func sendFiles(out *FrameWriter) error {
	return filepath.WalkDir(OutDir, func(name string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(OutDir, name)
		if err != nil {
			return err
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		to := out.File(rel)
		// An empty file is one frame as well.
		if _, err := to.Write(nil); err != nil {
			return err
		}
		_, err = io.Copy(to, f)
		return err
	})
}
