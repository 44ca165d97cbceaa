package change

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// proportional is the memory of all processes in a namespace but this one, in
// bytes: what they have alone, and of what they share their part (PSS, see
// Documentation/filesystems/proc.rst of Linux). It is an error if there is none.
func proportional(namespace string) (int64, error) {
	pids, err := processes(namespace)
	if err != nil {
		return 0, err
	}
	total := int64(0)
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it has ended
		}
		if err != nil {
			return 0, err
		}
		n, err := pss(text)
		if err != nil {
			return 0, fmt.Errorf("process %d: %w", pid, err)
		}
		total += n
	}
	if total == 0 {
		return 0, fmt.Errorf("there is no process in %s", namespace)
	}
	return total, nil
}

// processes are those in a namespace but this one, which has a thread in there
// now and then.
func processes(namespace string) (pids []int, err error) {
	space, err := os.Stat(filepath.Join("/run/netns", namespace))
	if err != nil {
		return nil, err
	}
	names, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		pid, err := strconv.Atoi(strings.Split(name, "/")[2])
		if err != nil {
			return nil, err
		}
		// A process may end while we look at it.
		if is, err := os.Stat(name); err == nil && os.SameFile(is, space) && pid != os.Getpid() {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// pss reads the line of a smaps_rollup that begins with "Pss:", in bytes.
func pss(rollup []byte) (int64, error) {
	for lines := bufio.NewScanner(bytes.NewReader(rollup)); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) != 3 || fields[0] != "Pss:" || fields[2] != "kB" {
			continue
		}
		kib, err := strconv.ParseUint(fields[1], 10, 40)
		return int64(kib) << 10, err
	}
	return 0, errors.New("its smaps_rollup has no Pss")
}
