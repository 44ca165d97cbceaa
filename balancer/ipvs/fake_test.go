package ipvs

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"nlb/balancer"
)

// A fake is a kernel that refuses what the real one refuses, in the same words
// (ip_vs_add_service, ip_vs_add_dest and their like in linux net/netfilter/ipvs/ip_vs_ctl.c).
type fake struct {
	looks    int   // at the kernel
	missing  error // what probe says; ErrNoIPVS also means that there is nothing
	services map[serviceKey]*service
	settings map[string]int
	// quota is how many writes there will be before the process is killed, and
	// broken is the write after that.
	quota  int
	broken error
	writes int
	file   []byte // of the state folder, where a test needs to go back
}

// killed is what a write is answered that comes after the process has ended.
var errKilled = fmt.Errorf("killed")

func newFake() *fake {
	return &fake{
		services: make(map[serviceKey]*service), quota: -1, broken: errKilled,
		settings: map[string]int{
			settingConntrack: 0, settingExpire: 0, settingSloppy: 0, settingReuse: 1, timeoutTCP: 900, timeoutUDP: 300,
		},
	}
}

func (f *fake) probe() error  { return f.missing }
func (f *fake) present() bool { return f.missing != ErrNoIPVS }
func (f *fake) close()        {}

func (f *fake) observe(ours func(serviceKey, uint32) bool) (state, error) {
	f.looks++
	if !f.present() {
		return state{}, nil
	}
	s := state{settings: make(map[string]int)}
	for k, v := range f.settings {
		s.settings[k] = v
	}
	for k, v := range f.services {
		if ours(k, v.cookie) {
			c := *v
			c.destinations = slices.Clone(v.destinations)
			s.services = append(s.services, c)
		}
	}
	sortServices(s.services)
	return s, nil
}

func (f *fake) write(s step) error {
	if f.quota == 0 {
		return f.broken
	}
	f.quota--
	if !f.present() {
		return unix.ENOENT
	}
	f.writes++
	switch s.op {
	case setSysctl:
		f.settings[s.set.name] = s.set.value
		return nil
	case setTimeouts:
		return f.setTimeouts(s.idle)
	case addService, editService, removeService:
		return f.writeService(s)
	}
	return f.writeDestination(s)
}

func (f *fake) setTimeouts(t timeouts) error {
	if t.tcp != 0 {
		f.settings[timeoutTCP] = t.tcp
	}
	if t.udp != 0 {
		f.settings[timeoutUDP] = t.udp
	}
	return nil
}

func (f *fake) writeService(s step) error {
	is := f.services[s.of.key]
	switch {
	case s.op == addService && is != nil:
		return unix.EEXIST
	case s.op != addService && is == nil:
		return unix.ESRCH
	case s.op == removeService:
		delete(f.services, s.of.key)
		return nil
	case s.of.scheduler != "mh" && s.of.scheduler != "rr":
		return unix.ENOENT
	case s.of.key.at.Addr().Is6() && (s.of.netmask < 1 || s.of.netmask > 128):
		return unix.EINVAL
	}
	made := s.of
	if is != nil {
		made.destinations = is.destinations
	}
	f.services[s.of.key] = &made
	return nil
}

func (f *fake) writeDestination(s step) error {
	is := f.services[s.of.key]
	if is == nil {
		return unix.ESRCH
	}
	if s.dest.at.Addr().BitLen() != s.of.key.at.Addr().BitLen() || s.dest.weight < 0 || s.dest.weight > 65535 {
		return unix.EINVAL
	}
	d := is.find(s.dest.at)
	switch {
	case s.op == addDestination && d != nil:
		return unix.EEXIST
	case s.op == addDestination:
		s.dest.active = 0
		is.destinations = append(is.destinations, s.dest)
		is.sort()
	case d == nil:
		return unix.ENOENT
	case s.op == editDestination:
		s.dest.active = d.active
		*d = s.dest
	default:
		at := s.dest.at
		is.destinations = slices.DeleteFunc(is.destinations, func(d destination) bool { return d.at == at })
	}
	return nil
}

// all lists what is there, in ipvsadm's words.
func (f *fake) all() []string {
	s, _ := f.observe(func(serviceKey, uint32) bool { return true })
	return describe(s.services)
}

// describe prints services as ipvsadm --save does.
func describe(services []service) []string {
	var lines []string
	for _, s := range transition(nil, services) {
		lines = append(lines, strings.TrimPrefix(s.line(), "ipvsadm "))
	}
	return lines
}

// rig is a Dataplane over a fake.
func rig(t testing.TB) (*Dataplane, *fake, *observer.ObservedLogs) {
	t.Helper()
	core, logs := observer.New(zapcore.DebugLevel)
	f := newFake()
	d := New(t.TempDir(), zap.New(core))
	d.kernel, d.local = f, func(netip.Addr) bool { return true }
	return d, f, logs
}

// converge makes f hold the table, nil for nothing.
func converge(t testing.TB, d *Dataplane, table *balancer.Table) (lines []string) {
	t.Helper()
	err := balancer.Converge(t.Context(), []balancer.Part{d.Opener(), d.Closer()}, desired(table), func(p balancer.PartPlan) {
		lines = append(lines, p.Plan.Lines()...)
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func desired(t *balancer.Table) *balancer.Desired {
	if t == nil {
		return nil
	}
	return &balancer.Desired{Table: t}
}

func at(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func dest(s string, weight int) balancer.Destination {
	a := at(s)
	return balancer.Destination{Address: a.Addr(), Port: a.Port(), Weight: weight}
}

func relayed(s string, weight int) balancer.Destination {
	d := dest(s, weight)
	d.ClientIP = balancer.ProxyProtocolV2
	return d
}

func pool(name string, ds ...balancer.Destination) balancer.Pool {
	return balancer.Pool{Name: name, Protocols: []uint8{6, 17}, ClientIP: balancer.Preserve, Destinations: ds}
}

// listener is a service at an address, of TCP unless it says otherwise, over pools
// of the weights that are given.
func listener(vip string, pools map[string]int, protos ...uint8) balancer.VirtualService {
	a := at(vip)
	if len(protos) == 0 {
		protos = []uint8{balancer.ProtoTCP}
	}
	s := balancer.VirtualService{
		Name: vip, Address: a.Addr(), Port: a.Port(), Protocols: protos, IdleTimeout: 350 * time.Second,
	}
	for name, weight := range pools {
		s.Pools = append(s.Pools, balancer.WeightedPool{Pool: name, Weight: weight})
	}
	slices.SortFunc(s.Pools, func(a, b balancer.WeightedPool) int { return strings.Compare(a.Pool, b.Pool) })
	return s
}

func table(services []balancer.VirtualService, pools ...balancer.Pool) *balancer.Table {
	t := &balancer.Table{Dataplane: balancer.IPVS, Services: services, Pools: pools}
	for _, s := range services {
		if !slices.Contains(t.VIPs, s.Address) {
			t.VIPs = append(t.VIPs, s.Address)
		}
	}
	return t
}

func list(s ...balancer.VirtualService) []balancer.VirtualService { return s }
