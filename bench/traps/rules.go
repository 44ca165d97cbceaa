package traps

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"nlb/bench/lab"
)

// naiveTable is the one table of naive rules that a node has. Another name than
// nlb's, which owns its own.
const naiveTable = "naive"

// A naiveRule is what somebody would write by hand, in IPv4.
type naiveRule struct {
	proto    uint8 // unix.IPPROTO_TCP or UDP
	from     netip.AddrPort
	to       netip.AddrPort
	notSaddr netip.Addr // spare packets with this source; zero: none
}

// String is the rule as nft(8) prints it.
func (r naiveRule) String() string {
	proto := "tcp"
	if r.proto == unix.IPPROTO_UDP {
		proto = "udp"
	}
	spare := ""
	if r.notSaddr.IsValid() {
		spare = fmt.Sprintf("ip saddr != %v ", r.notSaddr)
	}
	return fmt.Sprintf("%sip daddr %v %s dport %d dnat to %v", spare, r.from.Addr(), proto, r.from.Port(), r.to)
}

// dnat makes rules the only ones of the node's naive table, for packets from
// outside and for those of the node itself.
func dnat(n *lab.Node, rules ...naiveRule) error {
	var b batch
	b.table(unix.NFT_MSG_NEWTABLE) // so that the deletion finds one
	b.table(unix.NFT_MSG_DELTABLE)
	b.table(unix.NFT_MSG_NEWTABLE)
	for name, hook := range map[string]uint32{"prerouting": unix.NF_INET_PRE_ROUTING, "output": unix.NF_INET_LOCAL_OUT} {
		b.natChain(name, hook, -100) // NF_IP_PRI_NAT_DST
		for _, r := range rules {
			b.rule(name, r.expressions())
		}
	}
	return b.send(n)
}

// masquerade gives what leaves a node by an interface the node's own address
// there.
func masquerade(n *lab.Node, iface string) error {
	var b batch
	b.table(unix.NFT_MSG_NEWTABLE)
	b.natChain("postrouting", unix.NF_INET_POST_ROUTING, 100) // NF_IP_PRI_NAT_SRC
	b.rule("postrouting", append(onInterface(unix.NFT_META_OIFNAME, iface), expression("masq", func(*netlink.AttributeEncoder) {})))
	return b.send(n)
}

// restoreMark remembers of each flow that it came by the interface from, and
// marks the packets of these flows that come by the interface back, before they
// are routed:
//
//	iifname from ct mark set mark
//	iifname back meta mark set ct mark
func restoreMark(n *lab.Node, from, back string, mark uint32) error {
	var b batch
	b.table(unix.NFT_MSG_NEWTABLE)
	b.chain("prerouting", "filter", unix.NF_INET_PRE_ROUTING, -150) // NF_IP_PRI_MANGLE
	b.rule("prerouting", append(onInterface(unix.NFT_META_IIFNAME, from),
		immediate(unix.NFT_REG_1, binary.NativeEndian.AppendUint32(nil, mark)),
		expression("ct", func(a *netlink.AttributeEncoder) {
			a.Uint32(unix.NFTA_CT_KEY, unix.NFT_CT_MARK)
			a.Uint32(unix.NFTA_CT_SREG, unix.NFT_REG_1)
		})))
	b.rule("prerouting", append(onInterface(unix.NFT_META_IIFNAME, back),
		expression("ct", func(a *netlink.AttributeEncoder) {
			a.Uint32(unix.NFTA_CT_KEY, unix.NFT_CT_MARK)
			a.Uint32(unix.NFTA_CT_DREG, unix.NFT_REG_1)
		}),
		expression("meta", func(a *netlink.AttributeEncoder) {
			a.Uint32(unix.NFTA_META_KEY, unix.NFT_META_MARK)
			a.Uint32(unix.NFTA_META_SREG, unix.NFT_REG_1)
		})))
	return b.send(n)
}

// onInterface matches the name of an interface: key is unix.NFT_META_IIFNAME or
// its like.
func onInterface(key uint32, name string) [][]byte {
	padded := make([]byte, unix.IFNAMSIZ)
	copy(padded, name)
	return [][]byte{
		expression("meta", func(a *netlink.AttributeEncoder) {
			a.Uint32(unix.NFTA_META_KEY, key)
			a.Uint32(unix.NFTA_META_DREG, unix.NFT_REG_1)
		}),
		compare(unix.NFT_CMP_EQ, padded),
	}
}

// removeRules removes the naive table.
func removeRules(n *lab.Node) error {
	var b batch
	b.table(unix.NFT_MSG_NEWTABLE)
	b.table(unix.NFT_MSG_DELTABLE)
	return b.send(n)
}

// expressions is the rule in nf_tables' own terms (linux/netfilter/nf_tables.h).
func (r naiveRule) expressions() [][]byte {
	var list [][]byte
	if r.notSaddr.IsValid() {
		list = append(list, loadPayload(unix.NFT_PAYLOAD_NETWORK_HEADER, 12, 4), compare(unix.NFT_CMP_NEQ, r.notSaddr.AsSlice()))
	}
	to := r.to.Addr().AsSlice()
	return append(list,
		loadPayload(unix.NFT_PAYLOAD_NETWORK_HEADER, 16, 4), compare(unix.NFT_CMP_EQ, r.from.Addr().AsSlice()),
		loadPayload(unix.NFT_PAYLOAD_NETWORK_HEADER, 9, 1), compare(unix.NFT_CMP_EQ, []byte{r.proto}),
		loadPayload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2), compare(unix.NFT_CMP_EQ, portBytes(r.from.Port())),
		immediate(unix.NFT_REG_1, to), immediate(unix.NFT_REG_2, portBytes(r.to.Port())),
		expression("nat", func(a *netlink.AttributeEncoder) {
			a.Uint32(unix.NFTA_NAT_TYPE, unix.NFT_NAT_DNAT)
			a.Uint32(unix.NFTA_NAT_FAMILY, unix.NFPROTO_IPV4)
			a.Uint32(unix.NFTA_NAT_REG_ADDR_MIN, unix.NFT_REG_1)
			a.Uint32(unix.NFTA_NAT_REG_PROTO_MIN, unix.NFT_REG_2)
		}),
	)
}

func portBytes(port uint16) []byte { return binary.BigEndian.AppendUint16(nil, port) }

func loadPayload(base, offset, length uint32) []byte {
	return expression("payload", func(a *netlink.AttributeEncoder) {
		a.Uint32(unix.NFTA_PAYLOAD_DREG, unix.NFT_REG_1)
		a.Uint32(unix.NFTA_PAYLOAD_BASE, base)
		a.Uint32(unix.NFTA_PAYLOAD_OFFSET, offset)
		a.Uint32(unix.NFTA_PAYLOAD_LEN, length)
	})
}

func compare(op uint32, value []byte) []byte {
	return expression("cmp", func(a *netlink.AttributeEncoder) {
		a.Uint32(unix.NFTA_CMP_SREG, unix.NFT_REG_1)
		a.Uint32(unix.NFTA_CMP_OP, op)
		a.Nested(unix.NFTA_CMP_DATA, func(a *netlink.AttributeEncoder) error {
			a.Bytes(unix.NFTA_DATA_VALUE, value)
			return nil
		})
	})
}

func immediate(register uint32, value []byte) []byte {
	return expression("immediate", func(a *netlink.AttributeEncoder) {
		a.Uint32(unix.NFTA_IMMEDIATE_DREG, register)
		a.Nested(unix.NFTA_IMMEDIATE_DATA, func(a *netlink.AttributeEncoder) error {
			a.Bytes(unix.NFTA_DATA_VALUE, value)
			return nil
		})
	})
}

func expression(name string, data func(*netlink.AttributeEncoder)) []byte {
	return encode(func(a *netlink.AttributeEncoder) {
		a.String(unix.NFTA_EXPR_NAME, name)
		a.Nested(unix.NFTA_EXPR_DATA, func(a *netlink.AttributeEncoder) error {
			data(a)
			return nil
		})
	})
}

// encode returns attributes, whose numbers nf_tables has in network order.
func encode(fill func(*netlink.AttributeEncoder)) []byte {
	a := netlink.NewAttributeEncoder()
	a.ByteOrder = binary.BigEndian
	fill(a)
	b, err := a.Encode()
	if err != nil {
		panic(fmt.Sprint("traps: encode a rule: ", err)) // too long for an attribute: none is
	}
	return b
}

// A batch is one transaction of nf_tables.
type batch struct{ messages []netlink.Message }

func (b *batch) put(kind netlink.HeaderType, flags netlink.HeaderFlags, family uint8, resource uint16, attrs []byte) {
	// struct nfgenmsg (linux/netfilter/nfnetlink.h).
	data := append([]byte{family, unix.NFNETLINK_V0}, portBytes(resource)...)
	b.messages = append(b.messages, netlink.Message{
		Header: netlink.Header{Type: kind, Flags: netlink.Request | flags},
		Data:   append(data, attrs...),
	})
}

func (b *batch) change(message uint16, flags netlink.HeaderFlags, fill func(*netlink.AttributeEncoder)) {
	kind := netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | message)
	b.put(kind, flags, unix.NFPROTO_IPV4, 0, encode(fill))
}

func (b *batch) table(message uint16) {
	flags := netlink.HeaderFlags(0)
	if message == unix.NFT_MSG_NEWTABLE {
		flags = netlink.Create
	}
	b.change(message, flags, func(a *netlink.AttributeEncoder) { a.String(unix.NFTA_TABLE_NAME, naiveTable) })
}

func (b *batch) natChain(name string, hook uint32, priority int32) {
	b.chain(name, "nat", hook, priority)
}

func (b *batch) chain(name, kind string, hook uint32, priority int32) {
	b.change(unix.NFT_MSG_NEWCHAIN, netlink.Create, func(a *netlink.AttributeEncoder) {
		a.String(unix.NFTA_CHAIN_TABLE, naiveTable)
		a.String(unix.NFTA_CHAIN_NAME, name)
		a.String(unix.NFTA_CHAIN_TYPE, kind)
		a.Nested(unix.NFTA_CHAIN_HOOK, func(a *netlink.AttributeEncoder) error {
			a.Uint32(unix.NFTA_HOOK_HOOKNUM, hook)
			a.Uint32(unix.NFTA_HOOK_PRIORITY, uint32(priority))
			return nil
		})
	})
}

func (b *batch) rule(chain string, expressions [][]byte) {
	b.change(unix.NFT_MSG_NEWRULE, netlink.Create|netlink.Append, func(a *netlink.AttributeEncoder) {
		a.String(unix.NFTA_RULE_TABLE, naiveTable)
		a.String(unix.NFTA_RULE_CHAIN, chain)
		a.Nested(unix.NFTA_RULE_EXPRESSIONS, func(a *netlink.AttributeEncoder) error {
			for _, e := range expressions {
				a.Bytes(unix.NLA_F_NESTED|unix.NFTA_LIST_ELEM, e)
			}
			return nil
		})
	})
}

// send carries the batch out on the node: all of it, or nothing and an error.
func (b *batch) send(n *lab.Node) error {
	changes := b.messages
	// The last change's answer comes after those of all that failed before it.
	changes[len(changes)-1].Header.Flags |= netlink.Acknowledge
	var framed batch
	framed.put(unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, nil)
	framed.messages = append(framed.messages, changes...)
	framed.put(unix.NFNL_MSG_BATCH_END, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, nil)
	err := n.Do(func() (err error) {
		c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, c.Close()) }()
		if _, err := c.SendMessages(framed.messages); err != nil {
			return err
		}
		_, err = c.Receive()
		return err
	})
	if err != nil {
		return fmt.Errorf("traps: %s: table ip %s: %w", n.Name, naiveTable, err)
	}
	return nil
}
