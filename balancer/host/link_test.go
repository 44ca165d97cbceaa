package host

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
)

func TestLinkNames(t *testing.T) {
	link := func(l netlink.Link, index, master int, encap string) netlink.Link {
		a := l.Attrs()
		a.Name, a.Index, a.MasterIndex, a.EncapType = fmt.Sprint(l.Type(), index), index, master, encap
		return l
	}
	got := linkNames([]netlink.Link{
		link(&netlink.Device{}, 1, 0, "loopback"),
		link(&netlink.Bridge{}, 2, 0, "ether"), link(&netlink.Veth{}, 3, 2, "ether"),
		link(&netlink.Vrf{}, 4, 0, "ether"), link(&netlink.Veth{}, 5, 4, "ether"),
		link(&netlink.Vlan{}, 6, 0, "ether"), link(&netlink.Wireguard{}, 7, 0, "none"),
		link(&netlink.Bond{}, 8, 0, "ether"), link(&netlink.Device{}, 9, 8, "ether"),
	})
	if diff := cmp.Diff([]string{"bond8", "bridge2", "veth5", "vlan6", "vrf4"}, got); diff != "" {
		t.Error(diff)
	}
}
