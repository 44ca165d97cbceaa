package e2e

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

const (
	workGroups = 20
	workEach   = 50 // targets of a group
	// workSettled is after how many answers the crowd's verdicts have come to
	// rest, and the flows of those that failed have ended.
	workSettled = 9
	// workSentinels fail in each window, one every workPace, and each is good
	// again after workOutage times that.
	workSentinels = 8
	workPace      = 500 * time.Millisecond
	workOutage    = 4
	// Networks of sentinels, beyond the crowd's.
	workCalm, workWild = 100, 101
)

// While 1,000 targets change their answer with every probe, of which one is
// enough for a verdict, their verdicts come to rest, and other targets that fail
// and return are handled as if the 1,000 were calm.
//
// The writes of a calm balancer are none, and no multiple of that means anything.
// So the sentinels, which fail once each and come back, are there in both
// windows: theirs are the writes that are compared, and the verdicts whose way
// into the kernel is timed. A busy machine gathers more verdicts into a pass, now
// in one window and now in the other, which the bounds leave room for.
func TestConstantWork(t *testing.T) {
	top := routed(t, lab.Options{})
	w := workServe(t, top)
	d := workStart(t, top)

	calm := w.measure(t, d, workCalm)
	t.Logf("calm:     %v", calm)
	w.flap()
	wait.For(t, limit, "the crowd has flapped for a while", w.settled)
	wait.For(t, limit, "its verdicts come to rest", workRests(d))
	wild := w.measure(t, d, workWild)
	t.Logf("flapping: %v", wild)

	if a, b := len(calm.verdicts), len(wild.verdicts); a == 0 || 2*b < a {
		t.Errorf("%d changes of sentinels while the crowd flaps, %d while it was calm", b, a)
	}
	if limit := workGroups * workEach / 10; wild.crowd > limit {
		t.Errorf("%d verdicts about the crowd have not come to rest, more than %d", wild.crowd, limit)
	}
	// One for the failure, one for the return, one when the flows have ended.
	if limit := uint64(max(2*int(calm.writes), 3*workSentinels)); wild.writes > limit {
		t.Errorf("%d kernel writes, more than %d, when calm took %d", wild.writes, limit, calm.writes)
	}
	if wild.cpu > 3*calm.cpu {
		t.Errorf("%.2f of a CPU, when calm took %.2f", wild.cpu, calm.cpu)
	}
	if len(calm.verdicts) > 0 && len(wild.verdicts) > 0 && wild.median() > 5*calm.median() {
		t.Errorf("verdicts took %v to the kernel, when they took %v in calm", wild.median(), calm.median())
	}
}

// workStart runs a daemon as operators do, who do not have each element logged
// that changes.
func workStart(t *testing.T, top *lab.Topology) *daemon {
	t.Helper()
	cfg := config{Sources: sources(top), VIPs: both()}
	add := func(name string, net, size int) {
		g := pool(name, "TCP", "preserve", targetPort, nil)
		g.HealthCheck = map[string]any{
			"protocol": "HTTP", "interval": "1s", "timeout": "1s", "healthy_threshold": 1, "unhealthy_threshold": 1,
		}
		for i := range size {
			g.Targets = append(g.Targets, target{Address: netip.AddrFrom4([4]byte{10, 7, byte(net), byte(i + 1)})})
		}
		cfg.Listeners = append(cfg.Listeners, listener{
			Name: name, VIP: lab.VIP4.String(), Protocol: "TCP", Port: uint16(8001 + len(cfg.Groups)), Forward: to(name),
		})
		cfg.Groups = append(cfg.Groups, g)
	}
	for i := range workGroups {
		add(fmt.Sprint("crowd", i), i, workEach)
	}
	for _, net := range []int{workCalm, workWild} {
		add(fmt.Sprint("sentinels", net), net, workSentinels)
	}
	dir, err := os.MkdirTemp("", "nlb-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	d := &daemon{
		t: t, node: top.LB, dir: dir, log: &logBuffer{},
		config: filepath.Join(dir, "nlb.yaml"), socket: filepath.Join(dir, "nlb.sock"),
	}
	d.client = control.NewClient(d.socket)
	d.write(cfg.String())
	t.Cleanup(d.end)
	d.cmd = d.command("serve", "-c", d.config, "--state-dir", d.state(""), "--log-level", "info")
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	d.done = make(chan struct{})
	go func() {
		d.err = d.cmd.Wait()
		close(d.done)
	}()
	wait.For(t, limit, "all are healthy", func() error {
		s, err := d.ask()
		if err != nil {
			return err
		}
		for _, g := range s.TargetGroups {
			for _, x := range g.Targets {
				if x.State != balancer.Healthy {
					return fmt.Errorf("%v is %v: %s", x.AddrPort(), x.State, x.Description)
				}
			}
		}
		return nil
	})
	return d
}

// A workload answers the health checks of all targets.
type workload struct {
	mu    sync.Mutex
	flaps bool                     // guarded by mu; whether the crowd does
	asked map[netip.Addr]int       // guarded by mu; since the crowd flaps
	bad   map[netip.Addr]bool      // guarded by mu; sentinels
	told  map[workAnswer]time.Time // guarded by mu; the first time
}

// A workAnswer is what a sentinel said.
type workAnswer struct {
	sentinel netip.Addr
	good     bool
}

// workServe answers on a node, for all of 10.7.0.0/16.
func workServe(t *testing.T, top *lab.Topology) *workload {
	t.Helper()
	n := top.Targets[0]
	must(t, n, "ip", "route", "add", "local", "10.7.0.0/16", "dev", "lo")
	must(t, top.LB, "ip", "route", "add", "10.7.0.0/16", "via", n.Addr4.String())
	w := &workload{asked: map[netip.Addr]int{}, bad: map[netip.Addr]bool{}, told: map[workAnswer]time.Time{}}
	var l net.Listener
	err := n.Do(func() (err error) {
		l, err = net.Listen("tcp4", fmt.Sprintf("0.0.0.0:%d", targetPort))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: w}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l)
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-done
	})
	return w
}

func (w *workload) ServeHTTP(out http.ResponseWriter, in *http.Request) {
	at := in.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr).AddrPort().Addr().Unmap()
	if !w.good(at) {
		out.WriteHeader(http.StatusServiceUnavailable)
	}
}

// good decides an answer. Neighbours of the crowd change in opposite ways, so
// that no group is ever all good or all bad, when it would fail open at once.
func (w *workload) good(at netip.Addr) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	b := at.As4()
	if b[2] < workGroups {
		if !w.flaps {
			return true
		}
		w.asked[at]++
		return (w.asked[at]+int(b[3]))%2 == 0
	}
	a := workAnswer{at, !w.bad[at]}
	if _, known := w.told[a]; !known && (!a.good || !w.told[workAnswer{at, false}].IsZero()) {
		w.told[a] = time.Now()
	}
	return a.good
}

func (w *workload) flap() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.flaps = true
}

// settled says who was not asked often enough yet.
func (w *workload) settled() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.asked) < workGroups*workEach {
		return fmt.Errorf("%d of the crowd were asked", len(w.asked))
	}
	for at, n := range w.asked {
		if n < workSettled {
			return fmt.Errorf("%v was asked %d times", at, n)
		}
	}
	return nil
}

// workRests returns what says that there was a verdict not long ago. A busy
// machine tells of those of the first answers late.
func workRests(d *daemon) func() error {
	const silence = 2 * time.Second
	verdicts, since := -1, time.Now()
	return func() error {
		if n := len(workLine.FindAllString(d.log.String(), -1)); n != verdicts {
			verdicts, since = n, time.Now()
		}
		if quiet := time.Since(since); quiet < silence {
			return fmt.Errorf("the last of %d came %v ago", verdicts, quiet)
		}
		return nil
	}
}

func (w *workload) set(sentinel netip.Addr, bad bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.bad[sentinel] = bad
}

// A work is what a daemon did.
type work struct {
	cpu      float64 // seconds per second
	writes   uint64
	crowd    int             // verdicts about the crowd
	verdicts []time.Duration // about sentinels, from the answer to the end of the pass, sorted
	// reconciler is within what time the reconciler had its verdicts in the kernel,
	// and how many of how many it had within 100 ms.
	reconciler    time.Duration
	soon, decided uint64
}

func (w work) median() time.Duration { return w.verdicts[len(w.verdicts)/2] }

func (w work) String() string {
	s := fmt.Sprintf("%.3f of a CPU, %d kernel writes, %d changes of the crowd, %d of sentinels", w.cpu, w.writes, w.crowd, len(w.verdicts))
	if n := len(w.verdicts); n > 0 {
		s += fmt.Sprintf(", in the kernel after %v (median) to %v", w.verdicts[n/2], w.verdicts[n-1])
	}
	return s + fmt.Sprintf("; the reconciler's part: %d verdicts, %d within 100 ms, all within %v", w.decided, w.soon, w.reconciler)
}

// count takes what the daemon counted between two looks.
func (w *work) count(before, after control.Latency) {
	w.decided = after.Count - before.Count
	for i, b := range after.Buckets {
		n := b.Count - before.Buckets[i].Count
		bound := time.Duration(b.LeSeconds * float64(time.Second))
		if bound == 100*time.Millisecond {
			w.soon = n
		}
		if n == w.decided && w.reconciler == 0 {
			w.reconciler = bound
		}
	}
}

// measure has one network's sentinels fail and return, one after the other.
func (w *workload) measure(t *testing.T, d *daemon, net int) work {
	t.Helper()
	logged := len(d.log.String())
	before, cpu, begun := d.status().Apply, workCPU(t, d), time.Now()
	tick := time.NewTicker(workPace)
	defer tick.Stop()
	for i := range workSentinels + workOutage {
		if i < workSentinels {
			w.set(netip.AddrFrom4([4]byte{10, 7, byte(net), byte(i + 1)}), true)
		}
		if i >= workOutage {
			w.set(netip.AddrFrom4([4]byte{10, 7, byte(net), byte(i - workOutage + 1)}), false)
		}
		<-tick.C
	}
	span, after := time.Since(begun), d.status().Apply
	out := work{cpu: float64(workCPU(t, d)-cpu) / float64(span), writes: after.WritesTotal - before.WritesTotal}
	out.count(before.Latency, after.Latency)
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, m := range workLine.FindAllStringSubmatch(d.log.String()[logged:], -1) {
		at, err := time.Parse(time.RFC3339Nano, m[1])
		if err != nil {
			t.Fatal(err)
		}
		told, ok := w.told[workAnswer{netip.MustParseAddr(m[2]), m[3] == balancer.Healthy.String()}]
		if !ok {
			out.crowd++
			continue
		}
		out.verdicts = append(out.verdicts, at.Sub(told))
	}
	slices.Sort(out.verdicts)
	return out
}

// workLine is logged when the pass has ended that a verdict led to.
var workLine = regexp.MustCompile(`(?m)^(\S+)\s.*\ttarget health changed\t.*"target": "([^"]+):\d+", "from": "[a-z.]+", "to": "([a-z.]+)"`)

// workCPU is the time that the daemon has used, by the kernel's clock of another
// process (clock_getcpuclockid(3)).
func workCPU(t *testing.T, d *daemon) time.Duration {
	t.Helper()
	const sched = 2 // CPUCLOCK_SCHED, of all threads
	var used unix.Timespec
	if err := unix.ClockGettime(int32(^d.cmd.Process.Pid<<3|sched), &used); err != nil {
		t.Fatal(err)
	}
	return time.Duration(used.Nano())
}
