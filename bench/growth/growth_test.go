package growth

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
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

// small is enough to see that all works: a thousand takes seconds to set up, and
// one turn is taken in any case.
var small = care{sizes: []size{sizes[0], sizes[1], sizes[3], sizes[4]}}

// records is a Recorder.
type records struct{ measurements []report.Measurement }

func (r *records) Measure(m report.Measurement) error {
	r.measurements = append(r.measurements, m)
	return nil
}

func (r *records) Note(n report.Note) error { return fmt.Errorf("unexpected note: %v", n) }

// TestGrowth opens everything with the real nlb, looks where flows go, and
// measures one round. How fast is no matter here.
func TestGrowth(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	o := options(t, parttest.BuildNLB(t))
	r, err := openWith(t.Context(), &o, small)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		parttest.NothingLeft(t)
	})
	if got, want := len(r.sites), len(contestants)*3; got != want {
		t.Errorf("%d networks, not %d: listeners=1 and targets=3 are the same", got, want)
	}
	for _, s := range r.sites {
		t.Run(s.contestant+", "+s.name, func(t *testing.T) { spreads(t, r, s) })
	}
	var got records
	if err := r.Round(t.Context(), 1, &got); err != nil {
		t.Fatal(err)
	}
	var want []report.Measurement
	for _, size := range small.sizes {
		for _, c := range contestants {
			want = append(want, report.Measurement{Round: 1, Metric: FirstPacket, Case: size.name, Contestant: c, Unit: "ns"})
		}
	}
	if diff := cmp.Diff(want, got.measurements, cmpopts.IgnoreFields(report.Measurement{}, "Value")); diff != "" {
		t.Error(diff)
	}
	for _, m := range got.measurements {
		// A packet takes no less than a hundred instructions of any processor,
		// and no more than a ms even where others have most of it.
		if m.Value < 30 || m.Value > 1e6 {
			t.Errorf("%+v", m)
		}
	}
}

// spreads checks that a turn's flows reach all listeners and all targets, and that
// a turn leaves none.
func spreads(t *testing.T, r *runner, s *site) {
	r.out.prepare(s)
	if err := r.out.send(s); err != nil {
		t.Fatal(err)
	}
	if s.contestant != part.Direct { // which tracks nothing
		flows, listeners, targets := tracked(t, s)
		if flows != turnFlows || listeners != s.listeners || targets != s.targets {
			t.Errorf("%d flows to %d listeners, on to %d targets; not %d, %d, %d",
				flows, listeners, targets, turnFlows, s.listeners, s.targets)
		}
	}
	if err := r.turn(&row{site: s}); err != nil {
		t.Fatal(err)
	}
	if flows, _, _ := tracked(t, s); flows != 0 {
		t.Errorf("%d flows are left", flows)
	}
}

// tracked counts the balancer's UDP flows, and their listeners and targets.
func tracked(t *testing.T, s *site) (flows, listeners, targets int) {
	t.Helper()
	table, err := s.conntrack.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
	if err != nil {
		t.Fatal(err)
	}
	to, on := make(map[uint16]bool), make(map[string]bool)
	for _, f := range table {
		if f.Forward.Protocol == unix.IPPROTO_UDP {
			flows++
			to[f.Forward.DstPort], on[f.Reverse.SrcIP.String()] = true, true
		}
	}
	return flows, len(to), len(on)
}

// TestCost has one batch during which another program had the core, which does
// not count, and time of nlb's own, which does.
func TestCost(t *testing.T) {
	w := row{costs: []float64{4000, 4100, 100000}, daemon: 3 * batchSize * 50 * time.Nanosecond}
	if got := w.cost(); got != 4150 {
		t.Errorf("%g", got)
	}
}

func TestOnlyWhatIsWantedIsMade(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	o := options(t, "")
	o.Contestants = []string{"another part's", part.Direct}
	r, err := openWith(t.Context(), &o, care{sizes: sizes[:1]})
	if err != nil {
		t.Fatal(err)
	}
	var got records
	if err := errors.Join(r.Round(t.Context(), 3, &got), r.Close()); err != nil {
		t.Fatal(err)
	}
	want := []report.Measurement{{Round: 3, Metric: FirstPacket, Case: "listeners=1", Contestant: part.Direct, Unit: "ns"}}
	if diff := cmp.Diff(want, got.measurements, cmpopts.IgnoreFields(report.Measurement{}, "Value")); diff != "" {
		t.Error(diff)
	}
	parttest.NothingLeft(t)
}

func TestInterrupted(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	o := options(t, "")
	o.Contestants = []string{part.Direct}
	r, err := openWith(t.Context(), &o, care{sizes: sizes[:1]})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var got records
	if err := r.Round(ctx, 1, &got); !errors.Is(err, context.Canceled) || len(got.measurements) > 0 {
		t.Errorf("%v, %v", err, got.measurements)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	parttest.NothingLeft(t)
}

// TestWrongSourceIsFound has a ruleset that keeps the client where one is expected
// that hides it.
func TestWrongSourceIsFound(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	o := options(t, "")
	s := &site{contestant: part.MinimalDNAT, size: sizes[0]}
	if err := s.build(t.Context(), o.Programs); err != nil {
		t.Fatal(errors.Join(err, s.close()))
	}
	if err := s.check(); err != nil {
		t.Error(err)
	}
	s.contestant = part.MinimalSNAT
	if err := s.check(); err == nil || err.Error() != "the target sees 203.0.113.9, not 10.0.1.1" {
		t.Errorf("%v", err)
	}
	if err := s.close(); err != nil {
		t.Error(err)
	}
	parttest.NothingLeft(t)
}

func TestWhatIsMissingIsSaid(t *testing.T) {
	for _, c := range []struct{ name, program, want string }{
		{"no program", "/nowhere/nlb", "nlb preserve, listeners=1: "},
		{"a program that fails", parttest.Script(t, "echo no luck >&2; exit 1"), "nlb preserve, listeners=1: nlb serve has ended: no luck"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv("TMPDIR", t.TempDir())
			o := options(t, c.program)
			o.Contestants = []string{part.Preserve}
			r, err := Part.Open(t.Context(), o)
			if err == nil {
				t.Fatal(r.Close())
			}
			if !strings.HasPrefix(err.Error(), c.want) {
				t.Errorf("%q, not %q", err, c.want)
			}
			parttest.NothingLeft(t)
		})
	}
}

func TestPartDeclaresWhatItMeasures(t *testing.T) {
	want := []string{"listeners=1", "listeners=100", "listeners=1000", "targets=3", "targets=100", "targets=1000"}
	if diff := cmp.Diff(want, Part.Metrics[0].Cases); diff != "" {
		t.Error(diff)
	}
	known := make(map[string]bool)
	for _, c := range part.Contestants {
		known[c.Name] = true
	}
	for _, c := range contestants {
		if !known[c] {
			t.Errorf("%q is no contestant", c)
		}
		if s := Part.Setups[c]; (s.Config == "" || len(s.Commands) == 0) != (c == part.Direct) {
			t.Errorf("%s is set up by %+v", c, s)
		}
	}
}

// TestEstimates has the limits that people are told of.
func TestEstimates(t *testing.T) {
	for _, c := range []struct {
		quick  bool
		rounds int
		limit  time.Duration
	}{{false, Part.Rounds, 90 * time.Second}, {true, Part.QuickRounds, 20 * time.Second}} {
		o := options(t, "")
		o.Quick = c.quick
		round, around := Part.Estimate(o)
		if total := around + time.Duration(c.rounds)*round; total <= 0 || total > c.limit {
			t.Errorf("quick %v: %v", c.quick, total)
		}
		o.Contestants = nil
		if round, around := Part.Estimate(o); round != 0 || around != 0 {
			t.Errorf("of nobody: %v, %v", round, around)
		}
	}
}

func TestTargetsHaveAddressesOfTheirOwn(t *testing.T) {
	seen := make(map[netip.Addr]bool)
	for _, a := range sizes[len(sizes)-1].targetAddrs() {
		if !targetNet.Contains(a) || seen[a] {
			t.Errorf("%s is not in %s, or is there already", a, targetNet)
		}
		seen[a] = true
	}
	if len(seen) != 1000 {
		t.Errorf("%d targets", len(seen))
	}
}

// options want everything of everybody, with the nft of this machine.
func options(t *testing.T, program string) part.Options {
	t.Helper()
	nft, err := exec.LookPath("nft")
	if err != nil {
		t.Fatal(err)
	}
	return part.Options{
		Programs:    part.Programs{part.NLB: program, part.NFT: nft},
		Contestants: contestants, Metrics: []string{FirstPacket},
	}
}
