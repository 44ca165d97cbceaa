package nft

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"nlb/balancer"
)

// numbers gives each target a number for the mark. Flows outlive rules, so a
// number is kept as long as its target is installed, is read back from the
// kernel after a restart, and after its target left is handed out again as late
// as possible. A numbers that a plan was made with is not modified.
type numbers struct {
	byKey map[balancer.TargetKey]uint16
	byNum map[uint16]balancer.TargetKey
	last  uint16
}

func newNumbers() *numbers {
	return &numbers{byKey: map[balancer.TargetKey]uint16{}, byNum: map[uint16]balancer.TargetKey{}}
}

func (n *numbers) clone() *numbers {
	return &numbers{byKey: maps.Clone(n.byKey), byNum: maps.Clone(n.byNum), last: n.last}
}

func (n *numbers) set(k balancer.TargetKey, num uint16) {
	n.byKey[k], n.byNum[num] = num, k
}

// adopt adds what the chains of an installed ruleset say, where it does not
// contradict what is known.
func (n *numbers) adopt(have *Ruleset) *numbers {
	if have == nil {
		return n
	}
	n = n.clone()
	for _, name := range slices.Sorted(maps.Keys(have.Chains)) {
		num, key, ok := parseTargetChain(have.Chains[name])
		if !ok {
			continue
		}
		_, known := n.byKey[key]
		_, taken := n.byNum[num]
		if !known && !taken {
			n.set(key, num)
			n.last = max(n.last, num)
		}
	}
	return n
}

// assign returns numbers for exactly the given keys: those that had one keep it.
func (n *numbers) assign(keys []balancer.TargetKey) (*numbers, error) {
	if len(keys) > maxTargets {
		return nil, fmt.Errorf("%d targets are more than the %d that fit the conntrack mark", len(keys), maxTargets)
	}
	out := &numbers{byKey: make(map[balancer.TargetKey]uint16, len(keys)), byNum: make(map[uint16]balancer.TargetKey, len(keys)), last: n.last}
	var fresh []balancer.TargetKey
	for _, k := range keys {
		if num, ok := n.byKey[k]; ok {
			out.set(k, num)
		} else {
			fresh = append(fresh, k)
		}
	}
	for _, k := range fresh {
		out.set(k, out.free())
	}
	return out, nil
}

// free is the next number after the last one given that nobody has. There is
// one: assign has counted.
func (n *numbers) free() uint16 {
	for {
		n.last++
		if _, taken := n.byNum[n.last]; !taken && n.last != 0 {
			return n.last
		}
	}
}

// A target's chain carries its number in the name and its identity in the
// comment, which is where a restart finds both.
func targetChainName(num uint16, group string) string { return fmt.Sprintf("t%d.%s", num, group) }

func sendChainName(num uint16, group string) string { return fmt.Sprintf("send%d.%s", num, group) }

func targetChainComment(k balancer.TargetKey) string { return k.Group + " " + k.AddrPort.String() }

func parseTargetChain(c *Chain) (num uint16, k balancer.TargetKey, ok bool) {
	digits, group, found := strings.Cut(strings.TrimPrefix(c.Name, "t"), ".")
	if !found || !strings.HasPrefix(c.Name, "t") {
		return 0, k, false
	}
	v, err := strconv.ParseUint(digits, 10, 16)
	g, addr, found := strings.Cut(c.Comment, " ")
	if err != nil || v == 0 || !found || g != group {
		return 0, k, false
	}
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return 0, k, false
	}
	return uint16(v), balancer.TargetKey{Group: g, AddrPort: ap}, true
}
