package ipvs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strconv"
	"time"

	"github.com/moby/ipvs"
	"github.com/sirupsen/logrus"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"nlb/balancer"
)

// Missing parts of the kernel. Plan and Probe wrap them.
var (
	ErrNoIPVS = errors.New("this kernel has no IPVS (module ip_vs): modprobe ip_vs, or use dataplane: nftables")

	ErrNoScheduler = errors.New("this kernel's IPVS has no scheduler mh (module ip_vs_mh): modprobe ip_vs_mh, or use dataplane: nftables")

	ErrNoConntrack = errors.New("this kernel's IPVS knows nothing of connection tracking (CONFIG_IP_VS_NFCT): use dataplane: nftables")
)

// A state is what was found in the kernel: services of ours, sorted, and the
// settings that there are.
type state struct {
	services []service
	settings map[string]int
}

// A kernel is IPVS as far as we use it. Its errors wrap errnos.
type kernel interface {
	// probe names what is missing.
	probe() error
	// observe reads the services that the function says are ours.
	observe(ours func(k serviceKey, cookie uint32) bool) (state, error)
	write(step) error
	close()
}

// A module is the kernel's IPVS in the network namespace of the process. It is
// not safe for concurrent use: replies to two that use one Handle get mixed up,
// and then both wait for ever.
type module struct {
	handle *ipvs.Handle // nil before the first use
	family uint16       // of generic netlink, that handle speaks
}

// present reports whether there is an IPVS to speak of. It looks for what each
// namespace has as soon as the module is there: to ask for the netlink family
// instead would run modprobe each time.
func (m *module) present() bool {
	_, err := os.Stat("/proc/net/ip_vs")
	return err == nil
}

// open makes sure that there is a handle that works. Without the family the
// library would say nothing and do nothing; it asks once per process.
func (m *module) open() error {
	f, err := netlink.GenlFamilyGet("IPVS")
	switch {
	case errors.Is(err, unix.ENOENT):
		return ErrNoIPVS
	case err != nil:
		return fmt.Errorf("look for IPVS: %w%s", err, remedy(err))
	case m.handle != nil && f.ID != m.family:
		return errors.New("module ip_vs was loaded anew: restart nlb")
	case m.handle != nil:
		return nil
	}
	logrus.SetOutput(io.Discard) // it warns when there is no modprobe
	h, err := ipvs.New("")
	if err != nil {
		return fmt.Errorf("open IPVS: %w", err)
	}
	m.handle, m.family = h, f.ID
	return nil
}

func (m *module) close() {
	if m.handle != nil {
		m.handle.Close()
		m.handle = nil
	}
}

func (m *module) probe() error {
	if err := m.open(); err != nil {
		return err
	}
	if _, err := readSysctl(settingConntrack); errors.Is(err, fs.ErrNotExist) {
		return ErrNoConntrack
	}
	// There is no question for a scheduler. But a service is refused for want of
	// its scheduler (ENOENT) before it is for the netmask that IPv6 must have
	// (EINVAL), see ip_vs_add_service, so this makes none in either case. A
	// kernel without IPv6 does not say (EAFNOSUPPORT): there the first service does.
	err := m.handle.NewService(&ipvs.Service{
		Address: net.IPv6loopback, Protocol: unix.IPPROTO_TCP, Port: 1,
		AddressFamily: unix.AF_INET6, SchedName: scheduler, Netmask: 0,
	})
	switch {
	case errors.Is(err, unix.ENOENT):
		return ErrNoScheduler
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EAFNOSUPPORT):
		return nil
	case errors.Is(err, unix.EEXIST):
		return nil // somebody's service; the order of checks may change
	}
	return fmt.Errorf("ask IPVS for scheduler %s: %w%s", scheduler, err, remedy(err))
}

func (m *module) observe(ours func(k serviceKey, cookie uint32) bool) (state, error) {
	s := state{settings: make(map[string]int)}
	if !m.present() {
		return s, nil
	}
	if err := m.open(); err != nil {
		return s, err
	}
	services, err := m.handle.GetServices()
	if err != nil {
		return s, fmt.Errorf("list services: %w%s", err, remedy(err))
	}
	for _, v := range services {
		at, ok := addrPort(v.Address, v.Port)
		if v.FWMark != 0 || !ok {
			continue // somebody's: ours have addresses
		}
		k := serviceKey{uint8(v.Protocol), at}
		if !ours(k, v.Timeout) {
			continue
		}
		svc := service{
			key: k, scheduler: v.SchedName, flags: v.Flags &^ flagHashed, cookie: v.Timeout, netmask: v.Netmask,
		}
		if svc.destinations, err = m.destinations(svc); err != nil {
			return s, err
		}
		s.services = append(s.services, svc)
	}
	sortServices(s.services)
	return s, m.readSettings(s.settings)
}

// destinations lists those of a service. One of the other family is a tunnel that
// somebody made, and cannot be named by way of the library.
func (m *module) destinations(s service) ([]destination, error) {
	found, err := m.handle.GetDestinations(serviceOf(s))
	if err != nil {
		return nil, fmt.Errorf("list destinations of %s %s: %w", protocolFlag(s.key.proto), s.key.at, err)
	}
	for _, d := range found {
		at, ok := addrPort(d.Address, d.Port)
		if !ok || at.Addr().BitLen() != s.key.at.Addr().BitLen() {
			continue
		}
		s.destinations = append(s.destinations, destination{
			at: at, weight: d.Weight, method: d.ConnectionFlags & ipvs.ConnectionFlagFwdMask,
			upper: d.UpperThreshold, lower: d.LowerThreshold, active: d.ActiveConnections,
		})
	}
	s.sort()
	return s.destinations, nil
}

func (m *module) readSettings(into map[string]int) error {
	for _, name := range sysctls {
		v, err := readSysctl(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		into[name] = v
	}
	c, err := m.handle.GetConfig()
	if err != nil {
		return fmt.Errorf("read timeouts: %w", err)
	}
	into[timeoutTCP] = int(c.TimeoutTCP / time.Second)
	into[timeoutUDP] = int(c.TimeoutUDP / time.Second)
	return nil
}

// write carries out one step. What would be taken without an error and mean
// something else is refused here: a destination of the other family, of which
// only the first bytes would count, and weights beyond 16 bits, which are read
// back as something else.
func (m *module) write(s step) error {
	if s.dest.at.IsValid() && s.dest.at.Addr().BitLen() != s.of.key.at.Addr().BitLen() ||
		s.dest.weight < 0 || s.dest.weight > 65535 {
		return unix.EINVAL
	}
	if m.handle == nil {
		if err := m.open(); err != nil {
			return err
		}
	}
	switch s.op {
	case addService:
		return m.handle.NewService(serviceOf(s.of))
	case editService:
		return m.handle.UpdateService(serviceOf(s.of))
	case removeService:
		return m.handle.DelService(serviceOf(s.of))
	case addDestination:
		return m.handle.NewDestination(serviceOf(s.of), destinationOf(s.dest))
	case editDestination:
		return m.handle.UpdateDestination(serviceOf(s.of), destinationOf(s.dest))
	case removeDestination:
		return m.handle.DelDestination(serviceOf(s.of), destinationOf(s.dest))
	case setSysctl:
		return balancer.ProcSys.Write(balancer.SysctlKey(s.set.name), strconv.Itoa(s.set.value))
	case setTimeouts:
		return m.handle.SetConfig(&ipvs.Config{ // 0 leaves one as it is
			TimeoutTCP: time.Duration(s.idle.tcp) * time.Second,
			TimeoutUDP: time.Duration(s.idle.udp) * time.Second,
		})
	}
	panic(fmt.Sprintf("no such operation: %d", s.op))
}

func serviceOf(s service) *ipvs.Service {
	return &ipvs.Service{
		Address: s.key.at.Addr().AsSlice(), Protocol: uint16(s.key.proto), Port: s.key.at.Port(),
		AddressFamily: familyOf(s.key.at.Addr()), SchedName: s.scheduler, Flags: s.flags,
		Timeout: s.cookie, Netmask: s.netmask,
	}
}

func destinationOf(d destination) *ipvs.Destination {
	return &ipvs.Destination{
		Address: d.at.Addr().AsSlice(), Port: d.at.Port(), AddressFamily: familyOf(d.at.Addr()),
		Weight: d.weight, ConnectionFlags: d.method, UpperThreshold: d.upper, LowerThreshold: d.lower,
	}
}

func familyOf(a netip.Addr) uint16 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// addrPort keeps the family as it was told: 4 bytes for IPv4, 16 for IPv6.
func addrPort(ip net.IP, port uint16) (netip.AddrPort, bool) {
	a, ok := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(a, port), ok
}

func readSysctl(name string) (int, error) {
	text, err := balancer.ProcSys.Read(balancer.SysctlKey(name))
	if err != nil {
		return 0, err
	}
	v, err := strconv.Atoi(text)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", name, err)
	}
	return v, nil
}

// explain is err of a step, with what to do about it if we know. What was made or
// removed by somebody in between calls for another plan.
func explain(s step, err error) error {
	switch {
	case s.op == setSysctl:
		return fmt.Errorf("%s: %w", s.line(), err)
	case s.op == addService && errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%s: %w", s.line(), ErrNoScheduler)
	case errors.Is(err, unix.EEXIST), errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINTR):
		return fmt.Errorf("%s: %w: %w", s.line(), err, balancer.ErrOvertaken)
	}
	return fmt.Errorf("%s: %w%s", s.line(), err, remedy(err))
}

func remedy(err error) string {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return " (needs CAP_NET_ADMIN: run as root)"
	case errors.Is(err, unix.ENOMEM), errors.Is(err, unix.ENOBUFS):
		return " (out of kernel memory)"
	}
	return ""
}
