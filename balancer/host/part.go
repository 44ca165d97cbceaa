package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/balancer/events"
)

var (
	_ balancer.Part    = (*Sysctls)(nil)
	_ balancer.Watcher = (*Sysctls)(nil)
	_ balancer.Plan    = Plan{}
)

// Sysctls is the Part that keeps the host's settings as balancing needs them.
// The package comment lists them.
type Sysctls struct {
	root  balancer.SysctlDir
	saved balancer.Records[record]
	log   *zap.Logger
	// warned says that the damaged file was complained about.
	warned bool
}

// NewSysctls returns a Part that keeps the previous values in stateDir, which
// is made when it is needed, and logs to log.
func NewSysctls(stateDir string, log *zap.Logger) *Sysctls {
	return &Sysctls{root: balancer.ProcSys, saved: savedIn(stateDir), log: log}
}

// Name implements balancer.Part.
func (*Sysctls) Name() string { return "sysctls" }

// IgnoresTable implements balancer.TableIgnorer.
func (*Sysctls) IgnoresTable() {}

// Plan implements balancer.Part. The plan is a [Plan].
func (s *Sysctls) Plan(_ context.Context, want *balancer.Desired) (balancer.Plan, error) {
	saved, err := s.saved.Load()
	if damaged, ok := errors.AsType[*balancer.DamagedError](err); ok {
		// Without it nothing can be restored, yet the rest works.
		if !s.warned {
			s.log.Warn("previous values of sysctls cannot be read and will not be restored; "+
				"the file is set aside when the next one is written", events.ForeignStateDamaged.Field(), zap.Error(damaged))
			s.warned = true
		}
		err = nil
	}
	if err != nil {
		return nil, err
	}
	found, err := s.observe(want, saved)
	if err != nil {
		return nil, err
	}
	return diff(found, wanted(want, found, saved), saved), nil
}

// observe reads what the decision depends on, and no more: what forwarding
// drags along only if it is about to be set.
func (s *Sysctls) observe(want *balancer.Desired, saved []record) (state, error) {
	found := state{values: map[string]string{}}
	for _, r := range saved {
		for _, u := range r.undo() {
			if err := s.read(&found, u.Key); err != nil {
				return state{}, err
			}
		}
	}
	if want != nil && want.Forwarding6 {
		if err := s.read(&found, keyForward6); err != nil {
			return state{}, err
		}
		if value, exists := found.values[keyForward6]; exists && value != "1" {
			if err := s.observeAdvertised(&found); err != nil {
				return state{}, err
			}
		}
	}
	for _, w := range wanted(want, found, saved) {
		if err := s.read(&found, w.Key); err != nil {
			return state{}, err
		}
		if found.values[w.Key] == w.Value {
			continue
		}
		if err := s.observeDragged(&found, w.Key); err != nil {
			return state{}, err
		}
	}
	return found, nil
}

func (s *Sysctls) observeAdvertised(found *state) error {
	var err error
	if found.advertised, err = advertised(); err != nil {
		return err
	}
	for _, ifname := range found.advertised {
		if err := s.read(found, keyAcceptRA(ifname)); err != nil {
			return err
		}
	}
	return nil
}

func (s *Sysctls) observeDragged(found *state, key string) error {
	var err error
	switch key {
	case keyForward4:
		found.names4, err = s.names("ipv4")
	case keyForward6:
		found.names6, err = s.names("ipv6")
	}
	if err != nil {
		return err
	}
	for _, d := range drags(key, found.names4, found.names6) {
		if err := s.read(found, d.key); err != nil {
			return err
		}
	}
	return nil
}

// read puts the value of key into found, if there is such a sysctl.
func (s *Sysctls) read(found *state, key string) error {
	value, err := s.root.Read(key)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	found.values[key] = value
	return nil
}

// names lists the interfaces that have settings, and "all" and "default".
func (s *Sysctls) names(family string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(string(s.root), "net", family, "conf"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list the interfaces' settings: %w", err)
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}

// advertised lists the interfaces that hold a default route learnt from router
// advertisements, sorted.
func advertised() ([]string, error) {
	filter := &netlink.Route{Protocol: unix.RTPROT_RA, Table: unix.RT_TABLE_UNSPEC} // in any table
	routes, err := steady(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_V6, filter, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("list IPv6 routes: %w", err)
	}
	var names []string
	for _, r := range routes {
		if r.Dst != nil {
			if bits, _ := r.Dst.Mask.Size(); bits != 0 {
				continue
			}
		}
		for _, index := range append(nextHops(r), r.LinkIndex) {
			link, err := netlink.LinkByIndex(index)
			if err != nil {
				continue // it went meanwhile, or is the 0 of a multipath route
			}
			names = append(names, link.Attrs().Name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

func nextHops(r netlink.Route) []int {
	var indexes []int
	for _, hop := range r.MultiPath {
		indexes = append(indexes, hop.LinkIndex)
	}
	return indexes
}

// Apply implements balancer.Part. It records the previous values, then restores
// and sets what it can, and returns all that could not be.
func (s *Sysctls) Apply(ctx context.Context, p balancer.Plan) error {
	plan, ok := p.(Plan)
	if !ok {
		return fmt.Errorf("a %T is no plan of sysctls", p)
	}
	if plan.Empty() {
		return nil
	}
	if err := s.store(slices.Concat(plan.keep, plan.restore, plan.set)); err != nil {
		return err
	}
	var errs []error
	left := slices.Clone(plan.keep)
	for _, r := range plan.restore {
		if err := s.write(ctx, r.undo()...); err != nil {
			errs = append(errs, err)
			left = append(left, r)
		}
	}
	for _, r := range plan.set {
		if err := s.write(ctx, setting{r.Key, r.Ours}); err != nil {
			errs = append(errs, err)
			continue
		}
		left = append(left, r)
	}
	return errors.Join(append(errs, s.store(left))...)
}

// store replaces the records on disk, unless it has these. What somebody else changed
// is set again without a wait for the disk.
func (s *Sysctls) store(records []record) error {
	if there, err := s.saved.Load(); err == nil && reflect.DeepEqual(byKey(there), byKey(records)) {
		return nil
	}
	return s.saved.Store(records)
}

func byKey(records []record) map[string]record {
	m := make(map[string]record, len(records))
	for _, r := range records {
		m[r.Key] = r
	}
	return m
}

// write sets the settings, up to the first that fails. Those of interfaces that
// are gone do not count.
func (s *Sysctls) write(ctx context.Context, settings ...setting) error {
	for _, w := range settings {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("%s: %w", w.line(), err)
		}
		err := s.root.Write(w.Key, w.Value)
		if errors.Is(err, fs.ErrNotExist) && perInterface(w.Key) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w%s", w.line(), err, remedy(w, err))
		}
		s.log.Info("sysctl set", events.SysctlSet.Field(), zap.String("key", balancer.SysctlName(w.Key)), zap.String("value", w.Value))
	}
	return nil
}

// remedy says what to do about a sysctl that there is not.
func remedy(w setting, err error) string {
	switch {
	case errors.Is(err, fs.ErrNotExist) && w.Key == keyAccounting:
		return " (connection tracking is not loaded: modprobe nf_conntrack)"
	case errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(w.Key, "net/ipv6/"):
		return " (this kernel has IPv6 switched off: boot it without ipv6.disable=1)"
	}
	return ""
}
