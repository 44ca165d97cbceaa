package balancer

import (
	"context"
	"errors"
	"net/netip"
	"slices"
)

// A Part makes one kernel interface hold what a Desired asks for.
//
// Plan reads what is installed, never remembers it, and reports only what we
// own. A nil Desired asks for nothing at all: everything of ours goes. Apply is
// safe to repeat; after an error the caller plans afresh. Neither is called by
// two goroutines at once.
type Part interface {
	// Name is a short noun for logs and errors, such as "nftables".
	Name() string
	Plan(ctx context.Context, want *Desired) (Plan, error)
	Apply(ctx context.Context, p Plan) error
}

// A Sparable is a Part that talks to a process, which may be slow or gone. What the
// kernel does alone must not wait for that.
type Sparable interface {
	Part
	// Spared reports whether the Parts after this one can do without it, whatever
	// became of it: what they rely on is there. It asks nobody who may be slow.
	Spared(want *Desired) bool
	// Hasty is the same Part, which fails soon where it is spared. What it asked for
	// may come true later.
	Hasty() Part
}

// A TableIgnorer is a Part to which the Table means nothing. A pass that looks at
// nothing anew, as after a verdict, leaves it alone: what others do to it is
// watched for.
type TableIgnorer interface{ IgnoresTable() }

// A Keeper is a Part that has something to write down for a restart. Keep is called
// some time after what was applied, beside the other methods and never twice at
// once, and again after an error. It may take as long as a disk does.
type Keeper interface{ Keep() error }

// ErrOvertaken is wrapped by an Apply whose Plan no longer fits, because
// somebody else changed the kernel in between. Nothing was changed by it.
var ErrOvertaken = errors.New("somebody else was faster")

// A Watcher is a Part that can tell when the kernel's side changed under it.
// Watch calls changed for each change that was not the Part's own, or may not
// have been, and returns when ctx ends (nil) or the kernel cannot tell (error).
type Watcher interface {
	Watch(ctx context.Context, changed func()) error
}

// A Plan is an ordered list of changes, in the words of the kernel's own tool.
type Plan interface {
	// Empty reports that there is nothing to change.
	Empty() bool
	// Lines says each change as a command a reader could have typed, without a
	// line break.
	Lines() []string
}

// Desired is everything that should hold in the kernel.
type Desired struct {
	Table *Table
	// Bound are the VIPs with an interface, sorted by address.
	Bound []VIP
	// Forwarding says which families need IP forwarding.
	Forwarding4, Forwarding6 bool
	// Egress lists the interfaces that lead to targets, sorted.
	Egress []string
}

// sameBesideTable reports whether two differ in their Table alone; either may be nil.
func (d *Desired) sameBesideTable(o *Desired) bool {
	return d != nil && o != nil && slices.Equal(d.Bound, o.Bound) && slices.Equal(d.Egress, o.Egress) &&
		d.Forwarding4 == o.Forwarding4 && d.Forwarding6 == o.Forwarding6
}

// A Route is how the host would reach a target.
type Route struct {
	// Source is the address the kernel would use towards it, or, when that is
	// a VIP, another address of the same interface; the zero Addr when none.
	Source    netip.Addr
	Interface string
	// Subnet is the directly connected prefix the target sits in; the zero
	// Prefix when it is reached through a gateway.
	Subnet netip.Prefix
	// Local says that the target is an address of this host.
	Local bool
}

// A Router answers how the host would reach addresses. An address without a
// route is absent from the answer. isVIP tells which sources may not be used.
type Router interface {
	Routes(ctx context.Context, targets []netip.Addr, isVIP func(netip.Addr) bool) (map[netip.Addr]Route, error)
	// Links lists the Ethernet-like interfaces that IP packets come and go by.
	Links(ctx context.Context) ([]string, error)
}
