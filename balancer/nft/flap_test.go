package nft

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"go.uber.org/zap"

	"nlb/balancer"
)

// noRoutes is a Router of a host that reaches no target: none is needed to
// program the kernel.
type noRoutes struct{}

func (noRoutes) Links(context.Context) ([]string, error) { return nil, nil }

func (noRoutes) Routes(context.Context, []netip.Addr, func(netip.Addr) bool) (map[netip.Addr]balancer.Route, error) {
	return nil, nil
}

// flapping has 20 listeners, each with a group of 50 targets.
func flapping(avoidSelf bool) *balancer.Spec {
	vip := addr("198.51.100.10")
	spec := &balancer.Spec{VIPs: []balancer.VIP{{Address: vip}}, SourceAddresses: []netip.Addr{addr("10.0.0.2")}}
	for i := range 20 {
		g := balancer.TargetGroup{
			Name: fmt.Sprint("crowd", i), Protocol: balancer.TCP, ClientIP: balancer.Preserve, AvoidSelf: avoidSelf,
			FailOpen: balancer.FailOpen{MinimumHealthyCount: 1}, Unhealthy: balancer.UnhealthyAction{ConnectionTermination: true},
		}
		for j := range 50 {
			g.Targets = append(g.Targets, balancer.Target{Address: netip.AddrFrom4([4]byte{10, 7, byte(i), byte(j + 1)}), Port: 8080, Weight: 1})
		}
		spec.TargetGroups = append(spec.TargetGroups, g)
		spec.Listeners = append(spec.Listeners, balancer.Listener{
			Name: g.Name, VIP: vip, Protocol: balancer.TCP, Port: uint16(8001 + i), TCPIdleTimeout: 350 * time.Second,
			Allow: prefixes("0.0.0.0/0"), Forward: []balancer.WeightedGroup{{TargetGroup: g.Name, Weight: 1}},
		})
	}
	return spec
}

// BenchmarkFlap reports how long a pass takes, in the median and in all but one of
// twenty, when verdicts come at once about 100 of 1,000 targets, in all groups.
func BenchmarkFlap(b *testing.B) {
	for name, avoidSelf := range map[string]bool{"plain": false, "avoid_self": true} {
		b.Run(name, func(b *testing.B) { benchmarkFlap(b, flapping(avoidSelf)) })
	}
}

// flapPatience ends a benchmark that hangs. A pass takes milliseconds; on a host that
// others keep busy the first one took more than ten seconds.
const flapPatience = 2 * time.Minute

func benchmarkFlap(b *testing.B, spec *balancer.Spec) {
	d, err := New(zap.NewNop(), "")
	if err != nil {
		b.Fatal(err)
	}
	// Neighbours differ, so that no group is ever all good or all bad.
	states := [...]balancer.State{balancer.Healthy, balancer.Unhealthy}
	verdicts := func(round, every int) map[balancer.TargetKey]balancer.Health {
		found := make(map[balancer.TargetKey]balancer.Health)
		for _, g := range spec.TargetGroups {
			for j, t := range g.Targets {
				if j%every == round%every {
					found[balancer.TargetKey{Group: g.Name, AddrPort: t.AddrPort()}] =
						balancer.Health{State: states[(round/every+j)%2], Since: time.Now()}
				}
			}
		}
		return found
	}
	r := balancer.NewReconciler(balancer.Options{
		Parts: []balancer.Part{d}, Router: noRoutes{}, Log: zap.NewNop(), Spec: spec, Health: verdicts(0, 1), Resync: time.Hour,
	})
	ended := make(chan error)
	go func() { ended <- r.Run(b.Context()) }() // over when the clean-up begins
	b.Cleanup(func() {
		if err := errors.Join(<-ended, empty(d), d.Close()); err != nil {
			b.Error(err)
		}
	})
	select {
	case <-r.Converged():
	case <-time.After(flapPatience):
		b.Fatalf("no table within %v", flapPatience)
	}
	var took []time.Duration
	for round := 10; b.Loop(); round++ {
		before := r.Snapshot()
		r.SetHealth(verdicts(round, 10))
		deadline := time.Now().Add(flapPatience)
		for r.Snapshot().Latency.Count == before.Latency.Count {
			if time.Now().After(deadline) {
				b.Fatalf("round %d: no pass within %v", round, flapPatience)
			}
			time.Sleep(50 * time.Microsecond)
		}
		took = append(took, r.Snapshot().Took)
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "median-ms")
	b.ReportMetric(float64(took[len(took)*95/100].Microseconds())/1000, "p95-ms")
}

// empty removes what d has installed.
func empty(d *Dataplane) error {
	p, err := d.Plan(context.Background(), nil)
	if err != nil {
		return err
	}
	return d.Apply(context.Background(), p)
}
