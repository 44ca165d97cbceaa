// Package rulesets has nftables rulesets that nlb is compared with: the smallest
// that do the job, and those of kube-proxy's nftables mode. They are text for
// nft -f, of IPv4 addresses only.
package rulesets

import (
	"fmt"
	"net/netip"
	"strings"
)

// A Protocol is one that has ports, in nft's words.
type Protocol string

const (
	TCP Protocol = "tcp"
	UDP Protocol = "udp"
)

// A Service is what clients connect to.
type Service struct {
	Protocol Protocol
	Address  netip.AddrPort
}

// Services are those of n ports of an address, from a first one upwards, for
// each of the protocols. It is for the caller that there are so many ports.
func Services(at netip.AddrPort, n int, protocols ...Protocol) []Service {
	var services []Service
	for i := range n {
		for _, p := range protocols {
			services = append(services, Service{p, netip.AddrPortFrom(at.Addr(), at.Port()+uint16(i))})
		}
	}
	return services
}

// Targets are where the flows of a service go, to each as many, and the one port
// that all have.
type Targets struct {
	Addresses []netip.Addr
	Port      uint16
}

// MinimalDNAT is the smallest ruleset that sends the flows of all services to the
// same targets: a rule for each address and protocol, that chooses by a hash of
// the client's address and port. There is one service at least, and one target.
func MinimalDNAT(services []Service, targets Targets) string {
	var b strings.Builder
	b.WriteString("table ip minimal {\n\tchain prerouting {\n\t\ttype nat hook prerouting priority dstnat\n")
	for _, g := range gather(services) {
		fmt.Fprintf(&b, "\t\tip daddr %s %s dport %s dnat to jhash ip saddr . %[2]s sport mod %[4]d map { %[5]s }:%[6]d\n",
			g.address, g.protocol, g.match(), len(targets.Addresses), targets.choices(), targets.Port)
	}
	b.WriteString("\t}\n}\n")
	return b.String()
}

// MinimalSNAT is MinimalDNAT, and targets see the balancer's address.
func MinimalSNAT(services []Service, targets Targets) string {
	return MinimalDNAT(services, targets) + `table ip minimal {
	chain postrouting {
		type nat hook postrouting priority srcnat
		ct status dnat masquerade
	}
}
`
}

// choices are the elements of a map from a number to a target.
func (t *Targets) choices() string {
	choices := make([]string, len(t.Addresses))
	for i, a := range t.Addresses {
		choices[i] = fmt.Sprintf("%d : %s", i, a)
	}
	return strings.Join(choices, ", ")
}

// A group is the services that one rule can have.
type group struct {
	address  netip.Addr
	protocol Protocol
	ports    []string
}

// gather keeps the order in which groups are met first.
func gather(services []Service) []*group {
	type key struct {
		address  netip.Addr
		protocol Protocol
	}
	var all []*group
	known := make(map[key]*group)
	for _, s := range services {
		k := key{s.Address.Addr(), s.Protocol}
		g := known[k]
		if g == nil {
			g = &group{address: k.address, protocol: k.protocol}
			known[k], all = g, append(all, g)
		}
		g.ports = append(g.ports, fmt.Sprint(s.Address.Port()))
	}
	return all
}

// match is a port, or a set, which costs a look-up.
func (g *group) match() string {
	if len(g.ports) == 1 {
		return g.ports[0]
	}
	return "{ " + strings.Join(g.ports, ", ") + " }"
}
