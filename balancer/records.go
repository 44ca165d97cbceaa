package balancer

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Records is a file of the state folder that says what the kernel's settings were
// before they were ours. It holds for one boot and one network namespace:
// elsewhere there are no records.
type Records[R any] struct {
	// Dir is the state folder; "" keeps nothing.
	Dir, Name string
	// Check refuses what must not be written to the kernel.
	Check func(R) error
}

// recordsFile is the file's JSON form.
type recordsFile[R any] struct {
	Boot     string `json:"boot"`
	Netns    string `json:"netns"`
	Settings []R    `json:"settings"`
}

// A DamagedError says that a file is there and makes no sense.
type DamagedError struct {
	Path string
	Err  error
}

func (e *DamagedError) Error() string { return fmt.Sprintf("%s is damaged: %v", e.Path, e.Err) }
func (e *DamagedError) Unwrap() error { return e.Err }

func (r Records[R]) path() string { return filepath.Join(r.Dir, r.Name) }

// Load reads the records in the order in which they were stored. The error is a
// *DamagedError if the file makes no sense.
func (r Records[R]) Load() ([]R, error) {
	if r.Dir == "" {
		return nil, nil
	}
	b, err := os.ReadFile(r.path())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("load settings of before: %w", err)
	}
	boot, netns, err := here()
	if err != nil {
		return nil, fmt.Errorf("load settings of before: %w", err)
	}
	records, err := r.parse(b, boot, netns)
	if err != nil {
		return nil, &DamagedError{r.path(), err}
	}
	return records, nil
}

// parse reads what was stored in a boot and a namespace. Elsewhere it must make
// sense too.
func (r Records[R]) parse(b []byte, boot, netns string) ([]R, error) {
	var f recordsFile[R]
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, err
	}
	for _, s := range f.Settings {
		if err := r.Check(s); err != nil {
			return nil, err
		}
	}
	if f.Boot != boot || f.Netns != netns {
		return nil, nil
	}
	return f.Settings, nil
}

// Store replaces the records in one step, or removes the file when there are none.
// They are on disk when it returns. A file that is damaged is set aside.
func (r Records[R]) Store(records []R) error {
	if r.Dir == "" {
		return nil
	}
	if err := r.replace(records); err != nil {
		return fmt.Errorf("store settings of before: %w", err)
	}
	return nil
}

func (r Records[R]) replace(records []R) error {
	if err := r.setAside(); err != nil {
		return err
	}
	if len(records) == 0 {
		if err := os.Remove(r.path()); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	boot, netns, err := here()
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(recordsFile[R]{boot, netns, records}, "", "  ")
	if err != nil {
		return err
	}
	return WriteStateFile(r.Dir, r.Name, append(b, '\n'))
}

// setAside renames the file, if it is damaged, to a name that is free.
func (r Records[R]) setAside() error {
	_, err := r.Load()
	if _, damaged := errors.AsType[*DamagedError](err); !damaged {
		return err
	}
	aside := r.path() + ".damaged"
	for n := 2; ; n++ {
		err := unix.Renameat2(unix.AT_FDCWD, r.path(), unix.AT_FDCWD, aside, unix.RENAME_NOREPLACE)
		if !errors.Is(err, unix.EEXIST) {
			if err != nil {
				return fmt.Errorf("set %s aside: %w", r.path(), err)
			}
			return nil
		}
		aside = fmt.Sprintf("%s.damaged.%d", r.path(), n)
	}
}

// here names this boot and this network namespace. The namespace's cookie
// (SO_NETNS_COOKIE, Linux 5.14) is never used twice in one boot, unlike its
// inode number; older kernels have only the latter.
func here() (boot, netns string, err error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", "", err
	}
	boot = strings.TrimSpace(string(b))
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", "", err
	}
	defer func() { _ = unix.Close(fd) }()
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if errors.Is(err, unix.ENOPROTOOPT) {
		netns, err = os.Readlink("/proc/self/ns/net")
		return boot, netns, err
	}
	return boot, "cookie:" + strconv.FormatUint(cookie, 10), err
}
