package vip

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"

	"nlb/balancer"
	"nlb/balancer/events"
)

var (
	_ balancer.Part    = (*Withdrawer)(nil)
	_ balancer.Part    = (*Announcer)(nil)
	_ balancer.Watcher = (*Announcer)(nil)
	_ balancer.Plan    = Plan{}
)

// A Withdrawer removes our addresses that are no VIP any more. It belongs
// before the dataplane, which guards the host's own ports as long as the
// address is a VIP.
type Withdrawer struct{ log *zap.Logger }

// NewWithdrawer returns a Withdrawer that logs to log.
func NewWithdrawer(log *zap.Logger) *Withdrawer { return &Withdrawer{log: log} }

// Name implements balancer.Part.
func (*Withdrawer) Name() string { return "VIP withdrawal" }

// IgnoresTable implements balancer.TableIgnorer.
func (*Withdrawer) IgnoresTable() {}

// Plan implements balancer.Part. The plan is a [Plan].
func (*Withdrawer) Plan(_ context.Context, want *balancer.Desired) (balancer.Plan, error) {
	have, err := addresses()
	if err != nil {
		return nil, err
	}
	withdraw, _ := Diff(have, vips(want))
	return withdraw, nil
}

// Apply implements balancer.Part. It does what can be done and returns all that
// could not.
func (w *Withdrawer) Apply(ctx context.Context, p balancer.Plan) error {
	plan, ok := p.(Plan)
	if !ok {
		return fmt.Errorf("a %T is no plan of VIPs", p)
	}
	k, err := dial()
	if err != nil {
		return err
	}
	defer k.close()
	links, err := k.byName()
	if err != nil {
		return err
	}
	return w.remove(ctx, k, links, plan.Remove)
}

func (w *Withdrawer) remove(ctx context.Context, k rtnl, links map[string]link, as []Address) error {
	var errs []error
	for _, a := range as {
		if err := ctx.Err(); err != nil {
			return errors.Join(append(errs, err)...)
		}
		l, ok := links[a.Interface]
		if !ok {
			continue // and its addresses with it
		}
		if err := k.remove(l, a); err != nil {
			errs = append(errs, fmt.Errorf("remove %s from %s: %w", a.Prefix, a.Interface, err))
			continue
		}
		w.log.Info("VIP removed", events.VIPRemoved.Field(), zap.Stringer("address", a.Prefix), zap.String("interface", a.Interface))
	}
	return errors.Join(errs...)
}

// An Announcer adds VIPs to their interfaces and tells the neighbours. It
// belongs after the dataplane, so that no packet meets an unguarded address.
//
// Addresses that are there already are adopted without a write and without an
// announcement: nothing changed for the neighbours.
type Announcer struct {
	log      *zap.Logger
	old      *Withdrawer // removes what moved
	schedule *schedule

	mu     sync.Mutex
	wanted map[netip.Addr]bool // as of the last Plan
	noted  map[Address]bool    // addresses of others that were logged
}

// NewAnnouncer returns an Announcer that logs to log.
func NewAnnouncer(log *zap.Logger) *Announcer {
	return &Announcer{log: log, old: NewWithdrawer(log), schedule: newSchedule()}
}

// Name implements balancer.Part.
func (*Announcer) Name() string { return "VIP announcement" }

// IgnoresTable implements balancer.TableIgnorer.
func (*Announcer) IgnoresTable() {}

// Plan implements balancer.Part. The plan is a [Plan].
func (a *Announcer) Plan(_ context.Context, want *balancer.Desired) (balancer.Plan, error) {
	have, err := addresses()
	if err != nil {
		return nil, err
	}
	vips := vips(want)
	a.remember(have, vips)
	_, announce := Diff(have, vips)
	return announce, nil
}

// remember keeps what Watch has to look for, and says once whose addresses we
// rely on.
func (a *Announcer) remember(have []Address, want []balancer.VIP) {
	homes := make(map[balancer.VIP]bool, len(want))
	wanted := make(map[netip.Addr]bool, len(want))
	for _, v := range want {
		homes[v] = true
		wanted[v.Address] = true
	}
	noted := map[Address]bool{}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, h := range have {
		if h.Ours || !homes[balancer.VIP{Address: h.Prefix.Addr(), Interface: h.Interface}] {
			continue
		}
		if !a.noted[h] {
			a.log.Info("VIP is bound by somebody else and left to them",
				events.VIPForeign.Field(), zap.Stringer("address", h.Prefix), zap.String("interface", h.Interface))
		}
		noted[h] = true
	}
	a.wanted, a.noted = wanted, noted
}

func (a *Announcer) wants(addr netip.Addr) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.wanted[addr]
}

// Apply implements balancer.Part. It does what can be done and returns all that
// could not: an interface that is missing or down does not keep the others
// waiting. A VIP whose new interface fails stays on the old one. Whether the
// neighbours listened cannot be known, so an announcement that fails is logged.
func (a *Announcer) Apply(ctx context.Context, p balancer.Plan) error {
	plan, ok := p.(Plan)
	if !ok {
		return fmt.Errorf("a %T is no plan of VIPs", p)
	}
	k, err := dial()
	if err != nil {
		return err
	}
	defer k.close()
	links, err := k.byName()
	if err != nil {
		return err
	}
	added, failed, err := a.add(ctx, k, links, plan.Add)
	a.announce(links, added)
	a.schedule.add(added, transmissions-1, time.Now().Add(interval))

	moved := make([]Address, 0, len(plan.Remove))
	for _, r := range plan.Remove {
		if !failed[r.Prefix.Addr()] {
			moved = append(moved, r)
		}
	}
	return errors.Join(err, a.old.remove(ctx, k, links, moved))
}

// add binds as and says which it could and which it could not.
func (a *Announcer) add(ctx context.Context, k rtnl, links map[string]link, as []Address) (added []Address, failed map[netip.Addr]bool, err error) {
	failed = map[netip.Addr]bool{}
	var errs []error
	for _, addr := range as {
		if err := ctx.Err(); err != nil {
			failed[addr.Prefix.Addr()] = true
			errs = append(errs, err)
			break
		}
		if err := bind(k, links, addr); err != nil {
			failed[addr.Prefix.Addr()] = true
			errs = append(errs, fmt.Errorf("add %s to %s: %w", addr.Prefix, addr.Interface, err))
			continue
		}
		added = append(added, addr)
		a.log.Info("VIP added", events.VIPAdded.Field(), zap.Stringer("address", addr.Prefix), zap.String("interface", addr.Interface))
	}
	return added, failed, errors.Join(errs...)
}

func bind(k rtnl, links map[string]link, a Address) error {
	l, ok := links[a.Interface]
	if !ok {
		return errors.New("there is no such interface")
	}
	// A link that is down keeps IPv4 addresses and loses IPv6 ones, and nobody
	// would hear the announcement: wait for it, Watch tells when it comes up.
	if !l.up() {
		return fmt.Errorf("the interface is down (ip link set %s up)", a.Interface)
	}
	err := k.add(l, a)
	if err != nil && a.Prefix.Addr().Is6() && ipv6Off(a.Interface) {
		return fmt.Errorf("IPv6 is off on the interface (net.ipv6.conf.*.disable_ipv6): %w", err)
	}
	return err
}

// announce tells the neighbours of each address, once.
func (a *Announcer) announce(links map[string]link, as []Address) {
	if len(as) == 0 {
		return
	}
	s, err := newSender()
	if err != nil {
		a.log.Warn("VIPs are not announced", events.VIPNotAnnounced.Field(), zap.Error(err))
		return
	}
	defer s.close()
	for _, addr := range as {
		l, ok := links[addr.Interface]
		if !ok || !l.announces() {
			continue
		}
		if err := s.announce(l, addr.Prefix.Addr()); err != nil {
			a.log.Warn("VIP is not announced", events.VIPNotAnnounced.Field(), zap.Stringer("address", addr.Prefix),
				zap.String("interface", addr.Interface), zap.Error(err))
		}
	}
}

func (k rtnl) byName() (map[string]link, error) {
	links, err := k.links()
	return byName(links), err
}

func byName(links map[int]link) map[string]link {
	named := make(map[string]link, len(links))
	for _, l := range links {
		named[l.name] = l
	}
	return named
}

func addresses() ([]Address, error) {
	k, err := dial()
	if err != nil {
		return nil, err
	}
	defer k.close()
	_, as, err := k.observe()
	return as, err
}

func vips(want *balancer.Desired) []balancer.VIP {
	if want == nil {
		return nil
	}
	return want.Bound
}
