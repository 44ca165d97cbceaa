package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

// A Rule is a list of expressions as the kernel stores them, and the same in
// nft's language.
type Rule struct {
	exprs attrs  // NFTA_LIST_ELEM...
	Text  string // as nft(8) would print it
}

// A reg is one of the sixteen 32-bit registers of nf_tables.
type reg uint32

// number is the register as the kernel dumps it: the first of each four has a
// number of the old 128-bit set (nft_dump_register in nf_tables_api.c).
func (r reg) number() uint32 {
	if r%4 == 0 {
		return unix.NFT_REG_1 + uint32(r)/4
	}
	return unix.NFT_REG32_00 + uint32(r)
}

// A ruleBuilder writes expressions and their text side by side. Each method
// names the nft phrase it stands for.
type ruleBuilder struct {
	exprs attrs
	words []string
}

func (b *ruleBuilder) rule() Rule { return Rule{b.exprs, strings.Join(b.words, " ")} }

func (b *ruleBuilder) say(format string, args ...any) {
	if len(args) == 0 {
		b.words = append(b.words, format)
		return
	}
	b.words = append(b.words, fmt.Sprintf(format, args...))
}

// bare is an expression that the kernel dumps without any data.
func (b *ruleBuilder) bare(name string) {
	elem := b.exprs.open(unix.NFTA_LIST_ELEM)
	b.exprs.str(unix.NFTA_EXPR_NAME, name)
	b.exprs.close(elem)
}

func (b *ruleBuilder) expr(name string, fill func(*attrs)) {
	elem := b.exprs.open(unix.NFTA_LIST_ELEM)
	b.exprs.str(unix.NFTA_EXPR_NAME, name)
	data := b.exprs.open(unix.NFTA_EXPR_DATA)
	fill(&b.exprs)
	b.exprs.close(data)
	b.exprs.close(elem)
}

// A family is what differs between IPv4 and IPv6 in our rules.
type family struct {
	name      string // "4" or "6", the suffix of sets and chains
	ip        string // nft's keyword for the header
	nfproto   uint8
	addrType  uint32
	addrRegs  int // 32-bit registers an address takes
	srcOffset uint32
	dstOffset uint32
	ctDst     uint32
	bits      int
}

var (
	ip4 = &family{"4", "ip", unix.NFPROTO_IPV4, typeIPv4, 1, 12, 16, unix.NFT_CT_DST_IP, 32}
	ip6 = &family{"6", "ip6", unix.NFPROTO_IPV6, typeIPv6, 4, 8, 24, unix.NFT_CT_DST_IP6, 128}

	families = []*family{ip4, ip6}
)

func familyOf(a netip.Addr) *family {
	if a.Is4() {
		return ip4
	}
	return ip6
}

// Data types of nft userland (include/datatype.h of nftables), by which nft
// prints sets. A concatenation packs six bits for each field.
const (
	typeVerdict = 1
	typeIPv4    = 7
	typeIPv6    = 8
	typeProto   = 12
	typeService = 13
	typeMark    = 19
	typeInteger = 4
	typeBits    = 6
)

func concat(types ...uint32) (t uint32) {
	for _, x := range types {
		t = t<<typeBits | x
	}
	return t
}

// --- loads -----------------------------------------------------------------

func (b *ruleBuilder) payload(base, offset, length uint32, to reg) {
	b.expr("payload", func(a *attrs) {
		a.u32(unix.NFTA_PAYLOAD_DREG, to.number())
		a.u32(unix.NFTA_PAYLOAD_BASE, base)
		a.u32(unix.NFTA_PAYLOAD_OFFSET, offset)
		a.u32(unix.NFTA_PAYLOAD_LEN, length)
	})
}

func (b *ruleBuilder) loadSource(f *family, to reg) {
	b.payload(unix.NFT_PAYLOAD_NETWORK_HEADER, f.srcOffset, uint32(4*f.addrRegs), to)
}

func (b *ruleBuilder) loadDest(f *family, to reg) {
	b.payload(unix.NFT_PAYLOAD_NETWORK_HEADER, f.dstOffset, uint32(4*f.addrRegs), to)
}

func (b *ruleBuilder) loadSourcePort(to reg) { b.payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 0, 2, to) }
func (b *ruleBuilder) loadDestPort(to reg)   { b.payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2, to) }

func (b *ruleBuilder) loadMeta(key uint32, to reg) {
	b.expr("meta", func(a *attrs) {
		a.u32(unix.NFTA_META_KEY, key)
		a.u32(unix.NFTA_META_DREG, to.number())
	})
}

func (b *ruleBuilder) loadCT(key uint32, to reg) {
	b.expr("ct", func(a *attrs) {
		a.u32(unix.NFTA_CT_KEY, key)
		a.u32(unix.NFTA_CT_DREG, to.number())
	})
}

// loadCTOriginal loads a field of the flow's first packet before any rewriting.
func (b *ruleBuilder) loadCTOriginal(key uint32, to reg) {
	b.expr("ct", func(a *attrs) {
		a.u32(unix.NFTA_CT_KEY, key)
		a.u32(unix.NFTA_CT_DREG, to.number())
		a.u8(unix.NFTA_CT_DIRECTION, 0)
	})
}

// --- comparisons -----------------------------------------------------------

func (b *ruleBuilder) cmp(op uint32, from reg, value []byte) {
	b.expr("cmp", func(a *attrs) {
		a.u32(unix.NFTA_CMP_SREG, from.number())
		a.u32(unix.NFTA_CMP_OP, op)
		a.nest(unix.NFTA_CMP_DATA, func(a *attrs) { a.put(unix.NFTA_DATA_VALUE, value) })
	})
}

// bitwise is (reg & mask) ^ xor in place, all in host order.
func (b *ruleBuilder) bitwise(r reg, mask, xor []byte) {
	b.expr("bitwise", func(a *attrs) {
		a.u32(unix.NFTA_BITWISE_SREG, r.number())
		a.u32(unix.NFTA_BITWISE_DREG, r.number())
		a.u32(unix.NFTA_BITWISE_LEN, uint32(len(mask)))
		a.nest(unix.NFTA_BITWISE_MASK, func(a *attrs) { a.put(unix.NFTA_DATA_VALUE, mask) })
		a.nest(unix.NFTA_BITWISE_XOR, func(a *attrs) { a.put(unix.NFTA_DATA_VALUE, xor) })
	})
}

func native32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

// family matches the packets of one address family; nft leaves it unsaid where
// a header keyword implies it.
func (b *ruleBuilder) family(f *family) {
	b.loadMeta(unix.NFT_META_NFPROTO, 0)
	b.cmp(unix.NFT_CMP_EQ, 0, []byte{f.nfproto})
}

func (b *ruleBuilder) l4proto(proto uint8) {
	b.loadMeta(unix.NFT_META_L4PROTO, 0)
	b.cmp(unix.NFT_CMP_EQ, 0, []byte{proto})
	b.say("meta l4proto %s", protoName(proto))
}

// sourceIs matches packets from a prefix.
func (b *ruleBuilder) sourceIs(f *family, p netip.Prefix) {
	b.loadSource(f, 0)
	addr := p.Addr().AsSlice()
	if !p.IsSingleIP() {
		b.bitwise(0, maskBytes(p.Bits(), len(addr)), make([]byte, len(addr)))
	}
	b.cmp(unix.NFT_CMP_EQ, 0, addr)
	b.say("%s saddr %s", f.ip, prefixText(p))
}

// fromThisHost matches packets that came in by no interface.
func (b *ruleBuilder) fromThisHost() {
	b.loadMeta(unix.NFT_META_IIF, 0)
	b.cmp(unix.NFT_CMP_EQ, 0, native32(0))
	b.say("iif 0")
}

// fromElsewhere matches packets that came in by an interface.
func (b *ruleBuilder) fromElsewhere() {
	b.loadMeta(unix.NFT_META_IIF, 0)
	b.cmp(unix.NFT_CMP_NEQ, 0, native32(0))
	b.say("iif != 0")
}

// notLooped matches packets that came in by another interface than the loopback,
// whose index is always 1 (LOOPBACK_IFINDEX).
func (b *ruleBuilder) notLooped() {
	b.loadMeta(unix.NFT_META_IIF, 0)
	b.cmp(unix.NFT_CMP_NEQ, 0, native32(1))
	b.say("iif != lo")
}

// metaMarkIs matches packets that carry a firewall mark.
func (b *ruleBuilder) metaMarkIs(mark uint32) {
	b.loadMeta(unix.NFT_META_MARK, 0)
	b.cmp(unix.NFT_CMP_EQ, 0, native32(mark))
	b.say("meta mark 0x%08x", mark)
}

// ctMarkHas matches flows whose mark has all of the given bits.
func (b *ruleBuilder) ctMarkHas(bits uint32) {
	b.loadCT(unix.NFT_CT_MARK, 0)
	b.bitwise(0, native32(bits), native32(0))
	b.cmp(unix.NFT_CMP_EQ, 0, native32(bits))
	b.say("ct mark & 0x%08x == 0x%08x", bits, bits)
}

// ctMarkLacks matches flows whose mark has none of the given bits.
func (b *ruleBuilder) ctMarkLacks(bits uint32) {
	b.loadCT(unix.NFT_CT_MARK, 0)
	b.bitwise(0, native32(bits), native32(0))
	b.cmp(unix.NFT_CMP_EQ, 0, native32(0))
	b.say("ct mark & 0x%08x == 0", bits)
}

// ctMarkAny matches flows whose mark has one of the given bits.
func (b *ruleBuilder) ctMarkAny(bits uint32) {
	b.loadCT(unix.NFT_CT_MARK, 0)
	b.bitwise(0, native32(bits), native32(0))
	b.cmp(unix.NFT_CMP_NEQ, 0, native32(0))
	b.say("ct mark & 0x%08x != 0", bits)
}

// ctMarkTarget matches the flows of one target.
func (b *ruleBuilder) ctMarkTarget(number uint16) {
	b.loadCT(unix.NFT_CT_MARK, 0)
	b.bitwise(0, native32(TargetMask), native32(0))
	b.cmp(unix.NFT_CMP_EQ, 0, native32(markOf(number, 0)))
	b.say("ct mark & 0x%08x == 0x%08x", TargetMask, markOf(number, 0))
}

// ctMarkInSet matches flows whose mark, as far as mask shows it, is in the set.
func (b *ruleBuilder) ctMarkInSet(mask uint32, set string) {
	b.loadCT(unix.NFT_CT_MARK, 0)
	b.bitwise(0, native32(mask), native32(0))
	b.inSet(set, 0, false)
	b.say("ct mark & 0x%08x @%s", mask, set)
}

// Bits of the ct state key (NF_CT_STATE_BIT in nf_conntrack_common.h).
const (
	ctInvalid     = 1 << 0
	ctEstablished = 1 << 1
	ctRelated     = 1 << 2
	ctNew         = 1 << 3
	ctUntracked   = 1 << 6
)

func (b *ruleBuilder) ctState(bits uint32, names string) {
	b.loadCT(unix.NFT_CT_STATE, 0)
	b.bitwise(0, native32(bits), native32(0))
	b.cmp(unix.NFT_CMP_NEQ, 0, native32(0))
	b.say("ct state %s", names)
}

// ctReply matches packets of the direction that the flow did not begin in.
func (b *ruleBuilder) ctReply() {
	b.loadCT(unix.NFT_CT_DIRECTION, 0)
	b.cmp(unix.NFT_CMP_EQ, 0, []byte{1})
	b.say("ct direction reply")
}

// ctOriginal matches packets of the direction that the flow began in.
func (b *ruleBuilder) ctOriginal() {
	b.loadCT(unix.NFT_CT_DIRECTION, 0)
	b.cmp(unix.NFT_CMP_EQ, 0, []byte{0})
	b.say("ct direction original")
}

// Bits of the ct status key (IPS_* in nf_conntrack_common.h).
const (
	ctSeenReply = 1 << 1
	ctAssured   = 1 << 2
	ctConfirmed = 1 << 3
)

// ctStatus matches flows that have the status, or with NFT_CMP_EQ those that do
// not.
func (b *ruleBuilder) ctStatus(bit uint32, name string, op uint32) {
	b.loadCT(unix.NFT_CT_STATUS, 0)
	b.bitwise(0, native32(bit), native32(0))
	b.cmp(op, 0, native32(0))
	b.say("ct status & %s %s 0", name, map[uint32]string{unix.NFT_CMP_EQ: "==", unix.NFT_CMP_NEQ: "!="}[op])
}

// ctTCP matches packets of TCP flows, errors about them included.
func (b *ruleBuilder) ctTCP() {
	b.loadCT(unix.NFT_CT_PROTOCOL, 0)
	b.cmp(unix.NFT_CMP_EQ, 0, []byte{unix.IPPROTO_TCP})
	b.say("ct protocol tcp")
}

// icmpTypes matches one inclusive range of ICMP or ICMPv6 types; l4proto must
// have been matched before.
func (b *ruleBuilder) icmpTypes(keyword string, first, last uint8) {
	b.payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 0, 1, 0)
	if first == last {
		b.cmp(unix.NFT_CMP_EQ, 0, []byte{first})
		b.say("%s type %d", keyword, first)
		return
	}
	b.cmp(unix.NFT_CMP_GTE, 0, []byte{first})
	b.cmp(unix.NFT_CMP_LTE, 0, []byte{last})
	b.say("%s type %d-%d", keyword, first, last)
}

// tcpNotRST matches TCP segments that are no resets; l4proto must have been
// matched before.
func (b *ruleBuilder) tcpNotRST() {
	b.payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 13, 1, 0)
	b.bitwise(0, []byte{tcpRST}, []byte{0})
	b.cmp(unix.NFT_CMP_EQ, 0, []byte{0})
	b.say("tcp flags & rst == 0")
}

// tcpHasSYN matches TCP segments with a SYN, whatever else they are; l4proto must
// have been matched before.
func (b *ruleBuilder) tcpHasSYN() {
	b.payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 13, 1, 0)
	b.bitwise(0, []byte{tcpSYN}, []byte{0})
	b.cmp(unix.NFT_CMP_NEQ, 0, []byte{0})
	b.say("tcp flags & syn != 0")
}

// tcpSYN compares a TCP segment's flags with those of the first of a connection.
func (b *ruleBuilder) tcpSYN(op uint32, sign string) { b.tcpFlags(op, tcpSYN, sign+" syn") }

// tcpSYNACK matches the answer to the first segment of a connection.
func (b *ruleBuilder) tcpSYNACK() { b.tcpFlags(unix.NFT_CMP_EQ, tcpSYN|tcpACK, "== syn | ack") }

// tcpRefusal matches resets that answer a segment without ACK, as the first of a
// connection is the only one (RFC 9293, 3.10.7.1).
func (b *ruleBuilder) tcpRefusal() { b.tcpFlags(unix.NFT_CMP_EQ, tcpRST|tcpACK, "== rst | ack") }

const tcpFIN, tcpSYN, tcpRST, tcpACK = 1, 2, 4, 16

func (b *ruleBuilder) tcpFlags(op uint32, flags byte, text string) {
	b.payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 13, 1, 0)
	b.bitwise(0, []byte{tcpFIN | tcpSYN | tcpRST | tcpACK}, []byte{0})
	b.cmp(op, 0, []byte{flags})
	b.say("tcp flags & (fin | syn | rst | ack) %s", text)
}

// --- sets and maps -----------------------------------------------------------

func (b *ruleBuilder) inSet(set string, from reg, invert bool) {
	b.expr("lookup", func(a *attrs) {
		a.str(unix.NFTA_LOOKUP_SET, set)
		a.u32(unix.NFTA_LOOKUP_SREG, from.number())
		flags := uint32(0)
		if invert {
			flags = unix.NFT_LOOKUP_F_INV
		}
		a.u32(unix.NFTA_LOOKUP_FLAGS, flags)
	})
}

func (b *ruleBuilder) lookup(set string, from reg, to uint32) {
	b.expr("lookup", func(a *attrs) {
		a.str(unix.NFTA_LOOKUP_SET, set)
		a.u32(unix.NFTA_LOOKUP_SREG, from.number())
		a.u32(unix.NFTA_LOOKUP_DREG, to)
		a.u32(unix.NFTA_LOOKUP_FLAGS, 0)
	})
}

// vmap ends the rule with the verdict that the map holds for the register.
func (b *ruleBuilder) vmap(set string, from reg) {
	b.lookup(set, from, unix.NFT_REG_VERDICT)
	b.say("vmap @%s", set)
}

func (b *ruleBuilder) sourceInSet(f *family, set string, invert bool) {
	b.family(f)
	b.loadSource(f, 0)
	b.inSet(set, 0, invert)
	b.say("%s saddr %s@%s", f.ip, not(invert), set)
}

func (b *ruleBuilder) destInSet(f *family, set string) {
	b.family(f)
	b.loadDest(f, 0)
	b.inSet(set, 0, false)
	b.say("%s daddr @%s", f.ip, set)
}

func (b *ruleBuilder) destNotInSet(f *family, set string) {
	b.family(f)
	b.loadDest(f, 0)
	b.inSet(set, 0, true)
	b.say("%s daddr != @%s", f.ip, set)
}

func (b *ruleBuilder) originalDestInSet(f *family, set string) {
	b.family(f)
	b.loadCTOriginal(f.ctDst, 0)
	b.inSet(set, 0, false)
	b.say("ct original %s daddr @%s", f.ip, set)
}

// destService loads the address, protocol and port that a packet is for.
func (b *ruleBuilder) destService(f *family) {
	b.family(f)
	b.loadDest(f, 0)
	b.loadMeta(unix.NFT_META_L4PROTO, reg(f.addrRegs))
	b.loadDestPort(reg(f.addrRegs + 1))
	b.say("%s daddr . meta l4proto . th dport", f.ip)
}

// destServiceInSet matches packets to an address and port that is in a set.
func (b *ruleBuilder) destServiceInSet(f *family, set string) {
	b.destService(f)
	b.inSet(set, 0, false)
	b.say("@%s", set)
}

// ownSocket matches packets for a socket that is bound to one address: a
// connection's, or one that listens there.
func (b *ruleBuilder) ownSocket() {
	const socketKey, socketDreg, wildcard = 1, 2, 2 // NFTA_SOCKET_KEY, NFTA_SOCKET_DREG, NFT_SOCKET_WILDCARD
	b.expr("socket", func(a *attrs) {
		a.u32(socketKey, wildcard)
		a.u32(socketDreg, reg(0).number())
	})
	b.cmp(unix.NFT_CMP_EQ, 0, []byte{0})
	b.say("socket wildcard 0")
}

// sourceServiceInSet matches packets from an address and port that is a target.
func (b *ruleBuilder) sourceServiceInSet(f *family, set string) {
	b.family(f)
	b.loadSource(f, 0)
	b.loadMeta(unix.NFT_META_L4PROTO, reg(f.addrRegs))
	b.loadSourcePort(reg(f.addrRegs + 1))
	b.inSet(set, 0, false)
	b.say("%s saddr . meta l4proto . th sport @%s", f.ip, set)
}

func not(invert bool) string {
	if invert {
		return "!= "
	}
	return ""
}

// jhash puts a keyed hash of the flow, scaled to [0, modulus), into register 0:
// of the whole 5-tuple, or of the client's address alone.
func (b *ruleBuilder) jhash(f *family, sticky bool, modulus, seed uint32) {
	const from = reg(4)
	at := from
	b.loadSource(f, at)
	at += reg(f.addrRegs)
	what := f.ip + " saddr"
	if !sticky {
		b.loadDest(f, at)
		at += reg(f.addrRegs)
		b.loadSourcePort(at)
		b.loadDestPort(at + 1)
		b.loadMeta(unix.NFT_META_L4PROTO, at+2)
		at += 3
		what = fmt.Sprintf("%s saddr . %s daddr . th sport . th dport . meta l4proto", f.ip, f.ip)
	}
	b.expr("hash", func(a *attrs) {
		a.u32(unix.NFTA_HASH_SREG, from.number())
		a.u32(unix.NFTA_HASH_DREG, reg(0).number())
		a.u32(unix.NFTA_HASH_LEN, uint32(at-from)*4)
		a.u32(unix.NFTA_HASH_MODULUS, modulus)
		a.u32(unix.NFTA_HASH_SEED, seed)
		a.u32(unix.NFTA_HASH_TYPE, unix.NFT_HASH_JENKINS)
	})
	b.say("jhash %s mod %d seed 0x%08x", what, modulus, seed)
}

// toNetworkOrder turns register 0, so that interval sets, which compare bytes,
// sort it as a number.
func (b *ruleBuilder) toNetworkOrder() {
	b.expr("byteorder", func(a *attrs) {
		a.u32(unix.NFTA_BYTEORDER_SREG, reg(0).number())
		a.u32(unix.NFTA_BYTEORDER_DREG, reg(0).number())
		a.u32(unix.NFTA_BYTEORDER_OP, unix.NFT_BYTEORDER_HTON)
		a.u32(unix.NFTA_BYTEORDER_LEN, 4)
		a.u32(unix.NFTA_BYTEORDER_SIZE, 4)
	})
}

// --- statements --------------------------------------------------------------

// ctMarkSet gives the masked bits of the flow's mark a value and keeps the
// others.
func (b *ruleBuilder) ctMarkSet(mask, value uint32) {
	b.loadCT(unix.NFT_CT_MARK, 0)
	b.bitwise(0, native32(^mask), native32(value))
	b.storeCTMark(0)
	if keep := ^mask | value; keep != ^uint32(0) {
		b.say("ct mark set ct mark & 0x%08x | 0x%08x", keep, value)
	} else {
		b.say("ct mark set ct mark | 0x%08x", value)
	}
}

func (b *ruleBuilder) storeCTMark(from reg) {
	b.expr("ct", func(a *attrs) {
		a.u32(unix.NFTA_CT_KEY, unix.NFT_CT_MARK)
		a.u32(unix.NFTA_CT_SREG, from.number())
	})
}

// ctMarkMerge makes the number in register 0 the flow's target and keeps the
// bits below. The mark in register 1 is shifted left until only those bits are
// left, then both registers are shifted as one 64-bit number: they meet in
// register 0.
func (b *ruleBuilder) ctMarkMerge() {
	b.loadCT(unix.NFT_CT_MARK, 1)
	b.shiftLeft(1, 4, 32-markShift)
	b.shiftLeft(0, 8, markShift)
	b.storeCTMark(0)
}

// shiftLeft shifts length bytes from register r on, as one number whose first
// word is the most significant.
func (b *ruleBuilder) shiftLeft(r reg, length, bits uint32) {
	const opAttr, dataAttr, lshift = 6, 7, 1 // NFTA_BITWISE_OP, NFTA_BITWISE_DATA, NFT_BITWISE_LSHIFT
	b.expr("bitwise", func(a *attrs) {
		a.u32(unix.NFTA_BITWISE_SREG, r.number())
		a.u32(unix.NFTA_BITWISE_DREG, r.number())
		a.u32(unix.NFTA_BITWISE_LEN, length)
		a.u32(opAttr, lshift)
		a.nest(dataAttr, func(a *attrs) { a.put(unix.NFTA_DATA_VALUE, native32(bits)) })
	})
}

// Object types (linux/netfilter/nf_tables.h).
const (
	objectCounter   = 1
	objectCTTimeout = 7
)

func (b *ruleBuilder) object(typ uint32, name string) {
	b.expr("objref", func(a *attrs) {
		a.u32(unix.NFTA_OBJREF_IMM_TYPE, typ)
		a.str(unix.NFTA_OBJREF_IMM_NAME, name)
	})
}

func (b *ruleBuilder) counter(name string) {
	b.object(objectCounter, name)
	b.say("counter name %q", name)
}

func (b *ruleBuilder) ctTimeout(name string) {
	b.object(objectCTTimeout, name)
	b.say("ct timeout set %q", name)
}

// dynset adds the key in register 0 to a dynamic set, with a statement of its own if
// there is one, which then has the packet. The operation is add, whose statement runs
// for an element that exists as update's does; before 5.17 the kernel has update for
// sets with timeouts only. The rule ends if the set is full.
func (b *ruleBuilder) dynset(set string, statement func(*attrs)) {
	b.expr("dynset", func(a *attrs) {
		a.u32(unix.NFTA_DYNSET_SREG_KEY, reg(0).number())
		a.u32(unix.NFTA_DYNSET_OP, unix.NFT_DYNSET_OP_ADD)
		a.str(unix.NFTA_DYNSET_SET_NAME, set)
		if statement != nil {
			a.nest(unix.NFTA_DYNSET_EXPR, statement)
		}
	})
}

func counterStatement(a *attrs) { a.str(unix.NFTA_EXPR_NAME, "counter") }

// countTarget counts the packet for its flow's target.
func (b *ruleBuilder) countTarget(set string) {
	b.loadCT(unix.NFT_CT_MARK, 0)
	b.bitwise(0, native32(TargetMask), native32(0))
	b.dynset(set, counterStatement)
	b.say("add @%s { ct mark & 0x%08x counter }", set, TargetMask)
}

// ctID is NFT_CT_ID: a number of a flow that no other has at the same time.
const ctID = 23

func (b *ruleBuilder) flowNotIn(set string) {
	b.loadCT(ctID, 0)
	b.inSet(set, 0, true)
	b.say("ct id != @%s", set)
}

func (b *ruleBuilder) addFlow(set string) {
	b.loadCT(ctID, 0)
	b.dynset(set, nil)
	b.say("add @%s { ct id }", set)
}

// reset answers a TCP segment with a reset and drops it.
func (b *ruleBuilder) reset() {
	const rejectType = 1 // NFTA_REJECT_TYPE
	b.expr("reject", func(a *attrs) { a.u32(rejectType, unix.NFT_REJECT_TCP_RST) })
	b.say("reject with tcp reset")
}

// notrack keeps a packet from connection tracking.
func (b *ruleBuilder) notrack() {
	b.bare("notrack")
	b.say("notrack")
}

func (b *ruleBuilder) immediate(to reg, value []byte) {
	b.expr("immediate", func(a *attrs) {
		a.u32(unix.NFTA_IMMEDIATE_DREG, to.number())
		a.nest(unix.NFTA_IMMEDIATE_DATA, func(a *attrs) { a.put(unix.NFTA_DATA_VALUE, value) })
	})
}

func (b *ruleBuilder) dnat(f *family, to netip.AddrPort) {
	addr, port := reg(4), reg(8)
	b.immediate(addr, to.Addr().AsSlice())
	b.immediate(port, binary.BigEndian.AppendUint16(nil, to.Port()))
	b.expr("nat", func(a *attrs) {
		a.u32(unix.NFTA_NAT_TYPE, unix.NFT_NAT_DNAT)
		a.u32(unix.NFTA_NAT_FAMILY, uint32(f.nfproto))
		a.u32(unix.NFTA_NAT_REG_ADDR_MIN, addr.number())
		a.u32(unix.NFTA_NAT_REG_ADDR_MAX, addr.number())
		a.u32(unix.NFTA_NAT_REG_PROTO_MIN, port.number())
		a.u32(unix.NFTA_NAT_REG_PROTO_MAX, port.number())
		a.u32(unix.NFTA_NAT_FLAGS, natProtoSpecified|natMapIPs)
	})
	b.say("dnat %s to %s", f.ip, to)
}

// dnatToItself leaves the destination as it is, for good: no other table's DNAT
// comes after ours.
func (b *ruleBuilder) dnatToItself(f *family) {
	const addr = reg(4)
	b.loadDest(f, addr)
	b.expr("nat", func(a *attrs) {
		a.u32(unix.NFTA_NAT_TYPE, unix.NFT_NAT_DNAT)
		a.u32(unix.NFTA_NAT_FAMILY, uint32(f.nfproto))
		a.u32(unix.NFTA_NAT_REG_ADDR_MIN, addr.number())
		a.u32(unix.NFTA_NAT_REG_ADDR_MAX, addr.number())
		a.u32(unix.NFTA_NAT_FLAGS, natMapIPs)
	})
	b.say("dnat %s to %s daddr", f.ip, f.ip)
}

// Flags the kernel adds to what a nat expression says (nf_nat.h). They are
// written out so that a rule that somebody gave others is seen to differ.
const (
	natMapIPs         = 1 << 0
	natProtoSpecified = 1 << 1
)

// snatTo sources the flow from the address in the registers at from.
func (b *ruleBuilder) snatTo(f *family, from reg) {
	b.expr("nat", func(a *attrs) {
		a.u32(unix.NFTA_NAT_TYPE, unix.NFT_NAT_SNAT)
		a.u32(unix.NFTA_NAT_FAMILY, uint32(f.nfproto))
		a.u32(unix.NFTA_NAT_REG_ADDR_MIN, from.number())
		a.u32(unix.NFTA_NAT_REG_ADDR_MAX, from.number())
		a.u32(unix.NFTA_NAT_FLAGS, natMapIPs)
	})
}

func (b *ruleBuilder) verdict(code int32, chain string) {
	b.expr("immediate", func(a *attrs) {
		a.u32(unix.NFTA_IMMEDIATE_DREG, unix.NFT_REG_VERDICT)
		a.nest(unix.NFTA_IMMEDIATE_DATA, func(a *attrs) { putVerdict(a, code, chain) })
	})
}

func putVerdict(a *attrs, code int32, chain string) {
	at := a.open(unix.NFTA_DATA_VERDICT)
	a.u32(unix.NFTA_VERDICT_CODE, uint32(code))
	if chain != "" {
		a.str(unix.NFTA_VERDICT_CHAIN, chain)
	}
	a.close(at)
}

func (b *ruleBuilder) jump(chain string)   { b.verdict(unix.NFT_JUMP, chain); b.say("jump %s", chain) }
func (b *ruleBuilder) goTo(chain string)   { b.verdict(unix.NFT_GOTO, chain); b.say("goto %s", chain) }
func (b *ruleBuilder) returns()            { b.verdict(unix.NFT_RETURN, ""); b.say("return") }
func (b *ruleBuilder) drop()               { b.verdict(0, ""); b.say("drop") }
func (b *ruleBuilder) accept()             { b.verdict(1, ""); b.say("accept") }
func (b *ruleBuilder) dropAs(count string) { b.counter(count); b.drop() }

// rule makes a Rule of what fill builds.
func rule(fill func(b *ruleBuilder)) Rule {
	var b ruleBuilder
	fill(&b)
	return b.rule()
}

func maskBytes(bits, length int) []byte {
	m := make([]byte, length)
	for i := range m {
		n := min(max(bits-8*i, 0), 8)
		m[i] = byte(0xff << (8 - n))
	}
	return m
}

func protoName(p uint8) string {
	switch p {
	case unix.IPPROTO_TCP:
		return "tcp"
	case unix.IPPROTO_UDP:
		return "udp"
	case unix.IPPROTO_ICMP:
		return "icmp"
	case unix.IPPROTO_ICMPV6:
		return "ipv6-icmp"
	}
	return fmt.Sprint(p)
}

func prefixText(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}
