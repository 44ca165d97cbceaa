package balancer

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// A SysctlDir is a folder of the kernel's settings. Each has a key: its path below
// the folder, where a dot in an interface's name is just a dot.
type SysctlDir string

// ProcSys is where the settings are (proc_sys(5)); those below net are the network
// namespace's.
const ProcSys SysctlDir = "/proc/sys"

// SysctlName is a setting's name in sysctl(8), given its key: its parts are
// separated by dots, and the dots of an interface's name are slashes.
func SysctlName(key string) string { return swapSeparators(key) }

// SysctlKey is a setting's key, given its name in sysctl(8).
func SysctlKey(name string) string { return swapSeparators(name) }

func swapSeparators(s string) string {
	return strings.Map(func(r rune) rune {
		switch r {
		case '/':
			return '.'
		case '.':
			return '/'
		}
		return r
	}, s)
}

// Read returns a setting's value, without the end of the line. The error wraps
// fs.ErrNotExist if the kernel has no such setting.
func (d SysctlDir) Read(key string) (string, error) {
	b, err := os.ReadFile(d.path(key))
	if err != nil {
		return "", fmt.Errorf("read %s: %w", SysctlName(key), withoutPath(err))
	}
	return strings.TrimSpace(string(b)), nil
}

// Write gives a setting a value. The error is the kernel's, which does not say which
// setting it was, with the way out where the setting must not be written from here.
func (d SysctlDir) Write(key, value string) error {
	f, err := os.OpenFile(d.path(key), os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(value + "\n")
		err = errors.Join(err, f.Close())
	}
	err = withoutPath(err)
	if errors.Is(err, unix.EROFS) || errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w (set it from outside, where %s=%s may be written: on the host, "+
			"or with the container runtime's option for sysctls, such as docker run --sysctl)", err, SysctlName(key), value)
	}
	return err
}

func (d SysctlDir) path(key string) string { return filepath.Join(string(d), key) }

func withoutPath(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err
	}
	return err
}
