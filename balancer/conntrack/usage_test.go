package conntrack

import (
	"context"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"nlb/internal/wait"
)

func usage(t testing.TB, tr *Tracker) Usage {
	t.Helper()
	u, err := tr.Usage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func TestUsageAgreesWithTheHost(t *testing.T) {
	host(t)
	tr, _ := newTracker(t, nil)
	text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max")
	if err != nil {
		t.Fatal(err)
	}
	limit, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	before := usage(t, tr)
	connect(t, "203.0.113.9", "198.51.100.10:80", 1)
	datagrams(t, "203.0.113.9", "198.51.100.10:99", 1, 1) // somebody else's counts too
	if u := usage(t, tr); u.Entries != before.Entries+2 || u.Limit != limit {
		t.Errorf("%d entries and a limit of %d, want %d and %d", u.Entries, u.Limit, before.Entries+2, limit)
	}
}

// Two flows that have to leave from the same port for the same place: the second
// is dropped, and counted.
func TestUsageTellsOfExhaustedPorts(t *testing.T) {
	host(t)
	tr, _ := newTracker(t, nil)
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(`table inet sources {
		chain postrouting {
			type nat hook postrouting priority srcnat
			tcp dport 80 snat ip to 203.0.113.9:5000
		}
	}`)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
	t.Cleanup(func() { run(t, "nft", "delete", "table", "inet", "sources") })
	connect(t, "203.0.113.9", "198.51.100.10:80", 1)
	before := usage(t, tr)

	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		var d net.Dialer
		if c, err := d.DialContext(ctx, "tcp", "198.51.100.10:80"); err == nil {
			_ = c.Close()
			t.Error("a flow without a source port of its own got through")
		}
	}()
	defer func() { cancel(); <-ended }()
	wait.Until(t, patience, "a failed insertion is counted", func() bool { return usage(t, tr).InsertFailed > before.InsertFailed })
}

// The kernel says with the event of a flow's end in which state that was.
func TestResetsAreTold(t *testing.T) {
	host(t)
	tr, clk := newTracker(t, nil)
	start(t, tr)
	inState := func(s TCPState) func() bool {
		return func() bool {
			for _, f := range flows(t, tr, Filter{Mark: web, Mask: mask}) {
				if f.TCPState == s {
					return true
				}
			}
			return false
		}
	}
	c := connect(t, "203.0.113.9", "198.51.100.10:80", 1)
	if err := c.(*net.TCPConn).SetLinger(0); err != nil { // close with a reset
		t.Fatal(err)
	}
	_ = c.Close()
	wait.Until(t, patience, "the flow is reset", inState(Close))
	connect(t, "2001:db8:1::9", "[2001:db8::10]:80", 1)
	wait.Until(t, patience, "another lives", inState(Established))
	if n := counts(t, tr, clk)[web].Resets; n != 0 {
		t.Errorf("%d resets before conntrack has forgotten the flow", n)
	}
	empty(t)
	if n := counts(t, tr, clk)[web].Resets; n != 1 {
		t.Errorf("%d resets, want that of one of two flows", n)
	}
}

func TestShortage(t *testing.T) {
	var s Shortage
	now := time.Unix(1, 0)
	for _, step := range []struct {
		after          time.Duration
		failed, refuse uint64
	}{
		{0, 7, 0}, {time.Second, 7, 0}, {time.Second, 10, 3}, {time.Second, 15, 0}, {quiet - 1, 16, 0}, {quiet, 16, 0},
		{time.Second, 18, 2}, {quiet, 1, 0}, {time.Second, 2, 1},
	} {
		now = now.Add(step.after)
		if got := s.Hear(Usage{InsertFailed: step.failed}, now); got != step.refuse {
			t.Errorf("%d failed at %v: a shortage of %d, want %d", step.failed, now, got, step.refuse)
		}
	}
}

func TestAlarm(t *testing.T) {
	var a Alarm
	for _, step := range []struct {
		count   uint64
		changed bool
		on      bool
	}{
		{0, false, false}, {79, false, false}, {80, true, true}, {100, false, true}, {70, false, true},
		{69, true, false}, {79, false, false}, {81, true, true},
	} {
		if changed := a.Hear(Usage{Entries: step.count, Limit: 100}); changed != step.changed || a.On() != step.on {
			t.Errorf("at %d %%: changed %v, on %v", step.count, changed, a.On())
		}
	}
	if a = (Alarm{}); a.Hear(Usage{Entries: 1 << 40}) {
		t.Error("a table without a limit is full")
	}
}
