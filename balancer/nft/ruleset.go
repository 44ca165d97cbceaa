package nft

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// TableName is the one table we own, of family inet.
const TableName = "nlb"

// A Ruleset is all of table inet nlb: what is installed, or should be. Nil
// stands for no table. Chains, sets and objects are shared between rulesets and
// never modified once they are in one.
type Ruleset struct {
	Flags   uint32 // table flags; ours has none
	Chains  map[string]*Chain
	Sets    map[string]*Set
	Objects map[string]*Object
	// Flowtable is nil if there is none.
	Flowtable *Flowtable
	// Foreign lists things in our table that we have no word for; their
	// presence is drift.
	Foreign []string
}

func newRuleset() *Ruleset {
	return &Ruleset{Chains: map[string]*Chain{}, Sets: map[string]*Set{}, Objects: map[string]*Object{}}
}

func (r *Ruleset) addChain(c *Chain)   { r.Chains[c.Name] = c }
func (r *Ruleset) addSet(s *Set)       { r.Sets[s.Name] = s }
func (r *Ruleset) addObject(o *Object) { r.Objects[o.Name] = o }

// A Chain is a list of rules, hooked into the packet's way if Base is set.
type Chain struct {
	Name    string
	Base    *Base
	Comment string
	Rules   []Rule
}

// Base is where a base chain is hooked in.
type Base struct {
	Type     string // "nat" or "filter"
	Hook     uint32 // NF_INET_*
	Priority int32
	Drop     bool // policy; ours all accept
}

var hookNames = map[uint32]string{
	unix.NF_INET_PRE_ROUTING: "prerouting", unix.NF_INET_LOCAL_IN: "input", unix.NF_INET_FORWARD: "forward",
	unix.NF_INET_LOCAL_OUT: "output", unix.NF_INET_POST_ROUTING: "postrouting",
}

// Text is the base as nft spells it in a chain's block.
func (b *Base) Text() string {
	policy := "accept"
	if b.Drop {
		policy = "drop"
	}
	return fmt.Sprintf("type %s hook %s priority %d; policy %s;", b.Type, hookNames[b.Hook], b.Priority, policy)
}

// sameKind reports whether a chain can become the other by changing its rules
// and its policy.
func (c *Chain) sameKind(o *Chain) bool {
	if (c.Base == nil) != (o.Base == nil) || c.Comment != o.Comment {
		return false
	}
	return c.Base == nil || c.Base.Type == o.Base.Type && c.Base.Hook == o.Base.Hook && c.Base.Priority == o.Base.Priority
}

// holdsRules reports whether got has the rules of c, and no others.
func (c *Chain) holdsRules(got *Chain) bool {
	return slices.EqualFunc(c.Rules, got.Rules, func(w, g Rule) bool {
		return len(w.exprs) == len(g.exprs) && string(w.exprs) == string(g.exprs) || holdsList(w.exprs, g.exprs)
	})
}

// A kind is the shape of a set's keys and values: the kernel sees lengths, nft
// userland types, a reader text.
type kind struct {
	name     string // as in a set's block
	keyType  uint32
	keyLen   int
	dataType uint32 // 0: a set, not a map
	dataLen  int
	interval bool
	// dynamic says that rules add the elements, which are no business of ours.
	dynamic bool
	timeout time.Duration // after which an element goes; 0: never
	key     func([]byte) string
}

const dataVerdict = 0xffffff00 // NFT_DATA_VERDICT

func (k *kind) flags() (f uint32) {
	if k.interval {
		f |= unix.NFT_SET_INTERVAL
	}
	if k.dataType != 0 {
		f |= unix.NFT_SET_MAP
	}
	if k.dynamic {
		f |= unix.NFT_SET_EVAL
	}
	if k.timeout != 0 {
		f |= unix.NFT_SET_TIMEOUT
	}
	return f
}

// flagText is the flags as nft spells them; a map's is its keyword.
func (k *kind) flagText() string {
	switch {
	case k.interval:
		return "interval"
	case k.timeout != 0:
		return "dynamic,timeout"
	case k.dynamic:
		return "dynamic"
	}
	return ""
}

// timeoutText is a timeout in nft's words.
func timeoutText(d time.Duration) string {
	if d%time.Second == 0 {
		return fmt.Sprintf("%ds", d/time.Second)
	}
	return fmt.Sprintf("%dms", d/time.Millisecond)
}

func (k *kind) isMap() bool { return k.dataType != 0 }

func addrKind(f *family, interval bool) *kind {
	return &kind{name: "type " + f.addrName(), keyType: f.addrType, keyLen: 4 * f.addrRegs, interval: interval, key: addrText}
}

func (f *family) addrName() string {
	return "ip" + map[*family]string{ip4: "v4", ip6: "v6"}[f] + "_addr"
}

func serviceKind(f *family, verdict bool) *kind {
	k := &kind{
		name: "type " + f.addrName() + " . inet_proto . inet_service", keyType: concat(f.addrType, typeProto, typeService),
		keyLen: 4*f.addrRegs + 8,
		key: func(b []byte) string {
			n := len(b) - 8
			return fmt.Sprintf("%s . %s . %d", addrText(b[:n]), protoName(b[n]), binary.BigEndian.Uint16(b[n+4:]))
		},
	}
	if verdict {
		k.name += " : verdict"
		k.dataType = dataVerdict
	}
	return k
}

// Kinds that both families share. Slot and target numbers are of type mark,
// since that is nft's 32-bit number in host order.
var (
	slotKind   = &kind{name: "type mark : mark", keyType: typeMark, keyLen: 4, dataType: typeMark, dataLen: 4, key: nativeText}
	targetKind = &kind{name: "type mark : verdict", keyType: typeMark, keyLen: 4, dataType: dataVerdict, key: nativeText}
	numberKind = &kind{name: "type mark", keyType: typeMark, keyLen: 4, key: nativeText}
	countKind  = &kind{name: "type mark", keyType: typeMark, keyLen: 4, dynamic: true, key: nativeText}
	flowKind   = &kind{name: "type mark", keyType: typeMark, keyLen: 4, dynamic: true, timeout: 2 * time.Minute, key: nativeText}
	shareKind  = &kind{name: "type integer : verdict", keyType: typeInteger, keyLen: 4, dataType: dataVerdict, interval: true, key: bigText}

	vipKinds     = map[*family]*kind{ip4: addrKind(ip4, false), ip6: addrKind(ip6, false)}
	prefixKinds  = map[*family]*kind{ip4: addrKind(ip4, true), ip6: addrKind(ip6, true)}
	serviceKinds = map[*family]*kind{ip4: serviceKind(ip4, true), ip6: serviceKind(ip6, true)}
	targetsKinds = map[*family]*kind{ip4: serviceKind(ip4, false), ip6: serviceKind(ip6, false)}
	sourceKinds  = map[*family]*kind{ip4: sourceKind(ip4), ip6: sourceKind(ip6)}
)

func sourceKind(f *family) *kind {
	return &kind{name: "type mark : " + f.addrName(), keyType: typeMark, keyLen: 4, dataType: f.addrType, dataLen: 4 * f.addrRegs, key: nativeText}
}

func addrText(b []byte) string {
	a, _ := netip.AddrFromSlice(b)
	return a.String()
}
func nativeText(b []byte) string { return fmt.Sprintf("0x%08x", binary.NativeEndian.Uint32(b)) }
func bigText(b []byte) string    { return fmt.Sprint(binary.BigEndian.Uint32(b)) }

// A Set is a named set or map.
type Set struct {
	Name string
	kind *kind
	// Size is the number of elements the kernel makes room for; 0 grows.
	Size uint32
	// Elems are sorted by key. A map of slots has Slots instead.
	Elems []Elem
	// Slots is the value of each key 0, 1, 2 …; noSlot where there is none.
	Slots []uint32
}

// dynamicSize is what the kernel bounds a dynamic set by when it is told no size.
// Told one, it makes room for all at once: a megabyte, which each reading of the
// set walks through.
const dynamicSize = 1<<16 - 1

const noSlot = ^uint32(0)

// An Elem is one element. In an interval set it begins a range, which reaches
// to the next element; one with End ends it.
type Elem struct {
	Key  string
	End  bool
	Goto string // verdict maps
	Data string // other maps
}

func compareElems(a, b Elem) int {
	if c := cmp.Compare(a.Key, b.Key); c != 0 {
		return c
	}
	// A range's end and the next one's beginning share a key; the end is first.
	if a.End != b.End {
		if a.End {
			return -1
		}
		return 1
	}
	return 0
}

func (s *Set) sort() *Set {
	slices.SortFunc(s.Elems, compareElems)
	return s
}

func (s *Set) sameKind(o *Set) bool {
	a, b := s.kind, o.kind
	return a.keyLen == b.keyLen && a.dataType == b.dataType && a.dataLen == b.dataLen && a.interval == b.interval && a.dynamic == b.dynamic && a.timeout == b.timeout &&
		s.Size == o.Size && (s.Slots == nil) == (o.Slots == nil)
}

func (s *Set) elemText(e Elem) string {
	t := s.kind.key([]byte(e.Key))
	switch {
	case e.Goto != "":
		t += " : goto " + e.Goto
	case e.Data != "" && s.kind.dataLen == 4 && s.kind.dataType == typeMark:
		t += " : " + nativeText([]byte(e.Data))
	case e.Data != "":
		t += " : " + addrText([]byte(e.Data))
	}
	return t
}

// elemTexts renders elements, ranges of interval sets as nft does.
func (s *Set) elemTexts(elems []Elem) []string {
	var out []string
	for i := 0; i < len(elems); i++ {
		e := elems[i]
		if !s.kind.interval {
			out = append(out, s.elemText(e))
			continue
		}
		if e.End {
			continue // ends what went before, or begins the gap at zero
		}
		end := ""
		if i+1 < len(elems) {
			end = elems[i+1].Key
		}
		out = append(out, s.rangeText(e, end))
	}
	return out
}

func (s *Set) rangeText(e Elem, end string) string {
	first, last := []byte(e.Key), before(end, s.kind.keyLen)
	value := ""
	if e.Goto != "" {
		value = " : goto " + e.Goto
	}
	if s.kind.keyType != typeInteger {
		if p, ok := prefixOf(first, last); ok {
			return prefixText(p) + value
		}
	}
	if string(first) == string(last) {
		return s.kind.key(first) + value
	}
	return s.kind.key(first) + "-" + s.kind.key(last) + value
}

// before is the key one less than end; an empty end is past the last key.
func before(end string, length int) []byte {
	b := []byte(end)
	if end == "" {
		b = make([]byte, length)
	}
	for i := len(b) - 1; i >= 0; i-- {
		b[i]--
		if b[i] != 0xff {
			break
		}
	}
	return b
}

// after is the key one more than b, or "" past the last.
func after(b []byte) string {
	b = slices.Clone(b)
	for i := len(b) - 1; i >= 0; i-- {
		b[i]++
		if b[i] != 0 {
			return string(b)
		}
	}
	return ""
}

func prefixOf(first, last []byte) (netip.Prefix, bool) {
	a, ok := netip.AddrFromSlice(first)
	if !ok {
		return netip.Prefix{}, false
	}
	for bits := 0; bits <= a.BitLen(); bits++ {
		p := netip.PrefixFrom(a, bits)
		if p.Masked().Addr() == a && string(lastOf(p)) == string(last) {
			return p, true
		}
	}
	return netip.Prefix{}, false
}

func lastOf(p netip.Prefix) []byte {
	b := p.Masked().Addr().AsSlice()
	for i, m := range maskBytes(p.Bits(), len(b)) {
		b[i] |= ^m
	}
	return b
}

// prefixElems turns sorted prefixes that do not overlap or touch into the
// elements of an interval set. The kernel's tree wants an end at zero when
// nothing begins there.
func prefixElems(prefixes []netip.Prefix) []Elem {
	var out []Elem
	for _, p := range prefixes {
		first := string(p.Masked().Addr().AsSlice())
		if n := len(out); n > 0 && out[n-1].End && out[n-1].Key == first {
			out = out[:n-1] // adjoins the one before: one range
		} else {
			out = append(out, Elem{Key: first})
		}
		if end := after(lastOf(p)); end != "" {
			out = append(out, Elem{Key: end, End: true})
		}
	}
	return withZeroEnd(out)
}

func withZeroEnd(elems []Elem) []Elem {
	if len(elems) == 0 {
		return nil
	}
	zero := string(make([]byte, len(elems[0].Key)))
	if elems[0].Key == zero {
		return elems
	}
	return append([]Elem{{Key: zero, End: true}}, elems...)
}

// An Object is a named counter or conntrack timeout policy.
type Object struct {
	Name string
	Type uint32
	// Established is the seconds an established TCP flow may be silent
	// (objectCTTimeout only).
	Established uint32
}

// words are the object's keyword, name and body in nft's language.
func (o *Object) words() (keyword, name, body string) {
	if o.Type == objectCTTimeout {
		return "ct timeout", o.Name, fmt.Sprintf(" protocol tcp; policy = { established : %ds };", o.Established)
	}
	return "counter", o.Name, ""
}

// String is the ruleset in nft's language, sorted, for people and goldens. nft
// can print one rule of it but not read it: a choice, whose shift by two
// registers keeps the mark's other bits, as no text of nft can say.
func (r *Ruleset) String() string {
	if r == nil {
		return ""
	}
	var b strings.Builder
	fmt.Fprintf(&b, "table inet %s {\n", TableName)
	for _, name := range slices.Sorted(maps.Keys(r.Objects)) {
		word, name, body := r.Objects[name].words()
		fmt.Fprintf(&b, "\t%s %s {%s }\n", word, name, body)
	}
	for _, name := range slices.Sorted(maps.Keys(r.Sets)) {
		r.Sets[name].write(&b)
	}
	if f := r.Flowtable; f != nil {
		fmt.Fprintf(&b, "\tflowtable %s {\n\t\t%s\n\t}\n", f.Name, strings.Join(f.body(), "\n\t\t"))
	}
	for _, name := range slices.Sorted(maps.Keys(r.Chains)) {
		r.Chains[name].write(&b)
	}
	b.WriteString("}\n")
	return b.String()
}

func (s *Set) write(b *strings.Builder) {
	fmt.Fprintf(b, "\t%s %s {\n\t\t%s\n", s.word(), s.Name, s.kind.name)
	if f := s.kind.flagText(); f != "" {
		fmt.Fprintf(b, "\t\tflags %s\n", f)
	}
	if s.kind.timeout != 0 {
		fmt.Fprintf(b, "\t\ttimeout %s\n", timeoutText(s.kind.timeout))
	}
	if s.Size != 0 {
		fmt.Fprintf(b, "\t\tsize %d\n", s.Size)
	}
	if t := s.elemTexts(s.allElems()); len(t) > 0 {
		fmt.Fprintf(b, "\t\telements = { %s }\n", strings.Join(t, ",\n\t\t\t     "))
	}
	b.WriteString("\t}\n")
}

func (s *Set) word() string {
	if s.kind.isMap() {
		return "map"
	}
	return "set"
}

// allElems is Elems, or Slots in the same form.
func (s *Set) allElems() []Elem {
	if s.Slots == nil {
		return s.Elems
	}
	var filled slotList
	for i, v := range s.Slots {
		if v != noSlot {
			filled = filled.append(i, v)
		}
	}
	return filled.elems()
}

// A slotList has slots and their values by turns, as the kernel has them. Tables
// change by thousands of slots, which are cheap as long as they are one string.
type slotList []byte

func (l slotList) append(slot int, value uint32) slotList {
	return binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(l, uint32(slot)), value)
}

func (l slotList) elems() []Elem {
	all := string(l)
	out := make([]Elem, len(all)/8)
	for i := range out {
		out[i] = Elem{Key: all[8*i : 8*i+4], Data: all[8*i+4 : 8*i+8]}
	}
	return out
}

func (c *Chain) write(b *strings.Builder) {
	fmt.Fprintf(b, "\tchain %s {\n", c.Name)
	if c.Comment != "" {
		fmt.Fprintf(b, "\t\tcomment %q\n", c.Comment)
	}
	if c.Base != nil {
		fmt.Fprintf(b, "\t\t%s\n", c.Base.Text())
	}
	for _, r := range c.Rules {
		fmt.Fprintf(b, "\t\t%s\n", r.Text)
	}
	b.WriteString("\t}\n")
}
