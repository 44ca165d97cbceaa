package traps

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/bench/lab"
)

// What is called, and where targets listen.
const (
	vipPort    = 80
	targetPort = 8080
)

var (
	vip    = netip.AddrPortFrom(lab.VIP4, vipPort)
	vipNet = netip.PrefixFrom(lab.VIP4, 32)
)

// briefly is how long a call may take that is expected to hang; it is too short
// for a SYN to be repeated (1 s, RFC 6298 section 2.1), so that one call is one
// packet.
const briefly = 600 * time.Millisecond

// A site is the network of a scenario while it runs.
type site struct {
	*lab.Topology
	scenario Scenario
	options  Options
	dir      string
	clock    int // a socket, see stampPackets

	daemon  *daemon
	watched []watched
	undo    []func() error // what to take back when the set-up is over, last first
}

// watched is a node whose packets are recorded.
type watched struct {
	node    *lab.Node
	capture *lab.Capture
}

func newSite(sc Scenario, o Options) (*site, error) {
	clock, err := stampPackets()
	if err != nil {
		return nil, err
	}
	if _, err := sweep(lab.Sweep); err != nil {
		return nil, errors.Join(err, unix.Close(clock))
	}
	wants := sc.options
	wants.Keep = o.Keep
	top, err := sc.build(wants)
	if err != nil {
		return nil, errors.Join(err, unix.Close(clock))
	}
	dir := files(top.Prefix)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, errors.Join(err, top.Close(), unix.Close(clock))
	}
	return &site{Topology: top, scenario: sc, options: o, dir: dir, clock: clock}, nil
}

// stampPackets opens a socket that makes the kernel note the time of each packet.
// A capture asks for that, too, but the kernel begins with some delay after the
// first one that asks (Linux, net_enable_timestamp), and until then a packet has
// the time at which the capture read it: too late to tell the order of packets.
func stampPackets() (fd int, err error) {
	fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fd, err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS_NEW, 1); err != nil {
		return fd, errors.Join(fmt.Errorf("SO_TIMESTAMPNS: %w", err), unix.Close(fd))
	}
	return fd, nil
}

// files is the folder of the nlb in a lab, by the prefix of the lab's namespaces.
func files(prefix string) string { return filepath.Join(os.TempDir(), prefix+"files") }

// ErrLeft is in what Run returns when it could not remove everything.
var ErrLeft = errors.New("something of the lab is left")

func (s *site) close() error {
	err := s.Close() // ends the daemon too, and its relay
	if s.daemon != nil {
		<-s.daemon.done
	}
	if err := errors.Join(err, os.RemoveAll(s.dir), unix.Close(s.clock)); err != nil {
		return fmt.Errorf("%w: %w", ErrLeft, err)
	}
	return nil
}

// RemoveKept removes what Options.Keep left of runs whose process has ended, and
// returns the names of the namespaces.
func RemoveKept() ([]string, error) { return sweep(lab.SweepKept) }

// sweep removes namespaces of dead processes, and the files of their labs.
func sweep(namespaces func() ([]string, error)) ([]string, error) {
	removed, err := namespaces()
	errs := []error{err}
	for _, name := range removed {
		prefix := name[:strings.LastIndexByte(name, '-')+1]
		errs = append(errs, os.RemoveAll(files(prefix)))
	}
	return removed, errors.Join(errs...)
}

func (s *site) names() []string {
	var names []string
	for _, n := range s.Nodes() {
		names = append(names, n.NS)
	}
	return names
}

// later takes something back at the end of the set-up.
func (s *site) later(f func() error) { s.undo = append(s.undo, f) }

func (s *site) revert() error {
	var errs []error
	for _, f := range slices.Backward(s.undo) {
		errs = append(errs, f())
	}
	s.undo = nil
	return errors.Join(errs...)
}

// with is what the cure has, or what is there instead when the cure is left out.
func (s *site) with(cure, without string) string {
	if s.options.WithoutCure {
		return without
	}
	return cure
}

// bind gives a node the VIP for the time of the set-up.
func (s *site) bind(n *lab.Node) error {
	s.later(func() error { return n.Unaddress("lo", vipNet) })
	return n.Address("lo", vipNet)
}

// dummy is the device that bindBeside makes.
const dummy = "dummy0"

// bindBeside gives a node the VIP as targets that answer by themselves have it: on a
// dummy device, or on lo where the kernel has no such devices. It returns which, and
// leaves it there.
func bindBeside(n *lab.Node) (iface string, err error) {
	iface = dummy
	if err = n.Dummy(dummy); lacking(err) {
		iface, err = "lo", nil
	}
	if err == nil {
		err = n.Address(iface, vipNet)
	}
	return iface, err
}

// forward gives a node naive rules for the time of the set-up.
func (s *site) forward(n *lab.Node, rules ...naiveRule) error {
	s.later(func() error { return removeRules(n) })
	return dnat(n, rules...)
}

// toTarget is the rule that sends callers of the VIP to a target.
func toTarget(n *lab.Node) naiveRule {
	return naiveRule{proto: unix.IPPROTO_TCP, from: vip, to: netip.AddrPortFrom(n.Addr4, targetPort)}
}

// listen makes a node answer, for as long as the set-up lasts.
func (s *site) listen(ctx context.Context, n *lab.Node, o lab.Serve) error {
	l, err := n.Agent().Serve(ctx, o)
	if err != nil {
		return err
	}
	s.later(l.Close)
	return nil
}

// targets makes nodes answer as plain targets.
func (s *site) targets(ctx context.Context, nodes ...*lab.Node) error {
	for _, n := range nodes {
		if err := s.listen(ctx, n, lab.Serve{Ports: []uint16{targetPort}}); err != nil {
			return err
		}
	}
	return nil
}

// watch records the packets of nodes from now on.
func (s *site) watch(ctx context.Context, nodes ...*lab.Node) error {
	for _, n := range nodes {
		c, err := n.Agent().Record(ctx)
		if err != nil {
			return err
		}
		s.watched = append(s.watched, watched{n, c})
	}
	return nil
}

func (s *site) unwatch() error {
	var errs []error
	for _, w := range s.watched {
		errs = append(errs, w.capture.Close())
	}
	s.watched = nil
	return errors.Join(errs...)
}

// packets are what a watched node recorded so far, other than neighbour
// discovery.
func (s *site) packets(ctx context.Context, n *lab.Node) ([]lab.Packet, error) {
	i := slices.IndexFunc(s.watched, func(w watched) bool { return w.node == n })
	if i < 0 {
		return nil, fmt.Errorf("%s is not watched", n.Name)
	}
	return s.watched[i].capture.Packets(ctx, func(p lab.Packet) bool {
		switch p.Proto {
		case unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_ICMP:
			return true
		case unix.IPPROTO_ICMPV6:
			return p.ICMPType < 128 // an error (RFC 4443, 2.1)
		}
		return false
	})
}

// captureLag is how long a busy machine may take to bring a packet along.
const captureLag = 2 * time.Second

// seen finds the first packet that a node recorded and match holds for, and gives
// the packet some time to come.
func (s *site) seen(ctx context.Context, n *lab.Node, match func(lab.Packet) bool) (p lab.Packet, found bool, err error) {
	end := time.NewTimer(captureLag)
	defer end.Stop()
	tick := time.NewTicker(captureLag / 100)
	defer tick.Stop()
	for {
		if p, found, err = s.sofar(ctx, n, match); found || err != nil {
			return p, found, err
		}
		select {
		case <-tick.C:
		case <-end.C:
			return p, false, nil
		case <-ctx.Done():
			return p, false, ctx.Err()
		}
	}
}

// sofar is seen for what should not be there.
func (s *site) sofar(ctx context.Context, n *lab.Node, match func(lab.Packet) bool) (p lab.Packet, found bool, err error) {
	packets, err := s.packets(ctx, n)
	if err != nil {
		return p, false, err
	}
	if i := slices.IndexFunc(packets, match); i >= 0 {
		return packets[i], true, nil
	}
	return p, false, nil
}

// call makes one call.
func (s *site) call(ctx context.Context, from *lab.Node, c lab.Call) (lab.Reply, error) {
	if c.Network == "" {
		c.Network = "tcp"
	}
	if !c.Dst.IsValid() {
		c.Dst = vip
	}
	replies, err := from.Agent().Call(ctx, c)
	if err != nil {
		return lab.Reply{}, err
	}
	return replies[0], nil
}

// try makes a call that is expected to fail.
func (s *site) try(ctx context.Context, from *lab.Node) (lab.Reply, error) {
	return s.call(ctx, from, lab.Call{Timeout: briefly})
}

// ask makes a call that is expected to be answered by who, who sees peer.
// Without the cure it fails, and need not be waited for as long.
func (s *site) ask(ctx context.Context, from, who *lab.Node, peer netip.Addr) (Finding, error) {
	c := lab.Call{Timeout: answerTime}
	if s.options.WithoutCure {
		c.Timeout = briefly
	}
	r, err := s.call(ctx, from, c)
	return answered(r, who, peer), err
}

// answered judges a reply.
func answered(r lab.Reply, who *lab.Node, peer netip.Addr) Finding {
	if r.Err != "" {
		return Finding{Evidence: "the caller: " + r.Err}
	}
	return Finding{
		Works:    r.Who == who.Name && r.Peer == peer,
		Evidence: fmt.Sprintf("%s answered, and saw %v", r.Who, r.Peer),
	}
}

// netstat reads a counter of a node from /proc/net/netstat, such as
// "TcpExtIPReversePathFilter": its table and column (Linux, snmp_counter).
func netstat(n *lab.Node, name string) (uint64, error) {
	var text []byte
	err := n.Do(func() (err error) {
		// /proc/net is the main thread's, which is elsewhere.
		text, err = os.ReadFile("/proc/thread-self/net/netstat")
		return err
	})
	if err != nil {
		return 0, err
	}
	return counterIn(text, name)
}

// counterIn finds a counter in the pairs of lines of /proc/net/netstat, names
// over values.
func counterIn(text []byte, name string) (uint64, error) {
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		names := strings.Fields(lines.Text())
		if !lines.Scan() {
			break
		}
		values := strings.Fields(lines.Text())
		if len(names) == 0 || len(names) != len(values) {
			continue
		}
		table := strings.TrimSuffix(names[0], ":")
		for i, column := range names[1:] {
			if table+column == name {
				return strconv.ParseUint(values[i+1], 10, 64)
			}
		}
	}
	return 0, fmt.Errorf("the kernel has no counter %s", name)
}

// A daemon is nlb serve.
type daemon struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	log  string        // the file that it prints to
	file string        // its configuration
	api  *control.Client
}

func (d *daemon) said() string {
	text, err := os.ReadFile(d.log)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(text))
}

// ready holds when nlb does what its file says and is settled on its targets.
type ready func(*control.Status) error

// nlb runs nlb on a node with a configuration, and returns when it is ready. One
// that runs already is given the configuration.
func (s *site) nlb(ctx context.Context, n *lab.Node, config string, holds ready) error {
	if s.daemon != nil {
		return s.reload(ctx, config, holds)
	}
	return s.start(ctx, n, config, holds)
}

func (s *site) start(ctx context.Context, n *lab.Node, config string, holds ready) error {
	d := &daemon{
		done: make(chan struct{}), log: filepath.Join(s.dir, "nlb.log"), file: filepath.Join(s.dir, "nlb.yaml"),
		api: control.NewClient(filepath.Join(s.dir, "nlb.sock")),
	}
	if err := os.WriteFile(d.file, []byte(config), 0o600); err != nil {
		return err
	}
	// A file, because its relay prints there too, and outlives it.
	log, err := os.Create(d.log)
	if err != nil {
		return err
	}
	defer log.Close()
	// Its life is the site's, not the context's: close ends it, unless it is kept.
	d.cmd = n.Command(context.Background(), s.options.Program, "serve", "-c", d.file, "--dataplane", s.options.Dataplane.String(),
		"--state-dir", filepath.Join(s.dir, "state"), "--socket", filepath.Join(s.dir, "nlb.sock"))
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "NLB_") || strings.HasPrefix(v, "NOTIFY_SOCKET=")
	})
	if err := d.cmd.Start(); err != nil {
		return fmt.Errorf("start nlb: %w", err)
	}
	s.daemon = d
	go func() {
		_ = d.cmd.Wait() // wait reports an end that nobody wanted
		close(d.done)
	}()
	return s.wait(ctx, holds)
}

func (s *site) reload(ctx context.Context, config string, holds ready) error {
	if err := os.WriteFile(s.daemon.file, []byte(config), 0o600); err != nil {
		return err
	}
	if err := s.daemon.api.Reload(ctx); err != nil {
		return err
	}
	return s.wait(ctx, holds)
}

// wait waits until the daemon is ready.
func (s *site) wait(ctx context.Context, holds ready) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		status, err := s.daemon.api.Status(ctx)
		if err == nil {
			if err = holds(status); err == nil {
				return nil
			}
		}
		select {
		case <-tick.C:
		case <-s.daemon.done:
			return fmt.Errorf("nlb serve has ended: %s", s.daemon.said())
		case <-ctx.Done():
			return fmt.Errorf("waited in vain for nlb: %w\n%s", err, s.daemon.said())
		}
	}
}

// inForce holds when the kernel has what the file says.
func inForce(s *control.Status) error {
	if s.Apply.Error != "" {
		return errors.New(s.Apply.Error)
	}
	if s.Apply.ConvergedAt.IsZero() {
		return errors.New("the configuration is not in force yet")
	}
	return nil
}

// settled is inForce, with every target healthy and taking flows.
func settled(s *control.Status) error {
	for _, g := range s.TargetGroups {
		for _, t := range g.Targets {
			if !t.Removed && (t.State != balancer.Healthy || t.EffectiveWeight != t.Weight) {
				return fmt.Errorf("%s %s is %s: %s", g.Name, t.AddrPort(), t.State, t.Description)
			}
		}
	}
	return inForce(s)
}

// config is a configuration of nlb with one listener and its group. group is
// what the group has besides, such as "client_ip: snat"; targets are list
// entries in YAML.
func config(source netip.Addr, group string, targets ...string) string {
	return configFor("TCP", source, group, targets...)
}

func configFor(protocol string, source netip.Addr, group string, targets ...string) string {
	return fmt.Sprintf(`source_addresses: [%v]
vips: [{address: %v, interface: lo}]
metrics: {address: ""}
listeners:
  - {name: web, vip: %v, protocol: %s, port: %d, forward: [{target_group: web}]}
target_groups:
  - {name: web, protocol: %s, port: %d, %s, targets: [%s]}
`, source, lab.VIP4, lab.VIP4, protocol, vipPort, protocol, targetPort, group, strings.Join(targets, ", "))
}

// at is a node as a target's entry, with further keys or none.
func at(n *lab.Node, keys ...string) string {
	entry := []string{"address: " + n.Addr4.String()}
	for _, k := range keys {
		if k != "" {
			entry = append(entry, k)
		}
	}
	return "{" + strings.Join(entry, ", ") + "}"
}

// serve makes nodes answer as plain targets and runs nlb in front of them until
// they are healthy.
func (s *site) serve(ctx context.Context, n *lab.Node, config string, nodes ...*lab.Node) error {
	if err := s.targets(ctx, nodes...); err != nil {
		return err
	}
	return s.nlb(ctx, n, config, settled)
}
