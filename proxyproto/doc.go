// Package proxyproto writes PROXY protocol headers, version 2, of TCP
// connections: how a target that sees the balancer's address learns the
// client's. Sections in comments are those of HAProxy's
// https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt.
//
// A header is the first thing on a connection, in front of what the client
// sends, and there is exactly one:
//
//	 0        12   13   14       16
//	+---------+----+----+--------+-----------------------------+------+
//	|signature|0x21| fam| length | src, dst, src port, dst port| TLVs |
//	+---------+----+----+--------+-----------------------------+------+
//	                              12 bytes (IPv4) or 36 (IPv6)
//
// The TLVs are, in this order, PP2_TYPE_CRC32C and PP2_TYPE_UNIQUE_ID, each only
// if asked for. A Network Load Balancer also puts the checksum first; its sample
// headers (github.com/aws/elastic-load-balancing-tools, proprot) go on with
// PP2_TYPE_AWS (0xEA), which names the VPC endpoint that the connection came
// through, and end with PP2_TYPE_NOOP as padding. Neither is sent here: there is
// no endpoint to name, a made-up one could pass a target's check of who may come
// in, and padding has no use, for the length field says where a header ends.
//
// Package verify asks a target whether it understands such a header, and
// package relay sends it.
package proxyproto
