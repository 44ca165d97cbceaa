package host

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"nlb/balancer"
)

// A Router asks the kernel how it would reach addresses. It implements
// balancer.Router and balancer.Watcher and may be used by several goroutines.
type Router struct{}

// NewRouter returns a Router for the network namespace of its callers.
func NewRouter() *Router { return &Router{} }

var (
	_ balancer.Router  = (*Router)(nil)
	_ balancer.Watcher = (*Router)(nil)
)

// Routes implements balancer.Router. Each target is a route lookup of its own,
// as any reading of the tables would have to repeat what the policy rules do; a
// lookup takes about ten microseconds. Targets whose route is no way to send
// (unreachable, prohibit, blackhole, broadcast) have none.
func (*Router) Routes(ctx context.Context, targets []netip.Addr, isVIP func(netip.Addr) bool) (map[netip.Addr]balancer.Route, error) {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("rtnetlink: %w", err)
	}
	defer handle.Close()
	l := lookup{handle: handle, isVIP: isVIP, names: map[int]string{}}
	routes := make(map[netip.Addr]balancer.Route, len(targets))
	for _, target := range targets {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		route, ok, err := l.route(target)
		if err != nil {
			return nil, fmt.Errorf("route to %s: %w", target, err)
		}
		if ok {
			routes[target] = route
		}
	}
	return routes, nil
}

// Links implements balancer.Router. A port of a bridge and a member of a bond or
// team are left out: IP sees the packets of the device that they belong to.
func (*Router) Links(ctx context.Context) ([]string, error) {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("rtnetlink: %w", err)
	}
	defer handle.Close()
	all, err := steady(handle.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	return linkNames(all), ctx.Err()
}

// linkNames picks the links that packets of IP come and go by.
func linkNames(all []netlink.Link) []string {
	lower := make(map[int]bool) // devices whose members are not
	for _, l := range all {
		switch l.Type() {
		case "bridge", "bond", "team":
			lower[l.Attrs().Index] = true
		}
	}
	var names []string
	for _, l := range all {
		a := l.Attrs()
		if a.EncapType == "ether" && !lower[a.MasterIndex] {
			names = append(names, a.Name)
		}
	}
	slices.Sort(names)
	return names
}

// A lookup is one pass over targets.
type lookup struct {
	handle *netlink.Handle
	isVIP  func(netip.Addr) bool
	names  map[int]string // of the interfaces met so far
	own    []address      // of all interfaces, once listed
	listed bool
}

func (l *lookup) route(target netip.Addr) (route balancer.Route, ok bool, err error) {
	found, ok, err := l.get(target, false)
	if !ok {
		return balancer.Route{}, false, err
	}
	if route.Interface, err = l.name(found.LinkIndex); err != nil {
		// The interface went between the two questions, and the route with it.
		return balancer.Route{}, false, notGone(err)
	}
	route.Local = found.Type == unix.RTN_LOCAL
	gateway := gatewayOf(found)
	if !route.Local && !gateway.IsValid() {
		if route.Subnet, err = l.subnet(target); err != nil {
			return balancer.Route{}, false, err
		}
	}
	source, _ := netip.AddrFromSlice(found.Src)
	route.Source = source.Unmap()
	if !route.Source.IsValid() || l.isVIP(route.Source) {
		next := target
		if gateway.IsValid() {
			next = gateway
		}
		if route.Source, err = l.source(found.LinkIndex, next); err != nil {
			return balancer.Route{}, false, err
		}
	}
	return route, true, nil
}

// get asks for the route to target: resolved for it, or, with fib, as it stands
// in the table. It is not ok when the target cannot be reached.
func (l *lookup) get(target netip.Addr, fib bool) (route netlink.Route, ok bool, err error) {
	options := netlink.RouteGetOptions{FIBMatch: fib, Oif: target.Zone()}
	found, err := l.handle.RouteGetWithOptions(target.AsSlice(), &options)
	if err != nil {
		if unreachable(err) {
			err = nil
		}
		return netlink.Route{}, false, notGone(err)
	}
	if len(found) != 1 {
		return netlink.Route{}, false, fmt.Errorf("the kernel gave %d answers", len(found))
	}
	route = found[0]
	return route, route.Type == unix.RTN_UNICAST || route.Type == unix.RTN_LOCAL, nil
}

// unreachable recognises the errors by which the kernel says that no route
// leads there: none at all, one of type unreachable, prohibit or blackhole, or
// IPv6 switched off.
func unreachable(err error) bool {
	return slices.ContainsFunc([]error{
		unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EINVAL,
		unix.EAFNOSUPPORT, unix.EOPNOTSUPP,
	}, func(e error) bool { return errors.Is(err, e) })
}

// notGone is err, unless it says that an interface is no longer there.
func notGone(err error) error {
	if _, gone := errors.AsType[netlink.LinkNotFoundError](err); gone {
		return nil
	}
	return err
}

// gatewayOf is the next hop of a resolved route; the zero Addr when the
// destination is on the link.
func gatewayOf(r netlink.Route) netip.Addr {
	ip := r.Gw
	if via, ok := r.Via.(*netlink.Via); ok {
		ip = via.Addr // a next hop of the other family (RFC 5549)
	}
	gateway, _ := netip.AddrFromSlice(ip)
	return gateway.Unmap()
}

// subnet is the on-link prefix that target sits in. A host route and a default
// route without a gateway say nothing about neighbours: the zero Prefix.
func (l *lookup) subnet(target netip.Addr) (netip.Prefix, error) {
	entry, ok, err := l.get(target, true)
	if !ok || entry.Dst == nil {
		return netip.Prefix{}, err
	}
	addr, _ := netip.AddrFromSlice(entry.Dst.IP)
	bits, _ := entry.Dst.Mask.Size()
	p := netip.PrefixFrom(addr.Unmap(), bits)
	if !p.IsValid() || p.Bits() == 0 || p.IsSingleIP() {
		return netip.Prefix{}, nil
	}
	return p, nil
}

func (l *lookup) name(index int) (string, error) {
	if name, ok := l.names[index]; ok {
		return name, nil
	}
	link, err := l.handle.LinkByIndex(index)
	if err != nil {
		return "", err
	}
	l.names[index] = link.Attrs().Name
	return l.names[index], nil
}

// An address is one that a connection of ours may come from.
type address struct {
	prefix netip.Prefix
	index  int // of its interface
}

// source picks an address that is no VIP for packets that leave by the
// interface to the next hop: one in the next hop's subnet, another one of the
// interface, any other of the host. It is the zero Addr if there is none.
func (l *lookup) source(index int, next netip.Addr) (netip.Addr, error) {
	if err := l.list(); err != nil {
		return netip.Addr{}, err
	}
	return pick(l.own, index, next, l.isVIP), nil
}

func pick(own []address, index int, next netip.Addr, isVIP func(netip.Addr) bool) netip.Addr {
	var best netip.Addr
	bestRank := 0
	for _, a := range own {
		if a.prefix.Addr().Is4() != next.Is4() || isVIP(a.prefix.Addr()) {
			continue
		}
		rank := 1
		if a.index == index {
			rank = 2
			if a.prefix.Contains(next.WithZone("")) {
				rank = 3
			}
		}
		if rank > bestRank {
			best, bestRank = a.prefix.Addr(), rank
		}
	}
	return best
}

// unusable are the flags of IPv6 addresses that the kernel would not choose
// either, or that do not last.
const unusable = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED | unix.IFA_F_DEPRECATED | unix.IFA_F_TEMPORARY

// listTries bounds how often a list is read again because it changed while it
// was read.
const listTries = 10

// list reads the host's global addresses, once.
func (l *lookup) list() error {
	if l.listed {
		return nil
	}
	all, err := steady(func() ([]netlink.Addr, error) { return l.handle.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range all {
		ip, _ := netip.AddrFromSlice(a.IP)
		ip = ip.Unmap()
		bits, _ := a.Mask.Size()
		// In IPv4 the flag of temporary addresses means secondary.
		if !ip.IsValid() || a.Scope != unix.RT_SCOPE_UNIVERSE || ip.Is6() && a.Flags&unusable != 0 {
			continue
		}
		l.own = append(l.own, address{prefix: netip.PrefixFrom(ip, bits), index: a.LinkIndex})
	}
	l.listed = true
	return nil
}

// steady repeats a dump until nothing changed while it was read.
func steady[T any](dump func() ([]T, error)) ([]T, error) {
	var (
		all []T
		err error
	)
	for range listTries {
		if all, err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
	return nil, err
}
