package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"

	"nlb/balancer"
)

var (
	_ balancer.Sparable = (*Opener)(nil)
	_ balancer.Sparable = (*Closer)(nil)
	_ balancer.Plan     = Plan{}
)

// A Plan is a change of what the relay serves.
type Plan struct {
	table *balancer.Table // nil: nothing is to be changed
	lines []string
}

// Empty reports that there is nothing to change.
func (p Plan) Empty() bool { return p.table == nil }

// Lines says in plain words what changes.
func (p Plan) Lines() []string { return p.lines }

// An Opener makes the relay serve what is wanted and is not served, or served
// differently. It belongs before the dataplane, which sends clients to sockets
// that must be there; what the dataplane still sends to is kept.
type Opener struct {
	m     *Manager
	hasty bool
}

// Opener returns the Part that belongs before the dataplane.
func (m *Manager) Opener() *Opener { return &Opener{m: m} }

// Name implements balancer.Part.
func (*Opener) Name() string { return "relay" }

// Plan implements balancer.Part. It finds addresses that somebody else listens
// on. A relay that serves nothing and is to serve nothing need not run.
func (o *Opener) Plan(ctx context.Context, want *balancer.Desired) (balancer.Plan, error) {
	return converse(ctx, o.m.line, o.spared(func() bool { return o.Spared(want) }), func(ctx context.Context) (balancer.Plan, error) {
		have, final, rests, err := o.m.compare(ctx, want)
		if err != nil {
			return nil, err
		}
		if rests {
			return Plan{}, nil
		}
		to := staged(have, final)
		if err := o.m.rehearse(have, to); err != nil {
			return nil, err
		}
		return plan(have, to)
	})
}

// Apply implements balancer.Part. It starts the relay if need be. After an error
// the relay serves what it served before.
func (o *Opener) Apply(ctx context.Context, p balancer.Plan) error {
	return o.m.apply(ctx, p, o.spared(func() bool {
		plan, ok := p.(Plan)
		return ok && plan.table != nil && o.m.listens(plan.table)
	}))
}

// Spared implements balancer.Sparable: where all sockets are there, clients wait in
// their queues for a worker.
func (o *Opener) Spared(want *balancer.Desired) bool { return o.m.listens(relayed(want.Table, nil)) }

// Hasty implements balancer.Sparable.
func (o *Opener) Hasty() balancer.Part { return &Opener{o.m, true} }

// spared is by when others can do without it; nil if they wait.
func (o *Opener) spared(by func() bool) func() bool {
	if o.hasty {
		return by
	}
	return nil
}

// A Closer ends what is not wanted any more. It belongs after the dataplane,
// which sends nobody there any more.
type Closer struct {
	m      *Manager
	spared func() bool // nil if others wait for it
}

// Closer returns the Part that belongs after the dataplane.
func (m *Manager) Closer() *Closer { return &Closer{m: m} }

// Name implements balancer.Part.
func (*Closer) Name() string { return "relay clean-up" }

// Plan implements balancer.Part.
func (c *Closer) Plan(ctx context.Context, want *balancer.Desired) (balancer.Plan, error) {
	return converse(ctx, c.m.line, c.spared, func(ctx context.Context) (balancer.Plan, error) {
		have, final, _, err := c.m.compare(ctx, want)
		if err != nil {
			return nil, err
		}
		return plan(staged(have, final), final)
	})
}

// Apply implements balancer.Part.
func (c *Closer) Apply(ctx context.Context, p balancer.Plan) error {
	return c.m.apply(ctx, p, c.spared)
}

// Spared implements balancer.Sparable: nobody needs what it ends to have ended.
func (*Closer) Spared(*balancer.Desired) bool { return true }

// Hasty implements balancer.Sparable.
func (c *Closer) Hasty() balancer.Part { return &Closer{c.m, func() bool { return true }} }

// compare returns what the relay serves and what it should serve in the end. It
// rests if it does nothing and is to do nothing: then the former is what our
// copies of sockets still listen for.
func (m *Manager) compare(ctx context.Context, want *balancer.Desired) (have, final *balancer.Table, rests bool, err error) {
	all := new(balancer.Table)
	if want != nil && want.Table != nil {
		all = want.Table
	}
	if m.rests() && empty(relayed(all, nil)) {
		return new(balancer.Table), new(balancer.Table), true, nil
	}
	now, err := m.observe(ctx)
	if err != nil {
		return nil, nil, false, err
	}
	final = relayed(all, now.table)
	if empty(now.table) && len(final.Services) == 0 {
		// Whatever final has of pools, there are no connections to look after.
		return m.rest(), new(balancer.Table), true, nil
	}
	return now.table, final, false, nil
}

// rests reports whether it is known that the relay has nothing to do, because
// nobody but us gives it anything. A host without relayed services need not ask
// in every pass.
func (m *Manager) rests() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.table != nil && empty(m.table)
}

// rest notes that the relay has nothing to do, and returns what it had to when we
// have sockets left of that. Those of a worker that died before we knew its table
// are closed: clients would wait in their queues for nobody.
func (m *Manager) rest() *balancer.Table {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.table == nil {
		m.forgetAll()
	}
	if len(m.sockets) == 0 {
		m.table = new(balancer.Table)
	}
	return m.table
}

// plan compares the tables as they are written: no slice and an empty one mean
// the same to us, but not to everybody.
func plan(from, to *balancer.Table) (balancer.Plan, error) {
	if reflect.DeepEqual(from, to) {
		return Plan{}, nil // as nearly always, and fast
	}
	was, err := encodeTable(from)
	if err != nil {
		return nil, err
	}
	is, err := encodeTable(to)
	if err != nil {
		return nil, err
	}
	if bytes.Equal(was, is) {
		return Plan{}, nil
	}
	return Plan{table: to, lines: changes(from, to)}, nil
}

// rehearse finds out whether the services that are new could listen.
func (m *Manager) rehearse(have, to *balancer.Table) error {
	listening := addresses(have)
	m.mu.Lock()
	defer m.mu.Unlock()
	var errs []error
	for i := range to.Services {
		a := addressOf(&to.Services[i])
		if _, ours := m.sockets[a]; !ours && !listening[a] {
			errs = append(errs, bindable(a))
		}
	}
	return errors.Join(errs...)
}

func (m *Manager) apply(ctx context.Context, p balancer.Plan, spared func() bool) error {
	plan, ok := p.(Plan)
	if !ok {
		return fmt.Errorf("a %T is no plan of a relay", p)
	}
	if plan.Empty() {
		return nil
	}
	_, err := converse(ctx, m.line, spared, func(ctx context.Context) (struct{}, error) {
		m.mu.Lock()
		defer m.mu.Unlock()
		return struct{}{}, m.give(ctx, plan.table)
	})
	return err
}
