package top

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"nlb/balancer"
	"nlb/balancer/control"
)

// at is what the cursor is on.
func (s *Screen) at() string {
	r, ok := s.selected()
	switch {
	case !ok:
		return ""
	case r.target != nil:
		return r.target.name
	case r.kind == listenersRow:
		return "listeners"
	}
	return r.name
}

// names are the rows, in their order.
func (s *Screen) names() string {
	var all []string
	for _, r := range s.rows {
		if r.target != nil {
			all = append(all, r.target.name)
		} else if r.kind != listenersRow && r.kind != listenerRow {
			all = append(all, r.name+":")
		}
	}
	return strings.NewReplacer(":8080", "", "metrics-of-the-second-data-centre", "metrics").Replace(strings.Join(all, " "))
}

func TestMoving(t *testing.T) {
	const metrics = "metrics-of-the-second-data-centre"
	for _, c := range []struct{ keys, at string }{
		{"", "listeners"}, {"up", "listeners"}, {"down", "dns"}, {"j j j", "idle"}, {"end", "[2001:db8::11]:8080"}, {"end down", "[2001:db8::11]:8080"},
		{"G g", "listeners"}, {"end home", "listeners"}, {"tab", "idle"}, {"tab tab", metrics}, {"tab tab tab tab tab", "web"},
		{"end shift+tab", "web"}, {"end shift+tab shift+tab", "old"}, {"shift+tab", "listeners"},
		{"pgdown", "[2001:db8::11]:8080"}, {"end pgup", "listeners"}, {"end k", "10.0.1.13:8080"},
		// A row that is folded away hands the cursor to its heading.
		{"end left", "web"}, {"end left right", "web"}, {"end left tab", "web"}, {"tab tab down enter", metrics}, {"end c", "web"}, {"c tab e down", "10.0.4.1:8080"},
		{"down space", "listeners"}, {"down space down", "idle"}, {"z", "listeners"},
	} {
		s := begun(80, 24)
		_ = s.Lines(start)
		if s.keys(strings.Fields(c.keys)...); s.at() != c.at {
			t.Errorf("%q leads to %s, want %s", c.keys, s.at(), c.at)
		}
	}
}

func TestOrders(t *testing.T) {
	for _, c := range []struct{ keys, want string }{
		{"", "idle: 10.0.4.1 metrics: 10.0.2.21 10.0.2.22 old: 10.0.9.99 web: 10.0.1.11 10.0.1.12 10.0.1.13 [2001:db8::11]"},
		{"r", "web: [2001:db8::11] 10.0.1.13 10.0.1.12 10.0.1.11 old: 10.0.9.99 metrics: 10.0.2.22 10.0.2.21 idle: 10.0.4.1"},
		{"s", "metrics: 10.0.2.21 10.0.2.22 idle: 10.0.4.1 old: 10.0.9.99 web: 10.0.1.12 10.0.1.13 [2001:db8::11] 10.0.1.11"},
		{"s s", "web: [2001:db8::11] 10.0.1.13 10.0.1.11 10.0.1.12 metrics: 10.0.2.22 10.0.2.21 old: 10.0.9.99 idle: 10.0.4.1"},
		{"s s s", "web: 10.0.1.11 10.0.1.13 10.0.1.12 [2001:db8::11] metrics: 10.0.2.22 10.0.2.21 old: 10.0.9.99 idle: 10.0.4.1"},
		{"s s s s", "web: 10.0.1.11 10.0.1.12 10.0.1.13 [2001:db8::11] idle: 10.0.4.1 metrics: 10.0.2.22 10.0.2.21 old: 10.0.9.99"},
		{"S", "web: 10.0.1.11 10.0.1.13 10.0.1.12 [2001:db8::11] idle: 10.0.4.1 metrics: 10.0.2.22 10.0.2.21 old: 10.0.9.99"},
	} {
		s := begun(80, 24)
		if s.keys(strings.Fields(c.keys)...); s.names() != c.want {
			t.Errorf("%q:\n%s\nwant\n%s", c.keys, s.names(), c.want)
		}
	}
}

func TestFilters(t *testing.T) {
	for _, c := range []struct{ keys, want string }{
		{"/ h e a l t h y enter", "web: 10.0.1.11"},
		{"/ 'unhealthy enter", "metrics: 10.0.2.21 10.0.2.22 web: 10.0.1.12"},
		{"/ 'unhealthy space W E B enter", "web: 10.0.1.12"},
		{"/ 'time enter", "metrics: 10.0.2.21"},
		{"/ '10.0.1 backspace 9 . enter", "old: 10.0.9.99"},
		{"/ 'nobody enter", ""},
		{"/ 'idle enter / x esc", "idle: 10.0.4.1"},
		{"/ 'idle enter / ctrl+u enter", "idle: 10.0.4.1 metrics: 10.0.2.21 10.0.2.22 old: 10.0.9.99 web: 10.0.1.11 10.0.1.12 10.0.1.13 [2001:db8::11]"},
		{"/ 'web enter c", "web:"},
		{"/ 'old enter esc c", "idle: metrics: old: web:"},
	} {
		s := begun(80, 24)
		for _, k := range strings.Fields(c.keys) {
			if pasted, ok := strings.CutPrefix(k, "'"); ok {
				s.Paste(pasted)
			} else {
				s.keys(k)
			}
		}
		if s.names() != c.want {
			t.Errorf("%q:\n%s\nwant\n%s", c.keys, s.names(), c.want)
		}
		_ = text(t, s, start)
	}
}

// What is pasted is never taken for keys, and brings no control characters along.
func TestPaste(t *testing.T) {
	s := begun(80, 24)
	s.Paste("q")
	s.keys("/")
	s.Paste("we\x1b[2J\nb")
	if got := s.keysLine().String(); got != "/we[2Jb_   enter keeps, esc drops it" {
		t.Errorf("pasted: %q", got)
	}
}

func TestDrainKeys(t *testing.T) {
	at := func(group, address string) control.TargetName {
		return control.TargetName{Group: group, Address: netip.MustParseAddr(address), Port: 8080}
	}
	for _, c := range []struct {
		name, target, keys string
		want               Action
		said               string
	}{
		{"yes", "10.0.1.11", "d y", Action{Drain, at("web", "10.0.1.11")}, "drain web 10.0.1.11:8080 …"},
		{"IPv6", "[2001:db8::11]", "d y", Action{Drain, at("web", "2001:db8::11")}, "drain web [2001:db8::11]:8080 …"},
		{"no", "10.0.1.11", "d n", Action{}, "no drain: web 10.0.1.11:8080 stays as it is"},
		{"enter is no yes", "10.0.1.11", "d enter", Action{}, "no drain: web 10.0.1.11:8080 stays as it is"},
		{"esc", "10.0.1.11", "d esc", Action{}, "no drain: web 10.0.1.11:8080 stays as it is"},
		{"twice the key", "10.0.1.11", "d d", Action{}, "no drain: web 10.0.1.11:8080 stays as it is"},
		{"quit from there", "10.0.1.11", "d ctrl+c", Action{Verb: Quit}, ""},
		{"already", "10.0.1.13", "d", Action{}, "10.0.1.13:8080 is drained already"},
		{"already, and a yes", "10.0.1.13", "d y", Action{}, ""},
		{"removed", "10.0.9.99", "d", Action{}, "10.0.9.99:8080 is not in the file any more: it leaves by itself"},
		{"back", "10.0.1.13", "u y", Action{Undrain, at("web", "10.0.1.13")}, "undrain web 10.0.1.13:8080 …"},
		{"not back", "10.0.1.13", "u n", Action{}, "no undrain: web 10.0.1.13:8080 stays as it is"},
		{"back of what is there", "10.0.1.11", "u", Action{}, "10.0.1.11:8080 is not drained"},
		{"back of what may be drained", "10.0.4.1", "u y", Action{Undrain, at("idle", "10.0.4.1")}, "undrain idle 10.0.4.1:8080 …"},
		{"back of what is removed", "10.0.9.99", "u", Action{}, "10.0.9.99:8080 is not in the file any more: put it back there"},
		{"no target", "", "d", Action{}, "select a target to drain"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := begun(80, 24)
			if c.target != "" {
				s.keys("/")
				s.Paste(c.target)
				s.keys("enter", "end")
			}
			if got := s.keys(strings.Fields(c.keys)...); got != c.want {
				t.Errorf("%+v, want %+v", got, c.want)
			}
			if s.note.text != c.said {
				t.Errorf("said %q, want %q", s.note.text, c.said)
			}
		})
	}
}

// The question names the target that was selected when the key was pressed, also
// once the list has changed or the target is gone.
func TestQuestion(t *testing.T) {
	for _, c := range []struct {
		name   string
		target string
		key    string
		change func(*control.Status)
		want   []string
	}{
		{"last of a group that ends flows", "10.0.1.11", "d", nil, []string{"Drain 10.0.1.11:8080 of web?",
			"New flows go elsewhere. For 5m00s, the deregistration delay of web, its 12 flows may go on; then those left are ENDED (connection_termination).",
			"It is the group's LAST HEALTHY target.", "u undrains it."}},
		{"of a group that does not", "10.0.2.22", "d", nil, []string{"Drain 10.0.2.22:8080 of metrics-of-the-second-data-centre?",
			"New flows go elsewhere. For 30s, the deregistration delay of metrics-of-the-second-data-centre, its 8 flows may go on; those left then are not ended (no connection_termination).",
			"u undrains it."}},
		{"uncounted", "10.0.2.21", "d", nil, []string{"Drain 10.0.2.21:8080 of metrics-of-the-second-data-centre?",
			"New flows go elsewhere. For 30s, the deregistration delay of metrics-of-the-second-data-centre, its flows may go on; those left then are not ended (no connection_termination).",
			"u undrains it."}},
		{"back", "10.0.1.13", "u", nil, []string{"Undrain 10.0.1.13:8080 of web?", "It takes new flows as soon as it is healthy, and keeps its 3 flows."}},
		{"gone meanwhile", "10.0.1.11", "d", func(s *control.Status) { s.TargetGroups = s.TargetGroups[:1] }, []string{"Drain 10.0.1.11:8080 of web?",
			"New flows go elsewhere. How long its flows may go on is not known: the group is gone.", "u undrains it."}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := begun(80, 24)
			s.keys("/")
			s.Paste(c.target)
			s.keys("enter", "end", c.key)
			if c.change != nil {
				st := answer(start, 2)
				c.change(st)
				s.Take(st, start.Add(2*apart))
			}
			name, text := s.question()
			if diff := cmp.Diff(c.want, append([]string{name}, text...)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestChanged(t *testing.T) {
	a := Action{Drain, control.TargetName{Group: "web", Address: netip.MustParseAddr("10.0.1.11"), Port: 8080}}
	for _, c := range []struct {
		verb Verb
		err  error
		want string
	}{
		{Drain, nil, "draining web 10.0.1.11:8080"},
		{Undrain, nil, "registered again: web 10.0.1.11:8080"},
		{Drain, errors.New("user 7 may look but not change"), "drain web 10.0.1.11:8080: user 7 may look but not change"},
	} {
		s := begun(80, 24)
		a.Verb = c.verb
		s.Changed(a, c.err)
		if got := s.keysLine().String(); got != c.want || s.note.bad != (c.err != nil) {
			t.Errorf("%q, want %q", got, c.want)
		}
		if s.keys("down"); s.note.text != "" {
			t.Errorf("%q outlives a key", s.note.text)
		}
	}
}

// Nobody is asked whether to drain what nobody would carry out.
func TestNoDrainWithoutADaemon(t *testing.T) {
	s := begun(80, 24)
	s.keys("end", "up", "up", "up")
	s.Fail(errors.New("no daemon answers"))
	if a := s.keys("d", "y"); a != (Action{}) || s.dialog.kind != noDialog {
		t.Errorf("%+v", a)
	}
}

func TestPausePaceAndOthers(t *testing.T) {
	for _, c := range []struct {
		keys     string
		want     Verb
		interval time.Duration
		paused   bool
	}{
		{"p", Nothing, apart, true}, {"p p", Look, apart, false}, {"+", Look, time.Second, false}, {"= =", Look, 500 * time.Millisecond, false},
		{"+ + + +", Look, 500 * time.Millisecond, false}, {"-", Look, 5 * time.Second, false}, {"- - - - - - - -", Look, time.Minute, false},
		{"q", Quit, apart, false}, {"ctrl+c", Quit, apart, false}, {"? ctrl+c", Quit, apart, false}, {"/ q", Nothing, apart, false}, {"/ ctrl+c", Quit, apart, false},
		{"? q", Nothing, apart, false}, {"? x q", Quit, apart, false}, {"ctrl+l", Redraw, apart, false}, {"ctrl+z", Suspend, apart, false},
	} {
		s := begun(80, 24)
		got := s.keys(strings.Fields(c.keys)...)
		if got.Verb != c.want || s.Interval() != c.interval || s.Paused() != c.paused {
			t.Errorf("%q: %v, every %v, paused %v", c.keys, got.Verb, s.Interval(), s.Paused())
		}
	}
	s := begun(80, 24)
	before := text(t, s, start)
	s.keys("p")
	s.Take(&control.Status{}, start.Add(2*apart))
	s.keys("p")
	if got := text(t, s, start); got != before {
		t.Errorf("an answer came through the pause:\n%s", cmp.Diff(before, got))
	}
}

// The cursor stays on what it is on, wherever the next answer puts that; if that is
// gone it stays where it was.
func TestCursorFollows(t *testing.T) {
	s := begun(80, 24)
	s.keys("S", "end", "up", "up", "up") // by bytes
	was := s.at()
	next := answer(start, 2)
	for i := range next.TargetGroups {
		next.TargetGroups[i].Targets = append([]control.Target{counted("10.0.0.1", balancer.Healthy, 0, 9, 9, 9)}, next.TargetGroups[i].Targets...)
	}
	s.Take(next, start.Add(2*apart))
	if s.at() != was {
		t.Errorf("the cursor went from %s to %s", was, s.at())
	}
	where := s.cursor
	s.Take(&control.Status{TargetGroups: next.TargetGroups[3:]}, start.Add(3*apart))
	if want := min(where, len(s.rows)-1); s.cursor != want {
		t.Errorf("the cursor went from %d to %d of %d", where, s.cursor, len(s.rows))
	}
	s.Take(&control.Status{}, start.Add(4*apart))
	if got := text(t, s, start); s.at() != "" || !strings.Contains(got, "no listeners, no target groups") {
		t.Errorf("at %q of nothing:\n%s", s.at(), got)
	}
}

// Whatever is pressed, pasted, answered and resized, a screen comes out, the cursor
// is on a row that is visible, and nothing is changed without a yes.
func TestAnyKeys(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := begun(80, 24)
		now, keys := start, []string{"y", "n", "x", "backspace", "ctrl+u", "1"}
		for _, b := range bindings {
			keys = append(keys, b.keys...)
		}
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			now = now.Add(time.Second)
			switch rapid.IntRange(0, 9).Draw(t, "what") {
			case 0:
				s.Resize(rapid.IntRange(1, 200).Draw(t, "width"), rapid.IntRange(1, 60).Draw(t, "height"))
			case 1:
				st := answer(now, uint64(now.Second()))
				st.TargetGroups = st.TargetGroups[:rapid.IntRange(0, len(st.TargetGroups)).Draw(t, "groups")]
				s.Take(st, now)
			case 2:
				s.Fail(errors.New("no daemon answers"))
			default:
				asked := s.dialog
				k := rapid.SampledFrom(keys).Draw(t, "key")
				if a := s.keys(k); (a.Verb == Drain || a.Verb == Undrain) && (asked.kind != confirming || k != "y" || a != asked.ask) {
					t.Fatalf("%q does %+v though %+v was asked", k, a, asked)
				}
			}
			lines := s.Lines(now)
			if len(lines) != s.height {
				t.Fatalf("%d lines on a screen of %d", len(lines), s.height)
			}
			for _, l := range lines {
				if width(l.String()) > s.width {
					t.Fatalf("%q on a screen of %d", l, s.width)
				}
			}
			if len(s.rows) > 0 && s.dialog.kind == noDialog && s.height >= 6 && (s.cursor < s.offset || s.cursor >= min(len(s.rows), s.offset+s.visible)) {
				t.Fatalf("the cursor is at %d, the screen at %d of %d", s.cursor, s.offset, len(s.rows))
			}
		}
	})
}

// crowd is an answer with ten thousand targets in a hundred groups.
func crowd(grown uint64) *control.Status {
	st := &control.Status{Dataplane: "nftables"}
	for i := range 100 {
		g := control.TargetGroup{Name: fmt.Sprintf("group-%02d", i), Protocol: balancer.TCP, ClientIP: balancer.SNAT}
		for j := range 100 {
			g.Targets = append(g.Targets, counted(fmt.Sprintf("10.0.%d.%d", i, j), balancer.Healthy, time.Hour, uint64(j), grown*uint64(j), grown*1000))
		}
		st.TargetGroups = append(st.TargetGroups, g)
	}
	return st
}

// A key draws what is visible, whatever else there is.
func BenchmarkKeyOfTenThousand(b *testing.B) {
	s := New(Options{Interval: time.Second})
	s.Take(crowd(1), start)
	b.ReportAllocs()
	for b.Loop() {
		s.keys("down")
		_ = s.Lines(start)
	}
}

// An answer costs as much as there are targets: to read it, and to show it.
func BenchmarkAnswerOfTenThousand(b *testing.B) {
	var answers [2][]byte
	for i := range answers {
		text, err := json.Marshal(crowd(uint64(i)))
		if err != nil {
			b.Fatal(err)
		}
		answers[i] = text
	}
	read := func(b *testing.B, i int) *control.Status {
		var st control.Status
		if err := json.Unmarshal(answers[i%2], &st); err != nil {
			b.Fatal(err)
		}
		return &st
	}
	b.Run("read", func(b *testing.B) {
		b.SetBytes(int64(len(answers[0])))
		for i := 0; b.Loop(); i++ {
			read(b, i)
		}
	})
	b.Run("show", func(b *testing.B) {
		s, both := New(Options{Interval: time.Second, Sort: ByBytes}), []*control.Status{read(b, 0), read(b, 1)}
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			at := start.Add(time.Duration(i) * time.Second)
			s.Take(both[i%2], at)
			_ = s.Lines(at)
		}
	})
}

// Drawing must not depend on how many rows there are besides those that are seen.
func TestDrawingTouchesWhatIsVisible(t *testing.T) {
	few, many := begun(80, 24), New(Options{Interval: apart})
	many.Take(crowd(1), start)
	many.Take(crowd(2), start.Add(apart))
	allocations := func(s *Screen) float64 {
		return testing.AllocsPerRun(10, func() { _ = s.Lines(start.Add(apart)) })
	}
	if a, b := allocations(few), allocations(many); b > 3*a {
		t.Errorf("a screen of %d rows takes %.0f allocations, one of %d takes %.0f", len(few.rows), a, len(many.rows), b)
	}
}
