package vm

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Machine is a guest to be: it boots, runs programs and is gone.
type Machine struct {
	Kernel *Kernel
	Tools  []string // programs of the host to take along, apart from the usual ones
	Files  []string // files and folders of the host to take along, at their paths
	Memory int      // MiB; 0: 1024
	CPUs   int      // 0: 1
	// Counting makes the guest's clock count instructions: each takes one
	// nanosecond, and time in which there is nothing to do takes none of ours. What
	// a program measures is then the same on every host, however busy that is. It
	// is slower, and for one processor.
	Counting bool
}

// A Run is a test binary to run in a guest.
type Run struct {
	Binary string   // statically linked
	Dir    string   // its folder; goes along, and testdata below it
	Args   []string // as go test has them; see Rewrite
}

// A Result is how a run ended.
type Result struct {
	Status   int // exit status; 128 and the signal's number for who was killed
	Duration time.Duration
}

// passed are the variables of this process's environment that programs in the
// guest get as well: those of Go, and that long tests are wanted.
var passed = []string{"GODEBUG", "GOTRACEBACK", "GOMAXPROCS", "NLB_LONG"}

// Do boots the machine and runs the programs in order, with their output going
// to the writers as it comes. After each, end is called with its index and how
// it ended.
//
// The error says why not all of them ran: it wraps ErrNoExit when the guest
// ended too early, and has the console's text then. It wraps the context's cause
// if that is done, whatever was under way. The guest is gone in any case.
func (m *Machine) Do(ctx context.Context, runs []Run, stdout, stderr io.Writer, end func(int, Result)) (err error) {
	defer func() {
		if err != nil && ctx.Err() != nil {
			err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}()
	dir, err := os.MkdirTemp("", "nlb-vm-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	arguments := make([]Arguments, len(runs))
	for i, r := range runs {
		arguments[i] = Rewrite(r.Args, r.Dir)
	}
	initrd := filepath.Join(dir, "initrd")
	if err := m.writeInitrd(ctx, initrd, runs, arguments); err != nil {
		return fmt.Errorf("make the initramfs: %w", err)
	}
	console := filepath.Join(dir, "console")
	stream, stop, err := m.start(ctx, initrd, console)
	if err != nil {
		return err
	}
	r := &receiver{arguments: arguments, stdout: stdout, stderr: stderr, end: end, begun: time.Now()}
	err = r.receive(stream)
	// All results are here, or nothing will come: there's nothing to wait for.
	said := stop(err == nil)
	if err != nil {
		text, _ := os.ReadFile(console)
		err = fmt.Errorf("%w\n%s--- console\n%s", err, said, bytes.TrimSpace(text))
	}
	return err
}

// commandLine is the kernel's command line. Each word has its reason.
func (m *Machine) commandLine() string {
	words := []string{
		"console=ttyS0",
		"quiet",           // a serial line is slow; errors and worse are still printed
		"panic=-1",        // a panic restarts at once, and
		"reboot=t",        // a restart by triple fault ends QEMU; without it the guest would hang
		"mitigations=off", // an emulated processor has no such bugs
		"nokaslr",
		"rdinit=" + initPath,
	}
	// Measuring the rate of the processor's time stamps hangs about half the
	// boots on a busy host, so it is told one.
	if !m.Counting {
		// That isn't the host's, and the kernel's watchdog would find out after a
		// while: timer ticks are the clock from the start.
		return strings.Join(append(words, "tsc_early_khz=2000000", "clocksource=jiffies"), " ")
	}
	return strings.Join(append(words,
		// A time stamp is the number of instructions so far, 10⁹ a second.
		"tsc_early_khz=1000000", "tsc=reliable", "clocksource=tsc",
		// Zeroing each new page is a loop of single instructions here; servers
		// have one instruction for it. So is what follows.
		"init_on_alloc=0",
		"clearcpuid=112", // X86_FEATURE_REP_GOOD: string instructions count each round
	), " ")
}

// qemuArgs are QEMU's arguments. Debian's kernels don't boot under KVM within
// some clouds: this emulates always, so that all machines do the same.
func (m *Machine) qemuArgs(initrd, console string) []string {
	args := []string{
		"-M", "microvm", "-accel", "tcg,tb-size=256",
		"-smp", fmt.Sprint(orDefault(m.CPUs, 1)), "-m", fmt.Sprint(orDefault(m.Memory, 1024)),
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-kernel", m.Kernel.Image, "-initrd", initrd, "-append", m.commandLine(),
		"-serial", "file:" + console,
		// Not "stdio": the end of standard input would disconnect the port,
		// and the guest would wait for ever to write to it.
		"-chardev", "file,id=results,path=/dev/stdout",
		"-device", "virtio-serial-device",
		"-device", "virtserialport,chardev=results,name=" + portName,
	}
	if m.Counting {
		// As with clearcpuid, for copies and for filling memory.
		args = append(args, "-cpu", "max,-erms,-fsrm", "-icount", "shift=0,sleep=off")
	}
	return args
}

func orDefault(n, or int) int {
	if n == 0 {
		return or
	}
	return n
}

// start starts QEMU. The stream is what comes out of the guest's port; it ends
// with the guest, or with ctx. Stop ends QEMU and returns what it said, which
// matters only if it wasn't asked to end.
func (m *Machine) start(ctx context.Context, initrd, console string) (stream io.Reader, stop func(asked bool) string, err error) {
	var said bytes.Buffer
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", m.qemuArgs(initrd, console)...)
	cmd.Stderr = &said
	// It must not outlive us, however we end. The signal fires when the
	// thread ends that started it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL, Setpgid: true}
	runtime.LockOSThread()
	stream, err = cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		runtime.UnlockOSThread()
		return nil, nil, fmt.Errorf("start the guest (Debian package qemu-system-x86): %w", err)
	}
	return stream, func(asked bool) string {
		defer runtime.UnlockOSThread()
		_ = cmd.Process.Kill()
		err := cmd.Wait()
		if asked || err == nil || cmd.ProcessState.Sys().(syscall.WaitStatus).Signaled() {
			return said.String()
		}
		return fmt.Sprintf("%sqemu-system-x86_64: %v\n", &said, err)
	}, nil
}

// writeInitrd writes the base, followed by what belongs to these runs.
func (m *Machine) writeInitrd(ctx context.Context, name string, runs []Run, arguments []Arguments) error {
	base, err := buildBase(ctx, m.Kernel, m.Tools)
	if err != nil {
		return err
	}
	tree := make(Tree)
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := addStatic(tree, initPath, self); err != nil {
		return err
	}
	j := job{
		Time: time.Now(), Modules: base.modules,
		Env: []string{
			"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "TMPDIR=/tmp", "LANG=C.UTF-8",
			EnvKernel + "=" + m.Kernel.Series,
		},
	}
	for _, name := range passed {
		if value, ok := os.LookupEnv(name); ok {
			j.Env = append(j.Env, name+"="+value)
		}
	}
	for i, r := range runs {
		path := fmt.Sprintf("/vm/%d/%s", i, filepath.Base(r.Binary))
		if err := addStatic(tree, path, r.Binary); err != nil {
			return err
		}
		if err := addFolder(tree, r.Dir); err != nil {
			return err
		}
		run := guestRun{Path: path, Dir: "/" + clean(r.Dir), Args: arguments[i].Args}
		for name := range arguments[i].Folders {
			run.Folders = append(run.Folders, name)
		}
		j.Runs = append(j.Runs, run)
	}
	for _, file := range m.Files {
		if err := addAll(tree, file); err != nil {
			return err
		}
	}
	text, err := json.Marshal(j)
	if err != nil {
		return err
	}
	tree.File(jobPath, 0o644, text)

	out, err := os.Create(name)
	if err != nil {
		return err
	}
	in, err := os.Open(base.file)
	if err == nil {
		_, err = io.Copy(out, in)
		err = errors.Join(err, in.Close())
	}
	if err == nil {
		err = tree.Encode(out)
	}
	return errors.Join(err, out.Close())
}

// addStatic adds a program that needs no libraries: the guest has none for it.
func addStatic(tree Tree, to, file string) error {
	content, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	needs, err := dynamic(content)
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", file, err)
	case needs:
		return fmt.Errorf("%s needs shared libraries: build it with CGO_ENABLED=0 (and without -race)", file)
	}
	tree.File(to, 0o755, content)
	return nil
}

// dynamic says whether a program needs shared libraries: it names the dynamic
// linker that finds them then (elf(5), PT_INTERP). It is an error if this is no ELF
// file.
func dynamic(program []byte) (bool, error) {
	file, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(file.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }), nil
}

// addFolder adds a folder's own files, and its testdata with all below.
func addFolder(tree Tree, dir string) error {
	tree.Dir(dir, 0o755)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		switch name := filepath.Join(dir, e.Name()); {
		case e.IsDir() && e.Name() != "testdata":
		// A test binary lies there after go test -c; nobody opens it.
		case strings.HasSuffix(e.Name(), ".test"):
		default:
			if err := addAll(tree, name); err != nil {
				return err
			}
		}
	}
	return nil
}

// addAll adds a file, or a folder and all below it.
func addAll(tree Tree, name string) error {
	name, err := filepath.Abs(name)
	if err != nil {
		return err
	}
	return filepath.WalkDir(name, func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		switch {
		case e.IsDir():
			tree.Dir(name, uint32(info.Mode().Perm()))
		case e.Type().IsRegular():
			content, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			tree.File(name, info.Mode(), content)
		case e.Type() == fs.ModeSymlink:
			target, err := os.Readlink(name)
			if err != nil {
				return err
			}
			tree.Link(name, target)
		}
		return nil
	})
}
