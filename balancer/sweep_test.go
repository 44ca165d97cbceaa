package balancer

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
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
}

func (w *flowWorld) note(format string, args ...any) {
	w.did = append(w.did, fmt.Sprintf("%v ", time.Since(w.begun).Round(time.Millisecond))+fmt.Sprintf(format, args...))
}

func (w *flowWorld) FlowsTo(_ context.Context, keys []TargetKey) (flows []Flow, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, k := range keys {
		flows = append(flows, w.flows[k]...)
	}
	return flows, nil
}

func (w *flowWorld) Forget(_ context.Context, keys []TargetKey, over func(Flow) bool) (map[TargetKey]int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
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
	w.mu.Lock()
	defer w.mu.Unlock()
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
		time.Sleep(10 * time.Second)
		synctest.Wait()
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
		time.Sleep(pruneEvery + terminateFor)
		synctest.Wait()
		if n := len(flows.did); n != 4 {
			t.Errorf("leftover: %q", flows.did)
		}
	})
}
