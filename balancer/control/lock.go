package control

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"nlb/balancer"
)

// ErrHeld is wrapped when another process has the lock.
var ErrHeld = errors.New("held by another process")

// A Lock keeps a second daemon away from a folder or a socket. The kernel
// releases it when its process ends, however it ends.
type Lock struct{ file *os.File }

// Acquire takes the lock file at path, and makes it and its folder if need be.
// It does not wait: an error that matches ErrHeld names the holder. The file is
// never removed, because a process could then lock what is no longer there.
func Acquire(path string) (*Lock, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	f, err := openLock(path)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	if err := lock(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &Lock{file: f}, nil
}

// openLock opens the file, or makes it its folder's owner's. It follows no link:
// root asks for locks in the folders of the daemon's user.
func openLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	}
	if err != nil {
		return nil, err
	}
	if err := balancer.GiveToFolder(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func lock(f *os.File) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("lock: %s is %w (pid %s)", f.Name(), ErrHeld, holder(f))
	}
	if err != nil {
		return fmt.Errorf("lock: flock %s: %w", f.Name(), err)
	}
	if err := f.Truncate(0); err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	if _, err := f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0); err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	return nil
}

func holder(f *os.File) string {
	var text [20]byte
	n, _ := f.ReadAt(text[:], 0) // an unreadable name is only a lesser message
	if pid := strings.TrimSpace(string(text[:n])); pid != "" {
		return pid
	}
	return "unknown"
}

// Release lets the next one in.
func (l *Lock) Release() error { return l.file.Close() }
