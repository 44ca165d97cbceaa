package e2e

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

const (
	// soakShort is the length of the test in a run of all of them.
	soakShort = 24 * time.Second
	// soakPace is from one event to the next.
	soakPace = time.Second
	// grace is how long after what happened has passed there may still be who met it.
	grace = time.Second
)

// mayGrow is how much a process may grow while it is measured, which is two thirds
// of the test: by its trend, see series.growth.
var mayGrow = map[string]float64{
	// The heap of a Go program breathes. A leak of 1 KiB for each connection would
	// be a multiple of this within half an hour.
	"resident KiB": 16 << 10,
	"files":        16,
	"threads":      8,
}

// TestSoak lets something happen each second, under load by every way of the
// client's address, both protocols and both families: reloads, drains, targets
// that die and return, and in the first third deaths of daemon and relay. What
// fails must have an excuse, of the kind and at the time that what happened
// allows. In the other two thirds daemon and relay must not grow. In the end the
// kernel holds what the file says, and nothing once it is cleared.
//
// NLB_SOAK is how long it takes, NLB_SEED draws the same events again.
func TestSoak(t *testing.T) {
	t.Parallel()
	length := soakLength(t)
	top, serving := longSite(t)
	s := &soak{t: t, top: top, serving: serving, r: seeded(t), vitals: map[string]*series{}}
	s.d = prepare(t, top, s.now.config(top).String())
	s.d.terse = true
	bare := s.d.bare()
	s.d.start()
	s.d.waitAllHealthy()
	load := rush{callers: 2, pause: 40 * time.Millisecond, streams: 3, sockets: 2, patience: patience, reopen: true}
	all := load.begin(t, top)

	s.run(length)
	s.calm()
	s.goesOn(all, load.streams)
	s.judge(all)
	s.measured()
	s.forgotten()
	s.cleared(bare)
}

func soakLength(t *testing.T) time.Duration {
	t.Helper()
	text := os.Getenv("NLB_SOAK")
	if text == "" {
		return soakShort
	}
	length, err := time.ParseDuration(text)
	if err != nil || length < soakShort {
		t.Fatalf("NLB_SOAK=%s: want a duration of %v or more", text, soakShort)
	}
	return length
}

// seeded draws as NLB_SEED says, or at random, and says how to draw the same again.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	if text := os.Getenv("NLB_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("NLB_SEED=%s: %v", text, err)
		}
	}
	t.Logf("drawn by NLB_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// A soak is the state of TestSoak.
type soak struct {
	t       *testing.T
	top     *lab.Topology
	d       *daemon
	r       *rand.Rand
	begun   time.Time
	serving map[string]*lab.Agent // by target
	now     setting

	dead *lab.Node // a target whose process is gone, or nil
	// drained is a target that nlb drain took out of one group, or nil.
	drained   *lab.Node
	drainedOf string

	story     []string
	excuses   []*excuse
	pending   []suspense
	processes [2]int             // daemon and relay, since they are measured
	vitals    map[string]*series // of the two, by process and measure
}

// A suspense is excuses that end when something has passed.
type suspense struct {
	over    func() bool
	excuses []*excuse
}

// An event is something that happens, which make tells.
type event struct {
	weight int
	kills  bool // daemon or relay
	make   func(*soak) string
}

var events = []event{
	{8, false, (*soak).reload},
	{3, false, (*soak).drainOrUndrain},
	{3, false, (*soak).dieOrReturn},
	{2, true, (*soak).killDaemon},
	{1, true, (*soak).restartDaemon},
	{2, true, (*soak).killRelay},
}

// run lets events happen for some time.
func (s *soak) run(length time.Duration) {
	s.t.Helper()
	s.begun = time.Now()
	tick, look := time.NewTicker(soakPace), time.NewTicker(soakPace/10)
	defer tick.Stop()
	defer look.Stop()
	for time.Since(s.begun) < length {
		select {
		case <-look.C:
			s.look()
			continue
		case <-tick.C:
		}
		stormy := time.Since(s.begun) < length/3
		at := time.Since(s.begun).Round(time.Millisecond)
		s.story = append(s.story, fmt.Sprintf("%v %s", at, s.draw(stormy).make(s)))
		if !stormy {
			s.measure()
		}
	}
}

// draw is the next event.
func (s *soak) draw(stormy bool) event {
	possible := slices.DeleteFunc(slices.Clone(events), func(e event) bool { return e.kills && !stormy })
	total := 0
	for _, e := range possible {
		total += e.weight
	}
	n := s.r.IntN(total)
	return possible[slices.IndexFunc(possible, func(e event) bool { n -= e.weight; return n < 0 })]
}

// look ends the excuses whose time has come.
func (s *soak) look() {
	s.pending = slices.DeleteFunc(s.pending, func(p suspense) bool {
		if !p.over() {
			return false
		}
		for _, e := range p.excuses {
			e.until = time.Now().Add(grace)
		}
		return true
	})
}

// excuse notes excuses that begin now: those of a moment, and those that last
// until something has passed.
func (s *soak) excuse(moment, lasting []excuse, over func() bool) {
	now := time.Now()
	for _, e := range moment {
		e.from, e.until = now, now.Add(grace)
		s.excuses = append(s.excuses, &e)
	}
	open := make([]*excuse, len(lasting))
	for i, e := range lasting {
		e.from = now
		open[i] = &e
	}
	s.excuses = append(s.excuses, open...)
	s.pending = append(s.pending, suspense{over, open})
}

// reload changes the file. Only a target that leaves is noticed, by a UDP client
// whose question it was asked last: the flow moves before the answer passes.
func (s *soak) reload() string {
	s.t.Helper()
	kind := changes[s.r.IntN(len(changes))]
	stayed := !s.now.away
	kind.make(&s.now)
	loaded := false
	if s.now.away && stayed {
		leaver := s.top.Targets[len(s.top.Targets)-1].Name
		s.excuse(nil, []excuse{{why: leaver + " left the file", kind: ofDatagrams, who: leaver, errs: []string{lab.Timeout}}},
			func() bool { return loaded })
	}
	if err := s.d.reload(s.now.config(s.top).String()); err != nil {
		s.t.Fatal(err)
	}
	loaded = true
	s.look()
	return "reload: " + kind.what
}

// trouble draws one of the targets that are always in the file, and not the one
// that is in trouble already: each way keeps one that works.
func (s *soak) trouble(already *lab.Node) *lab.Node {
	free := slices.DeleteFunc(slices.Clone(s.top.Targets[:3]), func(n *lab.Node) bool { return n == already })
	return free[s.r.IntN(len(free))]
}

// drainOrUndrain takes a target out of a group, or back. Nobody notices.
func (s *soak) drainOrUndrain() string {
	s.t.Helper()
	if n := s.drained; n != nil {
		s.d.life("undrain", n, s.drainedOf)
		s.drained = nil
		return fmt.Sprintf("undrain %s %s", s.drainedOf, n.Name)
	}
	s.drained, s.drainedOf = s.trouble(s.dead), passages[s.r.IntN(len(passages))].name
	s.d.life("drain", s.drained, s.drainedOf)
	return fmt.Sprintf("drain %s %s", s.drainedOf, s.drained.Name)
}

// foundDead is how long after its return a target may be found dead: two probes, and
// a pass of a busy daemon.
const foundDead = 3 * time.Second

// dieOrReturn kills a target's process, or starts it again.
func (s *soak) dieOrReturn() string {
	s.t.Helper()
	if n := s.dead; n != nil {
		// A check that met it dead may say so after it is back: then the relay ends
		// what it has had since.
		why, cut, back := n.Name+" was found dead when it was back", []string{lab.Reset, lab.Closed}, time.Now()
		s.excuse(nil, []excuse{
			{why: why, relayed: true, kind: ofStreams, who: n.Name, errs: cut},
			{why: why, relayed: true, kind: ofCalls, who: n.Name, errs: cut},
		}, func() bool { return time.Since(back) > foundDead && s.used(n) })
		s.serving[n.Name] = servePassages(s.t, n)
		s.dead = nil
		return n.Name + " returns"
	}
	n := s.trouble(s.drained)
	s.dead = n
	why, cut, refused := n.Name+" died", []string{lab.Reset, lab.Closed}, []string{lab.Reset, lab.Closed, lab.Refused}
	s.excuse([]excuse{
		// Those that it had. For new ones the relay finds another target.
		{why: why, relayed: true, kind: ofStreams, who: n.Name, errs: cut},
		{why: why, relayed: true, kind: ofCalls, errs: cut},
	}, []excuse{
		// The host is there and refuses, until the health checks have found out.
		{why: why, kind: ofStreams, who: n.Name, errs: refused},
		{why: why, kind: ofCalls, errs: refused},
		// A host says that a port is closed once a second only (icmp_ratelimit). Which
		// target it is that refuses nobody knows: a flow that another one had may
		// just have moved, because that one left the file or died before.
		{why: why, kind: ofDatagrams, errs: []string{lab.Refused, lab.Timeout}},
	}, func() bool { return s.unused(n) && s.abandoned(n) || s.used(n) })
	s.serving[n.Name].Kill()
	return why
}

// unused says whether a target is known to be dead and gets nothing new.
func (s *soak) unused(n *lab.Node) bool {
	return s.all(n, func(state balancer.State, weight int) bool { return state == balancer.Unhealthy && weight == 0 })
}

// abandoned says whether no UDP flow is led to a target any more: they are ended
// after the rules have changed, which on a starved machine takes seconds.
func (s *soak) abandoned(n *lab.Node) bool {
	left := s.d.tracked(func(e entry) bool {
		// The replies' direction names the target.
		return e.protocol == "udp" && (strings.Contains(e.text, "src="+n.Addr4.String()+" ") || strings.Contains(e.text, "src="+n.Addr6.String()+" "))
	})
	return len(left) == 0
}

// used says whether a target that was dead is used as ever.
func (s *soak) used(n *lab.Node) bool {
	return s.dead != n && s.all(n, func(state balancer.State, weight int) bool { return state == balancer.Healthy && weight > 0 })
}

// all says whether something holds for a target in all groups.
func (s *soak) all(n *lab.Node, holds func(state balancer.State, weight int) bool) bool {
	for _, g := range s.d.status().TargetGroups {
		for _, x := range g.Targets {
			if (x.Address == n.Addr4 || x.Address == n.Addr6) && !holds(x.State, x.EffectiveWeight) {
				return false
			}
		}
	}
	return true
}

// killDaemon and restartDaemon are no excuse for anything.
func (s *soak) killDaemon() string {
	s.t.Helper()
	s.d.kill()
	s.d.start()
	return "the daemon was killed"
}

func (s *soak) restartDaemon() string {
	s.t.Helper()
	s.d.stop()
	s.d.start()
	return "the daemon was restarted"
}

// killRelay ends the connections that the relay has. New ones wait for the next.
func (s *soak) killRelay() string {
	s.t.Helper()
	var pid int
	wait.For(s.t, limit, "a relay", func() (err error) {
		pid, err = s.d.relayPID()
		return err
	})
	why, cut := "the relay was killed", []string{lab.Reset, lab.Closed}
	s.excuse(nil, []excuse{
		{why: why, relayed: true, kind: ofStreams, errs: cut},
		{why: why, relayed: true, kind: ofCalls, errs: cut},
	}, func() bool {
		now, err := s.d.relayPID()
		return err == nil && now != pid
	})
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		s.t.Fatal(err)
	}
	return why
}

// measure notes how large daemon and relay are.
func (s *soak) measure() {
	s.t.Helper()
	now := [2]int{s.d.cmd.Process.Pid, s.d.relay()}
	if s.processes == [2]int{} {
		s.processes = now
	}
	if now != s.processes {
		s.t.Fatalf("daemon and relay were %v and are %v, and nobody killed them", s.processes, now)
	}
	for i, name := range []string{"daemon", "relay"} {
		for what, value := range vitalSigns(s.t, now[i]) {
			key := name + ": " + what
			if s.vitals[key] == nil {
				s.vitals[key] = new(series)
			}
			s.vitals[key].add(time.Since(s.begun), value)
		}
	}
}

// vitalSigns are what of a process must not grow, by the names of mayGrow.
func vitalSigns(t *testing.T, pid int) map[string]float64 {
	t.Helper()
	process := filepath.Join("/proc", strconv.Itoa(pid))
	files, err := os.ReadDir(filepath.Join(process, "fd"))
	if err != nil {
		t.Fatal(err)
	}
	threads, err := strconv.ParseFloat(processStatus(t, pid, "Threads"), 64)
	if err != nil {
		t.Fatal(err)
	}
	// Counted page by page, while VmRSS of the status file is not exact (proc(5)).
	rollup, err := os.ReadFile(filepath.Join(process, "smaps_rollup"))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(rollup), "\nRss:")
	resident, err := strconv.ParseFloat(strings.Fields(after + " none")[0], 64)
	if err != nil {
		t.Fatalf("no Rss in %q", rollup)
	}
	return map[string]float64{"resident KiB": resident, "files": float64(len(files)), "threads": threads}
}

// calm ends what troubles the site.
func (s *soak) calm() {
	s.t.Helper()
	if s.dead != nil {
		s.dieOrReturn()
	}
	if s.drained != nil {
		s.drainOrUndrain()
	}
	s.now = setting{}
	if err := s.d.reload(s.now.config(s.top).String()); err != nil {
		s.t.Fatal(err)
	}
	s.d.waitAllHealthy()
	wait.For(s.t, limit, "nothing to change", s.d.planned)
	wait.For(s.t, limit, "what happened has passed", func() error {
		if s.look(); len(s.pending) > 0 {
			return fmt.Errorf("%d suspenses", len(s.pending))
		}
		return nil
	})
}

// goesOn waits until each traffic has gone on from here.
func (s *soak) goesOn(all []*traffic, streaming int) {
	s.t.Helper()
	before := make([]int, len(all))
	for i, x := range all {
		before[i] = x.met(s.t).well
	}
	wait.For(s.t, limit, "all traffic goes on", func() error {
		for i, x := range all {
			if got := x.met(s.t); got.well == before[i] || x.kind == ofStreams && got.open != streaming {
				return fmt.Errorf("%v: %d well, %d streams are open", x, got.well-before[i], got.open)
			}
		}
		return nil
	})
}

// judge ends the traffic, and fails the test for what failed without an excuse.
func (s *soak) judge(all []*traffic) {
	s.t.Helper()
	const shown = 10
	excused, well := map[string]int{}, 0
	var inexcusable []string
	for _, x := range all {
		got := x.stop(s.t)
		well += got.well
		if got.failed != len(got.failures) {
			s.t.Errorf("%v: %d failed, more than can be judged", x, got.failed)
		}
		for _, f := range got.failures {
			i := slices.IndexFunc(s.excuses, func(e *excuse) bool { return e.covers(x.way.relayed(), x.kind, f) })
			if i >= 0 {
				excused[s.excuses[i].why]++
				continue
			}
			inexcusable = append(inexcusable, fmt.Sprintf("%v: %q of %q, from %v to %v", x, f.Err, f.Who, f.Began.Sub(s.begun), f.Ended.Sub(s.begun)))
		}
	}
	if len(inexcusable) > 0 {
		s.t.Errorf("%d failures without an excuse, such as\n%s\nwhile this happened:\n%s", len(inexcusable),
			strings.Join(inexcusable[:min(shown, len(inexcusable))], "\n"), strings.Join(s.story, "\n"))
	}
	for _, why := range slices.Sorted(maps.Keys(excused)) {
		s.t.Logf("%d failures, because %s", excused[why], why)
	}
	s.t.Logf("%d events, %d exchanges", len(s.story), well)
}

// measured fails the test if daemon or relay grew.
func (s *soak) measured() {
	s.t.Helper()
	for _, key := range slices.Sorted(maps.Keys(s.vitals)) {
		_, what, _ := strings.Cut(key, ": ")
		v := s.vitals[key]
		grown := v.growth()
		s.t.Logf("%s: %.0f, %+.1f by the trend of %d measurements", key, middle(v.value), grown, len(v.at))
		if grown > mayGrow[what] {
			s.t.Errorf("%s: grew by %.1f, more than %.0f: %.0f", key, grown, mayGrow[what], v.value)
		}
	}
	if want := 2 * len(mayGrow); len(s.vitals) != want {
		s.t.Errorf("%d things were measured, want %d", len(s.vitals), want)
	}
}

// forgotten waits until conntrack has no flow of ours any more.
func (s *soak) forgotten() {
	s.t.Helper()
	wait.For(s.t, limit, "no flows of ours", func() error {
		left := s.d.tracked(func(e entry) bool { return e.mark != 0 || e.to.Addr() == lab.VIP4 || e.to.Addr() == lab.VIP6 })
		if len(left) > 0 {
			return fmt.Errorf("%d, such as %s", len(left), left[0].text)
		}
		return nil
	})
}

// bare is what of the balancer nlb changes, and gives back.
func (d *daemon) bare() string {
	d.t.Helper()
	var b strings.Builder
	for _, argv := range [][]string{
		{"nft", "list", "ruleset"}, {"ip", "-o", "address"}, {"ip", "rule"}, {"ip", "-6", "rule"},
		{"ip", "route", "show", "table", "all"}, {"ip", "-6", "route", "show", "table", "all"},
	} {
		fmt.Fprintf(&b, "--- %s\n%s", strings.Join(argv, " "), must(d.t, d.node, argv...))
	}
	return b.String() + "--- sysctls\n" + d.sysctls()
}

// cleared stops the daemon, clears, and fails the test if something is left.
func (s *soak) cleared(bare string) {
	s.t.Helper()
	s.d.stop()
	s.d.tidy()
	if out := s.d.run("clear", "--state-dir", s.d.state("")); out.code != 0 {
		s.t.Errorf("clear: %+v", out)
	}
	if err := differ("the balancer", bare, s.d.bare()); err != nil {
		s.t.Errorf("something is left: %v", err)
	}
	wait.For(s.t, limit, "no relay is left", func() error {
		if left := s.d.relays(); len(left) > 0 {
			return fmt.Errorf("%v", left)
		}
		return nil
	})
	// Those of relays that were killed too; the lock is never removed.
	sockets, err := filepath.Glob(s.d.relaySocket() + "*")
	sockets = slices.DeleteFunc(sockets, func(name string) bool { return strings.HasSuffix(name, ".lock") })
	if err != nil || len(sockets) > 0 {
		s.t.Errorf("relays left %v: %v", sockets, err)
	}
}
