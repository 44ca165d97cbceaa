package traffic

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"nlb/bench/lab"
	"nlb/bench/measure"
	"nlb/bench/part"
	"nlb/bench/peers"
	"nlb/bench/rulesets"
)

const (
	targets = 3
	// kubeServices is how many services kube-proxy's ruleset has, of which traffic
	// meets two: TCP and UDP of one port.
	kubeServices = 1000
)

// A contestant is one way from the client to a target.
type contestant struct {
	name    string
	version version // of the header that a target gets
	// tracked says that the kernel is to track connections to the VIP in the
	// balancer's namespace. Those that do not need it must not pay for it.
	tracked bool
	// forwards says that it sends on packets: it can be measured by packets.
	forwards bool
	program  part.Program
	// config is what the program is given to read.
	config func(*measure.Site) string
	// shown is what people are shown instead, where config is too long for them.
	shown func(*measure.Site) string
}

var contestants = []contestant{
	{name: part.Direct, forwards: true},
	{name: part.MinimalDNAT, program: part.NFT, tracked: true, forwards: true, config: minimal(rulesets.MinimalDNAT)},
	{name: part.MinimalAgain, program: part.NFT, tracked: true, forwards: true, config: minimal(rulesets.MinimalDNAT)},
	{name: part.KubeProxy, program: part.NFT, tracked: true, forwards: true, config: kubeProxy, shown: firstOfKubeProxy},
	{name: part.Preserve, program: part.NLB, tracked: true, forwards: true, config: nlb("preserve")},
	{name: part.Hairpin, program: part.NLB, tracked: true, forwards: true, config: nlb("hairpin_snat")},
	{name: part.MinimalSNAT, program: part.NFT, tracked: true, forwards: true, config: minimal(rulesets.MinimalSNAT)},
	{name: part.SNAT, program: part.NLB, tracked: true, forwards: true, config: nlb("snat")},
	{name: part.PlainHAProxy, program: part.HAProxy, config: haproxy(peers.HAProxy{})},
	{name: part.PlainNginx, program: part.Nginx, config: nginx(peers.Nginx{})},
	{name: part.Relay, program: part.NLB, version: v2, tracked: true, config: nlbRelay(true)},
	{name: part.Untracked, program: part.NLB, version: v2, config: nlbRelay(false)},
	{name: part.SendProxy, program: part.HAProxy, version: v2, config: haproxy(peers.HAProxy{SendProxy: true})},
	{name: part.Spliced, program: part.HAProxy, version: v2, config: haproxy(peers.HAProxy{SendProxy: true, Splice: true})},
	{name: part.NginxProxy, program: part.Nginx, version: v1, config: nginx(peers.Nginx{SendProxy: true})},
}

// balanced says whether clients connect to the VIP: without a balancer they know
// the targets.
func (c *contestant) balanced() bool { return c.config != nil }

// keepsClient says whether targets see the client's address.
func (c *contestant) keepsClient() bool {
	i := slices.IndexFunc(part.Contestants, func(p part.Contestant) bool { return p.Name == c.name })
	return part.Contestants[i].Job == part.KeepsClient
}

func names() []string {
	var all []string
	for i := range contestants {
		all = append(all, contestants[i].name)
	}
	return all
}

// --- nftables ------------------------------------------------------------------

func minimal(render func([]rulesets.Service, rulesets.Targets) string) func(*measure.Site) string {
	return func(s *measure.Site) string { return render(services(2), addresses(s)) }
}

// services are n, half of them of TCP and half of UDP. The first of each are what
// clients connect to.
func services(n int) []rulesets.Service {
	return rulesets.Services(netip.AddrPortFrom(lab.VIP4, measure.Port), n/2, rulesets.TCP, rulesets.UDP)
}

func addresses(s *measure.Site) rulesets.Targets {
	t := rulesets.Targets{Port: measure.Port}
	for _, n := range s.Targets {
		t.Addresses = append(t.Addresses, n.Addr4)
	}
	return t
}

func kubeProxy(s *measure.Site) string { return kubeProxyOf(s, kubeServices) }

func firstOfKubeProxy(s *measure.Site) string {
	return fmt.Sprintf("# The first two of %d services; the others are alike.\n%s", kubeServices, kubeProxyOf(s, 2))
}

func kubeProxyOf(s *measure.Site, n int) string {
	return rulesets.KubeProxy(services(n), addresses(s), rulesets.Cluster{
		Pods:     netip.PrefixFrom(s.Clients[0].Addr4, 24).Masked(),
		Services: netip.PrefixFrom(lab.VIP4, 24).Masked(),
		Node:     s.LB.Addr4,
	})
}

// --- nlb -----------------------------------------------------------------------

func nlb(mode string) func(*measure.Site) string {
	return func(s *measure.Site) string { return s.Config(measure.Forwarding{ClientIP: mode, Listeners: 1}) }
}

func nlbRelay(tracked bool) func(*measure.Site) string {
	return func(s *measure.Site) string {
		return s.Config(measure.Forwarding{Protocol: "TCP", ClientIP: "proxy_protocol_v2", Untracked: !tracked, Listeners: 1})
	}
}

// --- peers ---------------------------------------------------------------------

// peerListeners are the one that clients connect to.
func peerListeners(s *measure.Site) []peers.Listener {
	l := peers.Listener{At: netip.AddrPortFrom(lab.VIP4, measure.Port)}
	for _, t := range s.Targets {
		l.Servers = append(l.Servers, netip.AddrPortFrom(t.Addr4, measure.Port))
	}
	return []peers.Listener{l}
}

func haproxy(h peers.HAProxy) func(*measure.Site) string {
	return func(s *measure.Site) string {
		h.Listeners = peerListeners(s)
		return h.Config()
	}
}

func nginx(n peers.Nginx) func(*measure.Site) string {
	return func(s *measure.Site) string {
		n.Listeners, n.PIDFile = peerListeners(s), "nginx.pid" // in the configuration's folder
		n.Module, _ = peers.StreamModule()                     // ready has said it if there is none
		return n.Config()
	}
}

// --- what people are shown -----------------------------------------------------

// plan is the network that every contestant gets, without being there: its
// addresses are the same each time.
func plan() *measure.Site {
	node := func(a string) *lab.Node { return &lab.Node{Addr4: netip.MustParseAddr(a)} }
	return &measure.Site{Topology: &lab.Topology{
		LB:      node("10.0.1.1"),
		Clients: []*lab.Node{node("203.0.113.9")},
		Targets: []*lab.Node{node("10.0.1.11"), node("10.0.1.12"), node("10.0.1.13")},
	}}
}

// unexpand is the opposite of measure.Site.Expand, of a plan.
func unexpand(s *measure.Site, text string) string {
	names := []string{lab.VIP4.String(), "VIP"}
	for i, t := range s.Targets {
		names = append(names, t.Addr4.String(), fmt.Sprint("T", i))
	}
	return strings.NewReplacer(names...).Replace(text)
}

// commands start the programs; the files are in a folder that is removed.
var commands = map[part.Program][]string{
	"":           {"sysctl -w net.ipv4.ip_forward=1"},
	part.NFT:     {"nft -f rules.nft"},
	part.NLB:     {"nlb serve -c nlb.yaml"},
	part.HAProxy: {"ip address add VIP/32 dev lo", strings.Join(peers.HAProxy{}.Command("haproxy", "haproxy.cfg"), " ")},
	part.Nginx:   {"ip address add VIP/32 dev lo", strings.Join(peers.Nginx{}.Command("nginx", "nginx.conf"), " ")},
}

func setups() map[string]part.Setup {
	all := make(map[string]part.Setup)
	s := plan()
	for i := range contestants {
		c := &contestants[i]
		setup := part.Setup{Commands: commands[c.program]}
		if c.balanced() {
			config := c.config
			if c.shown != nil {
				config = c.shown
			}
			setup.Config = unexpand(s, config(s))
		}
		all[c.name] = setup
	}
	return all
}
