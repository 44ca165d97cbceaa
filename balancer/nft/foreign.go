package nft

import (
	"cmp"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// Foreign has the chains of other tables, as they were when they were read. It is for
// telling people what those do to a flow, and no reason to change anything.
type Foreign struct {
	chains map[foreignName]*foreignChain
	bases  []*foreignChain // sorted by hook and priority
	sets   map[foreignName]*foreignSet
}

// A foreignName is a chain's or a set's: its table's family and name, and its own.
type foreignName struct {
	family      uint8
	table, name string
}

func (n foreignName) String() string {
	family := map[uint8]string{unix.NFPROTO_INET: "inet", unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6"}[n.family]
	return fmt.Sprintf("%s %s %s", family, n.table, n.name)
}

type foreignChain struct {
	name  foreignName
	base  *Base
	rules []foreignRule // in order
}

type foreignRule struct {
	handle uint64
	exprs  []byte // NFTA_LIST_ELEM...
}

// A foreignSet has the elements of a set by key. It is opaque if a key may be a range
// or a wildcard of several fields, or elements come and go by themselves.
type foreignSet struct {
	interval, opaque bool
	elems            []foreignElem // sorted by key, ends before beginnings
}

type foreignElem struct {
	key     string
	end     bool
	verdict *verdict
}

// ReadForeign reads the chains of all tables but ours that IP packets pass. It needs
// CAP_NET_ADMIN. What changes meanwhile may be in it or not.
func ReadForeign() (*Foreign, error) {
	s, err := dial()
	if err != nil {
		return nil, err
	}
	f := &Foreign{chains: make(map[foreignName]*foreignChain), sets: make(map[foreignName]*foreignSet)}
	for _, read := range []func(*socket) error{f.readChains, f.readRules, f.readSets} {
		if err = read(s); err != nil {
			break
		}
	}
	if closed := s.close(); err == nil {
		err = closed
	}
	if err != nil {
		return nil, fmt.Errorf("read other tables: %w", err)
	}
	return f, nil
}

// foreignNameOf is the name that a message of a family is about, and whether it is
// somebody else's and meets IP packets.
func foreignNameOf(m message, tableAttr, nameAttr uint16) (n foreignName, ok bool) {
	n = foreignName{m.family, text(find(m.body, tableAttr)), text(find(m.body, nameAttr))}
	switch m.family {
	case unix.NFPROTO_IPV4, unix.NFPROTO_IPV6:
		return n, true
	case unix.NFPROTO_INET:
		return n, n.table != TableName
	}
	return n, false
}

func (f *Foreign) readChains(s *socket) error {
	begin := func() { clear(f.chains); f.bases = nil }
	err := s.listAll(unix.NFT_MSG_GETCHAIN, func(*attrs) {}, begin, func(m message) {
		name, ok := foreignNameOf(m, unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME)
		if !ok {
			return
		}
		c := &foreignChain{name: name}
		if hook := find(m.body, unix.NFTA_CHAIN_HOOK); hook != nil {
			c.base = &Base{
				Type: text(find(m.body, unix.NFTA_CHAIN_TYPE)), Hook: be32(find(hook, unix.NFTA_HOOK_HOOKNUM)),
				Priority: int32(be32(find(hook, unix.NFTA_HOOK_PRIORITY))),
				Drop:     be32(find(m.body, unix.NFTA_CHAIN_POLICY)) == 0,
			}
			f.bases = append(f.bases, c)
		}
		f.chains[name] = c
	})
	slices.SortStableFunc(f.bases, func(a, b *foreignChain) int { return cmp.Compare(a.base.Priority, b.base.Priority) })
	return err
}

func (f *Foreign) readRules(s *socket) error {
	begin := func() {
		for _, c := range f.chains {
			c.rules = nil
		}
	}
	return s.listAll(unix.NFT_MSG_GETRULE, func(*attrs) {}, begin, func(m message) {
		name, ok := foreignNameOf(m, unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN)
		if c := f.chains[name]; ok && c != nil {
			c.rules = append(c.rules, foreignRule{be64(find(m.body, unix.NFTA_RULE_HANDLE)), slices.Clone(find(m.body, unix.NFTA_RULE_EXPRESSIONS))})
		}
	})
}

func (f *Foreign) readSets(s *socket) error {
	if len(f.bases) == 0 {
		return nil // nothing would ask
	}
	err := s.listAll(unix.NFT_MSG_GETSET, func(*attrs) {}, func() { clear(f.sets) }, func(m message) {
		name, ok := foreignNameOf(m, unix.NFTA_SET_TABLE, unix.NFTA_SET_NAME)
		if !ok {
			return
		}
		const concatenated = 1 << 7 // NFT_SET_CONCAT
		flags := be32(find(m.body, unix.NFTA_SET_FLAGS))
		f.sets[name] = &foreignSet{
			interval: flags&unix.NFT_SET_INTERVAL != 0,
			opaque:   flags&(unix.NFT_SET_EVAL|unix.NFT_SET_TIMEOUT|concatenated) != 0,
		}
	})
	if err != nil {
		return err
	}
	for name, set := range f.sets {
		if !set.opaque {
			if err := set.read(s, name); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *foreignSet) read(s *socket, name foreignName) error {
	fill := func(a *attrs) {
		a.str(unix.NFTA_SET_ELEM_LIST_TABLE, name.table)
		a.str(unix.NFTA_SET_ELEM_LIST_SET, name.name)
	}
	err := s.listOf(name.family, unix.NFT_MSG_GETSETELEM, fill, func() { f.elems = nil }, func(m message) {
		list := find(m.body, unix.NFTA_SET_ELEM_LIST_ELEMENTS)
		for e, rest, ok := next(list); ok; e, rest, ok = next(rest) {
			elem := foreignElem{
				key: string(find(find(e.data, unix.NFTA_SET_ELEM_KEY), unix.NFTA_DATA_VALUE)),
				end: be32(find(e.data, unix.NFTA_SET_ELEM_FLAGS))&unix.NFT_SET_ELEM_INTERVAL_END != 0,
			}
			if v := find(find(e.data, unix.NFTA_SET_ELEM_DATA), unix.NFTA_DATA_VERDICT); v != nil {
				elem.verdict = parseVerdict(v)
			}
			f.elems = append(f.elems, elem)
		}
	})
	slices.SortFunc(f.elems, func(a, b foreignElem) int {
		return compareElems(Elem{Key: a.key, End: a.end}, Elem{Key: b.key, End: b.end})
	})
	return err
}

// lookup finds the element that a key is in; nil if it is in none.
func (f *foreignSet) lookup(key string) *foreignElem {
	var in *foreignElem
	for i := range f.elems {
		e := &f.elems[i]
		if !f.interval {
			if e.key == key {
				return e
			}
			continue
		}
		if e.key > key {
			break
		}
		if in = e; e.end {
			in = nil
		}
	}
	return in
}

// A verdict is what an expression or an element of a verdict map says.
type verdict struct {
	code  int32
	chain string
}

func parseVerdict(b []byte) *verdict {
	return &verdict{int32(be32(find(b, unix.NFTA_VERDICT_CODE))), text(find(b, unix.NFTA_VERDICT_CHAIN))}
}
