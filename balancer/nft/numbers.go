package nft

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
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
	// last is the number given last, 0 before the first. A file keeps it.
	last uint16
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
	highest := uint16(0)
	for _, name := range slices.Sorted(maps.Keys(have.Chains)) {
		num, key, ok := parseTargetChain(have.Chains[name])
		if !ok {
			continue
		}
		_, known := n.byKey[key]
		_, taken := n.byNum[num]
		if !known && !taken {
			n.set(key, num)
			highest = max(highest, num)
		}
	}
	if behind(n.last, highest) {
		n.last = highest
	}
	return n
}

// behind reports whether a number that is installed was given after the one that
// is thought to be the last. The numbers start again from 1 at some time, so one
// more than half of them ahead was given before (as in RFC 1982).
func behind(last, installed uint16) bool {
	return installed > last && (last == 0 || installed-last <= maxTargets/2)
}

// of lists the numbers of a pool's destinations.
func (n *numbers) of(p *balancer.Pool) []uint16 {
	nums := make([]uint16, len(p.Destinations))
	for i := range p.Destinations {
		nums[i] = n.byKey[balancer.TargetKey{Group: p.Name, AddrPort: p.Destinations[i].AddrPort()}]
	}
	return nums
}

// has reports whether all of the keys have a number.
func (n *numbers) has(keys []balancer.TargetKey) bool {
	return !slices.ContainsFunc(keys, func(k balancer.TargetKey) bool { _, ok := n.byKey[k]; return !ok })
}

// assign returns numbers for exactly the given keys, which differ: those that had
// one keep it.
func (n *numbers) assign(keys []balancer.TargetKey) (*numbers, error) {
	if len(keys) > maxTargets {
		return nil, fmt.Errorf("%d targets are more than the %d that fit the conntrack mark", len(keys), maxTargets)
	}
	if len(keys) == len(n.byKey) && n.has(keys) {
		return n, nil
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
		if _, taken := n.byNum[n.last]; !taken && n.last != 0 && n.last <= maxTargets {
			return n.last
		}
	}
}

// A target's chain carries its number in the name and its identity in the
// comment, which is where a restart finds both.
func targetChainName(num uint16, group string) string {
	return "t" + strconv.Itoa(int(num)) + "." + group
}

func sendChainName(num uint16, group string) string { return fmt.Sprintf("send%d.%s", num, group) }

func targetChainComment(k balancer.TargetKey) string { return k.Group + " " + k.AddrPort.String() }

func parseTargetChain(c *Chain) (num uint16, k balancer.TargetKey, ok bool) {
	digits, group, found := strings.Cut(strings.TrimPrefix(c.Name, "t"), ".")
	if !found || !strings.HasPrefix(c.Name, "t") {
		return 0, k, false
	}
	v, err := strconv.ParseUint(digits, 10, 16)
	g, addr, found := strings.Cut(c.Comment, " ")
	if err != nil || v == 0 || v > maxTargets || !found || g != group {
		return 0, k, false
	}
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return 0, k, false
	}
	return uint16(v), balancer.TargetKey{Group: g, AddrPort: ap}, true
}

// lastFile, in the state folder, has the number given last. Without it, a restart
// would give out again what targets had that are gone, and the flows that they
// left behind would be taken for those of others.
const lastFile = "numbers.last"

// readLast reads lastFile; 0 stands for none.
func readLast(dir string) (uint16, error) {
	if dir == "" {
		return 0, nil
	}
	path := filepath.Join(dir, lastFile)
	content, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	last, err := strconv.ParseUint(strings.TrimSuffix(string(content), "\n"), 10, 16)
	if err == nil && last == 0 {
		err = errors.New("0 is no number")
	}
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return uint16(last), nil
}

func writeLast(dir string, last uint16) error {
	return balancer.WriteStateFile(dir, lastFile, fmt.Appendf(nil, "%d\n", last))
}
