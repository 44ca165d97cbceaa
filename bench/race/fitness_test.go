package main

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestJudge(t *testing.T) {
	fit := state{core: 1, busy: 0.02, idle: 1.9, available: 4 << 30, flows: 1 << 18}
	for _, tt := range []struct {
		name   string
		change func(*state)
		want   string // empty for a fit one
	}{
		{"fit", func(*state) {}, ""},
		{"no table of connections yet", func(s *state) { s.flows = 0 }, ""},
		{"busy core", func(s *state) { s.busy = 0.3; s.hogs = []hog{{77, "cc1", 0.25}} }, "others use 30 % of core 1, and leave 1.9 cores idle in all; cc1 (process 77) 25 %"},
		{"all cores busy", func(s *state) { s.idle = 0.5 }, "others use 2 % of core 1, and leave 0.5 cores idle in all"},
		{"stolen", func(s *state) { s.stolen = 0.2 }, "the hypervisor takes 20 % of core 1 for other machines"},
		{"quota", func(s *state) { s.quota = 0.5 }, "a control group allows 0.50 of a core (cpu.max)"},
		{"memory", func(s *state) { s.available = 300 << 20 }, "300 MiB of memory are available, less than 1024"},
		{"flows", func(s *state) { s.flows = 8192 }, "the kernel tracks 8192 flows at most, less than 65536: sysctl net.netfilter.nf_conntrack_max"},
	} {
		s := fit
		tt.change(&s)
		if diff := cmp.Diff(tt.want, strings.Join(judge(s), "\n")); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

func TestCompareUsage(t *testing.T) {
	at := time.Unix(0, 0)
	before := &usage{at, coreUsage{1000, 900, 0}, coreUsage{2000, 1800, 0}, map[int]process{1: {"init", 10}, 7: {"cc1", 100}, os.Getpid(): {"race", 0}}}
	after := &usage{at.Add(time.Second), coreUsage{1100, 950, 10}, coreUsage{2200, 1950, 10}, map[int]process{1: {"init", 11}, 7: {"cc1", 140}, 9: {"ld", 30}, os.Getpid(): {"race", 90}}}
	s := state{core: 1}
	s.compare(before, after)
	if s.busy < 0.399 || s.busy > 0.401 || s.stolen != 0.1 || s.idle != 1.5 {
		t.Errorf("busy %v, stolen %v, idle %v", s.busy, s.stolen, s.idle)
	}
	if diff := cmp.Diff([]hog{{7, "cc1", 0.4}, {9, "ld", 0.3}}, s.hogs, cmp.AllowUnexported(hog{})); diff != "" {
		t.Errorf("hogs (-want +got):\n%s", diff)
	}
}

func TestParseProc(t *testing.T) {
	pid, p, err := parseProcess("42 (a) b (c) S 1 42 42 0 -1 4194560 1 0 0 0 7 5 0 0 20 0 1 0 100 1 1")
	if err != nil || pid != 42 || p != (process{"a) b (c", 12}) {
		t.Errorf("%d %+v %v", pid, p, err)
	}
	for _, text := range []string{"", "42 (a", "42 (a) S 1", "42 (a) S 1 42 42 0 -1 4194560 1 0 0 0 x 5"} {
		if _, _, err := parseProcess(text); err == nil {
			t.Errorf("%q was read", text)
		}
	}
	const stat = "cpu  10 1 2 100 5 0 1 3 0 0\ncpu0 1 1 1 50 1 0 0 1 0 0\ncpu1 9 0 1 50 4 0 1 2 0 0\n"
	got, err := coreLine(stat, "cpu1")
	if want := (coreUsage{67, 54, 2}); err != nil || got != want {
		t.Errorf("%+v %v", got, err)
	}
	if _, err := coreLine(stat, "cpu2"); err == nil {
		t.Error("a third core was found")
	}
	for text, want := range map[string]float64{"max 100000\n": 0, "50000 100000\n": 0.5, "": 0} {
		if got := parseQuota(text); got != want {
			t.Errorf("cpu.max %q: %v", text, got)
		}
	}
}

// TestLook reads this machine, whatever its state.
func TestLook(t *testing.T) {
	s, err := look(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if s.available == 0 || s.busy < 0 || s.busy > 1.1 || s.idle < 0 {
		t.Errorf("%+v", s)
	}
	if m, err := newMachine(0); err != nil || m.Cores < 1 || m.RAMBytes == 0 || m.Kernel == "" {
		t.Errorf("%+v %v", m, err)
	}
}
