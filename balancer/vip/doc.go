// Package vip binds VIPs to interfaces and tells the neighbours.
//
//	Withdrawer   before the dataplane changes: removes our addresses that are
//	             no longer wanted, while the dataplane still guards them
//	Announcer    after the dataplane changed: adds the wanted addresses, then
//	             sends gratuitous ARP or unsolicited neighbour advertisements
//
// # What an address of ours looks like
//
//	inet  198.51.100.10/32 scope host metric 7236706 proto 0x6e eth0:nlb
//	inet6 2001:db8::10/128 scope global deprecated nodad noprefixroute metric 7236706 proto 0x6e
//
// The address protocol ([Protocol], rtnetlink attribute IFA_PROTO, Linux 5.18)
// says that an address is ours, so that a restart or `nlb clear` recognises it.
// Older kernels drop that attribute silently; there the metric says it
// ([Metric], IFA_RT_PRIORITY, Linux 4.18). The metric is that of the prefix
// route, and a host prefix has none in IPv4 and is told to have none in IPv6,
// so it is free to carry a mark. The label, where the kernel has room for it,
// only keeps old programs from taking the VIP for the interface's address. ip(8) shows the metric since iproute2 4.18,
// the protocol since 6.4.
//
// An address that somebody else put on the interface serves as well, whatever
// its prefix length. It is left alone, and never removed.
//
// # A VIP is no source address
//
// Connections that the balancer opens by itself must not come from a VIP: a
// target that carries the VIP too would drop them.
//
//   - IPv4 gets scope host. The kernel chooses sources for unicast routes among
//     addresses of scope link or wider (inet_select_addr), so a VIP is never
//     chosen, not even as the only address of the interface. Answering does not
//     depend on the scope, with one exception: arp_ignore=3 on the interface
//     asks the kernel not to answer ARP for addresses of scope host.
//   - IPv6 has no such scope. The address is deprecated from the start
//     (preferred_lft 0, RFC 4862 section 5.5.4): it accepts connections, and
//     source address selection avoids it (RFC 6724 rule 3) as long as the host
//     has another global address.
//
// IPv6 addresses skip duplicate address detection (nodad): a VIP that moves
// here from a peer must answer at once, and a peer that has not let go yet must
// not make it unusable. For the same reason IPv4 is not probed (RFC 5227).
package vip
