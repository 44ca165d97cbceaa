package growth

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/bench/measure"
	"nlb/bench/part"
	"nlb/bench/rulesets"
)

// contestants are those that have a kernel forward packets, so that a packet is at
// its target when the call that sends it returns.
var contestants = []string{
	part.Direct, part.MinimalDNAT, part.KubeProxy, part.Preserve, part.Hairpin, part.MinimalSNAT, part.SNAT,
}

// modes are nlb's, by contestant.
var modes = map[string]string{part.Preserve: "preserve", part.Hairpin: "hairpin_snat", part.SNAT: "snat"}

// rules are rulesets, by contestant.
var rules = map[string]func([]rulesets.Service, rulesets.Targets) string{
	part.MinimalDNAT: rulesets.MinimalDNAT,
	part.MinimalSNAT: rulesets.MinimalSNAT,
	part.KubeProxy: func(s []rulesets.Service, t rulesets.Targets) string {
		return rulesets.KubeProxy(s, t, rulesets.Cluster{
			Pods:     netip.MustParsePrefix("203.0.113.0/24"), // the clients, whom the targets are to see
			Services: netip.MustParsePrefix("198.51.100.0/24"),
			Node:     balancerAddr,
		})
	},
}

// balancerAddr is the balancer's address in the lab.
var balancerAddr = netip.MustParseAddr("10.0.1.1")

// targetNet has the addresses of all targets. They are on one node, which takes
// what comes for any of them with one socket: a thousand nodes, or sockets, would
// cost what no balancer can help.
var targetNet = netip.MustParsePrefix("10.1.0.0/16")

func targetAddr(n int) netip.Addr {
	a := targetNet.Addr().As4()
	a[2], a[3] = byte(n/250), byte(1+n%250)
	return netip.AddrFrom4(a)
}

func (s *size) targetAddrs() []netip.Addr {
	addrs := make([]netip.Addr, s.targets)
	for i := range addrs {
		addrs[i] = targetAddr(i)
	}
	return addrs
}

// forwarding is nlb's configuration in a mode.
func (s *size) forwarding(mode string) measure.Forwarding {
	return measure.Forwarding{Protocol: "UDP", ClientIP: mode, Listeners: s.listeners, Targets: s.targetAddrs()}
}

// ruleset is a contestant's, or empty if it is none of nft's.
func (s *size) ruleset(contestant string) string {
	render := rules[contestant]
	if render == nil {
		return ""
	}
	services := rulesets.Services(netip.AddrPortFrom(lab.VIP4, measure.Port), s.listeners, rulesets.UDP)
	return render(services, rulesets.Targets{Addresses: s.targetAddrs(), Port: measure.Port})
}

// setups are what contestants are given for the smallest size.
func setups() map[string]part.Setup {
	all, first := make(map[string]part.Setup), &sizes[0]
	for _, c := range contestants {
		if mode := modes[c]; mode != "" {
			all[c] = part.Setup{Commands: []string{"nlb serve -c nlb.yaml"}, Config: first.forwarding(mode).Config(balancerAddr)}
		} else if text := first.ruleset(c); text != "" {
			all[c] = part.Setup{Commands: []string{"nft -f -"}, Config: text}
		}
	}
	return all
}

// A site is a contestant's network for a size.
type site struct {
	contestant string
	size
	measure.Site
	sockets   measure.Sockets
	conntrack *netlink.Handle // the balancer's
	link      int             // packet socket on the client's link; 0 for none
	from, to  net.HardwareAddr
	next      int // flow
}

// build makes the network and starts what balances.
func (s *site) build(ctx context.Context, programs part.Programs) error {
	if err := s.Build(lab.Options{Targets: 1, Offload: true}); err != nil {
		return err
	}
	if err := s.wire(); err != nil {
		return err
	}
	switch mode, ruleset := modes[s.contestant], s.ruleset(s.contestant); {
	case mode != "":
		cmd, err := s.NLB(programs[part.NLB], s.Config(s.forwarding(mode)))
		if err != nil {
			return err
		}
		return s.Start(cmd)
	case ruleset != "":
		return s.load(ctx, programs[part.NFT], ruleset)
	}
	return nil
}

// wire gives the target its addresses and sockets, and the client its link.
func (s *site) wire() error {
	client, target := s.Clients[0], s.Targets[0]
	if err := errors.Join(target.Own(targetNet), s.LB.Route(targetNet, target.Addr4, target.Name)); err != nil {
		return err
	}
	if err := target.Do(func() error { return s.sockets.Listen(netip.IPv4Unspecified()) }); err != nil {
		return fmt.Errorf("%s: %w", target.Name, err)
	}
	err := s.LB.Do(func() (err error) {
		peer, err := net.InterfaceByName(client.Name)
		if err != nil {
			return err
		}
		s.to = peer.HardwareAddr
		s.conntrack, err = netlink.NewHandle(unix.NETLINK_NETFILTER)
		return err
	})
	if err != nil {
		return fmt.Errorf("%s: %w", s.LB.Name, err)
	}
	err = client.Do(func() error {
		link, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		s.from = link.HardwareAddr
		s.link, err = measure.PacketSocket(link.Index)
		return err
	})
	if err != nil {
		return fmt.Errorf("%s: %w", client.Name, err)
	}
	return nil
}

// load gives a ruleset to nft.
func (s *site) load(ctx context.Context, nft, ruleset string) error {
	cmd := s.LB.Command(ctx, nft, "-f", "-")
	cmd.Stdin = strings.NewReader(ruleset)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft -f: %w: %s", err, out)
	}
	return nil
}

// patience is how long nlb may take to forward to all targets, with others that
// begin at the same time.
const patience = time.Minute

// await returns when the balancer forwards.
func (s *site) await(ctx context.Context) error {
	if s.Balancer.PID() == 0 {
		return nil
	}
	return s.AwaitNLB(ctx, patience, measure.Forwards)
}

// forget ends all flows of the balancer.
func (s *site) forget() error {
	if err := s.conntrack.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
		return fmt.Errorf("flush the flows: %w", err)
	}
	return nil
}

// close removes the network and all in it, complete or not.
func (s *site) close() error {
	s.sockets.Close()
	if s.conntrack != nil {
		s.conntrack.Close()
	}
	if s.link > 0 {
		_ = unix.Close(s.link)
	}
	return s.Close()
}
