package ipvs

import (
	"cmp"
	"net/netip"
	"slices"

	"nlb/balancer"
)

// A serviceKey is what the kernel tells virtual services apart by.
type serviceKey struct {
	proto uint8 // IP protocol number
	at    netip.AddrPort
}

func (k serviceKey) compare(o serviceKey) int {
	return cmp.Or(k.at.Compare(o.at), cmp.Compare(k.proto, o.proto))
}

// Flags of a service (linux include/uapi/linux/ip_vs.h). The scheduler mh takes
// the first two of the scheduler's own.
const (
	flagFallback uint32 = 0x08 // mh-fallback: a flow of a quiesced destination goes to another
	flagPort     uint32 = 0x10 // mh-port: the client's port is part of the hash
	// flagHashed is the kernel's own, and shows in what is read back.
	flagHashed uint32 = 0x02
)

// scheduler is the one that agrees with other balancers and disturbs little when
// destinations change: Maglev hashing.
const scheduler = "mh"

// cookie marks our services, so that they are found when nothing else tells whose
// they are. It is in the field of the persistence timeout, which the kernel keeps
// and does not use without IP_VS_SVC_F_PERSISTENT: "nl" in ASCII, as seconds.
const cookie uint32 = 0x6e6c

// A service is a virtual service and its destinations, sorted by address.
type service struct {
	key          serviceKey
	scheduler    string
	flags        uint32 // without flagHashed
	cookie       uint32
	netmask      uint32 // as the kernel has it, see netmaskOf
	destinations []destination
}

// A destination is where a service sends flows to.
type destination struct {
	at netip.AddrPort
	// weight is the share of new flows; 0 quiesces.
	weight int
	// method is how packets get there: 0 rewrites them (masquerading).
	method uint32
	// upper and lower are the thresholds of connections, 0 for none.
	upper, lower uint32
	// active counts the established connections. It is only read.
	active int
}

// newService is a service of ours without destinations.
func newService(k serviceKey, sticky bool) service {
	flags := flagFallback | flagPort
	if sticky {
		flags = flagFallback
	}
	return service{key: k, scheduler: scheduler, flags: flags, cookie: cookie, netmask: netmaskOf(k.at.Addr())}
}

// netmaskOf is the persistence granularity of a service, which the kernel checks
// even where there is no persistence: a prefix length for IPv6 (0 is EINVAL), a
// mask for IPv4 (0 would make all clients one, if it counted).
func netmaskOf(a netip.Addr) uint32 {
	if a.Is4() {
		return 0xffffffff
	}
	return 128
}

// same reports whether two are configured alike, destinations apart.
func (s *service) same(o *service) bool {
	return s.key == o.key && s.scheduler == o.scheduler && s.flags == o.flags && s.cookie == o.cookie && s.netmask == o.netmask
}

// same reports whether two are configured alike.
func (d destination) same(o destination) bool {
	d.active, o.active = 0, 0
	return d == o
}

// find returns the destination at an address, or nil.
func (s *service) find(at netip.AddrPort) *destination {
	i, ok := slices.BinarySearchFunc(s.destinations, at, func(d destination, at netip.AddrPort) int {
		return d.at.Compare(at)
	})
	if !ok {
		return nil
	}
	return &s.destinations[i]
}

// usable reports whether a new flow finds a destination.
func (s *service) usable() bool {
	return slices.ContainsFunc(s.destinations, func(d destination) bool { return d.weight > 0 })
}

func (s *service) sort() {
	slices.SortFunc(s.destinations, func(a, b destination) int { return a.at.Compare(b.at) })
}

func findService(services []service, k serviceKey) *service {
	i, ok := slices.BinarySearchFunc(services, k, func(s service, k serviceKey) int { return s.key.compare(k) })
	if !ok {
		return nil
	}
	return &services[i]
}

func sortServices(services []service) {
	slices.SortFunc(services, func(a, b service) int { return a.key.compare(b.key) })
}

// ours tells our services: those on the VIPs of a Table, nil for none, and those
// with our cookie. All others are somebody's.
func ours(t *balancer.Table) func(k serviceKey, c uint32) bool {
	vips := make(map[netip.Addr]bool)
	if t != nil {
		for _, a := range t.VIPs {
			vips[a] = true
		}
	}
	return func(k serviceKey, c uint32) bool { return c == cookie || vips[k.at.Addr()] }
}
