package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"nlb/bench/part"
	"nlb/bench/report"
)

// newMachine is this one.
func newMachine(core int) (report.Machine, error) {
	m := report.Machine{CPU: runtime.GOARCH, Cores: runtime.NumCPU(), Core: core}
	cpu, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return m, err
	}
	for line := range strings.Lines(string(cpu)) {
		key, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(key) {
		case "processor":
			if n, err := strconv.Atoi(strings.TrimSpace(value)); err == nil {
				m.Cores = n + 1 // the machine's; ours is one
			}
		case "model name":
			m.CPU = strings.TrimSpace(value)
		}
	}
	if m.RAMBytes, err = memoryInfo("MemTotal"); err != nil {
		return m, err
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return m, os.NewSyscallError("uname", err)
	}
	m.Kernel = unix.ByteSliceToString(uts.Release[:])
	return m, nil
}

// memoryInfo is a line of /proc/meminfo, in bytes.
func memoryInfo(key string) (uint64, error) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, key+":"); ok {
			kib, err := strconv.ParseUint(strings.Fields(value)[0], 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("/proc/meminfo has no %s", key)
}

// loadAverage is that of 1, 5 and 15 minutes.
func loadAverage() (load [3]float64, err error) {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return load, err
	}
	_, err = fmt.Sscan(string(text), &load[0], &load[1], &load[2])
	return load, err
}

// versionArgs ask a program for its version, which is in the first line. ipvsadm
// says nothing where the kernel has no IPVS, and IPVS itself is the kernel's.
var versionArgs = map[part.Program]string{part.NLB: "version", part.HAProxy: "-v", part.Nginx: "-v", part.NFT: "--version"}

// versions asks the programs of the contestants.
func versions(ctx context.Context, p *plan) (map[part.Program]string, error) {
	said := make(map[part.Program]string)
	for _, c := range p.contestants() {
		args, ok := versionArgs[c.Program]
		if !ok || said[c.Program] != "" {
			continue
		}
		// nginx says it on its standard error.
		out, err := exec.CommandContext(ctx, p.options.Programs[c.Program], args).CombinedOutput()
		if err != nil {
			return nil, errors.Join(fmt.Errorf("version of %s: %w", c.Program, err), ctx.Err())
		}
		said[c.Program], _, _ = strings.Cut(strings.TrimSpace(string(out)), "\n")
	}
	return said, nil
}
