package balancer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A world is a kernel made of text: what is installed, by name. It rejects what
// a kernel would reject, and what would expose a VIP.
type world struct {
	mu       sync.Mutex
	have     map[string]string
	watchers []func()
	// fault decides whether the next step fails.
	fault func(step) error
	steps int
}

func newWorld() *world { return &world{have: make(map[string]string)} }

// A step sets one thing to a text, or deletes it when the text is empty.
type step struct{ name, text string }

func (s step) String() string {
	if s.text == "" {
		return "delete " + s.name
	}
	return "set " + s.name + " " + s.text
}

func (w *world) do(s step) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.steps++
	if w.fault != nil {
		if err := w.fault(s); err != nil {
			return err
		}
	}
	if err := w.reject(s); err != nil {
		return fmt.Errorf("%s: %w", s, err)
	}
	if s.text == "" {
		delete(w.have, s.name)
	} else {
		w.have[s.name] = s.text
	}
	return nil
}

func (w *world) reject(s step) error {
	kind, name, _ := strings.Cut(s.name, " ")
	_, exists := w.have[s.name]
	switch {
	case s.text == "" && !exists:
		return errors.New("no such entry")
	case s.text == "" && kind == "guard" && w.have["address "+name] != "":
		return errors.New("the address is bound and would be exposed")
	case s.text == "" && kind == "pool":
		for other, text := range w.have {
			if strings.HasPrefix(other, "service ") && slices.Contains(strings.Fields(text), name) {
				return fmt.Errorf("in use by %s", other)
			}
		}
	case s.text != "" && kind == "service":
		for _, pool := range strings.Fields(s.text) {
			if w.have["pool "+pool] == "" {
				return fmt.Errorf("pool %s is missing", pool)
			}
		}
	case s.text != "" && kind == "address":
		if w.have["guard "+name] == "" {
			return errors.New("the address is not guarded")
		}
		if s.text == "missing0" {
			return errors.New("no such device")
		}
	}
	return nil
}

// tamper is a stranger's change.
func (w *world) tamper(name, text string, notify bool) {
	w.mu.Lock()
	if text == "" {
		delete(w.have, name)
	} else {
		w.have[name] = text
	}
	watchers := slices.Clone(w.watchers)
	w.mu.Unlock()
	if notify {
		for _, changed := range watchers {
			changed()
		}
	}
}

func (w *world) setFault(fault func(step) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fault = fault
}

func (w *world) dump() map[string]string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.have)
}

// parts are the Parts of a world in the order that a program gives them.
func (w *world) parts() []Part {
	return []Part{
		&fakePart{world: w, name: "withdraw", kinds: []string{"address"}, deletes: true},
		&fakePart{world: w, name: "dataplane", kinds: []string{"pool", "guard", "service"}, sets: true, deletes: true},
		&fakePart{world: w, name: "announce", kinds: []string{"address"}, sets: true},
	}
}

// A fakePart keeps some kinds of entries of a world.
type fakePart struct {
	*world
	name          string
	kinds         []string // in the order in which they are set
	sets, deletes bool

	watchErr error // Watch fails with it
}

type fakePlan []step

func (p fakePlan) Empty() bool { return len(p) == 0 }
func (p fakePlan) Lines() []string {
	var lines []string
	for _, s := range p {
		lines = append(lines, s.String())
	}
	return lines
}

func (p *fakePart) Name() string { return p.name }

func (p *fakePart) Plan(ctx context.Context, want *Desired) (Plan, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	have, wanted := p.dump(), render(want)
	var plan fakePlan
	for _, kind := range p.kinds {
		for _, name := range slices.Sorted(maps.Keys(wanted)) {
			if p.sets && strings.HasPrefix(name, kind+" ") && have[name] != wanted[name] {
				plan = append(plan, step{name, wanted[name]})
			}
		}
	}
	for _, kind := range slices.Backward(p.kinds) {
		for _, name := range slices.Sorted(maps.Keys(have)) {
			if p.deletes && strings.HasPrefix(name, kind+" ") && wanted[name] == "" {
				plan = append(plan, step{name: name})
			}
		}
	}
	return plan, nil
}

func (p *fakePart) Apply(ctx context.Context, plan Plan) error {
	for _, s := range plan.(fakePlan) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := p.do(s); err != nil {
			return err
		}
	}
	return nil
}

func (p *fakePart) Watch(ctx context.Context, changed func()) error {
	if p.watchErr != nil {
		return p.watchErr
	}
	p.mu.Lock()
	p.watchers = append(p.watchers, changed)
	p.mu.Unlock()
	<-ctx.Done()
	return nil
}

// render says what a world should hold.
func render(want *Desired) map[string]string {
	entries := make(map[string]string)
	if want == nil {
		return entries
	}
	for _, v := range want.Table.VIPs {
		entries["guard "+v.String()] = "on"
	}
	for _, v := range want.Bound {
		entries["address "+v.Address.String()] = v.Interface
	}
	for _, p := range want.Table.Pools {
		text := p.ClientIP.String()
		for _, d := range p.Destinations {
			text += fmt.Sprintf(" %s=%d", d.AddrPort(), d.Weight)
			if d.Terminate {
				text += " ends"
			}
		}
		entries["pool "+p.Name] = text
	}
	for _, s := range want.Table.Services {
		var names []string
		for _, p := range s.Pools {
			names = append(names, p.Pool)
		}
		entries[fmt.Sprintf("service %s:%d", s.Address, s.Port)] = strings.Join(names, " ")
	}
	return entries
}

// fakeRouter puts every target behind eth1 in a /24 or /64.
type fakeRouter struct {
	err atomic.Pointer[error] // fails with it
}

func (r *fakeRouter) Links(context.Context) ([]string, error) { return []string{"eth0", "eth1"}, nil }

func (r *fakeRouter) Routes(_ context.Context, targets []netip.Addr, _ func(netip.Addr) bool) (map[netip.Addr]Route, error) {
	if err := r.err.Load(); err != nil {
		return nil, *err
	}
	routes := make(map[netip.Addr]Route)
	for _, t := range targets {
		bits := 24
		if t.Is6() {
			bits = 64
		}
		subnet, _ := t.Prefix(bits)
		routes[t] = Route{Source: subnet.Addr().Next(), Interface: "eth1", Subnet: subnet}
	}
	return routes, nil
}

// webSpec has one listener and one group with that many targets.
func webSpec(targets int) *Spec {
	spec := &Spec{
		VIPs: []VIP{{Address: addr("198.51.100.10"), Interface: "lo"}},
		Listeners: []Listener{{
			Name: "web", VIP: addr("198.51.100.10"), Protocol: TCP, Port: 80,
			Forward:        []WeightedGroup{{TargetGroup: "web", Weight: 1}},
			TCPIdleTimeout: 350 * time.Second,
			Allow:          prefixes("0.0.0.0/0", "::/0"),
		}},
		TargetGroups: []TargetGroup{{
			Name: "web", Protocol: TCP, Port: 8080, ClientIP: HairpinSNAT,
			Unhealthy: UnhealthyAction{ConnectionTermination: true},
			FailOpen:  FailOpen{MinimumHealthyCount: 1},
		}},
	}
	for i := range targets {
		spec.TargetGroups[0].Targets = append(spec.TargetGroups[0].Targets, target(fmt.Sprintf("10.0.1.%d", 11+i)))
	}
	return spec
}

func target(a string) Target { return Target{Address: addr(a), Port: 8080, Weight: 1} }

func webKey(a string) TargetKey {
	return TargetKey{Group: "web", AddrPort: netip.AddrPortFrom(addr(a), 8080)}
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func prefixes(s ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

// start runs a Reconciler until the test or stop ends it.
func start(o Options) (r *Reconciler, stop func()) {
	if o.Router == nil {
		o.Router = &fakeRouter{}
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	r = NewReconciler(o)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = r.Run(ctx) // always nil
	}()
	return r, func() { cancel(); <-done }
}

// inBubble runs f with a Reconciler of its own world and a clock of its own.
func inBubble(t *testing.T, spec *Spec, f func(t *testing.T, w *world, r *Reconciler)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		r, stop := start(Options{Parts: w.parts(), Spec: spec})
		defer stop()
		synctest.Wait()
		f(t, w, r)
	})
}
