// Package host knows the host's own networking: which way it would reach a
// target ([Router]), and the sysctls that balancing depends on ([Sysctls]).
//
// # Sysctls
//
// These are set when they differ, and only then are they ours to restore:
//
//	net.ipv4.ip_forward=1                        IPv4 targets
//	net.ipv4.conf.{all,EGRESS}.send_redirects=0  IPv4 targets: on one arm, a redirect
//	                                             would send their replies past us
//	net.ipv6.conf.EGRESS.accept_ra=2             IPv6 targets, where the default route
//	                                             comes from router advertisements
//	net.ipv6.conf.all.forwarding=1               IPv6 targets
//	net.netfilter.nf_conntrack_acct=1            bytes per target
//
// ICMPv6 redirects have no such switch. net.ipv4.conf.*.route_localnet is never
// touched.
//
// What a setting was before is written to sysctls.json in the state directory
// first, so that it is known even if we are killed between the two. A value
// that somebody changed since then is theirs and stays.
package host
