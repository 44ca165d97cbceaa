package top

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/internal/golden"
)

// start is when the first answer comes, and apart how long after it the second.
var start = time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)

const apart = 2 * time.Second

func n(n uint64) *uint64 { return &n }

// counted is a target with counters.
func counted(address string, s balancer.State, since time.Duration, flows, newFlows, bytes uint64) control.Target {
	t := control.Target{
		Address: netip.MustParseAddr(address), Port: 8080, Weight: 1, EffectiveWeight: 1, State: s,
		Since: start.Add(-since), ActiveFlows: n(flows), NewFlowsTotal: n(newFlows), BytesTotal: n(bytes),
	}
	if s != balancer.Healthy {
		t.EffectiveWeight = 0
	}
	return t
}

// answer is what the daemon says at a time, when counters grew so many times:
// something of everything.
func answer(at time.Time, grown uint64) *control.Status {
	busy := counted("10.0.1.11", balancer.Healthy, 75*time.Second, 12, 4000+60*grown, 90_000_000+2_400_000*grown)
	slow := counted("10.0.1.12", balancer.Unhealthy, 3*time.Hour, 0, 40, 5000)
	slow.Reason, slow.Description = balancer.ReasonFailedHealthChecks, "connection refused"
	leaving := counted("10.0.1.13", balancer.Draining, 12*time.Second, 3, 21, 7_000_000+300_000*grown)
	leaving.Reason, leaving.Until = balancer.ReasonDeregistrationInProgress, start.Add(288*time.Second)
	fresh := counted("2001:db8::11", balancer.Initial, 4*time.Second, 0, 0, 0)
	fresh.Reason = balancer.ReasonInitialHealthChecking
	mute := counted("10.0.2.21", balancer.Unhealthy, 26*time.Hour, 0, 0, 0)
	mute.ActiveFlows, mute.NewFlowsTotal, mute.BytesTotal = nil, nil, nil
	mute.EffectiveWeight, mute.Reason, mute.Description = 1, balancer.ReasonTimeout, "no answer within 10s"
	ending := counted("10.0.2.22", balancer.UnhealthyDraining, 40*time.Second, 8, 9, 10)
	ending.EffectiveWeight, ending.Reason, ending.Until = 1, balancer.ReasonResponseCodeMismatch, start.Add(50*time.Second)
	gone := counted("10.0.9.99", balancer.Draining, time.Minute, 1, 7, 900)
	gone.Removed, gone.Until = true, start.Add(62*time.Second)
	never := counted("10.0.4.1", balancer.Unused, 0, 0, 0, 0)
	never.Since, never.Reason, never.Weight = time.Time{}, balancer.ReasonNotInUse, 0

	return &control.Status{
		Dataplane: "nftables",
		Apply:     control.Apply{Generation: 2, Held: true, ConvergedAt: at.Add(-4 * time.Second)},
		Listeners: []control.Listener{
			{Name: "dns", VIP: netip.MustParseAddr("2001:db8::10"), Port: 53, Protocol: balancer.TCPUDP,
				Forward: []control.Forward{{TargetGroup: "web", Weight: 9}, {TargetGroup: "metrics-of-the-second-data-centre", Weight: 1}}},
			{Name: "web", VIP: netip.MustParseAddr("198.51.100.10"), Port: 80, Protocol: balancer.TCP,
				Forward: []control.Forward{{TargetGroup: "web", Weight: 1}}},
		},
		TargetGroups: []control.TargetGroup{
			{Name: "idle", Protocol: balancer.UDP, ClientIP: balancer.Preserve,
				DeregistrationDelay: &control.DeregistrationDelay{TimeoutSeconds: 300, ConnectionTermination: true},
				Targets:             []control.Target{never}},
			{Name: "metrics-of-the-second-data-centre", Protocol: balancer.TCP, ClientIP: balancer.ProxyProtocolV2, FailOpen: true,
				DeregistrationDelay: &control.DeregistrationDelay{TimeoutSeconds: 30}, Targets: []control.Target{mute, ending}},
			{Name: "old", Protocol: balancer.TCP, ClientIP: balancer.SNAT, Targets: []control.Target{gone}},
			{Name: "web", Protocol: balancer.TCP, ClientIP: balancer.HairpinSNAT,
				DeregistrationDelay: &control.DeregistrationDelay{TimeoutSeconds: 300, ConnectionTermination: true},
				Targets:             []control.Target{busy, slow, leaving, fresh}},
		},
		Totals: map[string]uint64{"unwanted_drops": 100 + 14*grown, "hairpins": 5},
	}
}

// begun is a Screen that has two answers.
func begun(width, height int) *Screen {
	s := New(Options{Interval: apart, Socket: "/run/nlb/nlb.sock"})
	s.Resize(width, height)
	s.Take(answer(start, 0), start)
	s.Take(answer(start.Add(apart), 1), start.Add(apart))
	return s
}

// keys presses keys by their names.
func (s *Screen) keys(names ...string) (last Action) {
	for _, k := range names {
		text := k
		switch {
		case k == "space":
			text = " "
		case len(k) > 1:
			text = ""
		}
		last = s.Press(k, text)
	}
	return last
}

// text is the screen as one string, once it is checked to be one.
func text(t *testing.T, s *Screen, now time.Time) string {
	t.Helper()
	lines := s.Lines(now)
	if len(lines) != s.height {
		t.Errorf("%d lines on a screen of %d", len(lines), s.height)
	}
	var b strings.Builder
	for _, l := range lines {
		if w := width(l.String()); w > s.width {
			t.Errorf("%d cells on a screen of %d: %q", w, s.width, l)
		}
		b.WriteString(strings.TrimRight(l.String(), " ") + "\n")
	}
	return b.String()
}

var sizes = [][2]int{{80, 24}, {120, 40}, {40, 10}}

// screens are what is kept as golden files, in each size.
var screens = map[string]func(*Screen){
	"list":  func(s *Screen) { s.keys("end", "up", "up") },
	"drain": func(s *Screen) { s.keys("end", "up", "up", "up", "d") },
	"gone": func(s *Screen) {
		s.Fail(fmt.Errorf("%w on /run/nlb/nlb.sock: start it with nlb serve", control.ErrNotRunning))
	},
	"filter":  func(s *Screen) { s.keys("s", "/", "u", "n", "h", "enter", "end") },
	"help":    func(s *Screen) { s.keys("?") },
	"trouble": trouble,
}

// trouble is an answer of a daemon that cannot do its work.
func trouble(s *Screen) {
	st := answer(start, 2)
	st.Apply = control.Apply{
		Generation: 3, ConvergedAt: start.Add(-time.Minute),
		Error: "apply VIP announcement: eth7: no such device", CountersError: "relayed targets cannot be counted",
	}
	s.Take(st, start.Add(2*apart))
	s.keys("p", "c")
}

func TestScreens(t *testing.T) {
	for name, prepare := range screens {
		for _, size := range sizes {
			file := fmt.Sprintf("%s-%dx%d.txt", name, size[0], size[1])
			t.Run(file, func(t *testing.T) {
				s := begun(size[0], size[1])
				prepare(s)
				golden.Check(t, file, text(t, s, start.Add(7*time.Second)))
			})
		}
	}
}

// Whatever the size, a screen is no larger, and it shows the row that is selected.
func TestEverySize(t *testing.T) {
	for name, prepare := range screens {
		for w := 1; w < 150; w += 7 {
			for h := 1; h < 50; h += 3 {
				s := begun(w, h)
				prepare(s)
				got := text(t, s, start.Add(7*time.Second))
				if s.dialog.kind == noDialog && w > 3 && h >= 7 && !strings.Contains(got, "\n>") {
					t.Fatalf("%s: nothing is selected at %dx%d:\n%s", name, w, h, got)
				}
			}
		}
	}
}

func TestBeforeTheFirstAnswer(t *testing.T) {
	s := New(Options{Interval: time.Second, Socket: "/run/nlb/nlb.sock"})
	first := func() string { return s.Lines(start)[0].String() }
	if got := first(); got != "asking the daemon on /run/nlb/nlb.sock …" {
		t.Errorf("before the first answer: %q", got)
	}
	for _, b := range bindings { // none of which needs a picture
		s.keys(b.keys[0])
		_ = text(t, s, start)
		s.keys("esc")
	}
	s.Fail(errors.New("no daemon answers"))
	if got := first(); got != "NO ANSWER: no daemon answers" {
		t.Errorf("without an answer: %q", got)
	}
}

func TestPageHasEverything(t *testing.T) {
	s := begun(80, 24)
	var got []string
	for _, l := range s.Page(start.Add(apart)) {
		got = append(got, strings.TrimRight(l.String(), " "))
	}
	golden.Check(t, "page.txt", strings.Join(got, "\n")+"\n")
}

// A picture that is not how things are now is dimmed, and a line says so.
func TestOldPictureIsDimmed(t *testing.T) {
	s := begun(80, 24)
	at := start.Add(apart)
	for _, c := range []struct {
		name string
		do   func()
		now  time.Time
		want bool
	}{
		{"fresh", func() {}, at.Add(apart), false},
		{"late", func() {}, at.Add(apart + patience + 1), true},
		{"paused", func() { s.keys("p") }, at.Add(time.Hour), false},
		{"goes on", func() { s.keys("p"); s.Take(answer(start, 2), at.Add(time.Hour)) }, at.Add(time.Hour), false},
		{"failed", func() { s.Fail(errors.New("no daemon answers")) }, at.Add(time.Hour), true},
		{"back", func() { s.Take(answer(start, 3), at.Add(2*time.Hour)) }, at.Add(2 * time.Hour), false},
	} {
		c.do()
		dimmed, said := true, false
		for _, l := range s.list(c.now, 10) {
			for _, span := range l {
				dimmed = dimmed && span.Style.Faint
			}
		}
		for _, l := range s.header(c.now) {
			said = said || strings.HasPrefix(l.String(), "NO ANSWER")
		}
		if dimmed != c.want || said != c.want {
			t.Errorf("%s: dimmed %v and said %v, want %v", c.name, dimmed, said, c.want)
		}
	}
}

// Colors are only those of SGR 30 to 37, and none without them being wanted; what
// is selected or dimmed shows either way.
func TestANSI(t *testing.T) {
	l := Line{{"a", Style{Bold: true, Color: Red}}, {"b", Style{Faint: true, Reverse: true}}, {"c", Style{}}}
	for colors, want := range map[bool]string{
		true:  "\x1b[1;31ma\x1b[m\x1b[2;7mb\x1b[mc",
		false: "\x1b[1ma\x1b[m\x1b[2;7mb\x1b[mc",
	} {
		if got := l.ANSI(colors); got != want {
			t.Errorf("colors %v: %q, want %q", colors, got, want)
		}
	}
}

func TestPerSecond(t *testing.T) {
	for _, c := range []struct {
		name          string
		before, after *uint64
		elapsed       time.Duration
		want          string
	}{
		{"grown", n(10), n(30), 2 * time.Second, "10"},
		{"stands", n(10), n(10), time.Second, "0"},
		{"began anew", n(1000), n(30), 10 * time.Second, "3"},
		{"began anew at zero", n(1000), n(0), time.Second, "0"},
		{"not counted before", nil, n(30), time.Second, "?"},
		{"not counted now", n(10), nil, time.Second, "?"},
		{"at the same time", n(10), n(30), 0, "?"},
		{"a clock that went back", n(10), n(30), -time.Second, "?"},
	} {
		if got := perSecond(c.before, c.after, c.elapsed).String(); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// Rates belong to a target of a group, however answers order them, and are not
// known of one that was not there before.
func TestRatesOfPictures(t *testing.T) {
	a := counted("10.0.1.11", balancer.Healthy, 0, 1, 100, 1000)
	b := counted("10.0.1.12", balancer.Healthy, 0, 1, 500, 9000)
	grow := func(t control.Target, by uint64) control.Target {
		t.NewFlowsTotal, t.BytesTotal = n(*t.NewFlowsTotal+by), n(*t.BytesTotal+100*by)
		return t
	}
	group := func(name string, targets ...control.Target) control.TargetGroup {
		return control.TargetGroup{Name: name, Targets: targets}
	}
	first := newPicture(&control.Status{TargetGroups: []control.TargetGroup{group("one", a), group("two", a, b)}}, start, nil)
	next := newPicture(&control.Status{TargetGroups: []control.TargetGroup{
		group("one", grow(a, 4), b), group("two", grow(b, 10), a),
	}}, start.Add(apart), first)
	var got []string
	for _, g := range next.groups {
		got = append(got, fmt.Sprintf("%s %v %v", g.Name, g.newFlows, g.bytes))
		for _, x := range g.targets {
			got = append(got, fmt.Sprintf("%s %v %v", x.name, x.newFlows, x.bytes))
		}
	}
	want := []string{
		"one 2 200", "10.0.1.11:8080 2 200", "10.0.1.12:8080 ? ?",
		"two 5 500", "10.0.1.12:8080 5 500", "10.0.1.11:8080 0 0",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got := next.sums.newFlows.String(); got != "7" {
		t.Errorf("all together: %s", got)
	}
}
