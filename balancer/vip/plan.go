package vip

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"nlb/balancer"
)

// An Address is an IP address on an interface.
type Address struct {
	// Prefix has the address itself and the length it is bound with. VIPs are
	// bound as host prefixes.
	Prefix    netip.Prefix
	Interface string
	// Ours says that it carries our mark.
	Ours bool
}

// A Plan is a list of addresses to add and, after that, to remove.
type Plan struct {
	Add, Remove []Address
}

// Empty reports that there is nothing to change.
func (p Plan) Empty() bool { return len(p.Add)+len(p.Remove) == 0 }

// Lines says the plan in the words of ip-address(8), iproute2 6.4 or later.
func (p Plan) Lines() []string {
	lines := make([]string, 0, len(p.Add)+len(p.Remove))
	for _, a := range p.Add {
		how := "scope host"
		if name := label(a); name != "" {
			how = "label " + name + " scope host"
		}
		if a.Prefix.Addr().Is6() {
			how = "preferred_lft 0 nodad noprefixroute"
		}
		lines = append(lines, fmt.Sprintf("ip addr add %s dev %s %s metric %d proto %#x",
			a.Prefix, a.Interface, how, Metric, Protocol))
	}
	for _, a := range p.Remove {
		lines = append(lines, fmt.Sprintf("ip addr del %s dev %s", a.Prefix, a.Interface))
	}
	return lines
}

// Diff says how the addresses have become the bound VIPs want. VIPs without an
// interface are none of our business.
//
// withdraw has what must go before the dataplane changes: addresses nobody
// wants any more. announce has what comes after it: additions, and removals of
// VIPs that moved to another interface, which stay where they are until they
// answer on the new one.
func Diff(have []Address, want []balancer.VIP) (withdraw, announce Plan) {
	wanted := map[netip.Addr]bool{}
	homes := map[balancer.VIP]bool{} // true once satisfied
	for _, v := range want {
		if v.Interface != "" {
			wanted[v.Address] = true
			homes[v] = false
		}
	}
	for _, h := range have {
		home := balancer.VIP{Address: h.Prefix.Addr(), Interface: h.Interface}
		switch _, here := homes[home]; {
		case here:
			homes[home] = true
		case !h.Ours:
		case wanted[home.Address]:
			announce.Remove = append(announce.Remove, h)
		default:
			withdraw.Remove = append(withdraw.Remove, h)
		}
	}
	for v, satisfied := range homes {
		if !satisfied {
			announce.Add = append(announce.Add, bound(v))
		}
	}
	for _, as := range [][]Address{withdraw.Remove, announce.Add, announce.Remove} {
		slices.SortFunc(as, compare)
	}
	return withdraw, announce
}

// bound is v as we bind it.
func bound(v balancer.VIP) Address {
	return Address{
		Prefix:    netip.PrefixFrom(v.Address, v.Address.BitLen()),
		Interface: v.Interface,
		Ours:      true,
	}
}

// label names an IPv4 address as an alias of its interface, if the kernel has
// room for it (IFNAMSIZ, with the zero at its end). Addresses of scope host come
// first in the kernel's list, and SIOCGIFADDR, which is all that old programs
// know, takes the first one with the plain name of the interface.
func label(a Address) string {
	name := a.Interface + ":nlb"
	if a.Prefix.Addr().Is6() || len(name) >= unix.IFNAMSIZ {
		return ""
	}
	return name
}

func compare(a, b Address) int {
	return cmp.Or(a.Prefix.Compare(b.Prefix), cmp.Compare(a.Interface, b.Interface))
}
