package measure

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// SoftirqsApart says whether the kernel leaves softirqs out of the CPU time of
// the processes that they interrupt, as it does with CONFIG_IRQ_TIME_ACCOUNTING
// unless it was started with tsc=noirqtime (kernel-parameters). A kernel whose
// configuration is neither in /proc/config.gz nor in /boot does not.
func SoftirqsApart() (bool, error) {
	config, err := kernelConfig()
	if err != nil {
		return false, err
	}
	parameters, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return false, err
	}
	return softirqsApart(string(config), string(parameters)), nil
}

func softirqsApart(config, parameters string) bool {
	return slices.Contains(strings.Split(config, "\n"), "CONFIG_IRQ_TIME_ACCOUNTING=y") &&
		!slices.Contains(strings.Fields(parameters), "tsc=noirqtime")
}

// kernelConfig is the text that the kernel was built with; empty if unknown.
func kernelConfig() ([]byte, error) {
	packed, err := os.ReadFile("/proc/config.gz")
	if err == nil {
		r, err := gzip.NewReader(bytes.NewReader(packed))
		if err != nil {
			return nil, err
		}
		return io.ReadAll(r)
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, os.NewSyscallError("uname", err)
	}
	text, err := os.ReadFile("/boot/config-" + unix.ByteSliceToString(uts.Release[:]))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return text, err
}
