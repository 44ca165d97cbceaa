package balancer

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"nlb/internal/bubble"
)

// flowWorld is a FlowTable that notes what is done, and when.
type flowWorld struct {
	begun time.Time
	mu    sync.Mutex
	flows map[TargetKey][]Flow
	did   []string
	// answers has how many packets a prompt draws from the client, by its port,
	// and from the target. The first reset closes the flow.
	answers map[uint16][2]uint64
	// first is called, without mu, before the next call of a kind. Fail makes all
	// calls of a kind fail.
	first  map[string]func()
	fail   map[string]error
	prunes int
	looks  int // at the flows of some targets
}

// enter begins a call. If it returns no error, the caller has mu.
func (w *flowWorld) enter(call string) error {
	w.mu.Lock()
	if f := w.first[call]; f != nil {
		delete(w.first, call)
		w.mu.Unlock()
		f()
		w.mu.Lock()
	}
	if err := w.fail[call]; err != nil {
		w.mu.Unlock()
		return err
	}
	return nil
}

// left is how many flows the target has.
func (w *flowWorld) left(k TargetKey) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.flows[k])
}

// set changes the world.
func (w *flowWorld) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
}

func (w *flowWorld) note(format string, args ...any) {
	w.did = append(w.did, fmt.Sprintf("%v ", time.Since(w.begun).Round(time.Millisecond))+fmt.Sprintf(format, args...))
}

func (w *flowWorld) FlowsTo(_ context.Context, keys []TargetKey) (flows []Flow, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.looks++
	for _, k := range keys {
		flows = append(flows, w.flows[k]...)
	}
	return flows, nil
}

func (w *flowWorld) Forget(_ context.Context, keys []TargetKey, over func(Flow) bool) (map[TargetKey]int, error) {
	if err := w.enter("forget"); err != nil {
		return nil, err
	}
	defer w.mu.Unlock()
	w.looks++
	forgotten := make(map[TargetKey]int)
	for _, k := range keys {
		if n := w.forget(k, over); n > 0 {
			forgotten[k] = n
		}
	}
	return forgotten, nil
}

// forget needs mu.
func (w *flowWorld) forget(k TargetKey, over func(Flow) bool) (n int) {
	var kept []Flow
	for _, f := range w.flows[k] {
		if over(f) {
			n++
		} else {
			kept = append(kept, f)
		}
	}
	w.flows[k] = kept
	if n > 0 {
		w.note("forget %v: %d", k, n)
	}
	return n
}

func (w *flowWorld) Prune(_ context.Context, stale func(Flow) bool) (n int, err error) {
	if err := w.enter("prune"); err != nil {
		return 0, err
	}
	defer w.mu.Unlock()
	w.prunes++
	for k, flows := range w.flows {
		var kept []Flow
		for _, f := range flows {
			if stale(f) {
				n++
			} else {
				kept = append(kept, f)
			}
		}
		w.flows[k] = kept
	}
	if n > 0 {
		w.note("prune %d", n)
	}
	return n, nil
}

func (w *flowWorld) Prompt(flows []Flow) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.note("prompt %d", len(flows))
	for _, asked := range flows {
		for i := range w.flows[asked.To] {
			if f := &w.flows[asked.To][i]; f.Client == asked.Client {
				drawn := w.answers[f.Client.Port()]
				f.Sent, f.Answered = f.Sent+drawn[0], f.Answered+drawn[1]
				f.Live = f.Live && drawn == [2]uint64{}
			}
		}
	}
	return nil
}

func TestSweeperEndsFlows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		spec := webSpec(2)
		spec.TargetGroups[0].Unhealthy.ConnectionTermination = true
		one, two := webKey("10.0.1.11"), webKey("10.0.1.12")
		flow := func(k TargetKey, port uint16) Flow {
			return Flow{Protocol: ProtoTCP, Client: netip.AddrPortFrom(addr("203.0.113.9"), port), Target: k.AddrPort, To: k, Ours: true, Live: true}
		}
		opening := flow(one, 3)
		opening.Live = false
		flows := &flowWorld{
			begun: time.Now(), answers: map[uint16][2]uint64{1: {1, 1}, 4: {1, 0}},
			flows: map[TargetKey][]Flow{one: {flow(one, 1), flow(one, 2), opening, flow(one, 4)}, two: {flow(two, 1)}},
		}
		r, stop := start(Options{Parts: newWorld().parts(), Spec: spec, Log: zap.NewNop()})
		defer stop()
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		defer running.Wait()
		defer cancel()
		running.Go(func() { _ = NewSweeper(r, flows, zap.NewNop()).Run(ctx) })
		synctest.Wait()
		r.SetHealth(map[TargetKey]Health{one: unhealthy(time.Now()), two: healthy(time.Now())})
		synctest.Wait()
		target := r.Snapshot().Desired.Table.Pools[0].Destinations[0]
		if !target.Terminate || target.Weight != 0 {
			t.Errorf("after the verdict: %+v", target)
		}
		bubble.Pass(10 * time.Second)
		want := []string{
			"0s forget web/10.0.1.11:8080: 1", "0s prompt 3", "50ms forget web/10.0.1.11:8080: 1",
			"600ms prompt 2", "1.2s prompt 2", "2.5s forget web/10.0.1.11:8080: 2",
		}
		if diff := cmp.Diff(want, flows.did); diff != "" {
			t.Error(diff)
		}
		if r.Snapshot().Desired.Table.Pools[0].Destinations[0].Terminate {
			t.Error("still terminates when all is over")
		}
		// A flow that turns up later is found by the next look at all flows.
		flows.mu.Lock()
		flows.flows[one], flows.did = []Flow{flow(one, 2)}, nil
		flows.mu.Unlock()
		bubble.Pass(pruneEvery + terminateFor)
		if n := len(flows.did); n != 4 {
			t.Errorf("leftover: %q", flows.did)
		}
	})
}

// sweeping runs f in a bubble with a Sweeper of three healthy targets, of which
// the first has a TCP flow whose ends are silent.
func sweeping(t *testing.T, spec *Spec, f func(t *testing.T, r *Reconciler, w *flowWorld)) {
	t.Helper()
	inBubble(t, spec, func(t *testing.T, _ *world, r *Reconciler) {
		now, one := time.Now(), webKey("10.0.1.11")
		w := &flowWorld{
			begun: now, first: make(map[string]func()), fail: make(map[string]error),
			flows: map[TargetKey][]Flow{one: {flowTo(ProtoTCP, one, 1)}},
		}
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		defer running.Wait()
		defer cancel()
		running.Go(func() { _ = NewSweeper(r, w, zap.NewNop()).Run(ctx) })
		r.SetHealth(map[TargetKey]Health{one: healthy(now), webKey("10.0.1.12"): healthy(now), webKey("10.0.1.13"): healthy(now)})
		bubble.Pass(time.Second)
		f(t, r, w)
	})
}

func flowTo(proto uint8, k TargetKey, port uint16) Flow {
	return Flow{
		Protocol: proto, Client: netip.AddrPortFrom(addr("203.0.113.9"), port), VIP: netip.MustParseAddrPort("198.51.100.10:80"),
		Target: k.AddrPort, To: k, Ours: true, Live: true,
	}
}

// Until the flowtable has released a flow, what its ends say is counted and reaches
// no rule that would answer: they are asked afterwards, and told then.
func TestFlowsAreEndedOnceTheFlowtableReleasesThem(t *testing.T) {
	spec := webSpec(2)
	spec.TargetGroups[0].Unhealthy.ConnectionTermination = true
	sweeping(t, spec, func(t *testing.T, r *Reconciler, w *flowWorld) {
		one := webKey("10.0.1.11")
		w.set(func() {
			w.begun = time.Now()
			w.answers = map[uint16][2]uint64{1: {1, 1}, 2: {1, 1}}
			held := flowTo(ProtoTCP, one, 2)
			held.Offloaded = true
			w.flows[one] = append(w.flows[one], held)
		})
		r.SetHealth(map[TargetKey]Health{one: unhealthy(time.Now()), webKey("10.0.1.12"): healthy(time.Now())})
		bubble.Pass(120 * time.Millisecond)
		w.set(func() {
			for i := range w.flows[one] {
				held := &w.flows[one][i]
				held.Sent, held.Answered = held.Sent+2, held.Answered+2
				held.Offloaded = false
			}
		})
		bubble.Pass(10 * time.Second)
		want := []string{
			"0s prompt 1", "50ms forget web/10.0.1.11:8080: 1",
			"150ms prompt 1", "150ms forget web/10.0.1.11:8080: 1",
		}
		if diff := cmp.Diff(want, w.did); diff != "" {
			t.Error(diff)
		}
	})
}

// A target that is not installed any more has flows that nobody can tell from
// others: it stays until they are forgotten.
func TestDrainedFlowsAreForgottenHoweverLate(t *testing.T) {
	one := webKey("10.0.1.11")
	busy := errors.New("device or resource busy")
	for _, c := range []struct {
		name string
		// hinder is called a second before the flows begin to be ended.
		hinder func(t *testing.T, r *Reconciler, w *flowWorld)
		want   string
	}{
		{"nothing is in the way", func(*testing.T, *Reconciler, *flowWorld) {}, "2.5s forget"},
		{"the last attempt fails", func(_ *testing.T, _ *Reconciler, w *flowWorld) {
			w.set(func() { w.fail["forget"] = busy })
			time.AfterFunc(4*time.Second, func() { w.set(func() { delete(w.fail, "forget") }) })
		}, "3.5s forget"},
		{"attempts fail for long", func(_ *testing.T, _ *Reconciler, w *flowWorld) {
			w.set(func() { w.fail["forget"] = busy })
			time.AfterFunc(time.Minute, func() { w.set(func() { delete(w.fail, "forget") }) })
		}, "59.5s forget"},
		// What follows takes long in the bubble's time.
		{"a look at all flows takes until there is little time left", func(t *testing.T, r *Reconciler, w *flowWorld) {
			w.set(func() { w.first["prune"] = func() { time.Sleep(terminateFor) } })
			lookAtAll(t, r)
		}, "6.7s forget"}, // that look, a rest, and as long as always
		{"a look at all flows comes between the prompts and takes long", func(t *testing.T, r *Reconciler, w *flowWorld) {
			w.set(func() { w.first["prune"] = func() { time.Sleep(2 * terminateFor) } })
			time.AfterFunc(1500*time.Millisecond, func() { lookAtAll(t, r) })
		}, "10.7s forget"}, // that look, and a rest
		{"the last look at its flows takes long", func(_ *testing.T, _ *Reconciler, w *flowWorld) {
			time.AfterFunc(3*time.Second, func() { w.set(func() { w.first["forget"] = func() { time.Sleep(2 * terminateFor) } }) })
		}, "12.5s forget"},
	} {
		t.Run(c.name, func(t *testing.T) {
			sweeping(t, minuteSpec(3), func(t *testing.T, r *Reconciler, w *flowWorld) {
				if err := r.Drain(t.Context(), "web", one.AddrPort.Addr(), 0); err != nil {
					t.Fatal(err)
				}
				bubble.Pass(59 * time.Second)
				w.set(func() { w.begun, w.did = time.Now().Add(time.Second), nil })
				c.hinder(t, r, w)
				bubble.Pass(2 * time.Minute)
				w.set(func() {
					w.did = slices.DeleteFunc(w.did, func(s string) bool { return !strings.Contains(s, "forget") })
				})
				if diff := cmp.Diff([]string{c.want + " web/10.0.1.11:8080: 1"}, w.did); diff != "" {
					t.Error(diff)
				}
				if s := r.Snapshot().Groups[0].Targets[0]; s.Terminate || w.left(one) > 0 {
					t.Errorf("%d flows are left, terminates: %v", w.left(one), s.Terminate)
				}
			})
		})
	}
}

// lookAtAll changes what all flows are judged by.
func lookAtAll(t *testing.T, r *Reconciler) {
	t.Helper()
	other := minuteSpec(3)
	other.Listeners[0].Port++
	setSpec(t, r, other)
}

// Who has relayed connections untracked and thinks better of it before all flows
// were looked at leaves entries behind that have missed packets.
func TestEntriesThatMissedPacketsGo(t *testing.T) {
	spec := func(untracked bool) *Spec {
		spec := minuteSpec(3)
		spec.TargetGroups[0].ClientIP, spec.UntrackedRelay = ProxyProtocolV2, untracked
		return spec
	}
	for _, c := range []struct {
		name string
		want []string
		then func(t *testing.T, r *Reconciler, w *flowWorld)
	}{
		{"always tracked", nil, func(*testing.T, *Reconciler, *flowWorld) {}},
		{"untracked", []string{"prune 1"}, func(t *testing.T, r *Reconciler, _ *flowWorld) { setSpec(t, r, spec(true)) }},
		{"tracked again while all flows are looked at", []string{"prune 1"}, func(t *testing.T, r *Reconciler, w *flowWorld) {
			w.set(func() { w.first["prune"] = func() { setSpec(t, r, spec(false)) } })
			setSpec(t, r, spec(true))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			sweeping(t, spec(false), func(t *testing.T, r *Reconciler, w *flowWorld) {
				one := webKey("10.0.1.11")
				relayed := flowTo(ProtoTCP, one, 1)
				relayed.Target = relayed.VIP
				w.set(func() { w.flows[one] = []Flow{relayed} })
				c.then(t, r, w)
				bubble.Pass(time.Minute)
				for i, s := range w.did {
					_, w.did[i], _ = strings.Cut(s, " ")
				}
				if diff := cmp.Diff(c.want, w.did); diff != "" {
					t.Error(diff)
				}
			})
		})
	}
}

func setSpec(t *testing.T, r *Reconciler, spec *Spec) {
	t.Helper()
	if err := r.SetSpec(t.Context(), spec); err != nil {
		t.Error(err)
	}
}

func TestPromptsComeInTimeWhateverFails(t *testing.T) {
	one := webKey("10.0.1.11")
	sweeping(t, minuteSpec(3), func(t *testing.T, r *Reconciler, w *flowWorld) {
		w.set(func() { w.fail["prune"], w.begun = errors.New("no buffer space available"), time.Now() })
		r.SetHealth(map[TargetKey]Health{one: unhealthy(time.Now())})
		bubble.Pass(10 * time.Second)
		want := []string{"0s prompt 1", "600ms prompt 1", "1.2s prompt 1", "2.5s forget web/10.0.1.11:8080: 1"}
		if diff := cmp.Diff(want, w.did); diff != "" {
			t.Error(diff)
		}
	})
}

// Each look is a walk of all flows of the host, which a target that flaps must not
// cause for nothing.
func TestTargetsWithoutFlowsCostLittle(t *testing.T) {
	one := webKey("10.0.1.11")
	for _, c := range []struct {
		name  string
		flows []Flow
		most  int
	}{
		{"none", nil, 3}, // what there is, whom to ask, and what slipped through
		{"one", []Flow{flowTo(ProtoTCP, one, 1)}, 20},
	} {
		t.Run(c.name, func(t *testing.T) {
			sweeping(t, minuteSpec(3), func(t *testing.T, r *Reconciler, w *flowWorld) {
				w.set(func() { w.flows[one] = c.flows })
				r.SetHealth(map[TargetKey]Health{one: unhealthy(time.Now())})
				bubble.Pass(4 * time.Second)
				if w.looks == 0 || w.looks > c.most {
					t.Errorf("%d looks, more than %d", w.looks, c.most)
				}
			})
		})
	}
}

func TestFlowsAreJudgedWhenItMatters(t *testing.T) {
	spec := minuteSpec(3)
	spec.TargetGroups[0].Unhealthy = UnhealthyAction{}
	other := minuteSpec(3)
	other.TargetGroups[0].Unhealthy = UnhealthyAction{}
	other.Listeners[0].Port++
	sweeping(t, spec, func(t *testing.T, r *Reconciler, w *flowWorld) {
		prunes := func(do func()) (n int) {
			w.set(func() { w.prunes = 0 })
			do()
			bubble.Pass(time.Second)
			w.set(func() { n = w.prunes })
			return n
		}
		if n := prunes(func() { r.SetHealth(map[TargetKey]Health{webKey("10.0.1.11"): unhealthy(time.Now())}) }); n != 0 {
			t.Errorf("%d times after a verdict that ends no flows", n)
		}
		if n := prunes(func() {
			if err := r.SetSpec(t.Context(), other); err != nil {
				t.Error(err)
			}
		}); n != 1 {
			t.Errorf("%d times after a change of a listener", n)
		}
		// Once more where a pass was under way, which may come at the same moment.
		if n := prunes(func() { bubble.Pass(pruneEvery) }); n != 1 && n != 2 {
			t.Errorf("%d times after a while", n)
		}
	})
}

// A look at all flows meets some that began after a pass that it does not know.
func TestFlowsOfALaterPassAreLeftAlone(t *testing.T) {
	udpSpec := func(targets int) *Spec {
		spec := minuteSpec(targets)
		spec.Listeners[0].Protocol, spec.TargetGroups[0].Protocol = TCPUDP, TCPUDP
		return spec
	}
	one, added := webKey("10.0.1.11"), webKey("10.0.1.14")
	t.Run("stale", func(t *testing.T) {
		sweeping(t, udpSpec(3), func(t *testing.T, r *Reconciler, w *flowWorld) {
			w.set(func() {
				w.first["prune"] = func() {
					if err := r.SetSpec(t.Context(), udpSpec(4)); err != nil {
						t.Error(err)
					}
					w.set(func() { w.flows[added] = []Flow{flowTo(ProtoUDP, added, 2)} })
				}
			})
			bubble.Pass(pruneEvery)
			if w.left(added) != 1 {
				t.Errorf("a flow to a target that has just come: %q", w.did)
			}
			if err := r.SetSpec(t.Context(), udpSpec(3)); err != nil {
				t.Error(err)
			}
			bubble.Pass(time.Second)
			if w.left(added) != 0 {
				t.Errorf("a flow to a target that has left: %q", w.did)
			}
		})
	})
	t.Run("of a target that is back", func(t *testing.T) {
		sweeping(t, udpSpec(3), func(t *testing.T, r *Reconciler, w *flowWorld) {
			if err := r.Drain(t.Context(), "web", one.AddrPort.Addr(), 0); err != nil {
				t.Error(err)
			}
			bubble.Pass(time.Minute + forgetAfter - time.Millisecond)
			w.set(func() {
				w.first["forget"] = func() {
					if err := r.Undrain(t.Context(), "web", one.AddrPort.Addr(), 0); err != nil {
						t.Error(err)
					}
				}
			})
			bubble.Pass(time.Minute)
			if w.left(one) != 1 {
				t.Errorf("it was forgotten: %q", w.did)
			}
		})
	})
	t.Run("while the kernel is not what it should be", func(t *testing.T) {
		sweeping(t, udpSpec(3), func(t *testing.T, r *Reconciler, w *flowWorld) {
			w.set(func() {
				w.flows[added] = []Flow{flowTo(ProtoUDP, added, 2)}
				w.first["prune"] = func() {
					s := *r.Snapshot()
					s.Held, s.Err = false, errors.New("device or resource busy")
					r.snapshot.Store(&s)
				}
			})
			other := udpSpec(3)
			other.Listeners[0].Port++
			if err := r.SetSpec(t.Context(), other); err != nil {
				t.Error(err)
			}
			bubble.Pass(time.Second)
			if w.left(added) != 1 {
				t.Errorf("judged: %q", w.did)
			}
			bubble.Pass(DefaultResync)
			if w.left(added) != 0 {
				t.Errorf("not judged again: %q", w.did)
			}
		})
	})
}
