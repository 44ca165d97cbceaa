package worker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/internal/wait"
)

// TestLife: nothing runs for nothing, what is wanted is served, what is not is
// refused, and a Stop ends all.
func TestLife(t *testing.T) {
	r := newRig(t)
	serveTarget(t)
	if got := converge(t, r.Manager, &balancer.Table{Pools: []balancer.Pool{pool("plain", balancer.SNAT, target)}}); got != nil {
		t.Errorf("without a relayed service: %q", got)
	}
	if got := converge(t, r.Manager, nil); got != nil || len(workers(t, r.socket)) > 0 {
		t.Errorf("nothing wanted: %q, workers %v", got, workers(t, r.socket))
	}

	want := web(80, 443)
	lines := []string{
		"relay: connect from [10.0.0.2]",
		"relay: listen on 198.51.100.10:80",
		"relay: listen on 198.51.100.10:443",
		"relay: web 10.0.1.11:8080 add with weight 1",
	}
	if d := cmp.Diff(lines, converge(t, r.Manager, want)); d != "" {
		t.Errorf("first pass (-want +got):\n%s", d)
	}
	if got := converge(t, r.Manager, want); got != nil {
		t.Errorf("second pass: %q", got)
	}
	for _, port := range []uint16{80, 443} {
		if err := visit(t.Context(), port); err != nil {
			t.Error(err)
		}
	}
	c, err := connect(t.Context(), 80)
	if err != nil {
		t.Fatal(err)
	}
	if err := talk(c); err != nil {
		t.Fatal(err)
	}
	f := r.flows(1)[0]
	wantFlow := Flow{
		Client: netip.MustParseAddrPort(c.LocalAddr().String()), VIP: netip.AddrPortFrom(vip, 80), Source: f.Source, Target: target,
		To: balancer.TargetKey{Group: "web", AddrPort: target}, Since: f.Since, Bytes: 12,
	}
	if f != wantFlow || f.Source.Addr() != source {
		t.Errorf("flow %+v, want %+v", f, wantFlow)
	}
	stats, err := r.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if s := stats.Targets[f.To]; stats.Connections != 1 || s.New != 3 || s.Answered != 3 || s.Active != 1 || stats.MaxConnections == 0 {
		t.Errorf("stats %+v", stats)
	}
	wait.For(t, waitAtMost, "the number of open files", func() error { // earlier requests' are closed meanwhile
		stats, err := r.Stats(t.Context())
		if err != nil {
			return err
		}
		open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", r.hello().PID))
		if err != nil {
			return err
		}
		// One more or less is the request's own.
		if most := stats.MaxFiles; stats.OpenFiles < len(open)-1 || stats.OpenFiles > len(open)+1 || most < stats.OpenFiles {
			return fmt.Errorf("%d of %d files are open, it says %d", len(open), most, stats.OpenFiles)
		}
		return nil
	})

	want.Pools[0].Destinations[0].Weight = 0
	if d := cmp.Diff([]string{"relay: web 10.0.1.11:8080 weight 1 -> 0"}, converge(t, r.Manager, want)); d != "" {
		t.Errorf("drain (-want +got):\n%s", d)
	}
	if err := talk(c); err != nil {
		t.Errorf("a drained target's connection: %v", err)
	}
	want.Services = want.Services[:1]
	if d := cmp.Diff([]string{"relay: stop listening on 198.51.100.10:443"}, converge(t, r.Manager, want)); d != "" {
		t.Errorf("listener removed (-want +got):\n%s", d)
	}
	if err := visit(t.Context(), 443); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("where nobody listens any more: %v", err)
	}
	if err := Stop(t.Context(), r.socket); err != nil {
		t.Fatal(err)
	}
	if err := talk(c); err == nil {
		t.Error("the connection outlived the relay")
	}
	if _, err := os.Stat(r.socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is there: %v", err)
	}
	if err := Stop(t.Context(), r.socket); err != nil {
		t.Errorf("nothing to stop: %v", err)
	}
	if _, err := r.Stats(t.Context()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("stats of nobody: %v", err)
	}
}

// flows waits until there are as many: the relay learns after the client that a
// connection has ended.
func (r *rig) flows(n int) (flows []Flow) {
	r.t.Helper()
	wait.Until(r.t, waitAtMost, "the number of flows", func() bool {
		var err error
		flows, err = r.Flows(r.t.Context())
		return err == nil && len(flows) == n
	})
	return flows
}

// TestPrivileges: every thread is nobody, for ever.
func TestPrivileges(t *testing.T) {
	r := newRig(t)
	converge(t, r.Manager, web(80))
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", r.hello().PID))
	if err != nil || len(files) == 0 {
		t.Fatalf("threads %q, error %v", files, err)
	}
	const none = "0000000000000000"
	want := map[string]string{
		"Uid": "65534 65534 65534 65534", "Gid": "65534 65534 65534 65534", "Groups": "",
		"CapInh": none, "CapPrm": none, "CapEff": none, "CapAmb": none, "NoNewPrivs": "1",
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // that thread has ended
		}
		got := make(map[string]string)
		for line := range strings.Lines(string(text)) {
			name, value, _ := strings.Cut(line, ":")
			if _, asked := want[name]; asked {
				got[name] = strings.Join(strings.Fields(value), " ")
			}
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", file, d)
		}
	}
	if info, err := os.Stat(r.socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket %v, error %v", info, err)
	}
}

// TestAdopt: a controller that was killed leaves all to the next.
func TestAdopt(t *testing.T) {
	r := newRig(t)
	serveTarget(t)
	want := web(80)
	stop := r.supervise(r.Manager)
	converge(t, r.Manager, want)
	c, err := connect(t.Context(), 80)
	if err != nil {
		t.Fatal(err)
	}
	before := r.hello()
	stop()
	if err := errors.Join(talk(c), visit(t.Context(), 80)); err != nil {
		t.Errorf("without a controller: %v", err)
	}

	next := r.manager(version)
	if plan, err := next.Opener().Plan(t.Context(), &balancer.Desired{Table: want}); err != nil || !plan.Empty() {
		t.Errorf("plan %v, error %v", plan, err)
	}
	stop = r.supervise(next)
	wait.Until(t, waitAtMost, "adoption", func() bool { return r.logs.FilterMessage("relay worker is attended").Len() > 0 })
	if d := cmp.Diff(before, r.hello(), values); d != "" {
		t.Errorf("worker before and after (-want +got):\n%s", d)
	}
	if err := talk(c); err != nil {
		t.Errorf("after the adoption: %v", err)
	}
	// It knows what to give another worker, and has the sockets.
	kill(t, before.PID, unix.SIGKILL)
	if err := visit(t.Context(), 80); err != nil {
		t.Errorf("after the adopted worker died: %v", err)
	}
	if got := converge(t, next, want); got != nil {
		t.Errorf("the next pass did %q", got)
	}
	stop()
}

// TestKilled: while there is no worker, clients wait in the queue.
func TestKilled(t *testing.T) {
	r := newRig(t)
	serveTarget(t)
	stop := r.supervise(r.Manager)
	converge(t, r.Manager, web(80))
	var gaps []time.Duration
	const rounds = 5
	visitors := visitors(t, 4, 80)
	for range rounds {
		wait.Until(t, waitAtMost, "attention", func() bool { return r.logs.FilterMessage("relay worker is attended").Len() > len(gaps) })
		pid := r.hello().PID
		kill(t, pid, unix.SIGKILL)
		begun := time.Now()
		if err := visit(t.Context(), 80); err != nil {
			// The worker may have accepted it when it died.
			if errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("visit: %v", err)
			}
			if err := visit(t.Context(), 80); err != nil {
				t.Errorf("second visit: %v", err)
			}
		}
		gaps = append(gaps, time.Since(begun))
		if now := r.hello().PID; now == pid {
			t.Errorf("pid %d is alive", pid)
		}
	}
	for _, err := range visitors.stop() {
		if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a client: %v", err)
		}
	}
	slices.Sort(gaps)
	t.Logf("kill -9 to served again: %v; %d visits meanwhile, none refused", gaps, visitors.visits.Load())
	stop()
}

// TestTakeovers: fifty upgrades under load cost no connection.
func TestTakeovers(t *testing.T) {
	r := newRig(t)
	serveTarget(t)
	stop := r.supervise(r.Manager)
	want := web(80)
	converge(t, r.Manager, want)
	const (
		upgrades = 50
		long     = 20
	)
	conns := make([]net.Conn, long)
	for i := range conns {
		var err error
		if conns[i], err = connect(t.Context(), 80); err != nil {
			t.Fatal(err)
		}
		if err := talk(conns[i]); err != nil {
			t.Fatal(err)
		}
	}
	first := r.hello()
	visitors := visitors(t, 2, 80)
	var took []time.Duration
	counted := uint64(0)
	for i := range upgrades {
		pid := r.hello().PID
		begun := time.Now()
		if _, err := r.Upgrade(t.Context()); err != nil {
			t.Fatalf("upgrade %d: %v", i, err)
		}
		took = append(took, time.Since(begun))
		if now := r.hello(); now.PID == pid || now.Hash != first.Hash || !slices.Equal(now.Listeners, first.Listeners) {
			t.Fatalf("upgrade %d: %+v", i, now)
		}
		if err := talk(conns[i%long]); err != nil {
			t.Errorf("upgrade %d: a long flow: %v", i, err)
		}
		stats, err := r.Stats(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if n := stats.Targets[balancer.TargetKey{Group: "web", AddrPort: target}].New; n < counted {
			t.Errorf("upgrade %d: new flows went back from %d to %d", i, counted, n)
		} else {
			counted = n
		}
	}
	for _, err := range visitors.stop() {
		t.Errorf("a client: %v", err)
	}
	for i, c := range conns {
		if err := talk(c); err != nil {
			t.Errorf("long flow %d: %v", i, err)
		}
	}
	slices.Sort(took)
	t.Logf("%d upgrades, median %v, longest %v; %d visits, none failed; %d flows kept", upgrades, took[upgrades/2], took[upgrades-1],
		visitors.visits.Load(), long)

	// The flows are all still seen, and the table counts for them.
	wait.Until(t, waitAtMost, "two workers", func() bool { return len(workers(t, r.socket)) == 2 })
	r.flows(long)
	want.Pools[0].Destinations[0].Weight, want.Pools[0].Destinations[0].Terminate = 0, true
	converge(t, r.Manager, want)
	for i, c := range conns {
		if err := talk(c); !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
			t.Errorf("long flow %d was not reset: %v", i, err)
		}
	}
	wait.Until(t, waitAtMost, "one worker", func() bool { return len(workers(t, r.socket)) == 1 })
	stop()
}

// TestRivals: of several that take over at once, the last serves, and no other
// stays.
func TestRivals(t *testing.T) {
	r := newRig(t)
	serveTarget(t)
	converge(t, r.Manager, web(80))
	visitors := visitors(t, 2, 80)
	errs := make(chan error, 4)
	for range cap(errs) {
		m := r.manager(version)
		go func() {
			_, err := m.start(context.Background(), false)
			errs <- err
		}()
	}
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	for _, err := range visitors.stop() {
		t.Errorf("a client: %v", err)
	}
	wait.Until(t, waitAtMost, "one worker", func() bool { return len(workers(t, r.socket)) == 1 })
}

// TestRetire: SIGTERM lets connections end, a second one does not; another worker
// serves in the meantime.
func TestRetire(t *testing.T) {
	r := newRig(t)
	serveTarget(t)
	stop := r.supervise(r.Manager)
	converge(t, r.Manager, web(80))
	for _, again := range []bool{false, true} {
		wait.Until(t, waitAtMost, "attention", func() bool { return attended(r, r.hello().PID) })
		old := r.hello().PID
		c, err := connect(t.Context(), 80)
		if err != nil {
			t.Fatal(err)
		}
		if err := talk(c); err != nil {
			t.Fatal(err)
		}
		kill(t, old, unix.SIGTERM)
		wait.Until(t, waitAtMost, "another worker", func() bool {
			h, err := sayHello(t.Context(), r.socket)
			return err == nil && h.PID != old && len(h.Listeners) == 1
		})
		if err := errors.Join(visit(t.Context(), 80), talk(c)); err != nil {
			t.Errorf("while a worker retires: %v", err)
		}
		if again {
			kill(t, old, unix.SIGTERM)
		} else {
			_ = c.Close()
		}
		wait.Until(t, waitAtMost, "the end of the old worker", func() bool { return !slices.Contains(workers(t, r.socket), old) })
		if err := talk(c); err == nil {
			t.Error("the connection outlived its worker")
		}
	}
	stop()
}

func attended(r *rig, pid int) bool {
	for _, e := range r.logs.FilterMessage("relay worker is attended").All() {
		if e.ContextMap()["pid"] == int64(pid) {
			return true
		}
	}
	return false
}

// TestOtherVersion: a worker of another version is replaced.
func TestOtherVersion(t *testing.T) {
	r := newRig(t)
	serveTarget(t)
	old := r.manager("v1")
	converge(t, old, web(80))
	old.close()
	before := r.hello()
	visitors := visitors(t, 2, 80)
	next := r.manager(version)
	stop := r.supervise(next)
	wait.Until(t, waitAtMost, "the new version", func() bool { return r.hello().Version == version })
	wait.Until(t, waitAtMost, "one worker", func() bool { return slices.Equal(workers(t, r.socket), []int{r.hello().PID}) })
	for _, err := range visitors.stop() {
		t.Errorf("a client: %v", err)
	}
	if now := r.hello(); before.Version != "v1" || now.Hash != before.Hash || now.Generation != before.Generation {
		t.Errorf("before %+v, after %+v", before, now)
	}
	if n := r.logs.FilterMessage("relay worker is of another version: a new one takes over").Len(); n != 1 {
		t.Errorf("it was said %d times", n)
	}
	stop()
}

// TestProgramOfAnotherVersion: a program that is of another version than the
// controller for good is not started again and again.
func TestProgramOfAnotherVersion(t *testing.T) {
	r := newRig(t)
	serveTarget(t)
	old := r.manager("v1")
	converge(t, old, web(80))
	old.close()
	next := r.manager(version)
	next.o.Args = func() []string { return []string{"relay", r.socket, "v3"} }
	stop := r.supervise(next)
	last := 0
	for range 3 {
		wait.Until(t, waitAtMost, "attention for the program's version", func() bool {
			h, err := sayHello(t.Context(), r.socket)
			if err != nil || h.Version != "v3" || h.PID == last || !attended(r, h.PID) {
				return false
			}
			last = h.PID
			return true
		})
		kill(t, last, unix.SIGKILL) // another one is judged anew
	}
	if n := r.logs.FilterMessage("relay worker is of another version: a new one takes over").Len(); n != 1 {
		t.Errorf("%d were replaced", n)
	}
	stop()
}

// TestStartMeetsAnother: the worker that answers after a start may be somebody
// else's, with sockets that nobody can open twice.
func TestStartMeetsAnother(t *testing.T) {
	r := newRig(t)
	serveTarget(t)
	converge(t, r.Manager, web(80))
	before := r.hello()
	r.close()
	aside := r.socket + ".aside"
	if err := errors.Join(os.Rename(r.socket, aside), os.Remove(ownName(r.socket, before.PID))); err != nil {
		t.Fatal(err)
	}
	next := r.manager(version)
	next.o.Program, next.o.Args = "/bin/mv", func() []string { return []string{aside, r.socket} }
	next.mu.Lock()
	err := next.give(t.Context(), web(80))
	next.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	defer next.close()
	if now := r.hello(); now.PID != before.PID || len(next.sockets) != 1 {
		t.Errorf("pid %d, before %d; %d sockets", now.PID, before.PID, len(next.sockets))
	}
	if now, err := next.start(t.Context(), false); err != nil || now.PID != before.PID {
		t.Errorf("one that answers at once: %+v, error %v", now, err)
	}
	if n := r.logs.FilterMessage("relay worker started").Len(); n != 0 {
		t.Error("it says that it started somebody else's worker")
	}
	if err := visit(t.Context(), 80); err != nil {
		t.Error(err)
	}
}

// TestNothingIsRelayed: a controller that has nothing to relay asks once, and
// finds what an earlier one left.
func TestNothingIsRelayed(t *testing.T) {
	r := newRig(t)
	plain := &balancer.Table{Pools: []balancer.Pool{pool("plain", balancer.SNAT, target)}}
	converge(t, r.Manager, web(80))
	r.close()
	next := r.manager(version)
	defer next.close()
	want := []string{
		"relay: another hash key",
		"relay: connect from []",
		"relay: stop listening on 198.51.100.10:80",
		"relay: web 10.0.1.11:8080 remove",
		"relay: target groups 1 -> 0",
	}
	if d := cmp.Diff(want, converge(t, next, plain)); d != "" {
		t.Errorf("an earlier controller's worker (-want +got):\n%s", d)
	}
	if err := Stop(t.Context(), r.socket); err != nil {
		t.Fatal(err)
	}
	// Whoever asks here gets no answer.
	deaf, err := net.Listen("unix", r.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = deaf.Close() }()
	if got := converge(t, next, plain); got != nil {
		t.Errorf("nothing to do: %q", got)
	}
	// As soon as there is something, it is asked again.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := next.Opener().Plan(ctx, &balancer.Desired{Table: web(80)}); !errors.Is(err, context.Canceled) {
		t.Errorf("something to do: error %v", err)
	}
}

// TestDiesUnwanted: when a worker has died and nothing is to be relayed any more,
// nobody waits in the queues of sockets.
func TestDiesUnwanted(t *testing.T) {
	r := newRig(t)
	plain := &balancer.Table{Pools: []balancer.Pool{pool("plain", balancer.SNAT, target)}}
	converge(t, r.Manager, web(80))
	kill(t, r.hello().PID, unix.SIGKILL)
	wait.Until(t, waitAtMost, "the worker's end", func() bool {
		_, err := sayHello(t.Context(), r.socket)
		return errors.Is(err, ErrNotRunning)
	})
	converge(t, r.Manager, plain)
	if err := visit(t.Context(), 80); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("where nobody listens: %v", err)
	}
	if got := converge(t, r.Manager, plain); got != nil || len(workers(t, r.socket)) > 0 {
		t.Errorf("again: %q, workers %v", got, workers(t, r.socket))
	}
}

// TestDiesUnknown: nor do they if it died before its new controller knew what it
// served, but had copies of its sockets.
func TestDiesUnknown(t *testing.T) {
	r := newRig(t)
	converge(t, r.Manager, web(80))
	r.close()
	next := r.manager(version)
	defer next.close()
	hello := r.hello()
	if err := next.adopt(t.Context(), hello); err != nil || len(next.sockets) != 1 {
		t.Fatalf("%d sockets, error %v", len(next.sockets), err)
	}
	kill(t, hello.PID, unix.SIGKILL)
	wait.Until(t, waitAtMost, "the worker's end", func() bool { return len(workers(t, r.socket)) == 0 })
	converge(t, next, nil)
	if err := visit(t.Context(), 80); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("where nobody listens: %v", err)
	}
}

// TestOrphan: a worker whose successor died between taking its place and telling
// it is found by the next one.
func TestOrphan(t *testing.T) {
	orphan := func(r *rig) (pid int) {
		converge(t, r.Manager, web(80))
		pid = r.hello().PID
		dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: r.socket + ".dead", Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		dead.SetUnlinkOnClose(false)
		if err := errors.Join(os.Rename(r.socket+".dead", r.socket), dead.Close()); err != nil {
			t.Fatal(err)
		}
		return pid
	}
	t.Run("a controller adopts it", func(t *testing.T) {
		r := newRig(t)
		pid := orphan(r)
		r.close()
		next := r.manager(version)
		defer next.close()
		if got := converge(t, next, web(80)); got != nil || !slices.Equal(workers(t, r.socket), []int{pid}) {
			t.Errorf("it did %q; workers %v", got, workers(t, r.socket))
		}
	})
	t.Run("a worker takes over", func(t *testing.T) {
		r := newRig(t)
		serveTarget(t)
		old := orphan(r)
		c, err := connect(t.Context(), 80)
		if err != nil {
			t.Fatal(err)
		}
		if err := talk(c); err != nil {
			t.Fatal(err)
		}
		now, err := r.Upgrade(t.Context())
		if err != nil || now.PID == old || len(now.Listeners) != 1 {
			t.Fatalf("%+v, error %v", now, err)
		}
		r.flows(1) // it is looked after
		if err := errors.Join(talk(c), visit(t.Context(), 80)); err != nil {
			t.Error(err)
		}
		_ = c.Close()
		wait.Until(t, waitAtMost, "the orphan's end", func() bool { return slices.Equal(workers(t, r.socket), []int{now.PID}) })
		if names := ownNames(r.socket); !slices.Equal(names, []string{ownName(r.socket, now.PID)}) {
			t.Errorf("names %q", names)
		}
	})
	t.Run("Stop ends it", func(t *testing.T) {
		r := newRig(t)
		orphan(r)
		if err := Stop(t.Context(), r.socket); err != nil {
			t.Fatal(err)
		}
		if left := workers(t, r.socket); left != nil || ownNames(r.socket) != nil {
			t.Errorf("workers %v, names %q", left, ownNames(r.socket))
		}
	})
}

// TestLeftNames: whoever cleans up removes the names of workers that died, and
// nothing else.
func TestLeftNames(t *testing.T) {
	r := newRig(t)
	leave := func(suffix string) {
		t.Helper()
		dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: r.socket + suffix, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		dead.SetUnlinkOnClose(false)
		if err := dead.Close(); err != nil {
			t.Fatal(err)
		}
	}
	// Numbers beyond kernel.pid_max are no process's.
	others := []string{".8000002.old", ".new", ".x", "8000003", ".8000004.new.new", ".-1", ".99999999999"}
	for _, suffix := range append([]string{".8000000", ".8000000.new", ".08000001"}, others...) {
		leave(suffix)
	}
	names := func() (left []string) {
		t.Helper()
		entries, err := filepath.Glob(r.socket + "?*")
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range entries {
			if suffix := strings.TrimPrefix(name, r.socket); suffix != ".lock" {
				left = append(left, suffix)
			}
		}
		return left
	}
	slices.Sort(others)
	converge(t, r.Manager, web(80))
	own := strings.TrimPrefix(ownName(r.socket, r.hello().PID), r.socket)
	if d := cmp.Diff(slices.Sorted(slices.Values(append([]string{own}, others...))), names()); d != "" {
		t.Errorf("after a start (-want +got):\n%s", d)
	}
	leave(".8000000.new")
	if err := Stop(t.Context(), r.socket); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(others, names()); d != "" {
		t.Errorf("after Stop (-want +got):\n%s", d)
	}
}

// TestStopIsNotHeard: a worker that hangs up on everybody, as one does that has
// its fill of control connections, is not asked for ever, and keeps its name.
func TestStopIsNotHeard(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "relay.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan int)
	go func() {
		n := 0
		for c, err := l.Accept(); err == nil; c, err = l.Accept() {
			n++
			_ = c.Close()
		}
		asked <- n
	}()
	want := fmt.Sprintf("stop: relay worker %d hangs up and stays: it may have too many control connections (try again in 10s)", os.Getpid())
	if err := Stop(t.Context(), socket); err == nil || err.Error() != want {
		t.Errorf("error %v\nwant %s", err, want)
	}
	if _, err := os.Stat(socket); err != nil {
		t.Errorf("its name: %v", err)
	}
	_ = l.Close()
	if n := <-asked; n != 2 {
		t.Errorf("it was asked %d times", n)
	}
}

// TestNoLeak: neither side keeps a file it has no use for.
func TestNoLeak(t *testing.T) {
	r := newRig(t)
	serveTarget(t)
	stop := r.supervise(r.Manager)
	converge(t, r.Manager, web(80))
	wait.Until(t, waitAtMost, "attention", func() bool { return attended(r, r.hello().PID) })
	ports := make([]uint16, 250)
	for i := range ports {
		ports[i] = uint16(1000 + i)
	}
	cycle := func() {
		converge(t, r.Manager, web(ports...))
		if err := visit(t.Context(), 1249); err != nil {
			t.Error(err)
		}
		// The controller forgets, and gets its copies back: in two frames.
		r.mu.Lock()
		r.sockets.close()
		r.sockets = make(sockets)
		if _, err := r.ensure(t.Context(), web(80)); err != nil || len(r.sockets) != len(ports) {
			t.Errorf("%d sockets, error %v", len(r.sockets), err)
		}
		r.mu.Unlock()
		if _, err := r.Upgrade(t.Context()); err != nil {
			t.Fatal(err)
		}
		converge(t, r.Manager, web(80))
		wait.Until(t, waitAtMost, "one worker that is attended", func() bool {
			pids := workers(t, r.socket)
			return len(pids) == 1 && attended(r, pids[0])
		})
	}
	cycle()
	here, there := openFiles(t, os.Getpid()), openFiles(t, r.hello().PID)
	for range 3 {
		cycle()
	}
	wait.Until(t, waitAtMost, "as many open files as before", func() bool {
		return openFiles(t, os.Getpid()) <= here && openFiles(t, r.hello().PID) <= there
	})
	t.Logf("open files: controller %d, worker %d", here, there)
	stop()
}

// TestDiesAtOnce: a worker that cannot run is not started ever faster.
func TestDiesAtOnce(t *testing.T) {
	r := newRig(t)
	r.o.Program, r.o.Args = "/bin/false", func() []string { return nil }
	err := balancer.Converge(t.Context(), []balancer.Part{r.Opener()}, &balancer.Desired{Table: web(80)}, func(balancer.PartPlan) {})
	const want = "apply relay: start the relay worker: it ended at once: exit status 1"
	if err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
	var pauses []time.Duration
	for n := range 9 {
		pauses = append(pauses, pauseAfter(n)/time.Millisecond)
	}
	if d := cmp.Diff([]time.Duration{0, 50, 100, 200, 400, 800, 1600, 3200, 5000}, pauses); d != "" {
		t.Errorf("pauses in ms (-want +got):\n%s", d)
	}
	// Run goes on trying, and serves as soon as it can.
	r.table = web(80)
	stop := r.supervise(r.Manager)
	wait.Until(t, waitAtMost, "two attempts", func() bool { return r.logs.FilterMessage("relay worker cannot be started").Len() >= 2 })
	stop()
}
