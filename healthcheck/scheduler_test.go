package healthcheck

import (
	"context"
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"nlb/internal/bubble"
)

// A field is the targets of a test: what each answers, how long that takes, and
// when it was asked.
type field struct {
	mu     sync.Mutex
	kind   map[netip.AddrPort]Kind // OK when absent
	takes  map[netip.AddrPort]time.Duration
	starts map[netip.AddrPort][]time.Time
	flying map[Key]bool
	twice  bool // a check had two probes in flight
	ended  int  // probes that their context ended
}

func newField() *field {
	return &field{
		kind: map[netip.AddrPort]Kind{}, takes: map[netip.AddrPort]time.Duration{},
		starts: map[netip.AddrPort][]time.Time{}, flying: map[Key]bool{},
	}
}

func (f *field) set(target netip.AddrPort, k Kind) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.kind[target] = k
}

func (f *field) times(target netip.AddrPort) []time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.starts[target])
}

// probe keeps to its timeout as a Prober does.
func (f *field) probe(ctx context.Context, c Check) Result {
	r := Result{Target: c.Target, Start: time.Now(), Kind: OK}
	f.mu.Lock()
	if k, ok := f.kind[c.Target]; ok {
		r.Kind = k
	}
	f.twice = f.twice || f.flying[c.Key()]
	f.flying[c.Key()] = true
	f.starts[c.Target] = append(f.starts[c.Target], r.Start)
	takes := f.takes[c.Target]
	f.mu.Unlock()
	if takes > c.Timeout {
		takes, r.Kind = c.Timeout, Timeout
	}
	ended := false
	if takes > 0 {
		select {
		case <-time.After(takes):
		case <-ctx.Done():
			ended = true
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.flying[c.Key()] = false
	if ended {
		f.ended++
		r.Kind = Unmade
	}
	r.Latency = time.Since(r.Start)
	return r
}

func numbered(i int) netip.AddrPort {
	b := [4]byte{10, 0, 0, 0}
	binary.BigEndian.PutUint16(b[2:], uint16(i))
	return netip.AddrPortFrom(netip.AddrFrom4(b), 8080)
}

func everySecond(target netip.AddrPort) Check {
	return Check{Target: target, Interval: time.Second, Timeout: time.Second, HealthyThreshold: 3, UnhealthyThreshold: 2}
}

// run has the scheduler run in the bubble of a test until stop returns.
func run(t *testing.T, s *Scheduler) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	return sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func state(t *testing.T, s *Scheduler, c Check) State {
	t.Helper()
	st, ok := s.Status(c.Key())
	if !ok {
		t.Fatalf("%v is not in the set", c.Target)
	}
	return st.State
}

func TestLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, c := newField(), everySecond(target)
		var told []Transition
		s := New(Options{Probe: f.probe, OnChange: func(ts []Transition) { told = append(told, ts...) }})
		defer run(t, s)()
		s.Set([]Check{c})
		if st, _ := s.Status(c.Key()); st.State != Initial || st.Reason != ReasonInitialHealthChecking || !st.Since.Equal(time.Now()) {
			t.Errorf("at first: %+v", st)
		}
		bubble.Pass(100 * time.Millisecond)
		if got := state(t, s, c); got != Healthy {
			t.Fatalf("after 100 ms: %v", got)
		}
		f.set(target, Refused)
		bubble.Pass(time.Second)
		if got := state(t, s, c); got != Healthy {
			t.Errorf("after one failure: %v", got)
		}
		bubble.Pass(time.Second)
		st, _ := s.Status(c.Key())
		want := Status{State: Unhealthy, Reason: ReasonFailedHealthChecks,
			Description: "connection refused by 10.0.1.11:8080 after 0.0 ms", Probes: 3, Failures: 2}
		if diff := cmp.Diff(want, st, cmpopts.IgnoreFields(Status{}, "Check", "Since", "Last")); diff != "" {
			t.Errorf("after two failures (-want +got):\n%s", diff)
		}
		if since := st.Last.Start; !st.Since.Equal(since) {
			t.Errorf("unhealthy since %v, last probe at %v", st.Since, since)
		}
		f.set(target, OK)
		bubble.Pass(2 * time.Second)
		if got := state(t, s, c); got != Unhealthy {
			t.Errorf("after two successes: %v", got)
		}
		bubble.Pass(time.Second)
		if st, _ := s.Status(c.Key()); st.State != Healthy || st.Reason != "" || st.Description != "" {
			t.Errorf("after three successes: %+v", st)
		}
		synctest.Wait()
		var changes []string
		for _, tr := range told {
			changes = append(changes, tr.From.String()+" to "+tr.To.String())
			if tr.Key != c.Key() || tr.Status.State != tr.To {
				t.Errorf("transition %+v", tr)
			}
		}
		if diff := cmp.Diff([]string{"initial to healthy", "healthy to unhealthy", "unhealthy to healthy"}, changes); diff != "" {
			t.Errorf("transitions (-want +got):\n%s", diff)
		}
	})
}

// OnResult hears of each probe, good or bad, and of none of a check that is gone.
func TestResultsAreTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, c := newField(), everySecond(target)
		var mu sync.Mutex
		told := map[Kind]int{}
		s := New(Options{Probe: f.probe, OnResult: func(k Key, r Result) {
			mu.Lock()
			defer mu.Unlock()
			if k != c.Key() || r.Target != target {
				t.Errorf("%v of %v", r, k)
			}
			told[r.Kind]++
		}})
		defer run(t, s)()
		s.Set([]Check{c})
		bubble.Pass(1500 * time.Millisecond)
		f.set(target, Unmade)
		bubble.Pass(time.Second)
		f.set(target, Refused)
		bubble.Pass(time.Second)
		f.mu.Lock()
		f.takes[target] = time.Hour
		f.mu.Unlock()
		bubble.Pass(time.Second) // a probe is in flight
		s.Set(nil)
		bubble.Pass(10 * time.Second)
		mu.Lock()
		defer mu.Unlock()
		if diff := cmp.Diff(map[Kind]int{OK: 2, Unmade: 1, Refused: 1}, told); diff != "" {
			t.Error(diff)
		}
	})
}

// TestInterval: from start to start, and never two at once.
func TestInterval(t *testing.T) {
	tests := map[string]struct {
		takes, timeout, want time.Duration
	}{
		"an instant probe":       {0, time.Second, time.Second},
		"a slow probe":           {900 * time.Millisecond, time.Second, time.Second},
		"a probe that times out": {time.Hour, time.Second, time.Second},
		"longer than interval":   {1500 * time.Millisecond, 10 * time.Second, 1500 * time.Millisecond},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f, c := newField(), everySecond(target)
				c.Timeout = tt.timeout
				f.takes[target] = tt.takes
				s := New(Options{Probe: f.probe})
				defer run(t, s)()
				s.Set([]Check{c})
				bubble.Pass(10*tt.want + tt.want/2)
				starts := f.times(target)
				if n := len(starts); n < 10 || n > 11 {
					t.Fatalf("%d probes", n)
				}
				for i := range starts[1:] {
					if gap := (starts[i+1].Sub(starts[i]) - tt.want).Abs(); gap > 2*launchStep {
						t.Errorf("gap %d is %v off", i, gap)
					}
				}
				if f.twice {
					t.Error("two probes in flight")
				}
				st, _ := s.Status(c.Key())
				if n := uint64(len(starts)); st.Probes != n && st.Probes != n-1 {
					t.Errorf("%d probes counted, %d made", st.Probes, n)
				}
			})
		})
	}
}

// TestHungTargetsDelayNoOther: 1,000 targets hang, one does not.
func TestHungTargetsDelayNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newField()
		var checks []Check
		for i := range 1000 {
			f.takes[numbered(i)] = time.Hour
			checks = append(checks, everySecond(numbered(i)))
		}
		good := everySecond(numbered(1000))
		s := New(Options{Probe: f.probe})
		defer run(t, s)()
		s.Set(append(checks, good))
		bubble.Pass(time.Minute)
		starts := f.times(good.Target)
		if n := len(starts); n < 59 || n > 62 {
			t.Errorf("%d probes in a minute", n)
		}
		for i := range starts[2:] {
			if gap := (starts[i+2].Sub(starts[i+1]) - time.Second).Abs(); gap > 2*launchStep {
				t.Errorf("gap %d is %v off", i+1, gap)
			}
		}
		if got := state(t, s, good); got != Healthy {
			t.Errorf("the good target is %v", got)
		}
		for _, c := range checks {
			if st, _ := s.Status(c.Key()); st.State != Unhealthy || st.Reason != ReasonTimeout {
				t.Fatalf("%v is %v, %v", c.Target, st.State, st.Reason)
			}
		}
	})
}

func TestStart(t *testing.T) {
	tests := map[string]struct {
		count    int
		interval time.Duration
		first    time.Duration // by when all were probed once
		most     int           // probes in any 100 ms of the second interval
	}{
		"a few are at once":               {300, 30 * time.Second, 110 * time.Millisecond, 300},
		"a crowd is spread":               {10_000, time.Second, 1010 * time.Millisecond, 1300},
		"a crowd is spread, long between": {10_000, 30 * time.Second, 2510 * time.Millisecond, 120},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f, began := newField(), time.Now()
				s := New(Options{Probe: f.probe})
				var checks []Check
				for i := range tt.count {
					checks = append(checks, Check{Target: numbered(i), Interval: tt.interval})
				}
				s.Set(checks)
				stop := run(t, s)
				bubble.Pass(tt.first)
				for _, st := range s.Snapshot() {
					if st.Probes == 0 {
						t.Fatalf("%v was not probed in %v", st.Check.Target, tt.first)
					}
				}
				bubble.Pass(3 * tt.interval)
				stop()
				perSlot := map[time.Duration]int{}
				for _, starts := range f.starts {
					for _, at := range starts {
						perSlot[at.Sub(began)/(100*time.Millisecond)]++
					}
				}
				for slot, n := range perSlot {
					// From the second interval on; the first few seconds are the first probes'.
					if at := slot * 100 * time.Millisecond; at > tt.first+tt.interval && n > tt.most {
						t.Errorf("%d probes in the 100 ms at %v, want at most %d", n, at, tt.most)
					}
				}
			})
		})
	}
}

func TestSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newField()
		a, b := everySecond(numbered(1)), everySecond(numbered(2))
		s := New(Options{Probe: f.probe})
		defer run(t, s)()
		s.Set([]Check{a, a}) // two groups with the same check
		bubble.Pass(10500 * time.Millisecond)
		if n := len(f.times(a.Target)); n != 11 {
			t.Errorf("%d probes of a check that two groups share", n)
		}
		before, _ := s.Status(a.Key())

		s.Set([]Check{a, b})
		if diff := cmp.Diff(before, mustStatus(t, s, a), cmpopts.EquateComparable(netip.AddrPort{}, netip.Addr{})); diff != "" {
			t.Errorf("a check that stays changed (-before +after):\n%s", diff)
		}
		if got := state(t, s, b); got != Initial {
			t.Errorf("a new check is %v", got)
		}
		bubble.Pass(time.Second)
		if n := len(f.times(a.Target)); n != 12 {
			t.Errorf("%d probes of a check that stays", n)
		}

		s.Set([]Check{b})
		bubble.Pass(10 * time.Second)
		if n := len(f.times(a.Target)); n != 12 {
			t.Errorf("%d probes of a check that ended", n)
		}
		s.Set([]Check{a, b})
		if got := state(t, s, a); got != Initial {
			t.Errorf("a check that comes back is %v", got)
		}
		s.Set(nil)
		if n := len(s.Snapshot()); n != 0 {
			t.Errorf("%d checks left", n)
		}
	})
}

func mustStatus(t *testing.T, s *Scheduler, c Check) Status {
	t.Helper()
	st, ok := s.Status(c.Key())
	if !ok {
		t.Fatalf("%v is not in the set", c.Target)
	}
	return st
}

// TestChangedCheckAdopts: an operator who changes a check does not make its
// target new.
func TestChangedCheckAdopts(t *testing.T) {
	path := func(p string) Check {
		c := everySecond(target)
		c.Protocol, c.Path = HTTP, p
		return c
	}
	tests := map[string]struct {
		before, after []Check
		want          State // of the first check after
	}{
		"changed":                      {[]Check{path("/a")}, []Check{path("/b")}, Unhealthy},
		"both changed, both unhealthy": {[]Check{path("/a"), path("/c")}, []Check{path("/b"), path("/d")}, Unhealthy},
		"added":                        {[]Check{path("/a")}, []Check{path("/b"), path("/a")}, Initial},
		"another target":               {[]Check{everySecond(numbered(1))}, []Check{path("/b")}, Initial},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newField()
				f.set(target, Refused)
				s := New(Options{Probe: f.probe})
				stop := run(t, s)
				s.Set(tt.before)
				bubble.Pass(5 * time.Second)
				stop()
				s.Set(tt.after)
				if got := state(t, s, tt.after[0]); got != tt.want {
					t.Errorf("%v, want %v", got, tt.want)
				}
			})
		})
	}
	t.Run("those before disagree", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := New(Options{Probe: func(_ context.Context, c Check) Result {
				return Result{Kind: map[string]Kind{"/a": OK, "/c": Refused}[c.Path]}
			}})
			defer run(t, s)()
			s.Set([]Check{path("/a"), path("/c")})
			bubble.Pass(5 * time.Second)
			s.Set([]Check{path("/b")})
			if got := state(t, s, path("/b")); got != Initial {
				t.Errorf("%v, want %v", got, Initial)
			}
		})
	})
}

// TestRemovedCheckEndsItsProbe, and what it would have found is not told.
func TestRemovedCheckEndsItsProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, c := newField(), everySecond(target)
		c.Timeout = time.Hour
		f.takes[target] = time.Hour
		s := New(Options{Probe: f.probe, OnChange: func(ts []Transition) { t.Errorf("told %+v", ts) }})
		defer run(t, s)()
		s.Set([]Check{c})
		bubble.Pass(time.Second)
		s.Set(nil)
		synctest.Wait()
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.ended != 1 || len(f.starts[target]) != 1 {
			t.Errorf("%d of %d probes ended", f.ended, len(f.starts[target]))
		}
	})
}

// TestSlowListener: OnChange takes long, probes go on, changes are summed up.
func TestSlowListener(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newField()
		flapping, back, failing := everySecond(numbered(1)), everySecond(numbered(2)), everySecond(numbered(3))
		release := make(chan bool)
		var batches [][]Transition
		s := New(Options{Probe: f.probe, OnChange: func(ts []Transition) {
			batches = append(batches, ts)
			<-release
		}})
		defer run(t, s)()
		s.Set([]Check{flapping, back, failing})
		bubble.Pass(200 * time.Millisecond)
		release <- true // the batch, or the batches, of the first successes
		for synctest.Wait(); ; synctest.Wait() {
			select {
			case release <- true:
				continue
			default:
			}
			break
		}
		batches = nil

		f.set(failing.Target, Refused)
		bubble.Pass(2 * time.Second) // OnChange hangs with this one
		f.set(flapping.Target, Refused)
		f.set(back.Target, Refused)
		bubble.Pass(2 * time.Second)
		f.set(back.Target, OK)
		bubble.Pass(3 * time.Second)
		f.set(flapping.Target, OK)
		bubble.Pass(3 * time.Second)
		f.set(flapping.Target, Refused)
		bubble.Pass(2 * time.Second)
		if n := len(f.times(failing.Target)); n != 13 {
			t.Errorf("%d probes while OnChange hung", n)
		}
		close(release)
		synctest.Wait()
		var got [][]string
		for _, batch := range batches {
			var words []string
			for _, tr := range batch {
				words = append(words, tr.Status.Check.Target.String()+": "+tr.From.String()+" to "+tr.To.String())
			}
			got = append(got, words)
		}
		want := [][]string{{"10.0.0.3:8080: healthy to unhealthy"}, {"10.0.0.1:8080: healthy to unhealthy"}}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("batches (-want +got):\n%s", diff)
		}
	})
}

// TestUnmadeProbesChangeNothing: our own trouble is not the target's.
func TestUnmadeProbesChangeNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, c := newField(), everySecond(target)
		s := New(Options{Probe: f.probe})
		defer run(t, s)()
		s.Set([]Check{c})
		bubble.Pass(time.Second / 2)
		f.set(target, Unmade)
		bubble.Pass(10 * time.Second)
		st := mustStatus(t, s, c)
		want := Status{State: Healthy, Description: "could not probe 10.0.1.11:8080: ", Probes: 1, Unmade: 10}
		if diff := cmp.Diff(want, st, cmpopts.IgnoreFields(Status{}, "Check", "Since", "Last")); diff != "" {
			t.Errorf("status (-want +got):\n%s", diff)
		}
	})
}

// TestRunJoins: the bubble would report a goroutine that is left.
func TestRunJoins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newField()
		var checks []Check
		for i := range 100 {
			c := everySecond(numbered(i))
			c.Timeout = time.Hour
			f.takes[c.Target] = time.Hour
			checks = append(checks, c)
		}
		s := New(Options{Probe: f.probe})
		stop := run(t, s)
		s.Set(checks)
		bubble.Pass(time.Second)
		began := time.Now()
		stop()
		if took := time.Since(began); took != 0 {
			t.Errorf("the end took %v", took)
		}
		if f.ended != 100 {
			t.Errorf("%d of 100 probes ended", f.ended)
		}
		if err := s.Run(t.Context()); err == nil {
			t.Error("a second Run")
		}
	})
}

// A probe that does not end, and one that is never begun, are overdue; what is slow
// within its timeout is not.
func TestOverdue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var hang atomic.Bool
		s := New(Options{Probe: func(ctx context.Context, c Check) Result {
			if hang.Load() {
				<-release // although its time is over
			}
			time.Sleep(c.Timeout) // of the bubble's time
			return Result{Target: c.Target, Kind: OK}
		}})
		s.Set([]Check{{Target: netip.MustParseAddrPort("10.0.1.11:80"), Interval: 10 * time.Second, Timeout: 4 * time.Second}})
		bubble.Pass(time.Hour)
		if late := s.Overdue(); late != 0 {
			t.Errorf("overdue for %v before Run", late)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		for range 600 {
			bubble.Pass(100 * time.Millisecond)
			if late := s.Overdue(); late > 0 {
				t.Fatalf("overdue for %v although all is well", late)
			}
		}
		hang.Store(true)
		bubble.Pass(time.Minute)
		// The last good one began up to an interval after that, and had its timeout.
		if late := s.Overdue(); late < 45*time.Second || late > time.Minute {
			t.Errorf("overdue for %v after a minute without a result", late)
		}
		close(release)
		bubble.Pass(30 * time.Second)
		if late := s.Overdue(); late > 0 {
			t.Errorf("overdue for %v although probes end again", late)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		bubble.Pass(time.Minute)
		if late := s.Overdue(); late < 49*time.Second {
			t.Errorf("overdue for %v a minute after the last probe was begun", late)
		}
	})
}

func TestQueue(t *testing.T) {
	var q queue
	for i := range 100 {
		q = append(q, start{due: time.Duration(i * 37 % 101), e: &entry{}})
	}
	q.init()
	for i := range 100 {
		q.push(&entry{due: time.Duration(i * 53 % 103)})
	}
	var last time.Duration
	for n := range 200 {
		due := q[0].due
		if q.pop(); due < last {
			t.Fatalf("element %d: %d after %d", n, due, last)
		}
		last = due
	}
	if len(q) != 0 {
		t.Errorf("%d left", len(q))
	}
}
