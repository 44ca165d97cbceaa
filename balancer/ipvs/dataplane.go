package ipvs

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/balancer/events"
)

var (
	_ balancer.Part = part{}
	_ balancer.Plan = plan{}
)

// A Dataplane keeps the virtual services of a Table in IPVS. It is two Parts, with
// the rules of nftables between them: what is new is there before clients are let
// in, and destinations are known to the rules before flows go to them.
//
// A Table of another dataplane wants no services: then the Parts remove those that
// are left, and need no IPVS where there are none.
type Dataplane struct {
	log     *zap.Logger
	records balancer.Records[record]
	// local reports whether packets to an address are delivered to this host.
	local func(netip.Addr) bool

	mu     sync.Mutex // guards all below
	kernel kernel
	// probed says that nothing was missing, and nothing failed since.
	probed bool
	// absent says that nothing of ours was there, and nobody has asked since.
	absent bool
	// quiet is the Opener's look, when there was nothing for it to do, until the next
	// plan of either.
	quiet *look
	// remote are the VIPs that were warned of, damaged the file that was.
	remote  []netip.Addr
	damaged bool
}

// New makes a Dataplane. It touches nothing, and works on a kernel without IPVS as
// long as no Table asks for one. stateDir keeps what the settings were before
// (ipvs.json); with "" they are not restored.
func New(stateDir string, log *zap.Logger) *Dataplane {
	return &Dataplane{log: log, records: savedIn(stateDir), local: delivered, kernel: new(module)}
}

// Close closes the Dataplane and leaves the kernel as it is.
func (d *Dataplane) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.kernel.close()
	return nil
}

// Probe says which part the kernel lacks: ErrNoIPVS, ErrNoScheduler or
// ErrNoConntrack. It may load modules, and changes nothing.
func (d *Dataplane) Probe() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.kernel.probe()
}

// Opener is the Part that belongs before the rules of nftables. It makes the
// settings, and the services that are new.
func (d *Dataplane) Opener() balancer.Part { return part{d, opening, true} }

// Closer is the Part that belongs after the rules of nftables. It makes services
// that were there before what they should be, removes the others, and restores
// the settings when the last is gone.
func (d *Dataplane) Closer() balancer.Part { return part{d, closing, false} }

// A part is one of the two.
type part struct {
	*Dataplane
	plan  func(*look) plan
	opens bool
}

// A look is what there is for a Desired: in the kernel, and on disk.
type look struct {
	want  *balancer.Desired
	table *balancer.Table // of want, nil if there is none
	found state
	saved []record
	// to are the services that there should be.
	to []service
}

// Name implements balancer.Part.
func (part) Name() string { return "ipvs" }

// A plan is an ordered list of writes.
type plan struct {
	steps    []step
	settings change
}

// Empty implements balancer.Plan.
func (p plan) Empty() bool { return len(p.steps) == 0 && p.settings.empty() }

// Lines implements balancer.Plan, in the words of ipvsadm(8) and sysctl(8).
func (p plan) Lines() []string {
	var lines []string
	for _, r := range p.settings.forgotten {
		lines = append(lines, fmt.Sprintf("# %s was changed by somebody since we set it to %d: left alone", r.Name, r.Ours[0]))
	}
	for _, s := range p.steps {
		lines = append(lines, s.line())
	}
	return lines
}

// opening is the plan up to the rules of nftables.
func opening(l *look) plan {
	var p plan
	if asks(l.table) && len(l.to) > 0 {
		p.settings = install(l.found.settings, wantedSettings(l.table), l.saved)
	}
	p.steps = append(p.settings.steps(), transition(l.found.services, staged(l.found.services, l.to))...)
	return p
}

// closing is the plan from there on.
func closing(l *look) plan {
	var p plan
	switch {
	case len(l.to) == 0:
		p.settings = restore(l.found.settings, nil, false, l.saved)
	case asks(l.table):
		p.settings = restore(l.found.settings, wantedSettings(l.table), false, l.saved)
	default:
		p.settings = restore(l.found.settings, nil, true, l.saved)
	}
	p.steps = append(transition(staged(l.found.services, l.to), l.to), p.settings.steps()...)
	return p
}

// asks reports whether the Table's services are IPVS's.
func asks(t *balancer.Table) bool { return t != nil && t.Dataplane == balancer.IPVS }

// Plan implements balancer.Part.
//
// The Closer looks at the kernel again if it has something to do: connections have
// come and gone since the Opener looked, and a destination that has some lingers. To
// see that there is nothing to do, which is so in most passes, the Opener's look is
// enough: it has asked the kernel about each service.
func (p part) Plan(_ context.Context, want *balancer.Desired) (balancer.Plan, error) {
	d := p.Dataplane
	d.mu.Lock()
	defer d.mu.Unlock()
	quiet := d.quiet
	d.quiet = nil
	l := &look{want: want}
	if want != nil {
		l.table = want.Table
	}
	if !asks(l.table) && d.absent {
		return plan{}, nil
	}
	if !p.opens && quiet != nil && quiet.want == want {
		if todo := p.plan(quiet); todo.Empty() {
			return todo, nil
		}
	}
	if err := d.look(l); err != nil {
		return nil, err
	}
	d.warnOfRemote(want, l.to)
	todo := p.plan(l)
	if p.opens && todo.Empty() {
		d.quiet = l
	}
	return todo, nil
}

// look fills in what there is, and what there should be.
func (d *Dataplane) look(l *look) (err error) {
	if asks(l.table) && !d.probed && len(goal(nil, l.table)) > 0 {
		if err := d.kernel.probe(); err != nil {
			return err
		}
		d.probed = true
	}
	if l.saved, err = d.saved(); err != nil {
		return err
	}
	if l.found, err = d.kernel.observe(ours(l.table)); err != nil {
		d.probed = false
		return err
	}
	d.absent = !asks(l.table) && len(l.found.services) == 0 && len(l.saved) == 0
	l.to = goal(l.found.services, l.table)
	return nil
}

// saved reads what the settings were. A file that makes no sense keeps no service
// from its flows: what is found counts as what was there before.
func (d *Dataplane) saved() ([]record, error) {
	saved, err := d.records.Load()
	if _, damaged := errors.AsType[*balancer.DamagedError](err); damaged {
		if !d.damaged {
			d.log.Warn("what IPVS's settings were before is unknown, those of now will stay", events.ForeignStateDamaged.Field(), zap.Error(err))
		}
		d.damaged = true
		return nil, nil
	}
	return saved, err
}

// Apply implements balancer.Part. It stops at the first step that fails; what was
// done until then stays, and strands nobody.
func (p part) Apply(ctx context.Context, balancerPlan balancer.Plan) error {
	todo, ok := balancerPlan.(plan)
	if !ok {
		return fmt.Errorf("a %T is no plan of IPVS", balancerPlan)
	}
	if todo.Empty() {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.apply(ctx, todo); err != nil {
		p.probed = false
		return err
	}
	return nil
}

func (d *Dataplane) apply(ctx context.Context, p plan) error {
	if err := d.store(p.settings.saved, p.settings.before); err != nil {
		return err
	}
	for _, s := range p.steps {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("%s: %w", s.line(), err)
		}
		if err := d.kernel.write(s); err != nil {
			return explain(s, err)
		}
	}
	return d.store(p.settings.before, p.settings.after)
}

// store replaces the records on disk, if others are there.
func (d *Dataplane) store(there, records []record) error {
	if same(there, records) {
		return nil
	}
	return d.records.Store(records)
}

// warnOfRemote tells, once for each change, of VIPs that IPVS would never see a
// packet of: it has the last word in what is delivered to this host, and sees
// nothing of what is forwarded.
func (d *Dataplane) warnOfRemote(want *balancer.Desired, to []service) {
	var remote []netip.Addr
	if want != nil && asks(want.Table) {
		for _, s := range to {
			a := s.key.at.Addr()
			bound := slices.ContainsFunc(want.Bound, func(v balancer.VIP) bool { return v.Address == a })
			if !bound && !slices.Contains(remote, a) && !d.local(a) {
				remote = append(remote, a)
			}
		}
	}
	if len(remote) > 0 && !slices.Equal(remote, d.remote) {
		d.log.Warn("IPVS sees only what is delivered to this host: give the VIP an interface, or add a local route to it",
			events.VIPNotLocal.Field(), zap.Stringers("vips", remote))
	}
	d.remote = remote
}

// delivered asks the routes, since an address can be local without being on a
// link (ip route add local 198.51.100.0/24 dev lo).
func delivered(a netip.Addr) bool {
	routes, err := netlink.RouteGet(a.AsSlice())
	if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) {
		return false
	}
	if err != nil {
		return true // not known: nothing to warn of
	}
	return slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Type == unix.RTN_LOCAL })
}
