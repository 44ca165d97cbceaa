package nft

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// A Plan is one transaction that turns the ruleset that was observed into the
// one that is wanted.
type Plan struct {
	steps      []step
	have, want *Ruleset
	// numbers are what want was rendered with; nil if nothing is wanted.
	numbers *numbers
}

// Empty reports that there is nothing to change.
func (p *Plan) Empty() bool { return len(p.steps) == 0 }

// Lines says each step as a command of nft(8).
func (p *Plan) Lines() []string {
	out := make([]string, len(p.steps))
	for i, s := range p.steps {
		out[i] = s.text()
	}
	return out
}

// elems is how many elements come and go.
func (p *Plan) elems() (n int) {
	for _, s := range p.steps {
		switch s := s.(type) {
		case addElems:
			n += len(s.elems)
		case delElems:
			n += len(s.elems)
		}
	}
	return n
}

// A step is one command of a transaction.
type step interface {
	text() string
	encode(b *batch, index int)
}

// diff lists the steps from have to want. The whole list is one transaction, so
// no packet ever meets a state in between; the order is the one the kernel
// demands: things exist before they are named, and are named by nobody when
// they go.
func diff(have, want *Ruleset) []step {
	if want == nil {
		if have == nil {
			return nil
		}
		return []step{delTable{}}
	}
	if have == nil {
		return append([]step{addTable{}}, changes(newRuleset(), want)...)
	}
	if !mendable(have, want) {
		// Somebody changed what cannot be changed back in place.
		return append([]step{delTable{}, addTable{}}, changes(newRuleset(), want)...)
	}
	return changes(have, want)
}

// mendable reports whether have can become want by adding, changing and removing
// rules, elements and whole chains, sets and objects.
func mendable(have, want *Ruleset) bool {
	if have.Flags != want.Flags || len(have.Foreign) > 0 {
		return false
	}
	for name, w := range want.Chains {
		if h := have.Chains[name]; h != nil && h != w && !h.sameKind(w) {
			return false
		}
	}
	for name, w := range want.Sets {
		if h := have.Sets[name]; h != nil && h != w && !h.sameKind(w) {
			return false
		}
	}
	for name, w := range want.Objects {
		if h := have.Objects[name]; h != nil && *h != *w {
			return false
		}
	}
	return true
}

func changes(have, want *Ruleset) []step {
	var make1, unname, rules, fill, flush, remove []step
	delFast, addFast := flowtableChanges(have, want)
	again := len(delFast) > 0 && len(addFast) > 0
	for _, name := range missing(want.Objects, have.Objects) {
		make1 = append(make1, addObject{want.Objects[name]})
	}
	for _, name := range missing(want.Sets, have.Sets) {
		make1 = append(make1, addSet{want.Sets[name]})
	}
	chains := differing(want.Chains, have.Chains)
	if again && !slices.Contains(chains, chainForward) {
		chains = append(chains, chainForward) // it names the flowtable
	}
	for _, name := range chains {
		w, h := want.Chains[name], have.Chains[name]
		if h == nil {
			make1 = append(make1, addChain{w})
			h = &Chain{Base: w.Base}
		}
		if w.Base != nil && h.Base.Drop != w.Base.Drop {
			make1 = append(make1, addChain{w})
		}
		if w.holdsRules(h) && !(again && name == chainForward) {
			continue
		}
		if len(h.Rules) > 0 {
			unname = append(unname, flushChain{name})
		}
		for _, r := range w.Rules {
			rules = append(rules, addRule{name, r})
		}
	}
	for _, name := range differing(want.Sets, have.Sets) {
		w, h := want.Sets[name], have.Sets[name]
		add, del := elemChanges(h, w)
		if len(del) > 0 {
			unname = append(unname, delElems{w, del})
		}
		if len(add) > 0 {
			fill = append(fill, addElems{w, add})
		}
	}
	for _, name := range missing(have.Chains, want.Chains) {
		if len(have.Chains[name].Rules) > 0 {
			flush = append(flush, flushChain{name})
		}
		remove = append(remove, delChain{name})
	}
	gone := missing(have.Sets, want.Sets)
	for _, name := range gone {
		// A verdict map names chains for as long as it exists.
		flush = append(flush, delSet{have.Sets[name]})
	}
	for _, name := range missing(have.Objects, want.Objects) {
		remove = append(remove, delObject{have.Objects[name]})
	}
	// Sets may be named by chains that are flushed after them in name order.
	slices.SortStableFunc(flush, func(a, b step) int { return flushRank(a) - flushRank(b) })
	return slices.Concat(make1, unname, delFast, addFast, rules, fill, flush, remove)
}

func flushRank(s step) int {
	if _, ok := s.(delSet); ok {
		return 1
	}
	return 0
}

// missing lists, sorted, the names that a has and b has not.
func missing[T any](a, b map[string]T) (names []string) {
	for name := range a {
		if _, ok := b[name]; !ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// differing lists, sorted, the names under which want has another value than have,
// or one that have has not.
func differing[T comparable](want, have map[string]T) (names []string) {
	for name, w := range want {
		if h, ok := have[name]; !ok || h != w {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// elemChanges lists what to add and what to remove. A key whose value changes is
// in both: the kernel has no replace, but a transaction has.
func elemChanges(have, want *Set) (add, del []Elem) {
	if want.Slots != nil {
		return slotChanges(have, want)
	}
	var h []Elem
	if have != nil {
		h = have.Elems
	}
	w := want.Elems
	for len(h) > 0 || len(w) > 0 {
		switch c := firstOf(h, w); {
		case c < 0:
			del, h = append(del, h[0]), h[1:]
		case c > 0:
			add, w = append(add, w[0]), w[1:]
		default:
			if h[0] != w[0] {
				del, add = append(del, h[0]), append(add, w[0])
			}
			h, w = h[1:], w[1:]
		}
	}
	if want.kind.interval && len(add)+len(del) > 0 {
		// Ends and beginnings only make sense together: the kernel refuses
		// ranges that overlap for a moment within the transaction.
		if have != nil {
			del = have.Elems
		}
		add = want.Elems
	}
	return add, del
}

func firstOf(a, b []Elem) int {
	switch {
	case len(a) == 0:
		return 1
	case len(b) == 0:
		return -1
	}
	return compareElems(a[0], b[0])
}

func slotChanges(have, want *Set) (add, del []Elem) {
	var added, removed slotList
	for i, w := range want.Slots {
		h := noSlot
		if have != nil && i < len(have.Slots) {
			h = have.Slots[i]
		}
		if h == w {
			continue
		}
		if h != noSlot {
			removed = removed.append(i, h)
		}
		if w != noSlot {
			added = added.append(i, w)
		}
	}
	add, del = added.elems(), removed.elems()
	if have != nil {
		del = append(del, have.Elems...) // keys past the table's end: drift
	}
	return add, del
}

// --- steps ---------------------------------------------------------------------

func says(format string, args ...any) string {
	return fmt.Sprintf(format, args...)
}

type addTable struct{}

func (addTable) text() string { return "add table inet " + TableName }
func (addTable) encode(b *batch, i int) {
	b.message(i, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, func(a *attrs) {
		a.str(unix.NFTA_TABLE_NAME, TableName)
		a.u32(unix.NFTA_TABLE_FLAGS, 0)
	})
}

type delTable struct{}

func (delTable) text() string { return "delete table inet " + TableName }
func (delTable) encode(b *batch, i int) {
	b.message(i, unix.NFT_MSG_DELTABLE, 0, func(a *attrs) { a.str(unix.NFTA_TABLE_NAME, TableName) })
}

type addChain struct{ c *Chain }

func (s addChain) text() string {
	body := ""
	if s.c.Base != nil {
		body += " " + s.c.Base.Text()
	}
	if s.c.Comment != "" {
		body += fmt.Sprintf(" comment %q;", s.c.Comment)
	}
	if body != "" {
		body = " {" + body + " }"
	}
	return says("add chain inet %s %s%s", TableName, s.c.Name, body)
}

func (s addChain) encode(b *batch, i int) {
	b.message(i, unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, func(a *attrs) {
		a.str(unix.NFTA_CHAIN_TABLE, TableName)
		a.str(unix.NFTA_CHAIN_NAME, s.c.Name)
		if base := s.c.Base; base != nil {
			a.nest(unix.NFTA_CHAIN_HOOK, func(a *attrs) {
				a.u32(unix.NFTA_HOOK_HOOKNUM, base.Hook)
				a.u32(unix.NFTA_HOOK_PRIORITY, uint32(base.Priority))
			})
			policy := uint32(1) // NF_ACCEPT
			if base.Drop {
				policy = 0
			}
			a.u32(unix.NFTA_CHAIN_POLICY, policy)
			a.str(unix.NFTA_CHAIN_TYPE, base.Type)
		}
		if s.c.Comment != "" {
			a.put(nftaChainUserdata, commentUserdata(s.c.Comment))
		}
	})
}

// nftaChainUserdata is NFTA_CHAIN_USERDATA, since kernel 5.10.
const nftaChainUserdata = 12

// commentUserdata is a comment as nft stores it: type, length, text, NUL.
func commentUserdata(s string) []byte {
	return append(append([]byte{0, byte(len(s) + 1)}, s...), 0)
}

func parseComment(b []byte) string {
	for len(b) >= 2 && len(b) >= 2+int(b[1]) {
		if b[0] == 0 {
			return text(b[2 : 2+b[1]])
		}
		b = b[2+int(b[1]):]
	}
	return ""
}

type delChain struct{ name string }

func (s delChain) text() string { return says("delete chain inet %s %s", TableName, s.name) }
func (s delChain) encode(b *batch, i int) {
	b.message(i, unix.NFT_MSG_DELCHAIN, 0, func(a *attrs) {
		a.str(unix.NFTA_CHAIN_TABLE, TableName)
		a.str(unix.NFTA_CHAIN_NAME, s.name)
	})
}

type flushChain struct{ name string }

func (s flushChain) text() string { return says("flush chain inet %s %s", TableName, s.name) }
func (s flushChain) encode(b *batch, i int) {
	b.message(i, unix.NFT_MSG_DELRULE, 0, func(a *attrs) {
		a.str(unix.NFTA_RULE_TABLE, TableName)
		a.str(unix.NFTA_RULE_CHAIN, s.name)
	})
}

type addRule struct {
	chain string
	r     Rule
}

func (s addRule) text() string { return says("add rule inet %s %s %s", TableName, s.chain, s.r.Text) }
func (s addRule) encode(b *batch, i int) {
	b.message(i, unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, func(a *attrs) {
		a.str(unix.NFTA_RULE_TABLE, TableName)
		a.str(unix.NFTA_RULE_CHAIN, s.chain)
		a.put(unix.NFTA_RULE_EXPRESSIONS|unix.NLA_F_NESTED, s.r.exprs)
	})
}

type addSet struct{ s *Set }

func (s addSet) text() string {
	body := s.s.kind.name + ";"
	if f := s.s.kind.flagText(); f != "" {
		body += " flags " + f + ";"
	}
	if t := s.s.kind.timeout; t != 0 {
		body += fmt.Sprintf(" timeout %s;", timeoutText(t))
	}
	if s.s.Size > 0 {
		body += fmt.Sprintf(" size %d;", s.s.Size)
	}
	return says("add %s inet %s %s { %s }", s.s.word(), TableName, s.s.Name, body)
}

func (s addSet) encode(b *batch, i int) {
	k := s.s.kind
	b.message(i, unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE, func(a *attrs) {
		a.str(unix.NFTA_SET_TABLE, TableName)
		a.str(unix.NFTA_SET_NAME, s.s.Name)
		a.u32(unix.NFTA_SET_FLAGS, k.flags())
		a.u32(unix.NFTA_SET_KEY_TYPE, k.keyType)
		a.u32(unix.NFTA_SET_KEY_LEN, uint32(k.keyLen))
		if k.isMap() {
			a.u32(unix.NFTA_SET_DATA_TYPE, k.dataType)
			if k.dataType != dataVerdict {
				a.u32(unix.NFTA_SET_DATA_LEN, uint32(k.dataLen))
			}
		}
		if s.s.Size > 0 && !k.dynamic {
			a.nest(unix.NFTA_SET_DESC, func(a *attrs) { a.u32(unix.NFTA_SET_DESC_SIZE, s.s.Size) })
		}
		if k.timeout != 0 {
			a.put(unix.NFTA_SET_TIMEOUT, binary.BigEndian.AppendUint64(nil, uint64(k.timeout.Milliseconds())))
		}
		a.u32(unix.NFTA_SET_ID, uint32(i)+1)
		if order := k.byteOrder(); order != nil {
			a.put(unix.NFTA_SET_USERDATA, order)
		}
	})
}

// byteOrder tells nft how to print numbers; it knows that of addresses
// (NFTNL_UDATA_SET_KEYBYTEORDER and _DATABYTEORDER, each a number in host
// order).
func (k *kind) byteOrder() []byte {
	const udataKey, udataData, hostEndian, bigEndian = 0, 1, 1, 2
	var b []byte
	switch k.keyType {
	case typeMark:
		b = append([]byte{udataKey, 4}, native32(hostEndian)...)
	case typeInteger:
		b = append([]byte{udataKey, 4}, native32(bigEndian)...)
	}
	if k.dataType == typeMark {
		b = append(append(b, udataData, 4), native32(hostEndian)...)
	}
	return b
}

type delSet struct{ s *Set }

func (s delSet) text() string { return says("delete %s inet %s %s", s.s.word(), TableName, s.s.Name) }
func (s delSet) encode(b *batch, i int) {
	b.message(i, unix.NFT_MSG_DELSET, 0, func(a *attrs) {
		a.str(unix.NFTA_SET_TABLE, TableName)
		a.str(unix.NFTA_SET_NAME, s.s.Name)
	})
}

type addElems struct {
	s     *Set
	elems []Elem
}

func (s addElems) text() string { return elemLine("add", s.s, s.elems) }
func (s addElems) encode(b *batch, i int) {
	encodeElems(b, i, unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, s.s, s.elems)
}

type delElems struct {
	s     *Set
	elems []Elem
}

func (s delElems) text() string { return elemLine("delete", s.s, s.elems) }
func (s delElems) encode(b *batch, i int) {
	encodeElems(b, i, unix.NFT_MSG_DELSETELEM, 0, s.s, s.elems)
}

func elemLine(verb string, s *Set, elems []Elem) string {
	return says("%s element inet %s %s { %s }", verb, TableName, s.Name, strings.Join(s.elemTexts(elems), ", "))
}

// encodeElems splits the list over messages, since an attribute holds 64 KiB.
func encodeElems(b *batch, i int, typ, flags uint16, s *Set, elems []Elem) {
	const limit = 60 << 10
	for len(elems) > 0 {
		b.message(i, typ, flags, func(a *attrs) {
			a.str(unix.NFTA_SET_ELEM_LIST_TABLE, TableName)
			a.str(unix.NFTA_SET_ELEM_LIST_SET, s.Name)
			list := a.open(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
			for len(elems) > 0 && len(*a)-list < limit {
				putElem(a, s.kind, elems[0])
				elems = elems[1:]
			}
			a.close(list)
		})
	}
}

func putElem(a *attrs, k *kind, e Elem) {
	elem := a.open(unix.NFTA_LIST_ELEM)
	if e.End {
		a.u32(unix.NFTA_SET_ELEM_FLAGS, unix.NFT_SET_ELEM_INTERVAL_END)
	}
	key := a.open(unix.NFTA_SET_ELEM_KEY)
	a.putString(unix.NFTA_DATA_VALUE, e.Key)
	a.close(key)
	switch {
	case e.Goto != "":
		data := a.open(unix.NFTA_SET_ELEM_DATA)
		putVerdict(a, unix.NFT_GOTO, e.Goto)
		a.close(data)
	case e.Data != "":
		data := a.open(unix.NFTA_SET_ELEM_DATA)
		a.putString(unix.NFTA_DATA_VALUE, e.Data)
		a.close(data)
	}
	a.close(elem)
}

// slotBytes is what putElem makes of a slot; most of a large transaction are slots.
const slotBytes = 28

// putString is put without a copy of the value.
func (b *attrs) putString(typ uint16, v string) {
	*b = binary.NativeEndian.AppendUint16(*b, uint16(4+len(v)))
	*b = binary.NativeEndian.AppendUint16(*b, typ)
	*b = append(*b, v...)
	b.pad()
}

type addObject struct{ o *Object }

func (s addObject) text() string {
	word, name, body := s.o.words()
	return says("add %s inet %s %s {%s }", word, TableName, name, body)
}

func (s addObject) encode(b *batch, i int) {
	b.message(i, unix.NFT_MSG_NEWOBJ, unix.NLM_F_CREATE, func(a *attrs) {
		a.str(unix.NFTA_OBJ_TABLE, TableName)
		a.str(unix.NFTA_OBJ_NAME, s.o.Name)
		a.u32(unix.NFTA_OBJ_TYPE, s.o.Type)
		a.nest(unix.NFTA_OBJ_DATA, func(a *attrs) {
			if s.o.Type == objectCTTimeout {
				putTimeout(a, s.o.Established)
			}
		})
	})
}

// Attributes of a ct timeout object, and the index of the established state
// (linux/netfilter/nf_tables.h, nfnetlink_cttimeout.h).
const (
	nftaTimeoutL3Proto    = 1
	nftaTimeoutL4Proto    = 2
	nftaTimeoutData       = 3
	ctaTimeoutEstablished = 3
)

// putTimeout says only the one state we care for; the kernel fills in the
// others from the namespace's sysctls.
func putTimeout(a *attrs, established uint32) {
	var l3 [2]byte
	binary.BigEndian.PutUint16(l3[:], unix.NFPROTO_INET)
	a.put(nftaTimeoutL3Proto, l3[:])
	a.u8(nftaTimeoutL4Proto, unix.IPPROTO_TCP)
	a.nest(nftaTimeoutData, func(a *attrs) { a.u32(ctaTimeoutEstablished, established) })
}

type delObject struct{ o *Object }

func (s delObject) text() string {
	word, name, _ := s.o.words()
	return says("delete %s inet %s %s", word, TableName, name)
}

func (s delObject) encode(b *batch, i int) {
	b.message(i, unix.NFT_MSG_DELOBJ, 0, func(a *attrs) {
		a.str(unix.NFTA_OBJ_TABLE, TableName)
		a.str(unix.NFTA_OBJ_NAME, s.o.Name)
		a.u32(unix.NFTA_OBJ_TYPE, s.o.Type)
	})
}
