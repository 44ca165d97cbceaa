package doctor

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// The messages of nf_tables (linux/netfilter/nf_tables.h). Numbers are in
// network order. What is damaged or not known counts as unknown, never as
// nothing, so that no rule is taken for a milder one than it is.

// An attribute is one of a netlink message, its type without flags.
type attribute struct {
	typ  uint16
	data []byte
}

// attributes are those of a message or a nest, up to the first damaged one.
func attributes(b []byte) (all []attribute) {
	for len(b) >= unix.SizeofNlAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofNlAttr || n > len(b) {
			break
		}
		typ := binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
		all = append(all, attribute{typ, b[unix.SizeofNlAttr:n]})
		b = b[min((n+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1), len(b)):]
	}
	return all
}

// get is the payload of the first attribute of that type, or nil.
func get(b []byte, path ...uint16) []byte {
	for _, typ := range path {
		var found []byte
		for _, a := range attributes(b) {
			if a.typ == typ {
				found = a.data
				break
			}
		}
		b = found
	}
	return b
}

func getText(b []byte, typ uint16) string {
	s, _, _ := bytes.Cut(get(b, typ), []byte{0})
	return string(s)
}

func getNumber(b []byte, path ...uint16) (uint32, bool) {
	v := get(b, path...)
	if len(v) != 4 {
		return 0, false
	}
	return binary.BigEndian.Uint32(v), true
}

// families are those whose chains see packets of ours.
var families = map[uint8]string{unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6", unix.NFPROTO_INET: "inet"}

var hooks = map[uint32]string{
	unix.NF_INET_PRE_ROUTING: "prerouting", unix.NF_INET_LOCAL_IN: "input", unix.NF_INET_FORWARD: "forward",
	unix.NF_INET_LOCAL_OUT: "output", unix.NF_INET_POST_ROUTING: "postrouting",
}

// sizeofNfgenmsg is that of struct nfgenmsg, which messages begin with: the
// family is its first byte.
const sizeofNfgenmsg = 4

// decodeChain reads a chain from NFT_MSG_NEWCHAIN. It is not ok for a family
// that is not looked at.
func decodeChain(msg []byte) (c Chain, ok bool) {
	if len(msg) < sizeofNfgenmsg {
		return Chain{}, false
	}
	c.Family, ok = families[msg[0]]
	b := msg[sizeofNfgenmsg:]
	c.Table, c.Name = getText(b, unix.NFTA_CHAIN_TABLE), getText(b, unix.NFTA_CHAIN_NAME)
	if hook, based := getNumber(b, unix.NFTA_CHAIN_HOOK, unix.NFTA_HOOK_HOOKNUM); based {
		c.Type, c.Hook = getText(b, unix.NFTA_CHAIN_TYPE), hooks[hook]
		priority, _ := getNumber(b, unix.NFTA_CHAIN_HOOK, unix.NFTA_HOOK_PRIORITY)
		c.Priority = int32(priority)
		policy, given := getNumber(b, unix.NFTA_CHAIN_POLICY)
		c.Drops = given && policy == nfDrop
	}
	return c, ok
}

// decodeRule reads a rule from NFT_MSG_NEWRULE, and the chain that it is in.
func decodeRule(msg []byte) (chain Chain, r Rule, ok bool) {
	if len(msg) < sizeofNfgenmsg {
		return Chain{}, Rule{}, false
	}
	chain.Family, ok = families[msg[0]]
	b := msg[sizeofNfgenmsg:]
	chain.Table, chain.Name = getText(b, unix.NFTA_RULE_TABLE), getText(b, unix.NFTA_RULE_CHAIN)
	d := ruleDecoder{fields: map[uint32]loaded{}, rule: Rule{Action: Continue}}
	for _, e := range attributes(get(b, unix.NFTA_RULE_EXPRESSIONS)) {
		if e.typ == unix.NFTA_LIST_ELEM {
			d.expression(getText(e.data, unix.NFTA_EXPR_NAME), get(e.data, unix.NFTA_EXPR_DATA))
		}
	}
	return chain, d.rule, ok
}

// A loaded register has a field, of which mask was taken.
type loaded struct {
	field Field
	mask  []byte
}

type ruleDecoder struct {
	fields map[uint32]loaded // by register
	rule   Rule
}

func fieldName(of string, key uint32) string { return fmt.Sprintf("%s %d", of, key) }

// doubt adds a condition that nobody can tell the truth of.
func (d *ruleDecoder) doubt() { d.rule.Conditions = append(d.rule.Conditions, Condition{}) }

func (d *ruleDecoder) expression(name string, b []byte) {
	switch name {
	case "payload":
		d.payload(b)
	case "meta":
		d.load("meta", b, unix.NFTA_META_DREG, unix.NFTA_META_KEY)
	case "ct":
		d.load("ct", b, unix.NFTA_CT_DREG, unix.NFTA_CT_KEY)
	case "bitwise":
		d.bitwise(b)
	case "cmp":
		d.compare(b)
	case "immediate":
		d.immediate(b)
	case "match":
		d.match(b)
	case "counter", "log", "objref", "comment", "nflog":
	case "lookup":
		d.lookup(b)
	case "range", "fib", "rt", "socket", "osf", "limit", "connlimit", "quota", "hash", "numgen", "byteorder", "exthdr", "dynset", "xfrm", "inner", "tunnel", "last":
		// Their results are not followed: what registers have from now on is not
		// known.
		d.doubt()
		clear(d.fields)
	case "reject":
		d.rule.Action = Drop
	case "masq":
		d.rule.Action = ToSource
	case "nat":
		d.nat(b)
	case "redir", "tproxy":
		d.rule.Action = ToDest
	case "notrack":
		d.rule.Action = NoTrack
	case "target":
		d.target(getText(b, unix.NFTA_TARGET_NAME))
	default:
		d.doubt()
		d.rule.Action = Unknown
	}
}

// load is what meta and ct do; without a register to load into they set
// something.
func (d *ruleDecoder) load(of string, b []byte, register, key uint16) {
	to, loads := getNumber(b, register)
	k, known := getNumber(b, key)
	if !loads {
		return
	}
	field := Field{}
	if known {
		field = Field{Of: fieldName(of, k), Len: unix.IFNAMSIZ}
	}
	d.fields[to] = loaded{field: field}
}

func (d *ruleDecoder) payload(b []byte) {
	to, loads := getNumber(b, unix.NFTA_PAYLOAD_DREG)
	base, _ := getNumber(b, unix.NFTA_PAYLOAD_BASE)
	offset, _ := getNumber(b, unix.NFTA_PAYLOAD_OFFSET)
	length, _ := getNumber(b, unix.NFTA_PAYLOAD_LEN)
	if !loads {
		return
	}
	field := Field{}
	switch base {
	case unix.NFT_PAYLOAD_NETWORK_HEADER:
		field = Field{ofNetwork, offset, length}
	case unix.NFT_PAYLOAD_TRANSPORT_HEADER:
		field = Field{ofTransport, offset, length}
	}
	d.fields[to] = loaded{field: field}
}

func (d *ruleDecoder) bitwise(b []byte) {
	from, _ := getNumber(b, unix.NFTA_BITWISE_SREG)
	to, _ := getNumber(b, unix.NFTA_BITWISE_DREG)
	mask, xor := get(b, unix.NFTA_BITWISE_MASK, unix.NFTA_DATA_VALUE), get(b, unix.NFTA_BITWISE_XOR, unix.NFTA_DATA_VALUE)
	l := d.fields[from]
	if len(mask) == 0 || len(bytes.Trim(xor, "\x00")) != 0 || l.mask != nil {
		l.field = Field{} // a shift, or bits turned: not followed
	}
	d.fields[to] = loaded{l.field, mask}
}

func (d *ruleDecoder) compare(b []byte) {
	from, _ := getNumber(b, unix.NFTA_CMP_SREG)
	op, known := getNumber(b, unix.NFTA_CMP_OP)
	value := get(b, unix.NFTA_CMP_DATA, unix.NFTA_DATA_VALUE)
	l := d.fields[from]
	if !known || Op(op) > GreaterOrEqual || l.field.Of == "" {
		d.doubt()
		return
	}
	if l.field.Offset == 0 && l.field.Of != ofNetwork && l.field.Of != ofTransport {
		l.field.Len = uint32(len(value))
	}
	d.rule.Conditions = append(d.rule.Conditions, Condition{Field: l.field, Mask: l.mask, Op: Op(op), Value: value})
}

// Verdicts of nf_tables.
const (
	nfDrop   = 0
	nfAccept = 1
)

var verdicts = map[int32]Action{
	nfDrop: Drop, nfAccept: Accept,
	unix.NFT_JUMP: Jump, unix.NFT_GOTO: Goto, unix.NFT_RETURN: Return, unix.NFT_CONTINUE: Continue,
}

func (d *ruleDecoder) immediate(b []byte) {
	to, _ := getNumber(b, unix.NFTA_IMMEDIATE_DREG)
	if to != unix.NFT_REG_VERDICT {
		d.fields[to] = loaded{} // a constant, for nat and the like
		return
	}
	verdict := get(b, unix.NFTA_IMMEDIATE_DATA, unix.NFTA_DATA_VERDICT)
	code, _ := getNumber(verdict, unix.NFTA_VERDICT_CODE)
	action, known := verdicts[int32(code)]
	if !known {
		action = Unknown
	}
	d.rule.Action, d.rule.To = action, getText(verdict, unix.NFTA_VERDICT_CHAIN)
}

// lookup asks for membership in a set, or takes a value or a verdict from a map,
// which is not followed.
func (d *ruleDecoder) lookup(b []byte) {
	if to, maps := getNumber(b, unix.NFTA_LOOKUP_DREG); maps {
		d.doubt()
		clear(d.fields)
		if to == unix.NFT_REG_VERDICT {
			d.rule.Action = Unknown
		}
		return
	}
	from, _ := getNumber(b, unix.NFTA_LOOKUP_SREG)
	op := In
	if flags, _ := getNumber(b, unix.NFTA_LOOKUP_FLAGS); flags&unix.NFT_LOOKUP_F_INV != 0 {
		op = NotIn
	}
	l := d.fields[from]
	d.rule.Conditions = append(d.rule.Conditions, Condition{Field: l.field, Mask: l.mask, Op: op, Set: getText(b, unix.NFTA_LOOKUP_SET)})
}

func (d *ruleDecoder) nat(b []byte) {
	kind, known := getNumber(b, unix.NFTA_NAT_TYPE)
	switch {
	case known && kind == unix.NFT_NAT_SNAT:
		d.rule.Action = ToSource
	case known && kind == unix.NFT_NAT_DNAT:
		d.rule.Action = ToDest
	default:
		d.rule.Action = Unknown
	}
}

// The targets of iptables that it does not put in words of nf_tables.
var xtTargets = map[string]Action{
	"MASQUERADE": ToSource, "SNAT": ToSource, "DNAT": ToDest, "REDIRECT": ToDest, "TPROXY": ToDest,
	"REJECT": Drop, "DROP": Drop, "ACCEPT": Accept, "NOTRACK": NoTrack,
	"LOG": Continue, "NFLOG": Continue, "MARK": Continue, "CONNMARK": Continue, "TCPMSS": Continue,
}

func (d *ruleDecoder) target(name string) {
	action, known := xtTargets[name]
	if !known {
		action = Unknown
	}
	d.rule.Action = action
}

// struct xt_conntrack_mtinfo3 (linux/netfilter/xt_conntrack.h), up to what is
// read of it.
const (
	xtConntrackFlags   = 146
	xtConntrackInverse = 148
	xtConntrackState   = 150
	xtConntrackEnd     = 152

	xtMatchesState = 1 << 0
	xtStateDNAT    = 1 << 7
)

// match reads "conntrack --ctstate" with DNAT or without, and no other match of
// iptables.
func (d *ruleDecoder) match(b []byte) {
	info := get(b, unix.NFTA_MATCH_INFO)
	name := getText(b, unix.NFTA_MATCH_NAME)
	if name == "comment" {
		return
	}
	if name != "conntrack" || len(info) < xtConntrackEnd ||
		binary.NativeEndian.Uint16(info[xtConntrackFlags:]) != xtMatchesState ||
		binary.NativeEndian.Uint16(info[xtConntrackInverse:]) != 0 ||
		binary.NativeEndian.Uint16(info[xtConntrackState:]) != xtStateDNAT {
		d.doubt()
		return
	}
	d.rule.Conditions = append(d.rule.Conditions, Condition{
		Field: Field{Of: ctField(unix.NFT_CT_STATUS), Len: 4},
		Mask:  native(statusDNAT), Op: NotEqual, Value: native(0),
	})
}
