package balancer

import (
	"net/netip"
	"time"
)

// A Table is what a dataplane should hold. It is sorted, comparable and
// printable, says state and not steps, and speaks the language of the kernel's
// balancers (ipvsadm(8)): virtual services and destinations.
type Table struct {
	// Key keys every hash, so that a client cannot aim at a destination and
	// balancers with the same key agree.
	Key HashKey
	// VIPs are guarded: what no service wants is dropped there.
	VIPs []netip.Addr
	// Sources is the SNAT pool. Where a family has none, each Destination
	// brings its own.
	Sources  []netip.Addr
	Services []VirtualService
	Pools    []Pool
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
	// Allow holds the client prefixes of the service's family. Empty means
	// nobody, a zero-length prefix everybody.
	Allow []netip.Prefix
	// Pools are chosen from by weight; Sticky chooses by the client's address.
	Pools  []WeightedPool
	Sticky bool
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
	// Terminate says that its TCP flows are being ended: whatever either end
	// sends is answered with a reset. Weight is 0 then.
	Terminate bool
	// Domain is what counts as the destination's own host: sorted, not
	// overlapping, and never without its own address.
	Domain []netip.Prefix
	// Source is the SNAT source towards it when Table.Sources has none of its
	// family; the zero Addr when no usable one is known.
	Source netip.Addr
}

// AddrPort is where the destination listens.
func (d Destination) AddrPort() netip.AddrPort { return netip.AddrPortFrom(d.Address, d.Port) }
