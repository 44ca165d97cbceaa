package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/bench/lab"
	"nlb/bench/measure"
)

const (
	targets   = 2
	port      = 80   // of the VIP and of the targets
	probePort = 8080 // of the targets, for health checks
	many      = 1000 // listeners, where there are many
)

// A way is one way from a client to a target.
type way struct {
	name string
	// against is the way that does the same job with the least, by name.
	against string
	// setup is a script for the balancer, with VIP, T0 and T1 for the addresses.
	setup string
	// dataplane and clientIP are nlb's. Without them and without a script the
	// balancer is only a router and clients know the targets.
	dataplane, clientIP string
	listeners           int
	// masked is for those where targets see the balancer and not the client.
	masked bool
	// here has the balancer's own sockets for a target.
	here bool
}

// The least that does the job.
const (
	setupDNAT = `nft -f - <<.
table ip minimal {
	chain prerouting {
		type nat hook prerouting priority dstnat
		ip daddr VIP tcp dport 80 dnat to jhash ip saddr . tcp sport mod 2 map { 0 : T0, 1 : T1 }
		ip daddr VIP udp dport 80 dnat to jhash ip saddr . udp sport mod 2 map { 0 : T0, 1 : T1 }
	}
}
.
`
	setupSNAT = setupDNAT + `nft -f - <<.
table ip minimal {
	chain postrouting {
		type nat hook postrouting priority srcnat
		ct status dnat masquerade
	}
}
.
`
	setupIPVS = `ip address add VIP/32 dev lo
for kind in t u; do
	ipvsadm -A -$kind VIP:80 -s mh -b mh-fallback,mh-port
	ipvsadm -a -$kind VIP:80 -r T0:80 -m
	ipvsadm -a -$kind VIP:80 -r T1:80 -m
done
`
	// A rule about ct has the kernel track connections, which IPVS tells what it
	// rewrites: without, nftables cannot follow a flow of IPVS.
	setupTrackedIPVS = setupIPVS + `sysctl -qw net.ipv4.vs.conntrack=1
nft -f - <<.
table ip minimal {
	chain postrouting {
		type nat hook postrouting priority srcnat
		ct state invalid drop
	}
}
.
`
	setupSNATIPVS = setupTrackedIPVS + `nft add rule ip minimal postrouting ct original ip daddr VIP masquerade
`
)

const (
	here        = "sockets on the balancer"
	direct      = "no balancer, a router"
	directAgain = "the same at the end"
	minimalDNAT = "minimal DNAT"
	minimalSNAT = "minimal DNAT + masquerade"
	plainIPVS   = "minimal IPVS"
	trackedIPVS = "minimal IPVS + conntrack"
	snatIPVS    = "minimal IPVS + conntrack + masquerade"
)

// router is the place among the ways of the one that all are compared with.
const router = 1

// ways begin with the sender and the receiver alone, and end with one that was
// counted before: it shows how much two equal things differ within a boot.
var ways = []way{
	{name: here, here: true},
	{name: direct},
	{name: minimalDNAT, setup: setupDNAT},
	{name: "nlb nftables, preserve", against: minimalDNAT, dataplane: "nftables", clientIP: "preserve", listeners: 1},
	{name: "nlb nftables, preserve, 1000 listeners", against: minimalDNAT, dataplane: "nftables", clientIP: "preserve", listeners: many},
	{name: minimalSNAT, masked: true, setup: setupSNAT},
	{name: "nlb nftables, snat", against: minimalSNAT, dataplane: "nftables", clientIP: "snat", masked: true, listeners: 1},
	{name: plainIPVS, setup: setupIPVS},
	{name: trackedIPVS, setup: setupTrackedIPVS},
	{name: "nlb ipvs, preserve", against: trackedIPVS, dataplane: "ipvs", clientIP: "preserve", listeners: 1},
	{name: "nlb ipvs, preserve, 1000 listeners", against: trackedIPVS, dataplane: "ipvs", clientIP: "preserve", listeners: many},
	{name: snatIPVS, masked: true, setup: setupSNATIPVS},
	{name: "nlb ipvs, snat", against: snatIPVS, dataplane: "ipvs", clientIP: "snat", masked: true, listeners: 1},
	{name: directAgain},
}

// A site is a way made real: a network and what is in it.
type site struct {
	way
	*lab.Topology
	dir      string
	daemon   measure.Daemon // nlb, while it installs the way
	servers  []*lab.Node    // who has the sockets: the targets, usually
	udp, tcp []int          // the sockets, by server
	opened   []int
}

// newSite builds the network of a way, which is ready for traffic then. nlb has
// ended: the kernel goes on by itself, and nobody else uses the processor.
func newSite(ctx context.Context, w way, program string) (*site, error) {
	s := &site{way: w}
	err := s.build()
	if err == nil && w.dataplane != "" {
		err = s.install(ctx, program)
	}
	if err == nil && w.setup != "" {
		err = s.script(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *site) build() (err error) {
	if s.Topology, err = lab.Routed(lab.Options{Targets: targets, Offload: true}); err != nil {
		return fmt.Errorf("needs network namespaces and veth links: %w", err)
	}
	s.servers = s.Targets
	if s.here {
		s.servers = []*lab.Node{s.LB}
	}
	for _, n := range s.servers {
		if err := n.Do(func() error { return s.serve(n) }); err != nil {
			return fmt.Errorf("%s: %w", n.Name, err)
		}
	}
	return nil
}

// serve opens the sockets of a server, in whose namespace it is called. Health
// checks have a port to themselves, where the kernel answers alone.
func (s *site) serve(n *lab.Node) error {
	u, err := s.listen(unix.SOCK_DGRAM, n, port)
	if err != nil {
		return err
	}
	t, err := s.listen(unix.SOCK_STREAM, n, port)
	if err != nil {
		return err
	}
	s.udp, s.tcp = append(s.udp, u), append(s.tcp, t)
	_, err = s.listen(unix.SOCK_STREAM, n, probePort)
	return err
}

// listen opens one of a server's sockets.
func (s *site) listen(kind int, t *lab.Node, port int) (int, error) {
	fd, err := bound(kind, t.Addr4, port)
	if err != nil {
		return -1, err
	}
	s.opened = append(s.opened, fd)
	if kind == unix.SOCK_STREAM {
		err = os.NewSyscallError("listen", unix.Listen(fd, 128))
	}
	return fd, err
}

// close removes the network and all in it, complete or not.
func (s *site) close() error {
	for _, fd := range s.opened {
		_ = unix.Close(fd)
	}
	var errs []error
	if s.Topology != nil {
		errs = append(errs, s.Topology.Close()) // ends the daemon too
	}
	s.daemon.Join()
	if s.dir != "" {
		errs = append(errs, os.RemoveAll(s.dir))
	}
	return errors.Join(errs...)
}

// script runs the way's script.
func (s *site) script(ctx context.Context) error {
	text := strings.NewReplacer("VIP", lab.VIP4.String(), "T0", s.Targets[0].Addr4.String(), "T1", s.Targets[1].Addr4.String()).Replace(s.setup)
	if out, err := s.LB.Command(ctx, "sh", "-ec", text).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// config is nlb's configuration. Health is found once, at the start.
func (s *site) config() string {
	var b strings.Builder
	fmt.Fprintf(&b, "dataplane: %s\nsource_addresses: [%s]\n", s.dataplane, s.LB.Addr4)
	fmt.Fprintf(&b, "vips: [{address: %s, interface: lo}]\n", lab.VIP4)
	b.WriteString("metrics: {address: \"\"}\nlisteners:\n")
	for i := range s.listeners {
		fmt.Fprintf(&b, "  - {name: bench-%d, vip: %s, protocol: TCP_UDP, port: %d, forward: [{target_group: bench}]}\n", i, lab.VIP4, port+i)
	}
	fmt.Fprintf(&b, "target_groups:\n  - name: bench\n    protocol: TCP_UDP\n    port: %d\n    client_ip: %s\n", port, s.clientIP)
	fmt.Fprintf(&b, "    health_check: {port: %d, interval: 300s}\n    targets:\n", probePort)
	for _, t := range s.Targets {
		fmt.Fprintf(&b, "      - {address: %s}\n", t.Addr4)
	}
	return b.String()
}

// patience is how long nlb may take to begin and to end, by the guest's clock: a
// minute for as many instructions as a server executes in one.
const patience = time.Minute

// install has nlb forward to all targets, and ends it.
func (s *site) install(ctx context.Context, program string) (err error) {
	if s.dir, err = os.MkdirTemp("", "nlb-bench-"); err != nil {
		return err
	}
	path := func(name string) string { return filepath.Join(s.dir, name) }
	if err := os.WriteFile(path("nlb.yaml"), []byte(s.config()), 0o600); err != nil {
		return err
	}
	// Its life is the network's, should it not end when it is told to.
	cmd := s.LB.Command(context.Background(), program,
		"serve", "-c", path("nlb.yaml"), "--state-dir", path("state"), "--socket", path("nlb.sock"))
	if err := s.daemon.Start(cmd); err != nil {
		return fmt.Errorf("start nlb: %w", err)
	}
	client := control.NewClient(path("nlb.sock"))
	err = s.daemon.Await(ctx, patience, func(ctx context.Context) error {
		status, err := client.Status(ctx)
		if err != nil {
			return err
		}
		return inForce(status)
	})
	if err != nil {
		return fmt.Errorf("waited in vain for nlb: %w\n%s", err, &s.daemon.Log)
	}
	if err := unix.Kill(s.daemon.PID(), unix.SIGTERM); err != nil {
		return fmt.Errorf("end nlb: %w", err)
	}
	err = s.daemon.Await(ctx, patience, func(context.Context) error { return errors.New("nlb still runs") })
	if !errors.Is(err, measure.ErrEnded) {
		return fmt.Errorf("%w\n%s", err, &s.daemon.Log)
	}
	return nil
}

// inForce says what is missing until the kernel forwards to all targets.
func inForce(s *control.Status) error {
	for _, g := range s.TargetGroups {
		for _, t := range g.Targets {
			if t.State != balancer.Healthy || t.EffectiveWeight != t.Weight {
				return fmt.Errorf("%s is %s: %s", t.AddrPort(), t.State, t.Description)
			}
		}
	}
	switch {
	case s.Apply.Error != "":
		return errors.New(s.Apply.Error)
	case s.Apply.ConvergedAt.IsZero():
		return errors.New("the configuration is not in force yet")
	}
	return nil
}

// address is where a client's flow from a port goes.
func (s *site) address(from int) unix.SockaddrInet4 {
	a := lab.VIP4
	if s.dataplane == "" && s.setup == "" {
		a = s.servers[from%len(s.servers)].Addr4
	}
	return unix.SockaddrInet4{Addr: a.As4(), Port: port}
}

// client is whom a target sees.
func (s *site) client() netip.Addr {
	if s.masked {
		return s.LB.Addr4
	}
	return s.Clients[0].Addr4
}
