package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// generation is the number of transactions the namespace has seen.
func (s *socket) generation() (gen uint32, err error) {
	err = s.request(unix.NFT_MSG_GETGEN, false, func(*attrs) {}, func(m message) {
		gen = be32(find(m.body, unix.NFTA_GEN_ID))
	})
	if err != nil {
		return 0, fmt.Errorf("read ruleset generation: %w", err)
	}
	return gen, nil
}

// dump reads all of our table; nil says that there is none. What somebody
// changes in the table meanwhile may be in it, or not, or in part.
func (s *socket) dump() (*Ruleset, error) {
	rs := newRuleset()
	err := s.request(unix.NFT_MSG_GETTABLE, false, func(a *attrs) { a.str(unix.NFTA_TABLE_NAME, TableName) }, func(m message) {
		rs.Flags = be32(find(m.body, unix.NFTA_TABLE_FLAGS))
	})
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read table inet %s: %w", TableName, err)
	}
	for _, read := range []func(*Ruleset) error{s.dumpChains, s.dumpRules, s.dumpSets, s.dumpObjects, s.dumpFlowtables} {
		// What is not there any more was removed meanwhile, which will be heard.
		if err := read(rs); err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, err
		}
	}
	return rs, nil
}

func isOurs(m message, tableAttr uint16) bool {
	return m.family == unix.NFPROTO_INET && text(find(m.body, tableAttr)) == TableName
}

func (s *socket) dumpChains(rs *Ruleset) error {
	err := s.list(unix.NFT_MSG_GETCHAIN, func(*attrs) {}, func() { clear(rs.Chains) }, func(m message) {
		if !isOurs(m, unix.NFTA_CHAIN_TABLE) {
			return
		}
		c := &Chain{Name: text(find(m.body, unix.NFTA_CHAIN_NAME)), Comment: parseComment(find(m.body, nftaChainUserdata))}
		if hook := find(m.body, unix.NFTA_CHAIN_HOOK); hook != nil {
			c.Base = &Base{
				Type:     text(find(m.body, unix.NFTA_CHAIN_TYPE)),
				Hook:     be32(find(hook, unix.NFTA_HOOK_HOOKNUM)),
				Priority: int32(be32(find(hook, unix.NFTA_HOOK_PRIORITY))),
				Drop:     be32(find(m.body, unix.NFTA_CHAIN_POLICY)) == 0,
			}
		}
		rs.addChain(c)
	})
	return wrapDump("chains", err)
}

func (s *socket) dumpRules(rs *Ruleset) error {
	begin := func() {
		for _, c := range rs.Chains {
			c.Rules = nil
		}
	}
	err := s.list(unix.NFT_MSG_GETRULE, func(a *attrs) { a.str(unix.NFTA_RULE_TABLE, TableName) }, begin, func(m message) {
		if !isOurs(m, unix.NFTA_RULE_TABLE) {
			return
		}
		c := rs.Chains[text(find(m.body, unix.NFTA_RULE_CHAIN))]
		if c == nil {
			return // newer than the dump of the chains
		}
		c.Rules = append(c.Rules, Rule{
			exprs: slices.Clone(find(m.body, unix.NFTA_RULE_EXPRESSIONS)),
			Text:  fmt.Sprintf("# handle %d", be64(find(m.body, unix.NFTA_RULE_HANDLE))),
		})
	})
	return wrapDump("rules", err)
}

func (s *socket) dumpSets(rs *Ruleset) error {
	var foreign []string
	begin := func() { clear(rs.Sets); foreign = nil }
	err := s.list(unix.NFT_MSG_GETSET, func(a *attrs) { a.str(unix.NFTA_SET_TABLE, TableName) }, begin, func(m message) {
		if !isOurs(m, unix.NFTA_SET_TABLE) {
			return
		}
		if set := parseSet(m.body); set.kind != nil {
			rs.addSet(set)
		} else {
			foreign = append(foreign, "set "+set.Name)
		}
	})
	if err != nil {
		return wrapDump("sets", err)
	}
	rs.Foreign = append(rs.Foreign, foreign...)
	for _, set := range rs.Sets {
		if set.kind.dynamic {
			continue
		}
		if err := s.dumpElems(set); err != nil {
			return err
		}
	}
	return nil
}

// kinds are all shapes of set we make.
var kinds = func() []*kind {
	out := []*kind{slotKind, targetKind, shareKind, numberKind, countKind, flowKind}
	for _, f := range families {
		out = append(out, vipKinds[f], prefixKinds[f], serviceKinds[f], targetsKinds[f], sourceKinds[f], destinationKinds[f], clientKinds[f], refusedKinds[f])
	}
	return out
}()

func parseSet(b []byte) *Set {
	set := &Set{
		Name: text(find(b, unix.NFTA_SET_NAME)),
		Size: be32(find(find(b, unix.NFTA_SET_DESC), unix.NFTA_SET_DESC_SIZE)),
	}
	flags, keyType, keyLen := be32(find(b, unix.NFTA_SET_FLAGS)), be32(find(b, unix.NFTA_SET_KEY_TYPE)), be32(find(b, unix.NFTA_SET_KEY_LEN))
	dataType := be32(find(b, unix.NFTA_SET_DATA_TYPE))
	timeout := time.Duration(be64(find(b, unix.NFTA_SET_TIMEOUT))) * time.Millisecond
	if find(b, nftaSetExpr) != nil || find(b, nftaSetExpressions) != nil {
		return set // every element would get a statement of somebody else's
	}
	for _, k := range kinds {
		if flags == k.flags() && keyType == k.keyType && int(keyLen) == k.keyLen && dataType == k.dataType && timeout == k.timeout {
			set.kind = k
		}
	}
	if set.kind == slotKind {
		set.Slots = make([]uint32, set.Size)
	}
	return set
}

// Attributes of linux/netfilter/nf_tables.h that say what each element of a set
// comes with.
const (
	nftaSetExpr        = 17
	nftaSetExpressions = 18
)

// empty forgets the elements.
func (s *Set) empty() {
	s.Elems = nil
	for i := range s.Slots {
		s.Slots[i] = noSlot
	}
}

func (s *socket) dumpElems(set *Set) error {
	err := s.listElems(set.Name, set.empty, set.addParsed)
	set.sort()
	return err
}

func (s *socket) listElems(set string, begin func(), f func(elem []byte)) error {
	err := s.list(unix.NFT_MSG_GETSETELEM, func(a *attrs) {
		a.str(unix.NFTA_SET_ELEM_LIST_TABLE, TableName)
		a.str(unix.NFTA_SET_ELEM_LIST_SET, set)
	}, begin, func(m message) {
		list := find(m.body, unix.NFTA_SET_ELEM_LIST_ELEMENTS)
		for e, rest, ok := next(list); ok; e, rest, ok = next(rest) {
			f(e.data)
		}
	})
	return wrapDump("elements of "+set, err)
}

func (s *Set) addParsed(b []byte) {
	var key, data, verdict, other []byte
	end := false
	for a, rest, ok := next(b); ok; a, rest, ok = next(rest) {
		switch a.typ {
		case unix.NFTA_SET_ELEM_KEY:
			key = find(a.data, unix.NFTA_DATA_VALUE)
		case unix.NFTA_SET_ELEM_DATA:
			data, verdict = find(a.data, unix.NFTA_DATA_VALUE), find(a.data, unix.NFTA_DATA_VERDICT)
		case unix.NFTA_SET_ELEM_FLAGS:
			end = be32(a.data)&unix.NFT_SET_ELEM_INTERVAL_END != 0
		case unix.NFTA_SET_ELEM_EXPIRATION, unix.NFTA_SET_ELEM_TIMEOUT:
			other = a.data
		}
	}
	if s.Slots != nil && len(key) == 4 && len(data) == 4 {
		if i := binary.NativeEndian.Uint32(key); int(i) < len(s.Slots) {
			s.Slots[i] = binary.NativeEndian.Uint32(data)
			return
		}
	}
	e := Elem{Key: string(key), End: end, Data: string(data)}
	if verdict != nil {
		e.Goto = text(find(verdict, unix.NFTA_VERDICT_CHAIN))
		if code := int32(be32(find(verdict, unix.NFTA_VERDICT_CODE))); code != unix.NFT_GOTO {
			e.Goto = fmt.Sprintf("(verdict %d) %s", code, e.Goto)
		}
	}
	if other != nil {
		e.Goto += " (expires)"
	}
	s.Elems = append(s.Elems, e)
}

func (s *socket) dumpObjects(rs *Ruleset) error {
	var foreign []string
	begin := func() { clear(rs.Objects); foreign = nil }
	err := s.listObjects(begin, func(name string, typ uint32, data []byte) {
		o := &Object{Name: name, Type: typ}
		switch typ {
		case objectCounter:
		case objectCTTimeout:
			o.Established = be32(find(find(data, nftaTimeoutData), ctaTimeoutEstablished))
		default:
			foreign = append(foreign, "object "+name)
			return
		}
		rs.addObject(o)
	})
	rs.Foreign = append(rs.Foreign, foreign...)
	return err
}

func (s *socket) listObjects(begin func(), f func(name string, typ uint32, data []byte)) error {
	err := s.list(unix.NFT_MSG_GETOBJ, func(a *attrs) { a.str(unix.NFTA_OBJ_TABLE, TableName) }, begin, func(m message) {
		if isOurs(m, unix.NFTA_OBJ_TABLE) {
			f(text(find(m.body, unix.NFTA_OBJ_NAME)), be32(find(m.body, unix.NFTA_OBJ_TYPE)), find(m.body, unix.NFTA_OBJ_DATA))
		}
	})
	return wrapDump("objects", err)
}

func wrapDump(what string, err error) error {
	if err != nil {
		return fmt.Errorf("read %s of table inet %s: %w", what, TableName, err)
	}
	return nil
}
