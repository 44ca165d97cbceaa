package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A machine's state is what decides whether figures from it mean anything.
type state struct {
	core int
	// busy is the part of the core that others had while nothing was measured,
	// and stolen what the hypervisor gave to another machine.
	busy, stolen float64
	// idle is how many cores' worth of time nobody had, on all that there are.
	idle float64
	hogs []hog // those who had most of any core
	// quota is how many cores a control group allows; 0 for as many as there are.
	quota float64
	// available is memory in bytes.
	available uint64
	// flows is how many the connection table holds; 0 if there is none yet.
	flows int
}

// A hog is a process that had a part of a core.
type hog struct {
	pid  int
	name string
	part float64
}

// What a machine has to have.
const (
	mostBusy       = 0.10    // of the core; ratios begin to wander before that
	leastAvailable = 1 << 30 // bytes: a thousand listeners in each of several contestants
	leastFlows     = 1 << 16
)

// judge says what is wrong with a machine.
func judge(s state) (bad []string) {
	if s.busy > mostBusy || s.idle < 1-mostBusy {
		text := fmt.Sprintf("others use %.0f %% of core %d, and leave %.1f cores idle in all", 100*s.busy, s.core, s.idle)
		for _, h := range s.hogs {
			text += fmt.Sprintf("; %s (process %d) %.0f %%", h.name, h.pid, 100*h.part)
		}
		bad = append(bad, text)
	}
	if s.stolen > mostBusy {
		bad = append(bad, fmt.Sprintf("the hypervisor takes %.0f %% of core %d for other machines", 100*s.stolen, s.core))
	}
	if s.quota > 0 && s.quota < 1 {
		bad = append(bad, fmt.Sprintf("a control group allows %.2f of a core (cpu.max)", s.quota))
	}
	if s.available < leastAvailable {
		bad = append(bad, fmt.Sprintf("%d MiB of memory are available, less than %d", s.available>>20, leastAvailable>>20))
	}
	if s.flows > 0 && s.flows < leastFlows {
		bad = append(bad, fmt.Sprintf("the kernel tracks %d flows at most, less than %d: sysctl net.netfilter.nf_conntrack_max", s.flows, leastFlows))
	}
	return bad
}

// An unfitError says why a machine is unfit.
type unfitError struct{ reasons []string }

func (e *unfitError) Error() string {
	return "the machine is unfit, --force measures all the same:\n  " + strings.Join(e.reasons, "\n  ")
}

// look finds the state of the machine, which takes a second.
func look(ctx context.Context, core int) (state, error) {
	s := state{core: core}
	before, err := readUsage(core)
	if err != nil {
		return s, err
	}
	select {
	case <-time.After(time.Second):
	case <-ctx.Done():
		return s, ctx.Err()
	}
	after, err := readUsage(core)
	if err != nil {
		return s, err
	}
	s.compare(before, after)
	memory, err := memoryInfo("MemAvailable")
	if err != nil {
		return s, err
	}
	s.available, s.quota = memory, quota()
	if text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max"); err == nil {
		s.flows, _ = strconv.Atoi(strings.TrimSpace(string(text)))
	}
	return s, nil
}

// Usage is in the kernel's ticks, of which there are tick in a second (USER_HZ,
// proc(5)).
type usage struct {
	at        time.Time
	core, all coreUsage
	processes map[int]process
}

const tick = 100

type coreUsage struct{ total, idle, stolen float64 }

type process struct {
	name string
	used float64
}

// compare sets what happened between two moments.
func (s *state) compare(before, after *usage) {
	part := func(a, b float64) float64 { return (b - a) / max(1, after.core.total-before.core.total) }
	s.stolen = part(before.core.stolen, after.core.stolen)
	s.busy = max(0, 1-s.stolen-part(before.core.idle, after.core.idle))
	s.idle = part(before.all.idle, after.all.idle)
	s.hogs = hogs(before, after)
}

// hogs are the three who had most, without those who had little.
func hogs(before, after *usage) (most []hog) {
	seconds := max(0.01, after.at.Sub(before.at).Seconds())
	for pid, p := range after.processes {
		had := (p.used - before.processes[pid].used) / tick / seconds
		if pid != os.Getpid() && had > mostBusy/2 {
			most = append(most, hog{pid, p.name, had})
		}
	}
	slices.SortFunc(most, func(a, b hog) int { return cmp.Or(cmp.Compare(b.part, a.part), cmp.Compare(a.pid, b.pid)) })
	return most[:min(3, len(most))]
}

// readUsage reads what cores and processes have had since their start.
func readUsage(core int) (*usage, error) {
	u := &usage{at: time.Now(), processes: make(map[int]process)}
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return nil, err
	}
	if u.all, err = coreLine(string(text), "cpu"); err != nil {
		return nil, err
	}
	if u.core, err = coreLine(string(text), fmt.Sprint("cpu", core)); err != nil {
		return nil, err
	}
	names, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if text, err := os.ReadFile(name); err == nil { // otherwise it has ended
			pid, p, err := parseProcess(string(text))
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			u.processes[pid] = p
		}
	}
	return u, nil
}

// coreLine reads a line of /proc/stat: user, nice, system, idle, iowait, irq,
// softirq and steal, which is all, and guests, who are in user already.
func coreLine(text, name string) (u coreUsage, err error) {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 9 || fields[0] != name {
			continue
		}
		for i, f := range fields[1:9] {
			n, err := strconv.ParseFloat(f, 64)
			if err != nil {
				return u, fmt.Errorf("/proc/stat: %w", err)
			}
			u.total += n
			switch i {
			case 3, 4:
				u.idle += n
			case 7:
				u.stolen += n
			}
		}
		return u, nil
	}
	return u, fmt.Errorf("/proc/stat has no %s", name)
}

// parseProcess reads /proc/PID/stat. The name may have spaces and brackets.
func parseProcess(text string) (pid int, p process, err error) {
	open, end := strings.IndexByte(text, '('), strings.LastIndexByte(text, ')')
	if open < 0 || end < open {
		return 0, p, errors.New("has no name")
	}
	fields := strings.Fields(text[end+1:])
	if len(fields) < 13 {
		return 0, p, fmt.Errorf("has %d fields after the name", len(fields))
	}
	p.name = text[open+1 : end]
	pid, err = strconv.Atoi(strings.TrimSpace(text[:open]))
	for _, f := range fields[11:13] { // utime and stime
		n, bad := strconv.ParseFloat(f, 64)
		p.used, err = p.used+n, errors.Join(err, bad)
	}
	return pid, p, err
}

// quota is the least that a control group above this process allows; 0 for no
// limit (cgroup-v2, cpu.max). Without version 2 nobody asks.
func quota() (least float64) {
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return 0
	}
	_, path, _ := strings.Cut(strings.TrimSpace(string(text)), "::")
	for {
		if limit, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", path, "cpu.max")); err == nil {
			if cores := parseQuota(string(limit)); cores > 0 && (least == 0 || cores < least) {
				least = cores
			}
		}
		if path == "/" || path == "." || path == "" {
			return least
		}
		path = filepath.Dir(path)
	}
}

// parseQuota reads cpu.max: µs in each period, and the period; 0 for max.
func parseQuota(text string) float64 {
	var most, period float64
	if n, err := fmt.Sscan(text, &most, &period); n != 2 || err != nil || period <= 0 {
		return 0
	}
	return most / period
}
