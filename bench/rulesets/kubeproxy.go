package rulesets

import (
	"fmt"
	"net/netip"
	"strings"
)

// A Cluster is what kube-proxy knows beside services.
type Cluster struct {
	// Pods are the addresses whose flows kube-proxy sends on as they are. It
	// masquerades those of everybody else.
	Pods netip.Prefix
	// Services has the addresses of all services.
	Services netip.Prefix
	// Node is the host's own address, for node ports, of which there are none.
	Node netip.Addr
}

// KubeProxy is what kube-proxy's nftables mode writes for so many services of
// the type ClusterIP, each of which has chains of its own for all the targets:
// len(services) * (1 + len(targets.Addresses)) chains. The tables, maps, hooks,
// priorities and rules are those that kubernetes/kubernetes has in
// pkg/proxy/nftables (README.md, and baseRules in proxier_test.go), only without
// the hashes in the names of chains.
func KubeProxy(services []Service, targets Targets, c Cluster) string {
	var b strings.Builder
	b.WriteString(strings.NewReplacer("SERVICES", c.Services.String(), "NODE", c.Node.String()).Replace(kubeProxyBase))
	seen := make(map[netip.Addr]bool)
	for i := range services {
		s := &services[i]
		if a := s.Address.Addr(); !seen[a] {
			seen[a] = true
			fmt.Fprintf(&b, "add element ip kube-proxy cluster-ips { %s }\n", a)
		}
		kubeProxyService(&b, s, fmt.Sprintf("bench/s%d/%s/p%d", i, s.Protocol, s.Address.Port()), &targets, c.Pods)
	}
	return b.String()
}

// kubeProxyService writes the chains of one service.
func kubeProxyService(b *strings.Builder, s *Service, name string, targets *Targets, pods netip.Prefix) {
	choices := make([]string, len(targets.Addresses))
	for i, a := range targets.Addresses {
		chain := fmt.Sprintf("endpoint-%s__%s/%d", name, a, targets.Port)
		choices[i] = fmt.Sprintf("%d : goto %s", i, chain)
		fmt.Fprintf(b, "add chain ip kube-proxy %s\n", chain)
		fmt.Fprintf(b, "add rule ip kube-proxy %s ip saddr %s jump mark-for-masquerade\n", chain, a)
		fmt.Fprintf(b, "add rule ip kube-proxy %s meta l4proto %s dnat to %s\n", chain, s.Protocol, netip.AddrPortFrom(a, targets.Port))
	}
	chain := "service-" + name
	fmt.Fprintf(b, "add chain ip kube-proxy %s\n", chain)
	fmt.Fprintf(b, "add rule ip kube-proxy %s ip daddr %s ip saddr != %s jump mark-for-masquerade\n", chain, s.Address.Addr(), pods)
	fmt.Fprintf(b, "add rule ip kube-proxy %s numgen random mod %d vmap { %s }\n", chain, len(choices), strings.Join(choices, ", "))
	fmt.Fprintf(b, "add element ip kube-proxy service-ips { %s . %s . %d : goto %s }\n", s.Address.Addr(), s.Protocol, s.Address.Port(), chain)
}

// kubeProxyBase is there without any service.
const kubeProxyBase = `add table ip kube-proxy { comment "rules for kube-proxy"; }
add set ip kube-proxy cluster-ips { type ipv4_addr; comment "Active ClusterIPs"; }
add set ip kube-proxy nodeport-ips { type ipv4_addr; comment "IPs that accept NodePort traffic"; }
add map ip kube-proxy firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict; comment "destinations that are subject to LoadBalancerSourceRanges"; }
add map ip kube-proxy no-endpoint-nodeports { type inet_proto . inet_service : verdict; comment "vmap to drop or reject packets to service nodeports with no endpoints"; }
add map ip kube-proxy no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; comment "vmap to drop or reject packets to services with no endpoints"; }
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict; comment "ClusterIP, ExternalIP and LoadBalancer IP traffic"; }
add map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict; comment "NodePort traffic"; }
add chain ip kube-proxy cluster-ips-check
add chain ip kube-proxy filter-prerouting-pre-dnat { type filter hook prerouting priority -110; }
add chain ip kube-proxy filter-output-pre-dnat { type filter hook output priority -110; }
add chain ip kube-proxy filter-forward { type filter hook forward priority 0; }
add chain ip kube-proxy filter-input { type filter hook input priority 0; }
add chain ip kube-proxy filter-output { type filter hook output priority 0; }
add chain ip kube-proxy firewall-check
add chain ip kube-proxy mark-for-masquerade
add chain ip kube-proxy masquerading
add chain ip kube-proxy nat-output { type nat hook output priority -100; }
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority 100; }
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100; }
add chain ip kube-proxy nodeport-endpoints-check
add chain ip kube-proxy reject-chain { comment "helper for @no-endpoint-services / @no-endpoint-nodeports"; }
add chain ip kube-proxy services
add chain ip kube-proxy service-endpoints-check
add rule ip kube-proxy cluster-ips-check ip daddr @cluster-ips reject comment "Reject traffic to invalid ports of ClusterIPs"
add rule ip kube-proxy cluster-ips-check ip daddr { SERVICES } drop comment "Drop traffic to unallocated ClusterIPs"
add rule ip kube-proxy filter-prerouting-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-forward ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump cluster-ips-check
add rule ip kube-proxy filter-input ct state new jump nodeport-endpoints-check
add rule ip kube-proxy filter-input ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-output ct state new jump cluster-ips-check
add rule ip kube-proxy firewall-check ip daddr . meta l4proto . th dport vmap @firewall-ips
add rule ip kube-proxy mark-for-masquerade mark set mark or 0x4000
add rule ip kube-proxy masquerading mark and 0x4000 == 0 return
add rule ip kube-proxy masquerading mark set mark xor 0x4000
add rule ip kube-proxy masquerading masquerade fully-random
add rule ip kube-proxy nat-output jump services
add rule ip kube-proxy nat-postrouting jump masquerading
add rule ip kube-proxy nat-prerouting jump services
add rule ip kube-proxy nodeport-endpoints-check ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
add rule ip kube-proxy reject-chain reject
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add rule ip kube-proxy services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
add element ip kube-proxy nodeport-ips { NODE }
add rule ip kube-proxy service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services
`
