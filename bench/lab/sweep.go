package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	namesDir   = "/run/netns" // iproute2's, see ip-netns(8)
	namePrefix = "nlb-"
	// keptPrefix begins the names of namespaces that outlive their process. What
	// follows is as in other names.
	keptPrefix = "nlbkept-"
)

// prepareNames makes the folder of names ready the way `ip netns add` does: a
// shared mount, so that a name removed here is gone from every mount namespace
// and its network namespace can end. Had iproute2 to do that later, its mount
// would cover our names and they could not be removed.
func prepareNames() error {
	if err := os.MkdirAll(namesDir, 0o755); err != nil {
		return err
	}
	dir, err := os.Open(namesDir)
	if err != nil {
		return err
	}
	defer dir.Close()
	// The same lock as iproute2's, against a second mount by another process.
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", namesDir, err)
	}
	share := func() error { return unix.Mount("", namesDir, "none", unix.MS_SHARED|unix.MS_REC, "") }
	if err := share(); !errors.Is(err, unix.EINVAL) {
		return err
	}
	// EINVAL: not a mount point yet.
	if err := unix.Mount(namesDir, namesDir, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("mount %s: %w", namesDir, err)
	}
	return share()
}

// Sweep removes the namespaces of labs whose process is dead, with all that
// still runs in them, and returns their names. New calls it.
func Sweep() ([]string, error) { return sweep(namePrefix) }

// SweepKept is Sweep for the namespaces that Options.Keep spared.
func SweepKept() ([]string, error) { return sweep(keptPrefix) }

func sweep(prefix string) ([]string, error) {
	entries, err := os.ReadDir(namesDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var stale []string
	for _, e := range entries {
		if pid, ok := ownerOf(e.Name(), prefix); ok && dead(pid) {
			stale = append(stale, e.Name())
		}
	}
	if len(stale) == 0 {
		return nil, nil
	}
	return stale, removeNamespaces(stale)
}

// ownerOf parses <prefix><pid>-<random>-<node>.
func ownerOf(name, prefix string) (pid int, ok bool) {
	rest, ok := strings.CutPrefix(name, prefix)
	parts := strings.Split(rest, "-")
	if !ok || len(parts) != 3 {
		return 0, false
	}
	pid, err := strconv.Atoi(parts[0])
	return pid, err == nil && pid > 0
}

func dead(pid int) bool { return errors.Is(unix.Kill(pid, 0), unix.ESRCH) }

// removeNamespaces kills what runs in the namespaces and removes their names.
// A name that is gone already is no error.
//
// It kills twice. What is started in the meantime looks for the name once it is
// inside (see enter), so it either finds it gone or is found here.
func removeNamespaces(names []string) error {
	var spaces []os.FileInfo
	for _, name := range names {
		f, err := os.Open(filepath.Join(namesDir, name))
		if err != nil {
			continue
		}
		// Held open to the end, or a new namespace might get this one's inode
		// number and its processes be killed.
		defer f.Close()
		if fi, err := f.Stat(); err == nil {
			spaces = append(spaces, fi)
		}
	}
	errs := []error{killIn(spaces)}
	for _, name := range names {
		errs = append(errs, removeName(filepath.Join(namesDir, name)))
	}
	return errors.Join(append(errs, killIn(spaces))...)
}

func removeName(path string) error {
	// EINVAL: a name without a namespace, such as one that a mount namespace took with it.
	err := unix.Unmount(path, unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

const killTimeout = 5 * time.Second

// killIn kills the processes in the namespaces until none is left.
func killIn(spaces []os.FileInfo) error {
	for end := time.Now().Add(killTimeout); ; time.Sleep(2 * time.Millisecond) {
		left, err := killOnce(spaces)
		if err != nil || len(left) == 0 {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("processes %v survived SIGKILL for %v", left, killTimeout)
		}
	}
}

// killOnce kills each process in one of the namespaces and returns their ids.
func killOnce(spaces []os.FileInfo) (pids []int, err error) {
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, e := range procs {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() || !inside(pid, spaces) {
			continue
		}
		// The handle is a pidfd. With one in hand, looking again proves that
		// the id has not passed to another process.
		p, err := os.FindProcess(pid)
		if err != nil {
			continue
		}
		if inside(pid, spaces) {
			_ = p.Kill()
			pids = append(pids, pid)
		}
		_ = p.Release()
	}
	return pids, nil
}

func inside(pid int, spaces []os.FileInfo) bool {
	// A zombie has no namespace any more, so this is an error for it.
	fi, err := os.Stat(fmt.Sprintf("/proc/%d/ns/net", pid))
	return err == nil && slices.ContainsFunc(spaces, func(s os.FileInfo) bool { return os.SameFile(s, fi) })
}
