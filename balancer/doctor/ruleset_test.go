package doctor

import (
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

var (
	unknown = Condition{}
	toWeb   = Condition{Field: Field{ofTransport, 2, 2}, Op: Equal, Value: []byte{0, 80}}
	toOther = Condition{Field: Field{ofTransport, 2, 2}, Op: Equal, Value: []byte{0, 81}}
	lowPort = Condition{Field: Field{ofTransport, 2, 2}, Op: Less, Value: []byte{4, 0}}
	inNet   = Condition{Field: Field{ofNetwork, 16, 3}, Op: Equal, Value: []byte{10, 0, 1}}
	fromNet = Condition{Field: Field{ofNetwork, 12, 4}, Op: Equal, Value: []byte{203, 0, 113, 9}}
)

func TestWalk(t *testing.T) {
	web := Packet{Dst: addr("10.0.1.11"), DstPort: 80, Protocol: 6}
	do := func(a Action, conditions ...Condition) Rule { return Rule{Conditions: conditions, Action: a} }
	jump := func(a Action, to string, conditions ...Condition) Rule {
		return Rule{Conditions: conditions, Action: a, To: to}
	}
	others := []Chain{
		{Family: "inet", Table: "fw", Name: "drops", Rules: []Rule{do(Drop)}},
		{Family: "inet", Table: "fw", Name: "accepts", Rules: []Rule{do(Accept, toWeb)}},
		{Family: "inet", Table: "fw", Name: "returns", Rules: []Rule{do(Return), do(Drop)}},
		{Family: "inet", Table: "fw", Name: "loops", Rules: []Rule{{Action: Jump, To: "loops"}, {Action: Jump, To: "loops"}}},
		{Family: "ip", Table: "fw", Name: "elsewhere", Rules: []Rule{do(Drop)}},
	}
	tests := []struct {
		name  string
		rules []Rule
		drops bool
		want  Outcome
	}{
		{name: "empty", want: Outcome{Action: Accept}},
		{name: "policy", drops: true, want: Outcome{Action: Drop}},
		{name: "accepted before the policy", drops: true, rules: []Rule{do(Accept, toWeb)}, want: Outcome{Action: Accept}},
		{name: "another port", drops: true, rules: []Rule{do(Accept, toOther)}, want: Outcome{Action: Drop}},
		{name: "port and net", rules: []Rule{do(Drop, inNet, lowPort)}, want: Outcome{Action: Drop}},
		{name: "may be accepted", drops: true, rules: []Rule{do(Accept, unknown)}, want: Outcome{Drop, true}},
		{name: "may not be accepted on another port", drops: true, rules: []Rule{do(Accept, unknown, toOther)}, want: Outcome{Action: Drop}},
		{name: "the client is not known", drops: true, rules: []Rule{do(Accept, fromNet)}, want: Outcome{Drop, true}},
		{name: "may be dropped", rules: []Rule{do(Drop, fromNet)}, want: Outcome{Action: Accept}},
		{name: "a verdict map", drops: true, rules: []Rule{do(Unknown)}, want: Outcome{Drop, true}},
		{name: "counted", rules: []Rule{do(Continue), do(Drop)}, want: Outcome{Action: Drop}},
		{name: "jump", rules: []Rule{jump(Jump, "drops")}, want: Outcome{Action: Drop}},
		{name: "jump that may be", rules: []Rule{jump(Jump, "drops", unknown)}, want: Outcome{Action: Accept}},
		{name: "jump that may accept", drops: true, rules: []Rule{jump(Jump, "accepts", unknown)}, want: Outcome{Drop, true}},
		{name: "jump and back", drops: true, rules: []Rule{jump(Jump, "returns"), do(Accept)}, want: Outcome{Action: Accept}},
		{name: "goto and not back", drops: true, rules: []Rule{jump(Goto, "returns"), do(Accept)}, want: Outcome{Action: Drop}},
		{name: "return", drops: true, rules: []Rule{do(Return), do(Accept)}, want: Outcome{Action: Drop}},
		{name: "a chain that is gone", drops: true, rules: []Rule{jump(Jump, "elsewhere")}, want: Outcome{Drop, true}},
		{name: "endless", drops: true, rules: []Rule{jump(Jump, "loops")}, want: Outcome{Drop, true}},
		{name: "notrack", rules: []Rule{do(NoTrack, toWeb)}, want: Outcome{Action: NoTrack}},
		{name: "notrack and accept", rules: []Rule{do(NoTrack, toWeb), do(Accept)}, want: Outcome{Action: NoTrack}},
		{name: "accept before notrack", rules: []Rule{do(Accept, toWeb), do(NoTrack)}, want: Outcome{Action: Accept}},
		{name: "masquerade", rules: []Rule{do(ToSource)}, want: Outcome{Action: ToSource}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			base := Chain{Family: "inet", Table: "fw", Name: "base", Type: "filter", Hook: "forward", Drops: tt.drops, Rules: tt.rules}
			if d := cmp.Diff(tt.want, rulesetOf(others).walk(&base, &web)); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}

func TestConditions(t *testing.T) {
	p := Packet{Src: addr("2001:db8::1"), DstPort: 0x1234, Protocol: 17, In: "eth0", Reply: true, Translated: true}
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, "eth0")
	tests := []struct {
		name string
		c    Condition
		want truth
	}{
		{"a part of an address", Condition{Field: Field{ofNetwork, 10, 2}, Value: []byte{0x0d, 0xb8}}, yes},
		{"the next header", Condition{Field: Field{ofNetwork, 6, 1}, Value: []byte{17}}, yes},
		{"an address that is not known", Condition{Field: Field{ofNetwork, 24, 16}, Value: make([]byte, 16)}, maybe},
		{"past the end", Condition{Field: Field{ofNetwork, 1 << 31, 1 << 31}, Value: []byte{1}}, maybe},
		{"greater", Condition{Field: Field{ofTransport, 2, 2}, Op: Greater, Value: []byte{0x12, 0x33}}, yes},
		{"not greater", Condition{Field: Field{ofTransport, 2, 2}, Op: Greater, Value: []byte{0x12, 0x34}}, no},
		{"greater or equal", Condition{Field: Field{ofTransport, 2, 2}, Op: GreaterOrEqual, Value: []byte{0x12, 0x34}}, yes},
		{"less or equal", Condition{Field: Field{ofTransport, 2, 2}, Op: LessOrEqual, Value: []byte{0x12, 0x33}}, no},
		{"less", Condition{Field: Field{ofTransport, 2, 2}, Op: Less, Value: []byte{0x13, 0}}, yes},
		{"in a set", Condition{Field: Field{ofTransport, 2, 2}, Op: In, Listed: true, Ranges: []Range{{[]byte{0, 1}, []byte{0, 2}}, {[]byte{0x12, 0}, []byte{0x12, 0x34}}}}, yes},
		{"not in a set", Condition{Field: Field{ofTransport, 2, 2}, Op: NotIn, Listed: true, Ranges: []Range{{[]byte{0, 1}, []byte{0, 2}}}}, yes},
		{"in an empty set", Condition{Field: Field{ofTransport, 2, 2}, Op: In, Listed: true}, no},
		{"in a set that was not read", Condition{Field: Field{ofTransport, 2, 2}, Op: NotIn, Set: "a"}, maybe},
		{"in a set of two fields", Condition{Field: Field{ofTransport, 2, 2}, Op: In, Listed: true, Ranges: []Range{{make([]byte, 8), make([]byte, 8)}}}, maybe},
		{"no such comparison", Condition{Field: Field{ofTransport, 2, 2}, Op: 9, Value: []byte{0x13, 0}}, maybe},
		{"family", Condition{Field: Field{Of: metaField(unix.NFT_META_NFPROTO), Len: 1}, Value: []byte{unix.NFPROTO_IPV6}}, yes},
		{"interface", Condition{Field: Field{Of: metaField(unix.NFT_META_IIFNAME), Len: 16}, Value: name}, yes},
		{"interfaces", Condition{Field: Field{Of: metaField(unix.NFT_META_IIFNAME), Len: 3}, Op: NotEqual, Value: []byte("eth")}, no},
		{"the other interface", Condition{Field: Field{Of: metaField(unix.NFT_META_OIFNAME), Len: 16}, Value: name}, maybe},
		{"state", Condition{Field: Field{Of: ctField(unix.NFT_CT_STATE), Len: 4}, Mask: native(stateNew), Op: NotEqual, Value: native(0)}, no},
		{"status", Condition{Field: Field{Of: ctField(unix.NFT_CT_STATUS), Len: 4}, Mask: native(statusDNAT), Op: NotEqual, Value: native(0)}, yes},
		{"direction", Condition{Field: Field{Of: ctField(unix.NFT_CT_DIRECTION), Len: 1}, Value: []byte{1}}, yes},
		{"somebody's mark", Condition{Field: Field{Of: metaField(unix.NFT_META_MARK), Len: 4}, Value: native(1)}, maybe},
	}
	for _, tt := range tests {
		if got := tt.c.holds(&p); got != tt.want {
			t.Errorf("%s: %v, not %v", tt.name, got, tt.want)
		}
	}
}

// nest is an attribute, for messages that the kernel of the tests cannot be
// brought to send.
func nest(typ uint16, payload ...[]byte) []byte {
	var all []byte
	for _, p := range payload {
		all = append(all, p...)
	}
	b := binary.NativeEndian.AppendUint16(nil, uint16(unix.SizeofNlAttr+len(all)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, all...)
	return append(b, make([]byte, -len(b)&3)...)
}

func expression(name string, data ...[]byte) []byte {
	return nest(unix.NFTA_LIST_ELEM, nest(unix.NFTA_EXPR_NAME, []byte(name+"\x00")), nest(unix.NFTA_EXPR_DATA, data...))
}

// iptablesDNAT is -m conntrack --ctstate DNAT, with the flags and states given.
func iptablesDNAT(flags, inverse, states uint16) []byte {
	info := make([]byte, 160)
	binary.NativeEndian.PutUint16(info[xtConntrackFlags:], flags)
	binary.NativeEndian.PutUint16(info[xtConntrackInverse:], inverse)
	binary.NativeEndian.PutUint16(info[xtConntrackState:], states)
	return expression("match", nest(unix.NFTA_MATCH_NAME, []byte("conntrack\x00")), nest(unix.NFTA_MATCH_INFO, info))
}

func ruleMessage(expressions ...[]byte) []byte {
	msg := []byte{unix.NFPROTO_IPV4, 0, 0, 0}
	msg = append(msg, nest(unix.NFTA_RULE_TABLE, []byte("filter\x00"))...)
	msg = append(msg, nest(unix.NFTA_RULE_CHAIN, []byte("FORWARD\x00"))...)
	return append(msg, nest(unix.NFTA_RULE_EXPRESSIONS, expressions...)...)
}

func TestRulesOfIPTables(t *testing.T) {
	target := func(name string) []byte {
		return expression("target", nest(unix.NFTA_TARGET_NAME, []byte(name+"\x00")))
	}
	comment := expression("match", nest(unix.NFTA_MATCH_NAME, []byte("comment\x00")))
	translated := Packet{Dst: addr("10.0.1.11"), Translated: true}
	tests := []struct {
		name    string
		message []byte
		action  Action
		matches truth
	}{
		{"translated flows", ruleMessage(iptablesDNAT(1, 0, 0x80), target("ACCEPT")), Accept, yes},
		{"others too", ruleMessage(iptablesDNAT(1, 0, 0x82), target("ACCEPT")), Accept, maybe},
		{"all but those", ruleMessage(iptablesDNAT(1, 1, 0x80), target("ACCEPT")), Accept, maybe},
		{"with a comment", ruleMessage(comment, target("REJECT")), Drop, yes},
		{"masquerade", ruleMessage(target("MASQUERADE")), ToSource, yes},
		{"an extension", ruleMessage(target("CT")), Unknown, yes},
	}
	for _, tt := range tests {
		in, r, ok := decodeRule(tt.message)
		if !ok || in.key() != (chainName{"ip", "filter", "FORWARD"}) || r.Action != tt.action || r.matches(&translated) != tt.matches {
			t.Errorf("%s: %v in %v, matches %v", tt.name, r, in.key(), r.matches(&translated))
		}
	}
}

func TestChainsOfIPTablesAreCuredByIt(t *testing.T) {
	p := passage{packet: Packet{Dst: addr("10.0.1.11")}}
	p.match, p.matchIPTables = translated()
	tests := []struct {
		chain Chain
		want  string
	}{
		{Chain{Family: "ip", Table: "filter", Name: "FORWARD"}, "iptables -t filter -I FORWARD -m conntrack --ctstate DNAT -j ACCEPT"},
		{Chain{Family: "ip6", Table: "filter", Name: "FORWARD"}, "ip6tables -t filter -I FORWARD -m conntrack --ctstate DNAT -j ACCEPT"},
		{Chain{Family: "ip", Table: "filter", Name: "forward"}, "nft insert rule ip filter forward ct status dnat accept"},
		{Chain{Family: "inet", Table: "filter", Name: "FORWARD"}, "nft insert rule inet filter FORWARD ct status dnat accept"},
	}
	for _, tt := range tests {
		if got := tt.chain.letPass(p).String(); got != tt.want {
			t.Errorf("%s: %s, not %s", &tt.chain, got, tt.want)
		}
	}
	// A name that is a command must not become one.
	hostile := Chain{Family: "inet", Table: "a; flush ruleset", Name: "forward", Type: "filter", Hook: "forward", Drops: true}
	if s := hostile.symptom(Drop, []passage{p}, false); len(s.cure) > 0 || s.advice == "" {
		t.Errorf("cured by %v", s.cure)
	}
}

func FuzzDecodeRule(f *testing.F) {
	f.Add(ruleMessage(iptablesDNAT(1, 0, 0x80)))
	f.Add(ruleMessage(expression("payload", nest(unix.NFTA_PAYLOAD_DREG, []byte{0, 0, 0, 1}), nest(unix.NFTA_PAYLOAD_BASE, []byte{0, 0, 0, 1}),
		nest(unix.NFTA_PAYLOAD_OFFSET, []byte{0, 0, 0, 16}), nest(unix.NFTA_PAYLOAD_LEN, []byte{0, 0, 0, 4})),
		expression("cmp", nest(unix.NFTA_CMP_SREG, []byte{0, 0, 0, 1}), nest(unix.NFTA_CMP_OP, []byte{0, 0, 0, 0}),
			nest(unix.NFTA_CMP_DATA, nest(unix.NFTA_DATA_VALUE, []byte{10, 0, 1, 11})))))
	f.Fuzz(func(t *testing.T, msg []byte) {
		in, r, _ := decodeRule(msg)
		switch r.Action {
		case "", Continue, Accept, Drop, Return, Jump, Goto, ToSource, ToDest, NoTrack, Unknown:
		default:
			t.Errorf("action %q", r.Action)
		}
		in.Rules = []Rule{r}
		rulesetOf([]Chain{in}).walk(&in, &Packet{Dst: addr("10.0.1.11"), DstPort: 80, Protocol: 6})
	})
}

func TestRangesOf(t *testing.T) {
	start := func(key ...byte) bound { return bound{key, false} }
	end := func(key ...byte) bound { return bound{key, true} }
	tests := []struct {
		name      string
		bounds    []bound
		intervals bool
		want      []Range
	}{
		{name: "none"},
		{name: "keys", bounds: []bound{start(2), start(1)}, want: []Range{{[]byte{1}, []byte{1}}, {[]byte{2}, []byte{2}}}},
		{
			name: "intervals", intervals: true, bounds: []bound{end(1, 0), start(0, 2), end(0, 0), start(1, 5), end(1, 6)},
			want: []Range{{[]byte{0, 2}, []byte{0, 255}}, {[]byte{1, 5}, []byte{1, 5}}},
		},
		{
			name: "one begins where another ends", intervals: true, bounds: []bound{start(1), end(3), start(3), end(4)},
			want: []Range{{[]byte{1}, []byte{2}}, {[]byte{3}, []byte{3}}},
		},
		{name: "to the last key", intervals: true, bounds: []bound{start(4, 0)}, want: []Range{{[]byte{4, 0}, []byte{255, 255}}}},
	}
	for _, tt := range tests {
		if d := cmp.Diff(tt.want, rangesOf(tt.bounds, tt.intervals)); d != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, d)
		}
	}
}

func FuzzDecodeElements(f *testing.F) {
	element := func(key []byte, flags byte) []byte {
		return nest(unix.NFTA_LIST_ELEM, nest(unix.NFTA_SET_ELEM_KEY, nest(unix.NFTA_DATA_VALUE, key)), nest(unix.NFTA_SET_ELEM_FLAGS, []byte{0, 0, 0, flags}))
	}
	seed := append([]byte{unix.NFPROTO_INET, 0, 0, 0}, nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS, element([]byte{0, 80}, 0), element([]byte{0, 90}, 1))...)
	if d := cmp.Diff([]Range{{[]byte{0, 80}, []byte{0, 89}}}, rangesOf(decodeElements(seed), true)); d != "" {
		f.Fatal(d)
	}
	f.Add(seed, true)
	f.Fuzz(func(t *testing.T, msg []byte, intervals bool) {
		decodeSet(msg)
		for _, r := range rangesOf(decodeElements(msg), intervals) {
			if len(r.First) != len(r.Last) || string(r.First) > string(r.Last) {
				t.Errorf("%x-%x", r.First, r.Last)
			}
		}
	})
}

func FuzzDecodeChain(f *testing.F) {
	hook := nest(unix.NFTA_CHAIN_HOOK, nest(unix.NFTA_HOOK_HOOKNUM, []byte{0, 0, 0, 2}), nest(unix.NFTA_HOOK_PRIORITY, []byte{0xff, 0xff, 0xff, 0x9c}))
	seed := append([]byte{unix.NFPROTO_INET, 0, 0, 0}, hook...)
	if c, ok := decodeChain(append(seed, nest(unix.NFTA_CHAIN_POLICY, []byte{0, 0, 0, 0})...)); !ok || c.Hook != "forward" || c.Priority != -100 || !c.Drops {
		f.Fatalf("the seed is %+v", c)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, msg []byte) {
		if c, ok := decodeChain(msg); ok && c.Family == "" {
			t.Errorf("%+v has no family", c)
		}
	})
}
