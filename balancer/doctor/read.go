package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"nlb/balancer"
)

// tries bounds how often a list is read again because it changed while it was
// read.
const tries = 10

// Read gathers Facts in the network namespace of the calling thread. It reads
// only. Chains of the table inet ours are left out on a balancer. Flows are
// the caller's to add, and Duplicates those of [Probe].
func Read(ctx context.Context, q Question, ours string) (*Facts, error) {
	// A namespace is a thread's, and a goroutine may change threads.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	f := &Facts{Question: q}
	for _, step := range []func() error{
		f.readKernel, f.readSysctls, f.readLinks, f.readDefaults, f.readRoutes,
		func() error { return f.readChains(ours) },
	} {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := step(); err != nil {
			return nil, err
		}
	}
	return f, nil
}

func (f *Facts) readKernel() error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	f.Kernel = unix.ByteSliceToString(u.Release[:])
	// Of this thread: a process has the namespace of its first one.
	_, err := os.Stat("/proc/thread-self/net/ip_vs")
	f.IPVS = err == nil
	for _, program := range []string{"ip", "ip6"} {
		names, err := os.ReadFile("/proc/thread-self/net/" + program + "_tables_names")
		if err != nil {
			continue // this kernel has none
		}
		for _, name := range strings.Fields(string(names)) {
			f.LegacyTables = append(f.LegacyTables, program+"tables "+name)
		}
	}
	return nil
}

func (f *Facts) readSysctls() error {
	f.Sysctls = map[string]string{}
	for _, key := range hostKeys {
		if err := f.readSysctl(key); err != nil {
			return err
		}
	}
	for family, names := range confKeys {
		interfaces, err := os.ReadDir(filepath.Join("/proc/sys/net", family, "conf"))
		if errors.Is(err, fs.ErrNotExist) {
			continue // IPv6 is not in this kernel
		}
		if err != nil {
			return fmt.Errorf("list the interfaces' settings: %w", err)
		}
		for _, i := range interfaces {
			for _, name := range names {
				if err := f.readSysctl("net/" + family + "/conf/" + i.Name() + "/" + name); err != nil {
					return err
				}
			}
		}
	}
	_, f.Conntrack = f.Sysctls[keyCTMax]
	return nil
}

// readSysctl does not mind one that this kernel has not, or that went with its
// interface meanwhile.
func (f *Facts) readSysctl(key string) error {
	b, err := os.ReadFile(filepath.Join("/proc/sys", key))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read %s: %w", dotted(key), err)
	}
	f.Sysctls[key] = strings.TrimSpace(string(b))
	return nil
}

func (f *Facts) readLinks() error {
	links, err := steady(netlink.LinkList)
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	addresses, err := steady(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	for _, link := range links {
		a := link.Attrs()
		l := Link{
			Name: a.Name, Index: a.Index, MTU: a.MTU, Up: a.RawFlags&unix.IFF_UP != 0, Loopback: a.RawFlags&unix.IFF_LOOPBACK != 0,
			HardwareAddr: a.HardwareAddr.String(),
		}
		if link.Type() != "device" {
			l.Kind = link.Type()
		}
		for _, address := range addresses {
			if address.LinkIndex == a.Index {
				l.Addresses = append(l.Addresses, prefixOf(address.IPNet.IP, address.IPNet.Mask))
			}
		}
		f.Links = append(f.Links, l)
	}
	return nil
}

func prefixOf(ip, mask []byte) netip.Prefix {
	a, _ := netip.AddrFromSlice(ip)
	bits := 0
	for _, b := range mask {
		for ; b != 0; b <<= 1 {
			bits++
		}
	}
	return netip.PrefixFrom(a.Unmap(), bits)
}

func (f *Facts) linkName(index int) string {
	for _, l := range f.Links {
		if l.Index == index {
			return l.Name
		}
	}
	return ""
}

func (f *Facts) readDefaults() error {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := steady(func() ([]netlink.Route, error) { return netlink.RouteList(nil, family) })
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			if r.Dst != nil {
				if bits, _ := r.Dst.Mask.Size(); bits != 0 {
					continue
				}
			}
			indexes := []int{r.LinkIndex}
			for _, hop := range r.MultiPath {
				indexes = append(indexes, hop.LinkIndex)
			}
			for _, index := range indexes {
				if name := f.linkName(index); name != "" && r.Type == unix.RTN_UNICAST {
					f.Defaults = append(f.Defaults, DefaultRoute{
						IPv6: family == netlink.FAMILY_V6, Interface: name, Advertised: r.Protocol == unix.RTPROT_RA,
					})
				}
			}
		}
	}
	return nil
}

func (f *Facts) readRoutes() error {
	to := slices.Clone(f.Balancers)
	if f.Role == Balancer && f.Spec != nil {
		to = balancer.RoutedAddrs(f.Spec, nil)
	}
	for _, a := range to {
		r, err := f.route(a, netip.Addr{})
		if err != nil {
			return err
		}
		f.Routes = append(f.Routes, r)
	}
	slices.SortFunc(f.Routes, compareRoutes)
	if f.Role == Target {
		return f.readReturns()
	}
	return nil
}

// readReturns asks for the way of this target's replies to clients: with the
// address as source that the balancer knows it by.
func (f *Facts) readReturns() error {
	for _, r := range f.Routes {
		c, ok := f.client(r.To.Is6())
		if !ok || !r.Reachable || !r.Source.IsValid() {
			continue
		}
		back, err := f.route(c, r.Source)
		if err != nil {
			return err
		}
		f.Returns = append(f.Returns, back)
	}
	slices.SortFunc(f.Returns, compareRoutes)
	f.Returns = slices.Compact(f.Returns)
	return nil
}

func (f *Facts) route(to, from netip.Addr) (Route, error) {
	answer := Route{To: to, From: from}
	options := netlink.RouteGetOptions{Oif: to.Zone()}
	if from.IsValid() {
		options.SrcAddr = from.AsSlice()
	}
	routes, err := netlink.RouteGetWithOptions(to.AsSlice(), &options)
	if err != nil || len(routes) != 1 {
		if err == nil || noRoute(err) {
			return answer, nil
		}
		return Route{}, fmt.Errorf("route to %s: %w", to, err)
	}
	r := routes[0]
	answer.Local = r.Type == unix.RTN_LOCAL
	answer.Reachable = answer.Local || r.Type == unix.RTN_UNICAST
	answer.Interface = f.linkName(r.LinkIndex)
	source, _ := netip.AddrFromSlice(r.Src)
	answer.Source = source.Unmap()
	gateway := r.Gw
	if via, ok := r.Via.(*netlink.Via); ok {
		gateway = via.Addr // a next hop of the other family (RFC 5549)
	}
	next, _ := netip.AddrFromSlice(gateway)
	answer.Gateway = next.Unmap()
	return answer, nil
}

// noRoute recognises the errors by which the kernel says that no route leads
// there: none at all, one of type unreachable, prohibit or blackhole, or a
// family that is switched off.
func noRoute(err error) bool {
	return slices.ContainsFunc([]error{
		unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EINVAL, unix.EAFNOSUPPORT, unix.EOPNOTSUPP,
	}, func(e error) bool { return errors.Is(err, e) })
}

// readChains reads all rules but ours. A kernel without nf_tables has none.
func (f *Facts) readChains(ours string) error {
	chains, err := nfTables(unix.NFT_MSG_GETCHAIN, unix.NFPROTO_UNSPEC)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil
	}
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("list chains: %w (needs CAP_NET_ADMIN)", err)
	}
	if err != nil {
		return fmt.Errorf("list chains: %w", err)
	}
	f.NFTables = true
	for _, m := range chains {
		c, ok := decodeChain(m)
		if ok && !(f.Role == Balancer && c.Family == "inet" && c.Table == ours) {
			f.Chains = append(f.Chains, c)
		}
	}
	if len(f.Chains) == 0 {
		return nil // ours may have many rules
	}
	rules, err := nfTables(unix.NFT_MSG_GETRULE, unix.NFPROTO_UNSPEC)
	if err != nil {
		return fmt.Errorf("list rules: %w", err)
	}
	in := rulesetOf(f.Chains)
	for _, m := range rules {
		chain, r, ok := decodeRule(m)
		if c := in[chain.key()]; ok && c != nil {
			c.Rules = append(c.Rules, r)
		}
	}
	return f.readSets()
}

// nfTables dumps one kind of object, of all families or one.
func nfTables(typ int, family uint8) ([][]byte, error) {
	return steady(func() (all [][]byte, err error) {
		err = nfTablesEach(typ, family, func(m []byte) bool {
			all = append(all, m)
			return true
		})
		return all, err
	})
}

// nfTablesEach calls f with each message of a dump, until f says no. Which has
// the names of what is dumped.
func nfTablesEach(typ int, family uint8, f func([]byte) bool, which ...*nl.RtAttr) error {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|typ, unix.NLM_F_DUMP)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: unix.NFNETLINK_V0})
	for _, a := range which {
		req.AddData(a)
	}
	return req.ExecuteIter(unix.NETLINK_NETFILTER, 0, f)
}

// steady repeats a dump until nothing changed while it was read.
func steady[T any](dump func() ([]T, error)) (all []T, err error) {
	err = again(func() error {
		all, err = dump()
		return err
	})
	return all, err
}

func again(dump func() error) (err error) {
	for range tries {
		if err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return err
		}
	}
	return err
}
