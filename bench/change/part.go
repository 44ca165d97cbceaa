// Package change is the part of the race that measures what contestants do when
// something changes: a target dies, the configuration does, a large one is put
// in force. How fast a packet is, other parts measure.
//
// What a contestant says of itself is not asked. The clock of each measurement
// ends with flows: with the first or last one that reaches a target, by the time
// that the kernel gave its SYN at the target's node, or with the first client
// that is answered.
//
// Each contestant has a network of its own for each measurement: a client, the
// balancer, and a node that has the addresses of all targets. One thread is the
// client and all targets. What dies and what is reloaded is watched under a
// steady load of new connections, each with a question and an answer.
package change

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"nlb/bench/lab"
	"nlb/bench/measure"
	"nlb/bench/part"
	"nlb/bench/report"
)

// Names of metrics.
const (
	Death        = "target's death until the last flow sent to it"
	DeathFailed  = "failed connections of 3 deaths"
	Reload       = "reload until flows follow"
	ReloadFailed = "failed connections of reloads"
	Apply        = "listeners x targets until in force"
	Memory       = "memory"
)

// Cases of metrics.
const (
	refused = "refused"
	silent  = "silent"

	added   = "target added"
	removed = "target removed"

	oneListener = "one listener"
	idle        = "2,000 idle connections"
)

// metrics are in the order in which they are shown. Failed connections are none,
// mostly, which no ratio can be made of.
var metrics = []part.Metric{
	{Key: "death", Metric: report.Metric{Name: Death, Unit: "ms", Better: report.Less, Cases: []string{refused, silent}}},
	{Key: "death", Metric: report.Metric{Name: DeathFailed, Unit: "connections", Better: report.Less, PrintedOnly: true, Cases: []string{refused, silent}}},
	{Key: "reload", Metric: report.Metric{Name: Reload, Unit: "ms", Better: report.Less, Decimals: 1, Cases: []string{added, removed}}},
	{Key: "reload", Metric: report.Metric{Name: ReloadFailed, Unit: "per 1,000 reloads", Better: report.Less, PrintedOnly: true}},
	{Key: "apply", Metric: report.Metric{Name: Apply, Unit: "ms", Better: report.Less, Cases: []string{sizes[0].cold, sizes[0].change, sizes[1].cold, sizes[1].change}}},
	{Key: "memory", Metric: report.Metric{Name: Memory, Unit: "MiB", Better: report.Less, Decimals: 1, Cases: []string{oneListener, sizes[0].memory, sizes[1].memory, idle}}},
}

// Part is the part.
var Part = part.Part{
	Name:        "change",
	Metrics:     metrics,
	Contestants: names(),
	Setups:      setups(),
	Rounds:      3,
	QuickRounds: 1,
	Estimate:    estimate,
	Open:        open,
}

func names() (all []string) {
	for _, w := range ways {
		all = append(all, w.name)
	}
	return all
}

// measures says which metrics can be measured of a contestant: rulesets watch no
// targets and have no process, and kube-proxy's changes are its own affair.
func (w *way) measures(metric string) bool {
	switch metric {
	case Death, DeathFailed, Memory:
		return w.program != part.NFT
	case Reload, ReloadFailed:
		return !w.kubeProxy
	}
	return true
}

// trafficPlan is what targets die and reloads happen in.
func trafficPlan(n int) plan {
	return plan{services: []service{{measure.Port, targets()[:n]}}, watch: true}
}

// setups are those under traffic; what is large or idle has the same form.
func setups() map[string]part.Setup {
	all := make(map[string]part.Setup)
	var addresses []string
	for i, t := range slices.Backward(targets()) { // 10.1.0.10 before 10.1.0.1
		addresses = append(addresses, t.String(), fmt.Sprint("T", i))
	}
	addresses = append(addresses, lab.VIP4.String(), "VIP")
	named := strings.NewReplacer(addresses...)
	for _, w := range ways {
		source := targets()[0].Prev() // of a balancer that is nowhere yet
		text := w.config(trafficPlan(deathTargets), source, files{dir: ".", module: "ngx_stream_module.so"})
		setup := part.Setup{Config: strings.ReplaceAll(named.Replace(text), source.String(), "LB")}
		if w.program == part.NLB {
			setup.Commands = []string{"nlb serve -c nlb.yaml", "kill -HUP NLB # to reload"}
		} else {
			s := site{way: w, programs: part.Programs{w.program: string(w.program)}}
			argv, reload := s.command("config")
			setup.Commands = []string{strings.Join(argv, " ")}
			if reload != 0 {
				setup.Commands = append(setup.Commands, fmt.Sprintf("kill -%d MASTER # to reload", reload))
			}
		}
		all[w.name] = setup
	}
	return all
}

// estimate is what the rounds took on two cores at 2.5 GHz, of which one was used.
func estimate(o part.Options) (round, around time.Duration) {
	r := runner{Options: o}
	for _, w := range ways {
		if slices.Contains(o.Contestants, w.name) {
			r.ways = append(r.ways, w)
		}
	}
	n := func(metrics ...string) time.Duration { return time.Duration(len(r.wanted(metrics...))) }
	round = n(Apply, Memory)*time.Second + n(Memory)*time.Second + n(Reload, ReloadFailed)*time.Duration(r.reloadCount())*time.Second/4
	if n(Death, DeathFailed) > 0 {
		round += 12 * time.Second
	}
	if !o.Quick {
		around = n(Apply, Memory) * 5 * time.Second // the thousand listeners of the first round
	}
	return round, around
}

// runner is the part, open. It holds nothing between rounds: a contestant is as
// fresh in the last one as in the first.
type runner struct {
	part.Options
	ways []way // that are wanted
}

func open(_ context.Context, o part.Options) (part.Runner, error) {
	r := &runner{Options: o}
	for _, w := range ways {
		if !slices.Contains(o.Contestants, w.name) {
			continue
		}
		if err := o.Programs.Ready(w.program); err != nil {
			return nil, fmt.Errorf("%s: %w", w.name, err)
		}
		r.ways = append(r.ways, w)
	}
	return r, nil
}

// Close has nothing to remove.
func (r *runner) Close() error { return nil }

// wanted are the contestants of which any of some metrics is wanted, in an order
// that changes.
func (r *runner) wanted(metrics ...string) (all []way) {
	for _, i := range rand.Perm(len(r.ways)) {
		w := r.ways[i]
		if slices.ContainsFunc(metrics, func(m string) bool { return r.Wants(m, w.name) && w.measures(m) }) {
			all = append(all, w)
		}
	}
	return all
}

// Round implements part.Runner.
func (r *runner) Round(ctx context.Context, n int, out part.Recorder) error {
	to := &record{Recorder: out, round: n, options: &r.Options}
	if n == 1 {
		to.remark(r.reloadCount())
	}
	for _, stage := range []func(context.Context, *record) error{r.scales, r.crowds, r.dies, r.reloads} {
		if err := errors.Join(stage(ctx, to), to.err); err != nil {
			return err
		}
	}
	return nil
}

// alone measures a contestant in a network of its own.
func (r *runner) alone(w way, f func(*site) error) (err error) {
	s, err := newSite(w, r.Programs)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	return f(s)
}

func (r *runner) scales(ctx context.Context, out *record) error {
	for _, z := range sizes {
		if z.rare && (r.Quick || out.round > 1) {
			continue
		}
		for _, w := range r.wanted(Apply, Memory) {
			if err := r.alone(w, func(s *site) error { return out.scale(ctx, s, z) }); err != nil {
				return err
			}
		}
	}
	return nil
}

// scale measures a contestant with a size, or notes that it took too long.
func (r *record) scale(ctx context.Context, s *site, z size) error {
	got, err := s.scale(ctx, z)
	if errors.Is(err, errLate) {
		s.abandon()
		r.note(Apply, z.cold, s.name, fmt.Sprintf("It was not ready within %v.", startTime))
		return nil
	}
	if err != nil {
		return err
	}
	r.ms(Apply, z.cold, s.name, got.cold)
	r.ms(Apply, z.change, s.name, got.change)
	if s.measures(Memory) {
		r.mib(z.memory, s.name, got.memory)
	}
	return nil
}

func (r *runner) crowds(ctx context.Context, out *record) error {
	for _, w := range r.wanted(Memory) {
		err := r.alone(w, func(s *site) error {
			got, err := s.hold(ctx, w.relays() && !r.Quick)
			if err != nil {
				return err
			}
			out.mib(oneListener, w.name, got.empty)
			if got.full > 0 {
				out.mib(idle, w.name, got.full)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// dies watches all contestants at the same time, since they mostly wait.
func (r *runner) dies(ctx context.Context, out *record) (err error) {
	ways := r.wanted(Death, DeathFailed)
	got := make([][]passing, len(ways))
	errs := make([]error, len(ways))
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	sites := make([]*site, 0, len(ways))
	defer func() {
		for _, s := range sites {
			err = errors.Join(err, s.close())
		}
	}()
	for _, w := range ways { // one after the other: see lab.Lab
		s, err := newSite(w, r.Programs)
		if err != nil {
			return err
		}
		sites = append(sites, s)
	}
	var wg sync.WaitGroup
	for i, s := range sites {
		wg.Go(func() {
			if got[i], errs[i] = s.dieAll(ctx); errs[i] != nil {
				cancel() // the others need not go on
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for i, w := range ways {
		for n, m := range manners {
			out.ms(Death, m.name, w.name, got[i][n].last)
			out.put(DeathFailed, m.name, w.name, float64(got[i][n].failed))
			out.failures(DeathFailed, m.name, w.name, got[i][n].reasons)
			if got[i][n].still {
				out.note(Death, m.name, w.name, fmt.Sprintf("In round %d, flows were still sent to a dead target when it was watched no more.", out.round))
			}
		}
	}
	return nil
}

// dieAll starts the contestant and lets targets die in all manners.
func (s *site) dieAll(ctx context.Context) (all []passing, err error) {
	p := trafficPlan(deathTargets)
	if _, err := s.start(ctx, p, p.services[0]); err != nil {
		return nil, err
	}
	for _, m := range manners {
		got, err := s.die(ctx, m, p.services[0])
		if err != nil {
			return nil, err
		}
		all = append(all, got)
	}
	return all, nil
}

// They are even: what is removed is added again.
const fullReloads, quickReloads = 8, 2

// reloadCount is how often each is reloaded in a round.
func (r *runner) reloadCount() int {
	if r.Quick {
		return quickReloads
	}
	return fullReloads
}

func (r *runner) reloads(ctx context.Context, out *record) error {
	for _, w := range r.wanted(Reload, ReloadFailed) {
		err := r.alone(w, func(s *site) error {
			p := trafficPlan(reloadTargets)
			if _, err := s.start(ctx, p, p.services[0]); err != nil {
				return err
			}
			got, err := s.reload(ctx, p, r.reloadCount())
			if err != nil {
				return err
			}
			out.ms(Reload, added, w.name, middle(got.added))
			out.ms(Reload, removed, w.name, middle(got.removed))
			out.put(ReloadFailed, "", w.name, float64(got.failed)*1000/float64(got.all))
			out.failures(ReloadFailed, "", w.name, got.reasons)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// A record keeps the values of a round, and the first error.
type record struct {
	part.Recorder
	round   int
	options *part.Options
	err     error
}

// put keeps a value if it is wanted.
func (r *record) put(metric, cas, contestant string, value float64) {
	if r.err != nil || !r.options.Wants(metric, contestant) {
		return
	}
	i := slices.IndexFunc(metrics, func(m part.Metric) bool { return m.Name == metric })
	r.err = r.Measure(report.Measurement{
		Round: r.round, Metric: metric, Case: cas, Contestant: contestant, Value: value, Unit: metrics[i].Unit,
	})
}

// soonest is how far flows to one target are apart, which is as exact as it is
// known when the last one was. What was over before a flow could tell counts as so
// much: a ratio needs some value.
const soonest = 4 * time.Millisecond

func (r *record) ms(metric, cas, contestant string, d time.Duration) {
	r.put(metric, cas, contestant, max(d, soonest).Seconds()*1000)
}

func (r *record) mib(cas, contestant string, bytes int64) {
	r.put(Memory, cas, contestant, float64(bytes)/(1<<20))
}

// note keeps a remark about a metric that is wanted.
func (r *record) note(metric, cas, contestant, text string) {
	if r.err == nil && slices.Contains(r.options.Metrics, metric) {
		r.err = r.Note(report.Note{Metric: metric, Case: cas, Contestant: contestant, Text: text})
	}
}

// failures notes what clients met.
func (r *record) failures(metric, cas, contestant, reasons string) {
	if reasons != "" {
		r.note(metric, cas, contestant, fmt.Sprintf("In round %d, %s.", r.round, reasons))
	}
}

// remark says what must be known of the metrics to read them.
func (r *record) remark(reloads int) {
	r.note(Death, "", "", fmt.Sprintf("The mean of %d deaths, of %d targets that share a connection every %v; the others get them afterwards. It is exact to the time between two flows of a target, %v. All that probe do so every %v, wait %[5]v at most, and one failure decides. "+
		"nginx does not probe: one connection that failed keeps a target from others for 10 s, which is longer than the deaths are watched for, and the next ones fail again.", deaths, deathTargets, deathRate, deathTargets*deathRate, interval))
	r.note(DeathFailed, "", "", fmt.Sprintf("Connections without an answer within %v, from the first death until %v after the last, of about %.0f.", patience, window, float64(interval+window)/float64(deathRate)))
	r.note(Reload, "", "", fmt.Sprintf("The median of %d reloads each, under %.0f connections a second over %d targets: until the first flow to a target that was added, or the last one to a target that was removed. Both are exact to the time between two flows of a target, %v.",
		reloads/2, 1/reloadRate.Seconds(), reloadTargets, reloadTargets*reloadRate))
	r.note(ReloadFailed, "", "", fmt.Sprintf("Connections without an answer within %v, of %d reloads in a round.", patience, reloads))
	r.note(Apply, "", "", fmt.Sprintf("Until a client is answered by the last of the listeners, or until the last flow to the target that was taken away from one of them. All listeners have the same %d targets, so that nlb probes no more than these. 1,000 of them are measured once, and not in a quick run. "+
		"Every contestant but kube-proxy, which writes its changes alone, reads the whole file again.", targetCount))
	r.note(Memory, "", "", fmt.Sprintf("The proportional set size of all its processes, %v after it had something to do last. What the kernel holds is not in it. In a quick run there are no idle connections.", quiet))
}
