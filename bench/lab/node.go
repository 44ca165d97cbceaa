package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A Node is a host of the lab: a network namespace.
type Node struct {
	Name string // within the lab, such as "t1"
	NS   string // of the namespace, as `ip netns` shows it
	// Addr4 and Addr6 are the addresses the node is known by, the first ones it
	// was wired with.
	Addr4, Addr6 netip.Addr

	// open guards space and nl: read-locked while they are used. A netlink
	// handle that is closed under a request would send it to the host.
	open  sync.RWMutex
	space netns.NsHandle
	nl    *netlink.Handle // nil when closed

	mu     sync.Mutex
	agents []*Agent // guarded by mu; the first is the one Agent returns
}

// baseline is what makes every node the same, whatever the host is set to: a new
// namespace inherits IPv4 settings from it (net.core.devconf_inherit_init_net).
// "default" is for the interfaces to come.
var baseline = []struct{ key, value string }{
	{"net.ipv4.ip_forward", "0"}, // first, as it resets others (ip-sysctl)
	{"net.ipv6.conf.all.forwarding", "0"},
	{"net.ipv4.conf.all.rp_filter", "0"},
	{"net.ipv4.conf.default.rp_filter", "0"},
	{"net.ipv4.conf.all.accept_local", "0"},
	{"net.ipv4.conf.default.accept_local", "0"},
	{"net.ipv4.conf.all.accept_redirects", "0"},
	{"net.ipv4.conf.default.accept_redirects", "0"},
	{"net.ipv4.conf.all.send_redirects", "0"},
	{"net.ipv4.conf.default.send_redirects", "0"},
	{"net.ipv6.conf.all.accept_redirects", "0"},
	{"net.ipv6.conf.default.accept_redirects", "0"},
	{"net.ipv6.conf.all.accept_dad", "0"},
	{"net.ipv6.conf.default.accept_dad", "0"},
	{"net.ipv6.conf.default.accept_ra", "0"},
	{"net.ipv6.conf.default.router_solicitations", "0"},
}

func newNode(name, ns string) (*Node, error) {
	n := &Node{Name: name, NS: ns, space: netns.None()}
	err := onThread(func() error {
		space, err := netns.NewNamed(ns)
		if err != nil {
			return err
		}
		n.space = space
		for _, s := range baseline {
			if err := writeSysctl(s.key, s.value); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		n.nl, err = netlink.NewHandleAt(n.space, unix.NETLINK_ROUTE)
	}
	if err == nil {
		err = n.up("lo")
	}
	if err != nil {
		return nil, errors.Join(err, removeNamespaces([]string{ns}), n.release())
	}
	return n, nil
}

// release closes what holds the namespace open.
func (n *Node) release() error {
	n.open.Lock()
	defer n.open.Unlock()
	if n.nl != nil {
		n.nl.Close()
		n.nl = nil
	}
	if n.space.IsOpen() {
		return n.space.Close()
	}
	return nil
}

// Do runs f on a thread that is in the node's namespace. Sockets and netlink
// handles that f opens stay in the namespace; goroutines that f starts are not
// in it. f must not call methods of the node: Close may be waiting for f.
func (n *Node) Do(f func() error) error {
	n.open.RLock()
	defer n.open.RUnlock()
	if !n.space.IsOpen() {
		return errClosed
	}
	return onThread(func() error {
		if err := netns.Set(n.space); err != nil {
			return fmt.Errorf("enter %s: %w", n.NS, err)
		}
		return f()
	})
}

// onThread runs f on a thread of its own and takes the thread back to the
// namespace it was in. A thread that cannot go back stays locked, and the
// runtime ends it with the goroutine.
func onThread(f func() error) error {
	result := make(chan error, 1)
	go func() {
		err := errors.New("the function did not return")
		defer func() { result <- err }()
		runtime.LockOSThread()
		home, e := netns.Get()
		if e != nil {
			err = e
			return
		}
		defer home.Close()
		err = f()
		if netns.Set(home) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return <-result
}

// Sysctl sets a kernel parameter of the node, such as net.ipv4.ip_forward. An
// interface's name within the key must not have a dot.
func (n *Node) Sysctl(key, value string) error {
	if err := n.Do(func() error { return writeSysctl(key, value) }); err != nil {
		return fmt.Errorf("lab: %s: %w", n.Name, err)
	}
	return nil
}

// writeSysctl sets a parameter of the namespace the calling thread is in:
// /proc/sys/net shows each thread its own.
func writeSysctl(key, value string) error {
	path := filepath.Join("/proc/sys", strings.ReplaceAll(key, ".", "/"))
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		return fmt.Errorf("sysctl %s=%s: %w", key, value, err)
	}
	return nil
}

// Command is exec.CommandContext for a program that runs on the node, in a
// process group of its own, with a /sys that shows the node. Close kills it if
// it still runs.
//
// The child is this binary at first, which enters the namespace and then
// executes the program: process id, signals and exit code are the program's.
// It exits with 127 if it gets no further.
func (n *Node) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	path, err := exec.LookPath(name)
	cmd := n.command(ctx, path, append([]string{name}, args...))
	if err != nil {
		cmd.Err = err
	}
	return cmd
}

func (n *Node) command(ctx context.Context, path string, argv []string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = append([]string{enterArg0, n.NS, path}, argv...)
	// A ^C at the terminal is for the lab's process, which decides.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// enter becomes the program argv in a namespace, and returns only on failure.
// args are the namespace's name, the program's path and its argv.
func enter(args []string) error {
	if len(args) < 3 {
		return errors.New("too few arguments")
	}
	name, path, argv := args[0], args[1], args[2:]
	// execve(2) keeps the namespaces of the thread that calls it.
	runtime.LockOSThread()
	space, err := netns.GetFromName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := netns.Set(space); err != nil {
		return fmt.Errorf("enter %s: %w", name, err)
	}
	if err := stillNamed(name, space); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("leave the host's mounts: %w", err)
	}
	// Slave: names removed on the host must not stay mounted in here.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("leave the host's mounts: %w", err)
	}
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return fmt.Errorf("mount the namespace's /sys: %w", err)
	}
	if err := syscall.Exec(path, argv, os.Environ()); err != nil {
		return fmt.Errorf("execute %s: %w", path, err)
	}
	return nil
}

// stillNamed fails if the namespace was removed while we entered it. From then
// on nobody would find us to end us; before, removeNamespaces does.
func stillNamed(name string, space netns.NsHandle) error {
	now, err := netns.GetFromName(name)
	if err != nil {
		return fmt.Errorf("find %s again: %w", name, err)
	}
	defer now.Close()
	if !now.Equal(space) {
		return fmt.Errorf("%s has been removed", name)
	}
	return nil
}

// Forward makes the node a router in both families.
func (n *Node) Forward() error {
	return errors.Join(n.Sysctl("net.ipv4.ip_forward", "1"), n.Sysctl("net.ipv6.conf.all.forwarding", "1"))
}

// Address adds an address to an interface of the node. The node becomes known
// by the first of each family.
func (n *Node) Address(iface string, p netip.Prefix) error {
	addr := &netlink.Addr{IPNet: ipNet(p)}
	known := &n.Addr4
	if p.Addr().Is6() {
		known = &n.Addr6
		addr.Flags = unix.IFA_F_NODAD // usable at once (RFC 4862, 5.4)
	}
	err := n.netlink(iface, func(h *netlink.Handle, l netlink.Link) error { return h.AddrAdd(l, addr) })
	if err != nil {
		return n.fail(fmt.Sprintf("ip addr add %s dev %s", p, iface), err)
	}
	if !known.IsValid() {
		*known = p.Addr()
	}
	return nil
}

// Route adds a route to dst through iface: to the router via, or, with a zero
// via, to neighbours on the link. The router counts as a neighbour even if no
// address of the node says so.
func (n *Node) Route(dst netip.Prefix, via netip.Addr, iface string) error {
	err := n.netlink(iface, func(h *netlink.Handle, l netlink.Link) error {
		r := &netlink.Route{Dst: ipNet(dst), LinkIndex: l.Attrs().Index, Scope: netlink.SCOPE_LINK}
		if via.IsValid() {
			r.Gw, r.Scope, r.Flags = via.AsSlice(), netlink.SCOPE_UNIVERSE, int(netlink.FLAG_ONLINK)
		}
		return h.RouteAdd(r)
	})
	if err != nil {
		return n.fail(fmt.Sprintf("ip route add %s via %s dev %s", dst, via, iface), err)
	}
	return nil
}

// Own makes every address of a prefix the node's own (ip route add local). It
// answers to them and may use them, but nobody hears of them: the neighbours need
// a route.
func (n *Node) Own(p netip.Prefix) error {
	err := n.netlink("lo", func(h *netlink.Handle, l netlink.Link) error {
		return h.RouteAdd(&netlink.Route{
			Dst: ipNet(p), LinkIndex: l.Attrs().Index,
			Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST,
		})
	})
	if err != nil {
		return n.fail(fmt.Sprintf("ip route add local %s dev lo", p), err)
	}
	return nil
}

// Unaddress takes an address off an interface of the node, the opposite of
// Address. What the node is known by stays.
func (n *Node) Unaddress(iface string, p netip.Prefix) error {
	err := n.netlink(iface, func(h *netlink.Handle, l netlink.Link) error {
		return h.AddrDel(l, &netlink.Addr{IPNet: ipNet(p)})
	})
	if err != nil {
		return n.fail(fmt.Sprintf("ip addr del %s dev %s", p, iface), err)
	}
	return nil
}

// RouteFrom sends what has the source src to the router via through iface,
// whatever the main table says: a policy rule and a table of its own
// (ip-rule(8)), whose number is 1-252.
func (n *Node) RouteFrom(src netip.Prefix, via netip.Addr, iface string, table int) error {
	rule := netlink.NewRule()
	rule.Src = ipNet(src)
	return n.routeBy(rule, "from "+src.String(), via, iface, table)
}

// RouteMark is RouteFrom for what has a packet mark.
func (n *Node) RouteMark(mark uint32, via netip.Addr, iface string, table int) error {
	rule := netlink.NewRule()
	rule.Mark = mark
	return n.routeBy(rule, fmt.Sprintf("fwmark %#x", mark), via, iface, table)
}

func (n *Node) routeBy(rule *netlink.Rule, selector string, via netip.Addr, iface string, table int) error {
	rule.Table, rule.Family = table, family(via)
	err := n.netlink(iface, func(h *netlink.Handle, l netlink.Link) error {
		everything := everywhere[0]
		if via.Is6() {
			everything = everywhere[1]
		}
		route := &netlink.Route{
			Dst: ipNet(everything), Gw: via.AsSlice(), LinkIndex: l.Attrs().Index,
			Table: table, Flags: int(netlink.FLAG_ONLINK),
		}
		if err := h.RouteAdd(route); err != nil {
			return err
		}
		return h.RuleAdd(rule)
	})
	if err != nil {
		return n.fail(fmt.Sprintf("ip route add default via %s dev %s table %d; ip rule add %s lookup %d", via, iface, table, selector, table), err)
	}
	return nil
}

func family(a netip.Addr) int {
	if a.Is6() {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

func (n *Node) up(iface string) error {
	err := n.netlink(iface, func(h *netlink.Handle, l netlink.Link) error { return h.LinkSetUp(l) })
	if err != nil {
		return n.fail("ip link set up "+iface, err)
	}
	return nil
}

// netlink calls f with the node's netlink handle and, unless iface is empty,
// that interface.
func (n *Node) netlink(iface string, f func(*netlink.Handle, netlink.Link) error) error {
	n.open.RLock()
	defer n.open.RUnlock()
	if n.nl == nil {
		return errClosed
	}
	if iface == "" {
		return f(n.nl, nil)
	}
	l, err := n.nl.LinkByName(iface)
	if err != nil {
		return err
	}
	return f(n.nl, l)
}

var errClosed = errors.New("the lab is closed")

func (n *Node) fail(what string, err error) error {
	return fmt.Errorf("lab: %s: %s: %w", n.Name, what, err)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
