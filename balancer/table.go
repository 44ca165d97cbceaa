package balancer

import (
	"cmp"
	"net/netip"
	"slices"
	"time"
)

// A Table is what a dataplane should hold. It is sorted, comparable and
// printable, says state and not steps, and speaks the language of the kernel's
// balancers (ipvsadm(8)): virtual services and destinations.
type Table struct {
	// Dataplane chooses among the Destinations.
	Dataplane Dataplane
	// Key keys every hash, so that a client cannot aim at a destination and
	// balancers with the same key agree.
	Key HashKey
	// VIPs are guarded: what no service wants is dropped there.
	VIPs []netip.Addr
	// Sources is the SNAT pool. Where a family has none, each Destination
	// brings its own.
	Sources []netip.Addr
	// UntrackedRelay keeps the connections of services that are relayed only,
	// and those of the relay to its destinations, out of connection tracking.
	UntrackedRelay bool
	// FastPath has the interfaces, sorted, between which established flows go past
	// the packet filter. Without any, all packets pass it.
	FastPath []string
	Services []VirtualService
	Pools    []Pool
}

// PoolsByName finds the Pools that services name. They are t's own.
func (t *Table) PoolsByName() map[string]*Pool {
	pools := make(map[string]*Pool, len(t.Pools))
	for i := range t.Pools {
		pools[t.Pools[i].Name] = &t.Pools[i]
	}
	return pools
}

// A HashKey is random per installation and survives restarts.
type HashKey [16]byte

// A VirtualService is what one listener answers: an address, a port and one or
// two IP protocols.
type VirtualService struct {
	Name        string
	Address     netip.Addr
	Protocols   []uint8 // IP protocol numbers, ascending
	Port        uint16
	IdleTimeout time.Duration // of established TCP flows
	// Allow holds the client prefixes of the service's family, aggregated (see
	// Aggregate). Empty means nobody, a zero-length prefix everybody.
	Allow []netip.Prefix
	// Pools are chosen from by weight; Sticky chooses by the client's address.
	Pools  []WeightedPool
	Sticky bool
	// SYNProxy and SourceLimit are off in their zero values. The former is of the
	// service's TCP flows, the latter of all.
	SYNProxy    SYNProxy    `json:",omitzero"`
	SourceLimit SourceLimit `json:",omitzero"`
}

// A WeightedPool is one choice of a VirtualService.
type WeightedPool struct {
	Pool   string
	Weight int
}

// A Pool is a set of destinations that are treated alike. It may hold both
// families; a service only uses those of its own.
type Pool struct {
	Name      string
	Protocols []uint8 // IP protocol numbers of its flows, ascending
	ClientIP  ClientIP
	AvoidSelf bool
	Sticky    bool
	// ProxyProtocol has what the headers of relayed connections carry besides
	// the addresses.
	ProxyProtocol ProxyProtocol
	// Observed says that the Outcomes of its TCP flows are counted.
	Observed bool
	// Destinations may have weight 0: they have flows, and get no more.
	Destinations []Destination
}

// A Destination is where a flow may go.
type Destination struct {
	Address netip.Addr
	Port    uint16
	// Weight is the share of new flows; 0 quiesces.
	Weight int
	// Kept is the weight by which a destination without a Weight keeps its hashes:
	// it is only its health that is against it, and whose hash leads to it draws
	// again, see maglev.Spare. So a verdict moves nobody else's.
	Kept int `json:",omitzero"`
	// ClientIP is its own, if it is not the Pool's.
	ClientIP ClientIP `json:",omitzero"`
	// Terminate says that its TCP flows are being ended: whatever either end
	// sends is answered with a reset. Weight is 0 then.
	Terminate bool
	// Leaves says that its UDP flows do not wait for a deadline: their next
	// packets choose anew.
	Leaves bool
	// Domain is what counts as the destination's own host: sorted, not
	// overlapping, and never without its own address.
	Domain []netip.Prefix
	// Source is the SNAT source towards it when Table.Sources has none of its
	// family; the zero Addr when no usable one is known.
	Source netip.Addr
}

// Same reports whether both are alike in all that there is of them. Each pass
// compares every destination with the pass before: reflection takes twenty times
// as long (BenchmarkSame), 2 ms for a thousand, several times in a pass.
func (p *Pool) Same(o *Pool) bool {
	return p.Name == o.Name && slices.Equal(p.Protocols, o.Protocols) && p.ClientIP == o.ClientIP &&
		p.AvoidSelf == o.AvoidSelf && p.Sticky == o.Sticky && p.ProxyProtocol == o.ProxyProtocol && p.Observed == o.Observed &&
		slices.EqualFunc(p.Destinations, o.Destinations, func(a, b Destination) bool { return a.same(&b) })
}

func (d *Destination) same(o *Destination) bool {
	return d.Address == o.Address && d.Port == o.Port && d.Weight == o.Weight && d.Kept == o.Kept && d.ClientIP == o.ClientIP &&
		d.Terminate == o.Terminate && d.Leaves == o.Leaves && slices.Equal(d.Domain, o.Domain) && d.Source == o.Source
}

// samePools reports whether both have the same Pools.
func (t *Table) samePools(o *Table) bool {
	return slices.EqualFunc(t.Pools, o.Pools, func(a, b Pool) bool { return a.Same(&b) })
}

// ClientIPOf is how the client's address travels to one of p's destinations.
func (p *Pool) ClientIPOf(d *Destination) ClientIP {
	return cmp.Or(d.ClientIP, p.ClientIP)
}

// Relays reports whether the relay makes connections to any of p's destinations.
func (p *Pool) Relays() bool {
	for i := range p.Destinations {
		if p.ClientIPOf(&p.Destinations[i]) == ProxyProtocolV2 {
			return true
		}
	}
	return p.ClientIP == ProxyProtocolV2
}

// OnlyRelays reports that nobody in the kernel need choose among the usable ones of
// p's destinations, given by their index: the relay takes them all.
func (p *Pool) OnlyRelays(usable []int) bool {
	return !slices.ContainsFunc(usable, func(i int) bool { return p.ClientIPOf(&p.Destinations[i]) != ProxyProtocolV2 })
}

// Usable lists which of p's destinations, by their index, the flows to a VIP of
// so many bits may go to. Those are of the VIP's family; but the relay, which
// makes another connection, takes the others where there are none.
func (p *Pool) Usable(bits int) (own []int) {
	var relayed []int
	for i := range p.Destinations {
		d := &p.Destinations[i]
		switch {
		case d.Address.BitLen() == bits:
			own = append(own, i)
		case p.ClientIPOf(d) == ProxyProtocolV2:
			relayed = append(relayed, i)
		}
	}
	if len(own) == 0 {
		return relayed
	}
	return own
}

// Dealt is the weight that hashes are dealt by.
func (d *Destination) Dealt() int { return cmp.Or(d.Weight, d.Kept) }

// AddrPort is where the destination listens.
func (d Destination) AddrPort() netip.AddrPort { return netip.AddrPortFrom(d.Address, d.Port) }

// SharesHost reports whether a client may be on the hosts of both destinations.
func (d *Destination) SharesHost(other *Destination) bool {
	return slices.ContainsFunc(d.Domain, func(p netip.Prefix) bool { return slices.ContainsFunc(other.Domain, p.Overlaps) })
}
