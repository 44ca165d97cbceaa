package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/bench/measure"
)

const (
	targets = 2
	many    = 1000 // listeners, where there are many
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
	flowtable           bool
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
	{name: "nlb nftables with flowtable, preserve", against: minimalDNAT, dataplane: "nftables", clientIP: "preserve", listeners: 1, flowtable: true},
	{name: "nlb nftables with flowtable, snat", against: minimalSNAT, dataplane: "nftables", clientIP: "snat", masked: true, listeners: 1, flowtable: true},
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
	measure.Site
	servers []*lab.Node // who has the sockets: the targets, usually
	sockets measure.Sockets
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

func (s *site) build() error {
	if err := s.Build(lab.Options{Targets: targets, Offload: true}); err != nil {
		return err
	}
	s.servers = s.Targets
	if s.here {
		s.servers = []*lab.Node{s.LB}
	}
	for _, n := range s.servers {
		if err := n.Do(func() error { return s.sockets.Listen(n.Addr4) }); err != nil {
			return fmt.Errorf("%s: %w", n.Name, err)
		}
	}
	return nil
}

// close removes the network and all in it, complete or not.
func (s *site) close() error {
	s.sockets.Close()
	return s.Close()
}

// script runs the way's script.
func (s *site) script(ctx context.Context) error {
	if out, err := s.LB.Command(ctx, "sh", "-ec", s.Expand(s.setup)).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// config is nlb's configuration.
func (s *site) config() string {
	return s.Config(measure.Forwarding{Dataplane: s.dataplane, ClientIP: s.clientIP, Listeners: s.listeners, Flowtable: s.flowtable})
}

// patience is how long nlb may take to begin and to end, by the guest's clock: a
// minute for as many instructions as a server executes in one.
const patience = time.Minute

// install has nlb forward to all targets, and ends it.
func (s *site) install(ctx context.Context, program string) error {
	if err := s.StartNLB(ctx, program, s.config(), patience); err != nil {
		return err
	}
	if err := s.Balancer.Signal(unix.SIGTERM); err != nil {
		return fmt.Errorf("end nlb: %w", err)
	}
	err := s.Balancer.Await(ctx, patience, func(context.Context) error { return errors.New("nlb still runs") })
	if !errors.Is(err, measure.ErrEnded) {
		return fmt.Errorf("%w\n%s", err, s.Balancer.Said())
	}
	return nil
}

// checkOffloaded fails if there is a flowtable and not so many UDP flows are in it.
func (s *site) checkOffloaded(flows int) error {
	if !s.flowtable {
		return nil
	}
	out, err := s.LB.Command(context.Background(), "conntrack", "-L", "-p", "udp").Output()
	if err != nil {
		return fmt.Errorf("list UDP flows: %w", err)
	}
	if got := strings.Count(string(out), "[OFFLOAD]"); got != flows {
		return fmt.Errorf("%d UDP flows are in the flowtable, not %d:\n%s", got, flows, out)
	}
	return nil
}

// address is where a client's flow from a port goes.
func (s *site) address(from int) unix.SockaddrInet4 {
	a := lab.VIP4
	if s.dataplane == "" && s.setup == "" {
		a = s.servers[from%len(s.servers)].Addr4
	}
	return unix.SockaddrInet4{Addr: a.As4(), Port: measure.Port}
}

// client is whom a target sees.
func (s *site) client() netip.Addr {
	if s.masked {
		return s.LB.Addr4
	}
	return s.Clients[0].Addr4
}
