package host

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

	"nlb/balancer"
)

// A file keeps the records on disk. They hold for one boot and one network
// namespace: elsewhere the sysctls start anew.
type file struct{ path string }

// content is the file's JSON form.
type content struct {
	Boot     string   `json:"boot"`
	Netns    string   `json:"netns"`
	Settings []record `json:"settings"`
}

// A corruptError says that the file is there and cannot be read.
type corruptError struct {
	path string
	err  error
}

func (e *corruptError) Error() string { return fmt.Sprintf("%s is corrupt: %v", e.path, e.err) }
func (e *corruptError) Unwrap() error { return e.err }

// load reads the records, oldest first. It is a *corruptError if the file makes
// no sense.
func (f file) load() ([]record, error) {
	b, err := os.ReadFile(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("saved sysctls: %w", err)
	}
	c, err := parse(b)
	if err != nil {
		return nil, &corruptError{f.path, err}
	}
	boot, netns, err := balancer.Here()
	if err != nil {
		return nil, err
	}
	if c.Boot != boot || c.Netns != netns {
		return nil, nil
	}
	return c.Settings, nil
}

// parse reads the file's JSON. It lets nothing through that could be written
// anywhere but below /proc/sys/net.
func parse(b []byte) (content, error) {
	var c content
	if err := json.Unmarshal(b, &c); err != nil {
		return content{}, err
	}
	for _, r := range c.Settings {
		for _, s := range append(r.undo(), setting{r.Key, r.Ours}) {
			if !fs.ValidPath(s.Key) || !strings.HasPrefix(s.Key, "net/") {
				return content{}, fmt.Errorf("%q is no network setting", s.Key)
			}
			if _, err := strconv.Atoi(s.Value); err != nil {
				return content{}, fmt.Errorf("%s: %q is no value", s.Key, s.Value)
			}
		}
	}
	return c, nil
}

// store replaces the file in one step, or removes it when there is nothing to
// keep. It is on disk when store returns.
func (f file) store(records []record) error {
	if err := f.replace(records); err != nil {
		return fmt.Errorf("save sysctls: %w", err)
	}
	return nil
}

func (f file) replace(records []record) error {
	if len(records) == 0 {
		if err := os.Remove(f.path); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	boot, netns, err := balancer.Here()
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(content{Boot: boot, Netns: netns, Settings: records}, "", "  ")
	if err != nil {
		return err
	}
	return balancer.WriteStateFile(filepath.Dir(f.path), filepath.Base(f.path), append(b, '\n'))
}

// setAside renames the file, if it is corrupt, to a name that is free.
func (f file) setAside() error {
	_, err := f.load()
	if _, corrupt := errors.AsType[*corruptError](err); !corrupt {
		return err
	}
	aside := f.path + ".corrupt"
	for n := 2; ; n++ {
		err := unix.Renameat2(unix.AT_FDCWD, f.path, unix.AT_FDCWD, aside, unix.RENAME_NOREPLACE)
		if !errors.Is(err, unix.EEXIST) {
			if err != nil {
				return fmt.Errorf("set %s aside: %w", f.path, err)
			}
			return nil
		}
		aside = fmt.Sprintf("%s.corrupt.%d", f.path, n)
	}
}
