package change

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/bench/measure"
	"nlb/bench/part"
	"nlb/bench/peers"
	"nlb/bench/rulesets"
)

// A service is a port of the VIP and the targets that share its flows alike.
type service struct {
	port    uint16
	targets []netip.Addr
}

// at is where clients connect to.
func (s service) at() netip.AddrPort { return netip.AddrPortFrom(lab.VIP4, s.port) }

// servers are where its flows go.
func (s service) servers() []netip.AddrPort {
	var all []netip.AddrPort
	for _, t := range s.targets {
		all = append(all, netip.AddrPortFrom(t, measure.Port))
	}
	return all
}

// without is the service, less one of its targets.
func (s service) without(n int) service {
	s.targets = slices.Delete(slices.Clone(s.targets), n, n+1)
	return s
}

// Health checks, for all that have them: as often as nlb can, and one failure or
// success decides. A target that does not answer fails as late as the next probe
// is due.
const (
	interval = time.Second
	timeout  = time.Second
)

// A way is how a contestant is configured.
type way struct {
	name     string
	program  part.Program
	clientIP string // of nlb
	header   bool   // targets get PROXY headers
	// masquerade and kubeProxy say which rules a ruleset has beside, or in place
	// of, the smallest.
	masquerade, kubeProxy bool
}

// ways are in the order of part.Contestants.
var ways = []way{
	{name: part.MinimalDNAT, program: part.NFT},
	{name: part.KubeProxy, program: part.NFT, kubeProxy: true},
	{name: part.Preserve, program: part.NLB, clientIP: "preserve"},
	{name: part.Hairpin, program: part.NLB, clientIP: "hairpin_snat"},
	{name: part.MinimalSNAT, program: part.NFT, masquerade: true},
	{name: part.SNAT, program: part.NLB, clientIP: "snat"},
	{name: part.PlainHAProxy, program: part.HAProxy},
	{name: part.PlainNginx, program: part.Nginx},
	{name: part.Relay, program: part.NLB, clientIP: "proxy_protocol_v2", header: true},
	{name: part.SendProxy, program: part.HAProxy, header: true},
	{name: part.NginxProxy, program: part.Nginx, header: true},
}

// relays says whether the contestant ends connections and begins others.
func (w *way) relays() bool { return w.program != part.NFT && (w.program != part.NLB || w.header) }

// A plan is what a contestant is to do.
type plan struct {
	services []service
	// watch has it find dead targets; else it probes rarely or not at all.
	watch bool
	// again says that the kernel has the plan's predecessor, which differs in the
	// service that is changed; that has lost the target gone, if that is valid.
	again   bool
	changed int
	gone    netip.Addr
}

// without is the plan's successor, in which a service has lost a target.
func (p plan) without(n, target int) plan {
	s := p.services[n]
	p.again, p.changed, p.gone = true, n, s.targets[target]
	p.services = slices.Clone(p.services)
	p.services[n] = s.without(target)
	return p
}

// next is the plan as successor of one that it was without a target of.
func (p plan) next() plan {
	p.again, p.gone = true, netip.Addr{}
	return p
}

// files are where a program finds what it needs beside its configuration.
type files struct{ dir, module string }

func (f files) path(name string) string { return f.dir + "/" + name }

// config is what the contestant's program reads.
func (w *way) config(p plan, source netip.Addr, f files) string {
	switch w.program {
	case part.NLB:
		return nlbConfig(p, w.clientIP, source)
	case part.HAProxy:
		h := peers.HAProxy{Listeners: listeners(p), SendProxy: w.header, Socket: f.path("haproxy.sock")}
		if p.watch {
			h.Connect = timeout
			h.Check = &peers.Check{Port: measure.ProbePort, Interval: interval, Timeout: timeout, Fall: 1, Rise: 1}
		}
		return h.Config()
	case part.Nginx:
		n := peers.Nginx{Listeners: listeners(p), SendProxy: w.header, Module: f.module, PIDFile: f.path("nginx.pid")}
		if p.watch {
			n.Connect = timeout
		}
		return n.Config()
	}
	return w.ruleset(p, source)
}

func listeners(p plan) []peers.Listener {
	var all []peers.Listener
	for _, s := range p.services {
		all = append(all, peers.Listener{At: s.at(), Servers: s.servers()})
	}
	return all
}

// nlbConfig has a group for each service.
func nlbConfig(p plan, clientIP string, source netip.Addr) string {
	check := "{port: 8080, interval: 300s, healthy_threshold: 1}"
	if p.watch {
		check = fmt.Sprintf("{port: %d, interval: %s, timeout: %s, healthy_threshold: 1, unhealthy_threshold: 1}", measure.ProbePort, interval, timeout)
	}
	var b, groups strings.Builder
	fmt.Fprintf(&b, "source_addresses: [%s]\nvips: [{address: %s, interface: lo}]\nmetrics: {address: \"\"}\nlisteners:\n", source, lab.VIP4)
	groups.WriteString("target_groups:\n")
	for i, s := range p.services {
		fmt.Fprintf(&b, "  - {name: bench-%d, vip: %s, protocol: TCP, port: %d, forward: [{target_group: bench-%[1]d}]}\n", i, lab.VIP4, s.port)
		fmt.Fprintf(&groups, "  - name: bench-%d\n    protocol: TCP\n    port: %d\n    client_ip: %s\n    health_check: %s\n    targets:\n", i, measure.Port, clientIP, check)
		for _, t := range s.targets {
			fmt.Fprintf(&groups, "      - {address: %s}\n", t)
		}
	}
	return b.String() + groups.String()
}

// ruleset is a file for nft -f. A change replaces the table in one transaction,
// but kube-proxy writes that which has changed alone.
func (w *way) ruleset(p plan, node netip.Addr) string {
	if w.kubeProxy {
		return kubeProxy(p, node)
	}
	var b strings.Builder
	if p.again {
		b.WriteString("delete table ip minimal\n")
	}
	for _, s := range p.services {
		b.WriteString(rulesets.MinimalDNAT([]rulesets.Service{s.rule()}, rulesets.Targets{Addresses: s.targets, Port: measure.Port}))
	}
	if w.masquerade { // once for all services, unlike rulesets.MinimalSNAT of each
		b.WriteString("table ip minimal {\n\tchain postrouting {\n\t\ttype nat hook postrouting priority srcnat\n\t\tct status dnat masquerade\n\t}\n}\n")
	}
	return b.String()
}

func (s service) rule() rulesets.Service {
	return rulesets.Service{Protocol: rulesets.TCP, Address: s.at()}
}

// kubeProxy is what kube-proxy writes for services that all have the same
// targets at first, and for one that has lost a target then: the service's chain
// is filled anew, and the lost endpoint's is removed (syncProxyRules in
// pkg/proxy/nftables/proxier.go of Kubernetes).
func kubeProxy(p plan, node netip.Addr) string {
	var services []rulesets.Service
	for _, s := range p.services {
		services = append(services, s.rule())
	}
	targets := rulesets.Targets{Addresses: p.services[p.changed].targets, Port: measure.Port}
	text := rulesets.KubeProxy(services, targets, rulesets.Cluster{
		Pods: netip.MustParsePrefix("203.0.113.0/24"), Services: netip.MustParsePrefix("198.51.100.0/24"), Node: node,
	})
	if !p.again {
		return text
	}
	name := fmt.Sprintf("bench/s%d/tcp/p%d", p.changed, p.services[p.changed].port)
	var b strings.Builder
	fmt.Fprintf(&b, "flush chain ip kube-proxy service-%s\n", name)
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "add rule ip kube-proxy service-"+name+" ") {
			b.WriteString(line)
		}
	}
	fmt.Fprintf(&b, "delete chain ip kube-proxy endpoint-%s__%s/%d\n", name, p.gone, measure.Port)
	return b.String()
}

// command is the command line of a program but nlb, and the signal by which it
// reads its file again; of nft, which is run again, there is none.
func (s *site) command(file string) (argv []string, reload syscall.Signal) {
	program := s.programs[s.program]
	switch s.program {
	case part.HAProxy:
		return peers.HAProxy{}.Command(program, file), unix.SIGUSR2
	case part.Nginx:
		return peers.Nginx{}.Command(program, file), unix.SIGHUP
	}
	return []string{program, "-f", file}, 0
}
