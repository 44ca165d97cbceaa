package counting

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"nlb/bench/lab"
	"nlb/bench/measure"
	"nlb/bench/part"
	"nlb/bench/report"
)

// unit is that of all counts.
const unit = "instructions"

// Part is the race's part that counts instructions. A round is a boot. Programs
// has a statically linked nlb for it, and the program that runs it is linked
// statically too and has called MaybeGuest.
var Part = part.Part{
	Name:        "instructions",
	Metrics:     partMetrics(),
	Contestants: contestants,
	Setups:      setups(),
	Rounds:      2,
	QuickRounds: 1,
	Estimate:    estimate,
	Open:        open,
}

// contestants are the ways that belong to the race.
var contestants = []string{
	part.Direct, part.MinimalDNAT, part.Preserve, part.Hairpin,
	part.MinimalSNAT, part.SNAT,
	part.MinimalFast, part.PreserveFast,
	part.IPVS, part.TrackedIPVS, part.PreserveIPVS, part.SNATIPVS,
}

// quick are those for which there is time in a quick run.
var quick = []string{part.Direct, part.MinimalDNAT, part.Preserve, part.PreserveFast}

func partMetrics() []part.Metric {
	var all []part.Metric
	for _, name := range Metrics() {
		all = append(all, part.Metric{Key: "instructions", Metric: report.Metric{Name: name, Unit: unit, Better: report.Less, Counted: true}})
	}
	return all
}

// setups are how the contestants are set up in the guest.
func setups() map[string]part.Setup {
	all := make(map[string]part.Setup)
	for _, name := range contestants {
		all[name] = known(name).setup()
	}
	return all
}

func (w *Way) setup() part.Setup {
	var s part.Setup
	for line := range strings.Lines(w.commands) {
		s.Commands = append(s.Commands, strings.TrimSpace(line))
	}
	switch {
	case w.ruleset != "":
		s.Commands, s.Config = append(s.Commands, "nft -f ruleset"), w.ruleset
	case w.nlb.ClientIP != "":
		s.Commands, s.Config = []string{"nlb serve -c nlb.yaml"}, w.config()
	}
	return s
}

// What a routed lab has.
const (
	balancerAddress = "10.0.1.1"
	firstTarget     = "10.0.1.11"
)

// config is nlb's configuration, with VIP, T0 and T1 for the addresses.
func (w *Way) config() string {
	site := measure.Site{Topology: &lab.Topology{LB: &lab.Node{Addr4: netip.MustParseAddr(balancerAddress)}}}
	names := []string{lab.VIP4.String(), "VIP"}
	a := netip.MustParseAddr(firstTarget)
	for i := range targets {
		site.Targets = append(site.Targets, &lab.Node{Addr4: a})
		names = append(names, a.String(), fmt.Sprint("T", i))
		a = a.Next()
	}
	return strings.NewReplacer(names...).Replace(site.Config(w.nlb))
}

// What a guest takes on an idle machine: to boot, with the kernel's own affairs,
// and for each way.
const (
	bootTime = 8 * time.Second
	wayTime  = 5 * time.Second
)

func estimate(o part.Options) (round, around time.Duration) {
	if n := len(wanted(o)); n > 0 {
		round = bootTime + time.Duration(n)*wayTime
	}
	return round, 0
}

// wanted are the ways to count.
func wanted(o part.Options) []string {
	return slices.DeleteFunc(slices.Clone(contestants), func(name string) bool {
		return o.Quick && !slices.Contains(quick, name) ||
			!slices.ContainsFunc(metrics, func(m metric) bool { return o.Wants(m.name, name) })
	})
}

// open needs nothing where nothing is wanted.
func open(ctx context.Context, o part.Options) (part.Runner, error) {
	r := &runner{options: o, ways: wanted(o)}
	if len(r.ways) == 0 {
		return r, nil
	}
	var err error
	if r.counter, err = NewCounter(ctx, o.Programs[part.NLB], Series); err != nil {
		return nil, err
	}
	return r, nil
}

// A runner has nothing but what each round makes and removes.
type runner struct {
	counter *Counter // nil if there are no ways
	options part.Options
	ways    []string
}

// limit is for a boot on a machine that is busy with other things.
const limit = 15 * time.Minute

func (r *runner) Round(ctx context.Context, n int, out part.Recorder) error {
	if len(r.ways) == 0 {
		return nil
	}
	if n == 1 {
		text := "Instructions are counted in an emulated machine: " + r.counter.Machine() + ", one processor."
		if err := out.Note(report.Note{Text: text}); err != nil {
			return err
		}
	}
	rand.Shuffle(len(r.ways), func(i, j int) { r.ways[i], r.ways[j] = r.ways[j], r.ways[i] })
	counts, err := r.counter.Count(ctx, r.ways, limit, io.Discard)
	if err != nil {
		return err
	}
	return r.record(n, counts, out)
}

// record gives what is wanted of a round to the recorder.
func (r *runner) record(n int, counts Counts, out part.Recorder) error {
	for m, metric := range metrics {
		for _, way := range r.ways {
			if !r.options.Wants(metric.name, way) {
				continue
			}
			v := report.Measurement{Round: n, Metric: metric.name, Contestant: way, Value: counts[m][way], Unit: unit}
			if err := out.Measure(v); err != nil {
				return err
			}
		}
	}
	return nil
}

func (*runner) Close() error { return nil }
