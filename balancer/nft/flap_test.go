package nft

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

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
			// A look of the benchmark's own, fine enough for what it measures.
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

// BenchmarkVerdict reports what one target of 1,000, in 20 groups, costs that fails
// or returns: the time of the transaction that says so, and the CPU time of it.
func BenchmarkVerdict(b *testing.B) {
	spec := flapping(false)
	for _, ending := range []bool{false, true} {
		table := func(fails bool) *balancer.Desired {
			return &balancer.Desired{Table: verdictTable(spec, fails, fails && ending)}
		}
		name := "plain"
		if ending {
			name = "ending"
		}
		b.Run(name, func(b *testing.B) { benchmarkVerdict(b, table(false), table(true)) })
	}
}

// verdictTable is the Table of a spec whose first target may have failed, with its
// flows being ended or not.
func verdictTable(spec *balancer.Spec, fails, ending bool) *balancer.Table {
	t := &balancer.Table{Key: balancer.HashKey{1, 2, 3}, VIPs: []netip.Addr{spec.VIPs[0].Address}, Sources: spec.SourceAddresses}
	for _, l := range spec.Listeners {
		t.Services = append(t.Services, balancer.VirtualService{
			Name: l.Name, Address: l.VIP, Protocols: []uint8{balancer.ProtoTCP}, Port: l.Port, IdleTimeout: l.TCPIdleTimeout,
			Allow: l.Allow, Pools: []balancer.WeightedPool{{Pool: l.Name, Weight: 1}},
		})
	}
	for _, g := range spec.TargetGroups {
		p := balancer.Pool{Name: g.Name, Protocols: []uint8{balancer.ProtoTCP}, ClientIP: g.ClientIP}
		for _, target := range g.Targets {
			p.Destinations = append(p.Destinations, dest(target.Address.String(), target.Port, target.Weight))
		}
		t.Pools = append(t.Pools, p)
	}
	if fails {
		failing(&t.Pools[0], 0)
		t.Pools[0].Destinations[0].Terminate = ending
	}
	return t
}

func benchmarkVerdict(b *testing.B, healthy, failed *balancer.Desired) {
	d, err := New(zap.NewNop(), "")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := errors.Join(empty(d), d.Close()); err != nil {
			b.Error(err)
		}
	})
	// The kernel works on a transaction within the send of this thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	apply := func(want *balancer.Desired) (took, cpu time.Duration) {
		p, err := d.Plan(b.Context(), want)
		if err != nil {
			b.Fatal(err)
		}
		begun, used := time.Now(), threadCPU(b)
		if err := d.Apply(b.Context(), p); err != nil {
			b.Fatal(err)
		}
		return time.Since(begun), threadCPU(b) - used
	}
	apply(healthy)
	var took, cpu [2][]time.Duration
	for b.Loop() {
		for i, want := range []*balancer.Desired{failed, healthy} {
			t, c := apply(want)
			took[i], cpu[i] = append(took[i], t), append(cpu[i], c)
		}
	}
	for i, verdict := range []string{"fail", "return"} {
		b.ReportMetric(median(took[i]), verdict+"-ms")
		b.ReportMetric(median(cpu[i]), verdict+"-cpu-ms")
	}
}

func median(d []time.Duration) float64 {
	slices.Sort(d)
	return float64(d[len(d)/2].Microseconds()) / 1000
}

// threadCPU is the CPU time that this thread has used.
func threadCPU(b *testing.B) time.Duration {
	var used unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &used); err != nil {
		b.Fatal(err)
	}
	return time.Duration(used.Nano())
}
