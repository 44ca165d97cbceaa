package balancer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"nlb/internal/bubble"
)

// TestAnyOrderConverges walks through reloads, health, tampering, failing steps
// and crashes in random order. Whenever it stands still for a resync, the kernel
// must hold what the Spec in force asks for.
func TestAnyOrderConverges(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		var failure any
		synctest.Test(t, func(*testing.T) {
			// rapid ends a walk by a panic, which must reach it on its own goroutine.
			defer func() { failure = recover() }()
			walk(rt)
		})
		if failure != nil {
			panic(failure)
		}
	})
}

func walk(t *rapid.T) {
	m := &machine{world: newWorld(), spec: webSpec(1)}
	m.boot()
	defer func() { m.stop() }()
	t.Repeat(map[string]func(*rapid.T){
		"reload":   m.reload,
		"health":   m.health,
		"tamper":   m.tamperWith,
		"flaky":    m.flaky,
		"crash":    m.crash,
		"idle":     m.idle,
		"converge": m.mustConverge,
	})
	m.mustConverge(t)
}

type machine struct {
	*world
	spec *Spec // in force
	r    *Reconciler
	stop func()
}

func (m *machine) boot() { m.r, m.stop = start(Options{Parts: m.parts(), Spec: m.spec}) }

func drawSpec(t *rapid.T) *Spec {
	spec := webSpec(rapid.IntRange(0, 4).Draw(t, "targets"))
	for i := range rapid.IntRange(0, 3).Draw(t, "more listeners") {
		name := fmt.Sprintf("extra%d", i)
		vip := VIP{Address: addr(fmt.Sprintf("198.51.100.%d", 20+i)), Interface: rapid.SampledFrom([]string{"lo", "eth0", ""}).Draw(t, "interface")}
		spec.VIPs = append(spec.VIPs, vip)
		g := spec.TargetGroups[0]
		g.Name = name
		spec.TargetGroups = append(spec.TargetGroups, g)
		spec.Listeners = append(spec.Listeners, Listener{
			Name: name, VIP: vip.Address, Protocol: TCP, Port: 443,
			Forward: []WeightedGroup{{TargetGroup: name, Weight: 1}, {TargetGroup: "web", Weight: 1}},
		})
	}
	if rapid.IntRange(0, 4).Draw(t, "sound") == 0 {
		spec.VIPs = append(spec.VIPs, VIP{Address: addr("198.51.100.99"), Interface: "missing0"})
	}
	return spec
}

func (m *machine) reload(t *rapid.T) {
	spec := drawSpec(t)
	if err := m.r.SetSpec(context.Background(), spec); err == nil {
		m.spec = spec
	}
}

func (m *machine) health(t *rapid.T) {
	keys := slices.SortedFunc(maps.Keys(targetKeys(m.spec)), func(a, b TargetKey) int { return a.AddrPort.Compare(b.AddrPort) })
	found := make(map[TargetKey]Health)
	for _, k := range keys {
		found[k] = rapid.SampledFrom([]Health{healthy(time.Now()), unhealthy(time.Now())}).Draw(t, k.String())
	}
	m.r.SetHealth(found)
}

func (m *machine) tamperWith(t *rapid.T) {
	names := slices.Sorted(maps.Keys(m.dump()))
	names = append(names, "pool stray", "service 198.51.100.66:6")
	name := rapid.SampledFrom(names).Draw(t, "name")
	text := rapid.SampledFrom([]string{"", "web"}).Draw(t, "text")
	m.tamper(name, text, rapid.Bool().Draw(t, "told"))
}

// flaky makes about one step in ten fail until the next mustConverge.
func (m *machine) flaky(t *rapid.T) {
	n := rapid.IntRange(0, 9).Draw(t, "phase")
	m.setFault(func(step) error {
		if n++; n%10 == 0 {
			return errors.New("device or resource busy")
		}
		return nil
	})
}

// crash ends the Reconciler between two steps and starts another one, which
// knows nothing of what the first did.
func (m *machine) crash(t *rapid.T) {
	left := rapid.IntRange(0, 5).Draw(t, "steps before the crash")
	m.setFault(func(step) error {
		if left == 0 {
			return errors.New("crashed")
		}
		left--
		return nil
	})
	spec := drawSpec(t)
	_ = m.r.SetSpec(context.Background(), spec) // cut short, or a success that nobody got to know
	m.stop()
	m.setFault(nil)
	if rapid.Bool().Draw(t, "file was changed") {
		m.spec = withoutMissing(spec)
	}
	m.boot()
}

func withoutMissing(spec *Spec) *Spec {
	sound := *spec
	sound.VIPs = slices.DeleteFunc(slices.Clone(spec.VIPs), func(v VIP) bool { return v.Interface == "missing0" })
	return &sound
}

func (m *machine) idle(t *rapid.T) {
	bubble.Pass(time.Duration(rapid.IntRange(1, 2000).Draw(t, "ms")) * time.Millisecond)
}

func (m *machine) mustConverge(t *rapid.T) {
	m.setFault(nil)
	bubble.Pass(DefaultResync + lastBackOff)
	s := m.r.Snapshot()
	if s.Err != nil || s.Spec != m.spec {
		t.Fatalf("error %v, spec in force is the expected one: %v", s.Err, s.Spec == m.spec)
	}
	if diff := cmp.Diff(render(s.Desired), m.dump()); diff != "" {
		t.Fatalf("kernel differs:\n%s", diff)
	}
}
