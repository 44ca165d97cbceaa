package balancer

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"nlb/internal/bubble"
)

// agingFlows is a FlowTimes of flows that a test changes, and notes what they are
// given.
type agingFlows struct {
	begun time.Time
	mu    sync.Mutex
	flows []Flow
	did   []string
	looks int
	takes time.Duration // a look, before it shows the first flow
}

func (a *agingFlows) SetTimeouts(_ context.Context, timeout func(Flow) (time.Duration, bool)) (n int, err error) {
	a.mu.Lock()
	takes := a.takes
	a.mu.Unlock()
	time.Sleep(takes) // of the bubble's time
	a.mu.Lock()
	defer a.mu.Unlock()
	a.looks++
	for i := range a.flows {
		if d, ok := timeout(a.flows[i]); ok {
			a.did = append(a.did, fmt.Sprintf("%v %v: %v", time.Since(a.begun), a.flows[i].Client.Port(), d))
			a.flows[i].Left = d
			n++
		}
	}
	return n, nil
}

// set changes the flow with that client port.
func (a *agingFlows) set(port uint16, change func(*Flow)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	i := slices.IndexFunc(a.flows, func(f Flow) bool { return f.Client.Port() == port })
	if i < 0 {
		i = len(a.flows)
		a.flows = append(a.flows, Flow{
			Protocol: ProtoTCP, Client: netip.AddrPortFrom(addr("203.0.113.9"), port),
			VIP: netip.MustParseAddrPort("198.51.100.10:80"), Ours: true, Established: true,
		})
	}
	change(&a.flows[i])
}

func (a *agingFlows) taken() (did []string, looks int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	did, looks = a.did, a.looks
	a.did, a.looks = nil, 0
	return did, looks
}

// keeper runs an IdleKeeper for a listener with 350 s.
func keeper(t *testing.T, fast bool) (*Reconciler, *agingFlows) {
	t.Helper()
	spec := webSpec(1)
	spec.Flowtable = fast
	r := NewReconciler(Options{Router: &fakeRouter{}, Log: zap.NewNop(), Spec: spec})
	a := &agingFlows{begun: time.Now()}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = r.Run(ctx) })
	running.Go(func() { _ = NewIdleKeeper(r, a, zap.NewNop()).Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	<-r.Attempted()
	return r, a
}

// offloaded has the flow in the flowtable, with so many packets each way.
func offloaded(packets uint64) func(*Flow) {
	return func(f *Flow) { f.Offloaded, f.Left, f.Sent, f.Answered = true, 0, packets, packets }
}

// released has it left the flowtable.
func released(f *Flow) { f.Offloaded, f.Left = false, 24*time.Hour }

func TestIdleKeeper(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a := keeper(t, true)
		a.set(1, offloaded(10)) // silent from now on
		a.set(2, offloaded(10)) // speaks once more just before it leaves
		a.set(3, func(f *Flow) { released(f); f.Sent = 7 })
		a.set(4, func(f *Flow) { f.Left = 350 * time.Second })
		a.set(5, func(f *Flow) { released(f); f.Established = false })
		a.set(6, offloaded(0)) // nobody counts
		bubble.Pass(31 * time.Second)
		a.set(1, released)
		a.set(2, func(f *Flow) { released(f); f.Sent++ })
		a.set(6, released)
		bubble.Pass(5 * time.Second)
		did, _ := a.taken()
		want := []string{
			"5s 3: 5m50s", // since when it is silent nobody knows
			"35s 1: 5m20s", "35s 2: 5m50s", "35s 6: 5m50s",
		}
		if diff := cmp.Diff(want, did); diff != "" {
			t.Error(diff)
		}
		// What was given holds.
		bubble.Pass(time.Minute)
		if did, looks := a.taken(); len(did) > 0 || looks != 12 {
			t.Errorf("%d looks, and %q", looks, did)
		}
		// A flow that was silent for longer than it may be has two looks left.
		a.set(1, offloaded(10))
		bubble.Pass(10 * time.Minute)
		a.set(1, released)
		bubble.Pass(5 * time.Second)
		if diff := cmp.Diff([]string{"11m40s 1: 10s"}, first(a.taken())); diff != "" {
			t.Error(diff)
		}
	})
}

func first[A, B any](a A, _ B) A { return a }

// A flow that speaks between being seen as silent and being given less time has
// lost what the kernel gave it for that.
func TestIdleKeeperGivesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a := keeper(t, true)
		for port := range uint16(4) {
			a.set(port, offloaded(10))
		}
		bubble.Pass(31 * time.Second)
		for port := range uint16(4) {
			a.set(port, released)
		}
		bubble.Pass(5 * time.Second)
		want := []string{"35s 0: 5m20s", "35s 1: 5m20s", "35s 2: 5m20s", "35s 3: 5m20s"}
		if diff := cmp.Diff(want, first(a.taken())); diff != "" {
			t.Error(diff)
		}
		speaks := func(f *Flow) { f.Sent++ }
		a.set(0, func(f *Flow) { speaks(f); f.Offloaded, f.Left = true, 0 })
		a.set(1, speaks)
		a.set(2, func(f *Flow) { speaks(f); f.Established = false })
		bubble.Pass(time.Minute)
		if diff := cmp.Diff([]string{"40s 0: 24h0m0s", "40s 1: 5m50s"}, first(a.taken())); diff != "" {
			t.Error(diff)
		}
	})
}

// A look takes time, in which flows speak. None is forgotten too early for that.
func TestIdleKeeperLooksSlowly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a := keeper(t, true)
		a.mu.Lock()
		a.takes = 2 * time.Second
		a.mu.Unlock()
		bubble.Pass(6 * time.Second) // a look has begun
		a.set(1, offloaded(10))      // the last word
		bubble.Pass(20 * time.Second)
		a.set(1, released)
		bubble.Pass(4 * time.Second)
		// Seen after 7 s and after 29 s, since a look rests ten times as long.
		if diff := cmp.Diff([]string{"29s 1: 5m28s"}, first(a.taken())); diff != "" {
			t.Error(diff)
		}
	})
}

// TestIdleKeeperRests has no flowtable, and then none any more.
func TestIdleKeeperRests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, a := keeper(t, false)
		// A second more, so that no look coincides with what the test does.
		bubble.Pass(time.Hour + time.Second)
		if _, looks := a.taken(); looks != idleAgain {
			t.Errorf("%d looks for what another time left, want %d", looks, idleAgain)
		}
		spec := webSpec(1)
		spec.Flowtable = true
		if err := r.SetSpec(t.Context(), spec); err != nil {
			t.Fatal(err)
		}
		bubble.Pass(time.Minute)
		if _, looks := a.taken(); looks != 12 {
			t.Errorf("%d looks in a minute", looks)
		}
		if err := r.SetSpec(t.Context(), webSpec(1)); err != nil {
			t.Fatal(err)
		}
		a.set(1, func(f *Flow) { f.Left = 24 * time.Hour })
		bubble.Pass(time.Hour)
		if did, looks := a.taken(); looks != idleAgain || len(did) != 1 {
			t.Errorf("%d looks, and %q", looks, did)
		}
	})
}

func TestForwardFastPath(t *testing.T) {
	spec := webSpec(1)
	var many []string
	for i := range 300 {
		many = append(many, fmt.Sprintf("veth%03d", i))
	}
	routes := map[netip.Addr]Route{spec.TargetGroups[0].Targets[0].Address: {Interface: "veth299"}}
	for _, c := range []struct {
		name      string
		flowtable bool
		links     []string
		want      int
	}{{"off", false, many, 0}, {"no links", true, nil, 0}, {"two", true, []string{"eth1", "eth0"}, 2}, {"many", true, many, 256}} {
		spec.Flowtable = c.flowtable
		got := Forward(spec, View{Links: c.links, Routes: routes, Now: time.Now()}).Table.FastPath
		if len(got) != c.want || !slices.IsSorted(got) {
			t.Errorf("%s: %d interfaces: %v", c.name, len(got), got)
		}
		if c.name == "many" && !slices.Contains(got, "veth299") {
			t.Errorf("%s: the way to the target is not among them", c.name)
		}
	}
}
