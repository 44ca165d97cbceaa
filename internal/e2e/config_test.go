package e2e

import (
	"net/netip"

	"go.yaml.in/yaml/v3"

	"nlb/bench/lab"
)

// A config is a configuration file. Its zero values are left out of the file,
// so that what the program makes of their absence is tested too.
type config struct {
	Sources   []netip.Addr   `yaml:"source_addresses,omitempty"`
	Relay     map[string]any `yaml:"relay,omitempty"`
	VIPs      []vip          `yaml:"vips"`
	Metrics   metrics        `yaml:"metrics"`
	Listeners []listener     `yaml:"listeners"`
	Groups    []group        `yaml:"target_groups"`
}

type metrics struct {
	Address string `yaml:"address"` // off when empty
}

type vip struct {
	Address   netip.Addr `yaml:"address"`
	Interface string     `yaml:"interface,omitempty"`
}

type listener struct {
	Name     string    `yaml:"name"`
	VIP      string    `yaml:"vip"`
	Protocol string    `yaml:"protocol"`
	Port     uint16    `yaml:"port"`
	Forward  []forward `yaml:"forward"`
	Idle     string    `yaml:"tcp_idle_timeout,omitempty"`
	Allow    []string  `yaml:"allow,omitempty"`

	SYNProxy     map[string]any `yaml:"syn_proxy,omitempty"`
	MaxPerSource int            `yaml:"max_connections_per_source,omitempty"`
	SourcePrefix int            `yaml:"source_prefix_length,omitempty"`
}

type forward struct {
	Group  string `yaml:"target_group"`
	Weight int    `yaml:"weight"`
}

type group struct {
	Name          string         `yaml:"name"`
	Protocol      string         `yaml:"protocol"`
	Port          uint16         `yaml:"port"`
	ClientIP      string         `yaml:"client_ip"`
	AvoidSelf     bool           `yaml:"avoid_self,omitempty"`
	HairpinSubnet bool           `yaml:"hairpin_subnet,omitempty"`
	Stickiness    string         `yaml:"stickiness,omitempty"`
	Deregister    map[string]any `yaml:"deregistration_delay,omitempty"`
	Unhealthy     map[string]any `yaml:"unhealthy,omitempty"`
	FailOpen      map[string]any `yaml:"fail_open,omitempty"`
	HealthCheck   map[string]any `yaml:"health_check"`
	Passive       map[string]any `yaml:"passive_health_check,omitempty"`
	Header        map[string]any `yaml:"proxy_protocol,omitempty"`
	Targets       []target       `yaml:"targets"`
}

type target struct {
	Address   netip.Addr `yaml:"address"`
	Port      uint16     `yaml:"port,omitempty"`
	Weight    *int       `yaml:"weight,omitempty"`
	ClientIP  string     `yaml:"client_ip,omitempty"`
	Colocated []string   `yaml:"colocated,omitempty"`
}

// weighed is the target with a weight.
func (t target) weighed(w int) target {
	t.Weight = &w
	return t
}

// String is the file.
func (c config) String() string {
	text, err := yaml.Marshal(c)
	if err != nil {
		panic(err) // of these types there is nothing that YAML cannot say
	}
	return string(text)
}

// both are the lab's VIPs, bound on lo.
func both() []vip {
	return []vip{{lab.VIP4, "lo"}, {lab.VIP6, "lo"}}
}

// sources are the balancer's addresses on the side of the targets.
func sources(top *lab.Topology) []netip.Addr {
	return []netip.Addr{top.LB.Addr4, top.LB.Addr6}
}

// quick is the fastest health check there is.
func quick() map[string]any {
	return map[string]any{"interval": "1s", "timeout": "1s", "healthy_threshold": 1, "unhealthy_threshold": 2}
}

// patient is a health check that bears with a busy machine, and with a while
// without answers.
func patient() map[string]any {
	return map[string]any{"interval": "5s", "timeout": "5s", "healthy_threshold": 1, "unhealthy_threshold": 10}
}

// to is a forward to one group.
func to(group string) []forward { return []forward{{group, 1}} }

// listen is a listener on both VIPs, as NAME4 and NAME6, for one group.
func listen(name, protocol string, port uint16, group string) []listener {
	var both []listener
	for _, f := range families {
		both = append(both, listener{Name: name + f.name, VIP: f.vip.String(), Protocol: protocol, Port: port, Forward: to(group)})
	}
	return both
}

// targets are the nodes by both of their addresses.
func targets(nodes ...*lab.Node) []target {
	var all []target
	for _, f := range families {
		for _, n := range nodes {
			all = append(all, target{Address: f.addr(n)})
		}
	}
	return all
}

// pool is a group with a quick health check.
func pool(name, protocol, mode string, port uint16, of []target) group {
	return group{Name: name, Protocol: protocol, Port: port, ClientIP: mode, HealthCheck: quick(), Targets: of}
}

// A family is what differs between IPv4 and IPv6.
type family struct {
	name string // as it ends names: "4" or "6"
	vip  netip.Addr
	addr func(*lab.Node) netip.Addr
}

var families = []family{
	{"4", lab.VIP4, func(n *lab.Node) netip.Addr { return n.Addr4 }},
	{"6", lab.VIP6, func(n *lab.Node) netip.Addr { return n.Addr6 }},
}

// version is the family in the words of conntrack(8): ipv4 or ipv6.
func (f family) version() string { return "ipv" + f.name }

// at is a port of the family's VIP.
func (f family) at(port uint16) netip.AddrPort { return netip.AddrPortFrom(f.vip, port) }
