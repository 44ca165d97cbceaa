package nft

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"nlb/balancer"
)

// A Packet is the first one of a flow, at a hook. In and Out are interfaces, empty
// where they are not known; what comes from this host has none to come in by.
type Packet struct {
	Protocol            uint8 // IP protocol number: TCP or UDP
	Source, Destination netip.AddrPort
	In, Out             string
	Hook                uint32 // NF_INET_*
	// Untracked says that conntrack was kept from it, as a SYN proxy does.
	Untracked bool
}

// A Finding is a rule, or a policy, that does something to a packet.
type Finding struct {
	// Where names it: family, table, chain, hook, handle.
	Where string
	// Does is drop or reject, or the kind of a change, such as masquerade.
	Does string
	// Certain says that the packet gets there, and matches. Else it may.
	Certain bool
}

// Ends reports whether the packet goes no further.
func (f Finding) Ends() bool { return f.Does == doesDrop || f.Does == doesReject }

const (
	doesDrop   = "drop"
	doesReject = "reject"
)

// Span is a range of priorities: after the first and before the last.
type Span struct{ After, Before int32 }

// Before and after our own translation at a hook, and all of it.
var (
	BeforeDNAT = Span{math.MinInt32, priorityDNAT}
	AfterDNAT  = Span{priorityDNAT, math.MaxInt32}
	BeforeSNAT = Span{math.MinInt32, prioritySNAT}
	AfterSNAT  = Span{prioritySNAT, math.MaxInt32}
	AllOfHook  = Span{math.MinInt32, math.MaxInt32}
	// BeforeIPVS is what of the input hook a packet meets before IPVS takes it.
	BeforeIPVS = Span{math.MinInt32, priorityArrived - 3}
)

// Walk lists what the chains at the packet's hook, within a span of priorities, do to
// it, up to the first thing that certainly ends it. nat says whether chains of type nat
// are asked: they are not, once a flow has been given its translation.
//
// Matches are yes, no or unknown. What is unknown makes all that depends on it
// uncertain: marks, limits, sets that change by themselves, extensions of iptables.
func (f *Foreign) Walk(p Packet, span Span, nat bool) []Finding {
	var found []Finding
	for _, c := range f.bases {
		b := c.base
		if b.Hook != p.Hook || b.Priority < span.After || b.Priority >= span.Before || b.Type == "nat" && !nat || !meets(c.name.family, p) {
			continue
		}
		w := walker{foreign: f, base: c, packet: p}
		how := w.chain(c, true, 0)
		if b.Drop && how != stopped {
			w.find("policy", doesDrop, how == passed)
		}
		found = append(found, w.found...)
		if n := len(found); n > 0 && found[n-1].Certain && found[n-1].Ends() {
			return found
		}
	}
	return found
}

func meets(family uint8, p Packet) bool {
	return family == unix.NFPROTO_INET || (family == unix.NFPROTO_IPV4) == p.Source.Addr().Is4()
}

// A walker takes a packet through one base chain.
type walker struct {
	foreign *Foreign
	base    *foreignChain
	packet  Packet
	found   []Finding
}

// An exit is how a packet leaves a chain.
type exit uint8

const (
	passed  exit = iota // by its end, or a return
	stopped             // by a verdict: nothing more of the base chain sees it
	unsure              // one or the other
)

// deepest is how far chains may call each other (NFT_JUMP_STACK_SIZE).
const deepest = 16

func (w *walker) find(where, does string, certain bool) {
	w.found = append(w.found, Finding{fmt.Sprintf("%s (%s, %s)", w.base.name, hookNames[w.base.base.Hook], where), does, certain})
}

func (w *walker) findRule(c *foreignChain, r *foreignRule, does string, certain bool) {
	where := fmt.Sprintf("handle %d", r.handle)
	if c != w.base {
		where = fmt.Sprintf("chain %s, %s", c.name.name, where)
	}
	w.find(where, does, certain)
}

// chain walks one chain. Certain says that the packet gets there for sure.
func (w *walker) chain(c *foreignChain, certain bool, depth int) exit {
	sure := true // that it has not ended in this chain so far
	for i := range c.rules {
		r := &c.rules[i]
		e := newEvaluation(w, c.name, r.exprs)
		if e.matches == no {
			continue
		}
		here := certain && sure && e.matches == yes
		for _, change := range e.changes {
			w.findRule(c, r, change, here)
		}
		how, over := w.rule(c, r, e, here, depth)
		if e.matches == yes && sure && (how == stopped || over) {
			return how
		}
		if how != passed || over {
			sure = false
		}
	}
	if !sure {
		return unsure
	}
	return passed
}

// rule does what a rule that may match says. Over says that the chain goes no further.
func (w *walker) rule(c *foreignChain, r *foreignRule, e *evaluation, here bool, depth int) (how exit, over bool) {
	switch {
	case e.rejects:
		w.findRule(c, r, doesReject, here)
		return stopped, true
	case e.unknownVerdict:
		w.findRule(c, r, "drop or change it", false)
		return unsure, true
	case e.verdict == nil:
		return passed, false
	}
	switch e.verdict.code {
	case unix.NFT_RETURN:
		return passed, true
	case unix.NFT_JUMP, unix.NFT_GOTO:
		to := w.foreign.chains[foreignName{c.name.family, c.name.table, e.verdict.chain}]
		if to == nil || depth == deepest {
			return unsure, true
		}
		return w.chain(to, here, depth+1), e.verdict.code == unix.NFT_GOTO
	case nfDrop:
		w.findRule(c, r, doesDrop, here)
		return stopped, true
	case nfAccept:
		return stopped, true
	}
	w.findRule(c, r, "queue", here)
	return unsure, true
}

// Verdicts of linux/netfilter.h.
const (
	nfDrop   = 0
	nfAccept = 1
)

// --- one rule -------------------------------------------------------------------------

// A truth is one of three values.
type truth uint8

const (
	no truth = iota
	unknown
	yes
)

func and(a, b truth) truth { return min(a, b) }

func truthOf(b bool) truth {
	if b {
		return yes
	}
	return no
}

// An evaluation is what a rule comes to for a packet.
type evaluation struct {
	walk    *walker
	table   foreignName
	matches truth
	verdict *verdict
	rejects bool
	// unknownVerdict says that a map or an extension decides, and how cannot be told.
	unknownVerdict bool
	changes        []string
	// registers are by their number in words of 4 bytes; what is not there is unknown.
	registers map[uint32][]byte
}

// newEvaluation goes through the expressions of a rule until one does not match, or has
// decided.
func newEvaluation(w *walker, in foreignName, exprs []byte) *evaluation {
	e := &evaluation{walk: w, table: in, matches: yes, registers: make(map[uint32][]byte)}
	for x, rest, ok := next(exprs); ok && e.matches != no; x, rest, ok = next(rest) {
		e.expression(text(find(x.data, unix.NFTA_EXPR_NAME)), find(x.data, unix.NFTA_EXPR_DATA))
	}
	return e
}

// changing are expressions that change a packet or take it away, and what nft calls
// them.
var changing = map[string]string{
	"nat": "translate its addresses", "masq": "masquerade", "redir": "redirect", "tproxy": "tproxy", "queue": "queue", "fwd": "fwd",
	"dup": "duplicate", "synproxy": "synproxy", "notrack": "notrack",
}

// harmless neither match nor change what matters to a flow.
var harmless = map[string]bool{"counter": true, "log": true, "objref": true, "flow_offload": true, "last": true, "dynset": true}

func (e *evaluation) expression(name string, data []byte) {
	switch name {
	case "meta":
		e.load(be32(find(data, unix.NFTA_META_DREG)), e.meta(be32(find(data, unix.NFTA_META_KEY))))
	case "payload":
		e.payload(data)
	case "ct":
		e.load(be32(find(data, unix.NFTA_CT_DREG)), e.walk.packet.ct(be32(find(data, unix.NFTA_CT_KEY))))
	case "bitwise":
		e.load(be32(find(data, unix.NFTA_BITWISE_DREG)), e.bitwise(data))
	case "cmp":
		e.require(e.compare(data))
	case "range":
		e.require(e.within(data))
	case "lookup":
		e.lookup(data)
	case "immediate":
		e.immediate(data)
	case "reject":
		e.rejects = true
	case "match":
		e.require(unknown)
	case "target":
		e.target(text(find(data, nftaTargetName)))
	default:
		switch {
		case changing[name] != "":
			e.changes = append(e.changes, changing[name])
		case !harmless[name]:
			// A load that is not known (fib, rt, hash), or a match (limit, quota).
			clear(e.registers)
			e.require(unknown)
		}
	}
}

const nftaTargetName = 1 // NFTA_TARGET_NAME

// target is one of iptables (xtables).
func (e *evaluation) target(name string) {
	switch name {
	case "REJECT":
		e.rejects = true
	case "DROP":
		e.verdict = &verdict{code: nfDrop}
	case "LOG", "NFLOG", "AUDIT", "TRACE", "MARK", "CONNMARK", "SECMARK", "CLASSIFY", "TCPMSS":
	default:
		e.changes = append(e.changes, strings.ToLower(name))
	}
}

func (e *evaluation) require(t truth) { e.matches = and(e.matches, t) }

// word is a register's number in words of 4 bytes (nft_parse_register in
// nf_tables_api.c): the old ones have four.
func word(register uint32) uint32 {
	if register >= unix.NFT_REG32_00 {
		return register - unix.NFT_REG32_00
	}
	return (register - unix.NFT_REG_1) * 4
}

// load puts a value into a register, padded to words as the kernel does; nil is not
// known.
func (e *evaluation) load(register uint32, value []byte) {
	at := word(register)
	if value == nil {
		delete(e.registers, at)
		return
	}
	for i := 0; i < len(value); i += 4 {
		w := make([]byte, 4)
		copy(w, value[i:])
		e.registers[at+uint32(i/4)] = w
	}
}

// read returns so many bytes of registers, or nil.
func (e *evaluation) read(register uint32, length int) []byte {
	var out []byte
	for at := word(register); len(out) < length; at++ {
		w := e.registers[at]
		if w == nil {
			return nil
		}
		out = append(out, w...)
	}
	return out[:length]
}

func (e *evaluation) meta(key uint32) []byte {
	p := &e.walk.packet
	switch key {
	case unix.NFT_META_L4PROTO:
		return []byte{p.Protocol}
	case unix.NFT_META_NFPROTO:
		return []byte{familyOf(p.Source.Addr()).nfproto}
	case unix.NFT_META_PROTOCOL:
		if p.Source.Addr().Is4() {
			return []byte{unix.ETH_P_IP >> 8, unix.ETH_P_IP & 0xff}
		}
		return []byte{unix.ETH_P_IPV6 >> 8, unix.ETH_P_IPV6 & 0xff}
	case unix.NFT_META_IIFNAME:
		return interfaceName(p.In)
	case unix.NFT_META_OIFNAME:
		return interfaceName(p.Out)
	}
	return nil
}

// interfaceName is as registers have it, with its zeros; nil if it is not known.
func interfaceName(name string) []byte {
	if name == "" {
		return nil
	}
	return append([]byte(name), make([]byte, unix.IFNAMSIZ-len(name))...)
}

// ct is what conntrack says of a flow's first packet.
func (p *Packet) ct(key uint32) []byte {
	switch {
	case key == unix.NFT_CT_STATE && p.Untracked:
		return native32(ctUntracked)
	case key == unix.NFT_CT_STATE:
		return native32(ctNew)
	case key == unix.NFT_CT_DIRECTION && !p.Untracked:
		return []byte{0}
	}
	return nil
}

// payload loads from the headers, of which addresses, ports and what follows from the
// protocol are known.
func (e *evaluation) payload(data []byte) {
	if find(data, unix.NFTA_PAYLOAD_DREG) == nil {
		e.changes = append(e.changes, "rewrite its headers")
		return
	}
	offset, length := int(be32(find(data, unix.NFTA_PAYLOAD_OFFSET))), int(be32(find(data, unix.NFTA_PAYLOAD_LEN)))
	var header, known []byte
	switch be32(find(data, unix.NFTA_PAYLOAD_BASE)) {
	case unix.NFT_PAYLOAD_NETWORK_HEADER:
		header, known = e.walk.packet.network()
	case unix.NFT_PAYLOAD_TRANSPORT_HEADER:
		header, known = e.walk.packet.transport()
	}
	var value []byte
	if offset+length <= len(header) && !bytes.Contains(known[offset:offset+length], []byte{0}) {
		value = header[offset : offset+length]
	}
	e.load(be32(find(data, unix.NFTA_PAYLOAD_DREG)), value)
}

// network is the IP header, and which of its bytes are known.
func (p *Packet) network() (header, known []byte) {
	f := familyOf(p.Source.Addr())
	size, protocolAt, version := 20, 9, byte(4<<4|5)
	if f == ip6 {
		size, protocolAt, version = 40, 6, 6<<4
	}
	header, known = make([]byte, size), make([]byte, size)
	put := func(at int, b ...byte) {
		copy(header[at:], b)
		copy(known[at:], bytes.Repeat([]byte{1}, len(b)))
	}
	if f == ip4 {
		put(0, version)
	}
	put(protocolAt, p.Protocol)
	put(int(f.srcOffset), p.Source.Addr().AsSlice()...)
	put(int(f.dstOffset), p.Destination.Addr().AsSlice()...)
	return header, known
}

// transport is the header's beginning. A port that is not known is 0.
func (p *Packet) transport() (header, known []byte) {
	const tcpFlagsAt, syn = 13, 2
	header, known = make([]byte, 20), make([]byte, 20)
	for at, port := range map[int]uint16{0: p.Source.Port(), 2: p.Destination.Port()} {
		if port != 0 {
			binary.BigEndian.PutUint16(header[at:], port)
			known[at], known[at+1] = 1, 1
		}
	}
	if p.Protocol == balancer.ProtoTCP {
		header[tcpFlagsAt], known[tcpFlagsAt] = syn, 1
	}
	return header, known
}

// bitwise is (value & mask) ^ xor. Shifts, and operations on two registers, are not
// known.
func (e *evaluation) bitwise(data []byte) []byte {
	mask := find(find(data, unix.NFTA_BITWISE_MASK), unix.NFTA_DATA_VALUE)
	xor := find(find(data, unix.NFTA_BITWISE_XOR), unix.NFTA_DATA_VALUE)
	value := bytes.Clone(e.read(be32(find(data, unix.NFTA_BITWISE_SREG)), len(mask)))
	if len(mask) == 0 || len(xor) != len(mask) || value == nil {
		return nil
	}
	for i := range value {
		value[i] = value[i]&mask[i] ^ xor[i]
	}
	return value
}

func (e *evaluation) compare(data []byte) truth {
	with := find(find(data, unix.NFTA_CMP_DATA), unix.NFTA_DATA_VALUE)
	value := e.read(be32(find(data, unix.NFTA_CMP_SREG)), len(with))
	if value == nil {
		return unknown
	}
	c := bytes.Compare(value, with)
	switch be32(find(data, unix.NFTA_CMP_OP)) {
	case unix.NFT_CMP_EQ:
		return truthOf(c == 0)
	case unix.NFT_CMP_NEQ:
		return truthOf(c != 0)
	case unix.NFT_CMP_LT:
		return truthOf(c < 0)
	case unix.NFT_CMP_LTE:
		return truthOf(c <= 0)
	case unix.NFT_CMP_GT:
		return truthOf(c > 0)
	case unix.NFT_CMP_GTE:
		return truthOf(c >= 0)
	}
	return unknown
}

func (e *evaluation) within(data []byte) truth {
	from := find(find(data, unix.NFTA_RANGE_FROM_DATA), unix.NFTA_DATA_VALUE)
	to := find(find(data, unix.NFTA_RANGE_TO_DATA), unix.NFTA_DATA_VALUE)
	value := e.read(be32(find(data, unix.NFTA_RANGE_SREG)), len(from))
	if value == nil {
		return unknown
	}
	in := bytes.Compare(value, from) >= 0 && bytes.Compare(value, to) <= 0
	return truthOf(in == (be32(find(data, unix.NFTA_RANGE_OP)) == unix.NFT_RANGE_EQ))
}

// lookup is in a set, or in a map, of which those of verdicts decide.
func (e *evaluation) lookup(data []byte) {
	set := e.walk.foreign.sets[foreignName{e.table.family, e.table.table, text(find(data, unix.NFTA_LOOKUP_SET))}]
	into := find(data, unix.NFTA_LOOKUP_DREG)
	decides := into != nil && be32(into) == unix.NFT_REG_VERDICT
	var key []byte
	if set != nil && !set.opaque && len(set.elems) > 0 {
		key = e.read(be32(find(data, unix.NFTA_LOOKUP_SREG)), len(set.elems[0].key))
	}
	switch {
	case set != nil && !set.opaque && len(set.elems) == 0:
		e.require(truthOf(inverted(data)))
	case key == nil:
		e.require(unknown)
		e.unknownVerdict = decides
		if into != nil && !decides {
			e.load(be32(into), nil)
		}
	default:
		elem := set.lookup(string(key))
		e.require(truthOf((elem != nil) != inverted(data)))
		if decides && elem != nil {
			e.verdict = elem.verdict
		} else if into != nil {
			e.load(be32(into), nil)
		}
	}
}

func inverted(lookup []byte) bool {
	const inv = 1 // NFT_LOOKUP_F_INV
	return be32(find(lookup, unix.NFTA_LOOKUP_FLAGS))&inv != 0
}

func (e *evaluation) immediate(data []byte) {
	value := find(data, unix.NFTA_IMMEDIATE_DATA)
	if v := find(value, unix.NFTA_DATA_VERDICT); v != nil {
		e.verdict = parseVerdict(v)
		return
	}
	e.load(be32(find(data, unix.NFTA_IMMEDIATE_DREG)), find(value, unix.NFTA_DATA_VALUE))
}
