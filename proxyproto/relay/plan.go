package relay

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"nlb/balancer"
	"nlb/balancer/maglev"
)

// A plan is a balancer.Table as the loops use it. It is never changed once it
// is made; only the tallies of its targets are, each by its own loop.
type plan struct {
	key      balancer.HashKey
	base     int
	services map[netip.AddrPort]*service
	pools    map[string]*pool
	targets  map[balancer.TargetKey]*target
	// terminated has the targets whose connections are to be reset.
	terminated map[balancer.TargetKey]bool
	// kept has those targets that are not in the table, and have connections.
	kept map[balancer.TargetKey]bool
	// sources are the addresses to dial from, by family.
	sources [2][]netip.Addr
}

// A service is a virtual service of the table.
type service struct {
	vip      netip.AddrPort
	idle     time.Duration
	allow    []netip.Prefix // aggregated
	allowAll bool
	sticky   bool
	shares   []share
	total    uint32 // of the weights
	seed     uint32
}

// A share is a pool's part of the group hashes: those below end that are no
// earlier share's.
type share struct {
	end  uint32
	pool *pool
}

// A pool is a target group. Its destinations are looked up by family, as the
// kernel's maps are.
type pool struct {
	name     string
	relayed  bool // some destination is
	sticky   bool
	seed     uint32
	spare    uint32 // the seed for the spare slots
	header   balancer.ProxyProtocol
	families [2]*family
	// manners are by loop, and outlive plans.
	manners []manners
}

// Manners say who speaks first on a pool's connections, the client or the
// target. The zero value expects it of the client.
type manners struct {
	// serverFirst is how many connections in a row would have to begin with the
	// client to forget that one began with the target.
	serverFirst uint8
}

// remember is how long one connection is remembered on which the target spoke
// first.
const remember = 100

func (m *manners) heard(server bool) {
	switch {
	case server:
		m.serverFirst = remember
	case m.serverFirst > 0:
		m.serverFirst--
	}
}

// A family has the destinations of a pool that share an address family.
type family struct {
	entries      []maglev.Entry
	destinations []destination
	slots        []int32        // nil when no destination takes new connections
	takers       []maglev.Entry // the entries by what they take
	spare        []int32        // dealt among them
	usable       int            // relayed destinations with a weight
}

// A destination is a target with what dialing needs.
type destination struct {
	target *target
	weight int
	// relayed is false for one that the kernel sends its share to, in a pool
	// that is relayed in part.
	relayed bool
	source  netip.Addr // to dial from when the plan has no sources of the family
}

// A target outlives plans, so that its counters do.
type target struct {
	key     balancer.TargetKey
	tallies []tally // by loop
}

// A tally is what one loop counted for a target. It fills a cache line: loops
// would slow each other down otherwise.
type tally struct {
	active, dialed, bytes, failed, answered uint64
	_                                       [24]byte
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// compile makes a plan of a table for so many loops. What old has in common with
// it is kept: the targets with their counters, and slots that nothing changed.
func compile(t *balancer.Table, old *plan, loops int) (*plan, error) {
	p := &plan{
		key: t.Key, base: maglev.BaseFor(len(t.Pools)),
		services: make(map[netip.AddrPort]*service, len(t.Services)),
		pools:    make(map[string]*pool, len(t.Pools)),
		targets:  make(map[balancer.TargetKey]*target),

		terminated: make(map[balancer.TargetKey]bool),
		kept:       make(map[balancer.TargetKey]bool),
	}
	for _, a := range t.Sources {
		p.sources[familyOf(a)] = append(p.sources[familyOf(a)], a)
	}
	for i := range t.Pools {
		p.addPool(&t.Pools[i], old, loops)
	}
	for i := range t.Services {
		s := &t.Services[i]
		if !slices.Contains(s.Protocols, balancer.ProtoTCP) {
			return nil, fmt.Errorf("service %q: only TCP can be relayed", s.Name)
		}
		if err := p.addService(s); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func (p *plan) addService(vs *balancer.VirtualService) error {
	s := &service{
		vip: netip.AddrPortFrom(vs.Address, vs.Port), idle: vs.IdleTimeout, sticky: vs.Sticky,
		allow: vs.Allow, seed: maglev.Seed(p.key, maglev.SeedGroup),
	}
	if p.services[s.vip] != nil {
		return fmt.Errorf("service %q: another one is at %s too", vs.Name, s.vip)
	}
	s.allowAll = len(s.allow) > 0 && s.allow[0].Bits() == 0
	for _, w := range vs.Pools {
		if w.Weight == 0 {
			continue
		}
		in := p.pools[w.Pool]
		if in == nil {
			return fmt.Errorf("service %q: there is no pool %q", vs.Name, w.Pool)
		}
		s.total += uint32(w.Weight)
		s.shares = append(s.shares, share{end: s.total, pool: in})
	}
	p.services[s.vip] = s
	return nil
}

func (p *plan) addPool(bp *balancer.Pool, old *plan, loops int) {
	in := &pool{
		name: bp.Name, relayed: bp.Relays(), sticky: bp.Sticky,
		seed: maglev.Seed(p.key, maglev.SeedTarget), spare: maglev.Seed(p.key, maglev.SeedSpare), header: bp.ProxyProtocol,
	}
	in.families = [2]*family{{}, {}}
	in.manners = old.manners(bp.Name, loops)
	for i := range bp.Destinations {
		d := &bp.Destinations[i]
		key := balancer.TargetKey{Group: bp.Name, AddrPort: d.AddrPort()}
		to := old.target(key, loops)
		p.targets[key] = to
		if d.Terminate {
			p.terminated[key] = true
		}
		f := in.families[familyOf(d.Address)]
		f.entries = append(f.entries, maglev.Entry{Name: d.AddrPort().String(), Weight: d.Dealt()})
		f.takers = append(f.takers, maglev.Entry{Name: d.AddrPort().String(), Weight: d.Weight})
		relayed := bp.ClientIPOf(d) == balancer.ProxyProtocolV2
		f.destinations = append(f.destinations, destination{target: to, weight: d.Weight, relayed: relayed, source: d.Source})
		if d.Weight > 0 && relayed {
			f.usable++
		}
	}
	if in.relayed {
		for i, f := range in.families {
			p.deal(f, old.family(bp.Name, i), old)
		}
	}
	p.pools[bp.Name] = in
}

// deal deals a family's slots, or takes them from the plan before when they would
// be the same: a table of thousands is not dealt anew because one target failed.
func (p *plan) deal(f, before *family, old *plan) {
	if f.usable == 0 {
		return
	}
	same := before != nil && before.slots != nil && old.key == p.key && old.base == p.base
	if same && slices.Equal(f.entries, before.entries) {
		f.slots = before.slots
	} else {
		f.slots = maglev.Build(p.key, p.base, maglev.Size(p.base, len(f.entries)), f.entries)
	}
	if same && slices.Equal(f.takers, before.takers) {
		f.spare = before.spare
	} else {
		spare := maglev.Spare(p.base)
		f.spare = maglev.Build(p.key, spare, maglev.SpareSize(spare, len(f.takers)), f.takers)
	}
}

// target returns the target of that key, a new one if the plan has none.
func (p *plan) target(key balancer.TargetKey, loops int) *target {
	if p != nil {
		if t := p.targets[key]; t != nil {
			return t
		}
	}
	return &target{key: key, tallies: make([]tally, loops)}
}

// manners are those of a pool that the plan has, or new ones.
func (p *plan) manners(pool string, loops int) []manners {
	if p != nil && p.pools[pool] != nil {
		return p.pools[pool].manners
	}
	return make([]manners, loops)
}

// ends reports whether the connections of a target are to be reset: it is being
// terminated. Those of a target that is not in the table any more go on, as flows
// of the kernel modes do.
func (p *plan) ends(t *target) bool { return p.terminated[t.key] }

// takes reports whether a target may get connections that were not promised to
// it yet.
func (p *plan) takes(t *target) bool {
	return p.targets[t.key] == t && !p.kept[t.key] && !p.terminated[t.key]
}

func (p *plan) family(pool string, i int) *family {
	if p == nil || p.pools[pool] == nil {
		return nil
	}
	return p.pools[pool].families[i]
}

// allows reports whether the service takes connections of the client.
func (s *service) allows(client netip.Addr) bool {
	if s.allowAll {
		return true
	}
	i, exact := slices.BinarySearchFunc(s.allow, client, func(p netip.Prefix, a netip.Addr) int { return p.Addr().Compare(a) })
	return exact || i > 0 && s.allow[i-1].Contains(client)
}

// choose returns the pool of a new connection and the hash that chooses among
// its destinations. There is no pool when the service has none, or none that is
// relayed.
//
// Hashes, their keys, their seeds and their scaling are those of the kernel
// modes: a listener may change between them and keep the targets of its clients.
func (s *service) choose(client netip.AddrPort) (*pool, aim) {
	var in *pool
	switch len(s.shares) {
	case 0:
		return nil, aim{}
	case 1:
		in = s.shares[0].pool
	default:
		in = s.share(maglev.Slot(s.flow(client).Hash(s.sticky, s.seed), int(s.total)))
	}
	if !in.relayed {
		return nil, aim{}
	}
	return in, s.aim(client, in)
}

// An aim is where a client's hash leads to.
type aim struct {
	hash  uint32
	spare bool // into the spare slots
}

// aim hashes the client again if its slot is that of a destination which takes no
// new connections.
func (s *service) aim(client netip.AddrPort, in *pool) aim {
	f, flow := in.family(s.vip.Addr()), s.flow(client)
	hash := flow.Hash(in.sticky, in.seed)
	if len(f.slots) == 0 || f.destinations[f.slots[maglev.Slot(hash, len(f.slots))]].weight > 0 {
		return aim{hash: hash}
	}
	return aim{hash: flow.Hash(in.sticky, in.spare), spare: true}
}

func (s *service) share(at int) *pool {
	for _, sh := range s.shares {
		if uint32(at) < sh.end {
			return sh.pool
		}
	}
	panic("relay: a group hash is beyond all shares")
}

func (s *service) flow(client netip.AddrPort) maglev.Flow {
	return maglev.Flow{Source: client, Destination: s.vip, Protocol: balancer.ProtoTCP}
}

// family returns the destinations for clients of a VIP: its own family's, or
// the other one's if none of those takes new connections.
func (p *pool) family(vip netip.Addr) *family {
	own := familyOf(vip)
	if f := p.families[own]; f.usable > 0 {
		return f
	}
	return p.families[1-own]
}

// next returns the destination of an aim that was not tried yet, looking from its
// own slot on; nil when there is none.
func (f *family) next(to aim, tried []*target) *destination {
	if f.usable <= len(tried) && !f.any(tried) || f.usable == 0 {
		return nil
	}
	slots := f.slots
	if to.spare {
		slots = f.spare
	}
	at := maglev.From(slots, to.hash, func(i int32) bool {
		d := &f.destinations[i]
		return d.relayed && d.weight > 0 && !slices.Contains(tried, d.target)
	})
	if at < 0 {
		return nil
	}
	return &f.destinations[at]
}

// any reports whether a destination that takes new connections was not tried.
// It spares a walk through all slots that would be in vain.
func (f *family) any(tried []*target) bool {
	return slices.ContainsFunc(f.destinations, func(d destination) bool {
		return d.weight > 0 && d.relayed && !slices.Contains(tried, d.target)
	})
}
