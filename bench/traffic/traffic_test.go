package traffic

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/bench/part"
	"nlb/bench/part/parttest"
	"nlb/bench/report"
)

func TestMain(m *testing.M) {
	lab.MaybeRunAgent()
	os.Exit(m.Run())
}

// everything is what a part can be asked for, with the real programs.
func everything(t *testing.T, nlb string) part.Options {
	t.Helper()
	t.Setenv("TMPDIR", t.TempDir())
	o := part.Options{
		Quick: true, Contestants: Part.Contestants,
		Programs: part.Programs{part.NLB: nlb, part.HAProxy: "haproxy", part.Nginx: "nginx", part.NFT: "nft"},
	}
	for _, m := range Part.Metrics {
		o.Metrics = append(o.Metrics, m.Name)
	}
	return o
}

// A book is a recorder that refuses what a report would.
type book struct {
	*report.Writer
	values map[string]float64 // by metric, case and contestant
}

func (b *book) Measure(m report.Measurement) error {
	b.values[m.Metric+"/"+m.Case+"/"+m.Contestant] = m.Value
	return b.Writer.Measure(m)
}

func (b *book) Note(n report.Note) error { return fmt.Errorf("unexpected: %+v", n) }

func newBook(t *testing.T) *book {
	t.Helper()
	h := report.Header{Start: time.Now(), Command: "bench", Mode: report.Quick, Rounds: 1}
	for _, m := range Part.Metrics {
		h.Metrics = append(h.Metrics, m.Metric)
	}
	for _, c := range part.Contestants {
		setup := Part.Setups[c.Name]
		h.Contestants = append(h.Contestants, report.Contestant{Name: c.Name, Role: c.Role, Job: c.Job, Commands: setup.Commands, Config: setup.Config})
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "run.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	w, err := report.NewWriter(f, h)
	if err != nil {
		t.Fatal(err)
	}
	return &book{w, make(map[string]float64)}
}

// expected are all values that there are to be.
func expected() []string {
	var all []string
	for i := range contestants {
		for _, l := range loads {
			if l.packets && !contestants[i].forwards {
				continue
			}
			for _, y := range l.yields {
				all = append(all, y.metric+"/"+y.cas+"/"+contestants[i].name)
			}
		}
	}
	slices.Sort(all)
	return all
}

// TestRound measures, shortly, with the real programs. How fast is no matter
// here; that each of them works, and targets see whom they should, is.
func TestRound(t *testing.T) {
	opened, err := Part.Open(t.Context(), everything(t, parttest.BuildNLB(t)))
	if err != nil {
		t.Fatal(err)
	}
	r := opened.(*runner)
	r.share = func(*load) time.Duration { return 30 * time.Millisecond }
	checkPlan(t, r.sites)
	b := newBook(t)
	if err := r.Round(t.Context(), 1, b); err != nil {
		t.Error(err)
	}
	checkArrived(t, r)
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	var got []string
	for key, v := range b.values {
		got = append(got, key)
		if !(v > 0) {
			t.Errorf("%s is %g", key, v)
		}
	}
	slices.Sort(got)
	if diff := cmp.Diff(expected(), got); diff != "" {
		t.Error(diff)
	}
	parttest.NothingLeft(t)
}

// checkArrived: each target has had connections of each contestant.
func checkArrived(t *testing.T, r *runner) {
	t.Helper()
	if err := r.measure(t.Context(), 1, loads[0], &notes{}); err != nil {
		t.Error(err)
	}
	for _, s := range r.sites {
		if slices.Contains(s.station.arrived, 0) {
			t.Errorf("%s: targets had %v connections", s.name, s.station.arrived)
		}
	}
}

// checkPlan: what people are shown is what was there.
func checkPlan(t *testing.T, sites []*site) {
	t.Helper()
	p := plan()
	for _, s := range sites {
		if s.LB.Addr4 != p.LB.Addr4 || s.Clients[0].Addr4 != p.Clients[0].Addr4 || len(s.Targets) != len(p.Targets) {
			t.Fatalf("%s: %s", s.name, s.Topology)
		}
		for i := range s.Targets {
			if s.Targets[i].Addr4 != p.Targets[i].Addr4 {
				t.Errorf("%s: target %d is %s", s.name, i, s.Targets[i].Addr4)
			}
		}
		if !s.balanced() || s.shown != nil {
			continue
		}
		if diff := cmp.Diff(s.config(&s.Site), s.Expand(Part.Setups[s.name].Config)); diff != "" {
			t.Errorf("%s: %s", s.name, diff)
		}
	}
}

// TestOnlyWhatIsWanted: nobody has to wait for more, or to have programs for it.
func TestOnlyWhatIsWanted(t *testing.T) {
	o := everything(t, "/nowhere/nlb")
	o.Contestants = []string{part.Direct, part.MinimalDNAT}
	o.Metrics = []string{packetRate}
	round, around := Part.Estimate(o)
	opened, err := Part.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	b := newBook(t)
	if err := opened.Round(t.Context(), 1, b); err != nil {
		t.Error(err)
	}
	if err := opened.Close(); err != nil {
		t.Error(err)
	}
	if len(b.values) != 2 || b.values[packetRate+"//"+part.Direct] == 0 || b.values[packetRate+"//"+part.MinimalDNAT] == 0 {
		t.Errorf("%v", b.values)
	}
	if want := 2 * (loads[4].quick + time.Duration(loads[4].turns(loads[4].quick))*turnTime); round != want || around != 2*buildTime {
		t.Errorf("%v and %v", round, around)
	}
	parttest.NothingLeft(t)
}

// TestEstimate: a full run is to be over in four minutes, a quick one in 50 s.
func TestEstimate(t *testing.T) {
	o := everything(t, "nlb")
	for _, c := range []struct {
		quick  bool
		rounds int
		most   time.Duration
	}{{true, Part.QuickRounds, 50 * time.Second}, {false, Part.Rounds, 4 * time.Minute}} {
		o.Quick = c.quick
		round, around := Part.Estimate(o)
		if all := around + time.Duration(c.rounds)*round; all > c.most || all < c.most/2 {
			t.Errorf("quick %v: %v and %d times %v are %v", c.quick, around, c.rounds, round, all)
		}
	}
}

// TestPartIsWhatTheRaceKnows: every contestant of the race can be measured, but for
// those that not every kernel has, and every metric is of a load.
func TestPartIsWhatTheRaceKnows(t *testing.T) {
	var all, yielded []string
	for _, c := range part.Contestants {
		if c.Key != "flowtable" && c.Key != "ipvs" {
			all = append(all, c.Name)
		}
	}
	if diff := cmp.Diff(all, Part.Contestants); diff != "" {
		t.Error(diff)
	}
	for _, l := range loads {
		for _, y := range l.yields {
			yielded = append(yielded, y.metric+"/"+y.cas)
		}
	}
	var known []string
	for _, m := range Part.Metrics {
		for _, c := range append(m.Cases, "")[:max(1, len(m.Cases))] {
			known = append(known, m.Name+"/"+c)
		}
	}
	slices.Sort(yielded)
	slices.Sort(known)
	if diff := cmp.Diff(known, yielded); diff != "" {
		t.Error(diff)
	}
	for name, s := range Part.Setups {
		if len(s.Commands) == 0 || strings.Contains(s.Config, "198.51.100.10") || len(s.Config) > 16<<10 {
			t.Errorf("%s: %+v", name, s)
		}
	}
}

// TestInterrupted is ^C while nlb is awaited.
func TestInterrupted(t *testing.T) {
	started := filepath.Join(t.TempDir(), "started")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if err := unix.Mkfifo(started, 0o600); err != nil {
		t.Fatal(err)
	}
	o := everything(t, parttest.Script(t, "echo >"+started+"; exec sleep 60"))
	o.Contestants = []string{part.Direct, part.Preserve}
	go func() {
		_, _ = os.ReadFile(started) // until the script has been there
		cancel()
	}()
	if _, err := Part.Open(ctx, o); err == nil || ctx.Err() == nil {
		t.Errorf("error %v, of the context %v", err, ctx.Err())
	}
	parttest.NothingLeft(t)
}

// TestBrokenPromises: a way is measured only if it does what it is said to.
func TestBrokenPromises(t *testing.T) {
	o := everything(t, "/nowhere/nlb")
	o.Contestants = []string{part.MinimalDNAT, part.MinimalSNAT}
	opened, err := Part.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	dnat, snat := opened.(*runner).sites[0], opened.(*runner).sites[1]
	for _, s := range []*site{dnat, snat} {
		if err := s.try(); err != nil {
			t.Errorf("%s: %v", s.name, err)
		}
	}
	dnat.station.peer, snat.station.peer = snat.station.peer, dnat.station.peer
	for s, want := range map[*site]string{
		dnat: "the target sees 203.0.113.9, not 10.0.1.1",
		snat: "the target sees 10.0.1.1, not 203.0.113.9",
	} {
		if err := s.try(); err == nil || err.Error() != want {
			t.Errorf("%s: %v, not %q", s.name, err, want)
		}
	}
	dnat.station.peer = dnat.station.client
	dnat.contestant = &contestant{name: part.MinimalDNAT, config: dnat.config}
	if err := dnat.try(); err == nil || !strings.Contains(err.Error(), "tracked") {
		t.Errorf("tracked in spite of its promise: %v", err)
	}
	if err := opened.Close(); err != nil {
		t.Error(err)
	}
	parttest.NothingLeft(t)
}

// TestEndedBalancerIsSaid: a balancer that dies ends the round, and is named.
func TestEndedBalancerIsSaid(t *testing.T) {
	o := everything(t, "nlb")
	o.Contestants, o.Metrics = []string{part.PlainHAProxy}, []string{connectionRate}
	opened, err := Part.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	b := &opened.(*runner).sites[0].Balancer
	if err := b.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	b.Join()
	if err := opened.Round(t.Context(), 1, newBook(t)); err == nil || !strings.HasPrefix(err.Error(), "connections: HAProxy: ") {
		t.Errorf("%v", err)
	}
	if err := opened.Close(); err != nil {
		t.Error(err)
	}
	parttest.NothingLeft(t)
}

func TestWhatIsMissingIsSaid(t *testing.T) {
	fails := parttest.Script(t, "echo no luck >&2; exit 1")
	for _, c := range []struct {
		name   string
		change func(*part.Options)
		want   string
	}{
		{"no nlb", func(o *part.Options) { o.Programs[part.NLB] = "/nowhere/nlb" }, "nlb preserve: needs nlb: make build-static: "},
		{"no HAProxy", func(o *part.Options) { o.Programs[part.HAProxy] = "/nowhere/haproxy" }, "HAProxy: needs haproxy: apt-get install haproxy: "},
		{"no nginx", func(o *part.Options) { o.Programs[part.Nginx] = "" }, "nginx stream: needs nginx: apt-get install nginx-light libnginx-mod-stream: "},
		{"no nft", func(o *part.Options) { o.Programs[part.NFT] = "/nowhere/nft" }, "nftables DNAT: needs nft: apt-get install nftables: "},
		{"no such core", func(o *part.Options) { o.Core = 9999 }, "there is no ksoftirqd/9999"},
		{"a program that fails", func(o *part.Options) { o.Contestants = []string{part.Direct, part.Relay} }, "nlb proxy_protocol_v2: nlb serve has ended: no luck"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := everything(t, fails)
			c.change(&o)
			if _, err := Part.Open(t.Context(), o); err == nil || !strings.HasPrefix(err.Error(), c.want) {
				t.Errorf("said %v, not %q", err, c.want)
			}
			parttest.NothingLeft(t)
		})
	}
}

func TestSpread(t *testing.T) {
	for _, c := range []struct {
		arrived []int
		fine    bool
	}{
		{[]int{100, 100, 100}, true},
		{[]int{10, 190, 100}, true},
		{[]int{9, 191, 100}, false},
		{[]int{300, 0, 0}, false},
		{[]int{299, 0, 0}, true}, // too few to say
		{[]int{500}, true},
	} {
		if err := spread(c.arrived); (err == nil) != c.fine {
			t.Errorf("%v: %v", c.arrived, err)
		}
	}
}

func TestWindow(t *testing.T) {
	var w window
	w.add(500_000, 2*time.Second)
	w.add(500_000, 2*time.Second)
	if w.rate() != 250_000 || w.cost(time.Microsecond) != 4 || w.cost(time.Nanosecond) != 4000 {
		t.Errorf("%+v: %v, %v", w, w.rate(), w.cost(time.Microsecond))
	}
}

// failing is a recorder that can not.
type failing struct{ measure, note error }

func (f failing) Measure(report.Measurement) error { return f.measure }
func (f failing) Note(report.Note) error           { return f.note }

// TestLossIsNoted: what was lost is said, once for each value, and an error of
// the recorder ends the round.
func TestLossIsNoted(t *testing.T) {
	full := errors.New("disk full")
	r := &runner{o: part.Options{Contestants: []string{part.Direct}, Metrics: []string{packetRate}}}
	lossy := sample{window: window{10, time.Second}, lost: 3}
	var n notes
	if err := r.record(2, loads[4], part.Direct, &lossy, &n); err != nil {
		t.Fatal(err)
	}
	want := notes{{Metric: packetRate, Contestant: part.Direct, Text: "round 2: 3 packets did not arrive"}}
	if diff := cmp.Diff(want, n); diff != "" {
		t.Error(diff)
	}
	for _, f := range []failing{{measure: full}, {note: full}} {
		if err := r.record(1, loads[4], part.Direct, &lossy, f); !errors.Is(err, full) {
			t.Errorf("%v", err)
		}
	}
}

type notes []report.Note

func (*notes) Measure(report.Measurement) error { return nil }
func (n *notes) Note(v report.Note) error       { *n = append(*n, v); return nil }

// TestHurry: the urgency is there, by either way, and gone again afterwards.
func TestHurry(t *testing.T) {
	self := os.Getpid()
	niceOf := func() string {
		t.Helper()
		text, err := os.ReadFile("/proc/self/autogroup")
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		group, _, err := groupNice(text)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := unix.Getpriority(unix.PRIO_PROCESS, self)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%s/%d", group, 20-raw)
	}
	for name, way := range map[string]func(int) (func(), error){"whole": hurry, "threads": hurryThreads} {
		before := niceOf()
		calm, err := way(self)
		if err != nil {
			t.Fatal(err)
		}
		during := niceOf()
		calm()
		if !strings.Contains(during, strconv.Itoa(urgency)) || niceOf() != before {
			t.Errorf("%s: %q, then %q, then %q", name, before, during, niceOf())
		}
	}
}

func TestGroupNice(t *testing.T) {
	for _, c := range []struct {
		text, nice string
		grouped    bool
		fails      bool
	}{
		{text: "/autogroup-12 nice -15\n", nice: "-15", grouped: true},
		{text: "/autogroup-3 nice 0\n", nice: "0", grouped: true},
		{text: ""}, // no autogroups, or in the kernel's own
		{text: "/autogroup nice\n", fails: true},
	} {
		nice, grouped, err := groupNice([]byte(c.text))
		if nice != c.nice || grouped != c.grouped || (err != nil) != c.fails {
			t.Errorf("%q: %q, %v, %v", c.text, nice, grouped, err)
		}
	}
}
