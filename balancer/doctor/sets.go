package doctor

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// unlisted are the flags of sets that say nothing lasting, or have keys of
// several fields, or are maps.
const unlisted = unix.NFT_SET_MAP | unix.NFT_SET_TIMEOUT | unix.NFT_SET_EVAL | unix.NFT_SET_OBJECT | nftSetConcat

// nftSetConcat is NFT_SET_CONCAT of linux/netfilter/nf_tables.h.
const nftSetConcat = 0x80

// maxElements is how large a set may be and still be read, in elements, of which
// an interval has two: lists of blocked networks have hundred thousands.
const maxElements = 4096

// setsWanted are the sets that rules ask about fields that are known.
func (f *Facts) setsWanted() map[chainName][]*Condition {
	wanted := map[chainName][]*Condition{}
	for i := range f.Chains {
		c := &f.Chains[i]
		for _, r := range c.Rules {
			for j := range r.Conditions {
				if cond := &r.Conditions[j]; cond.Set != "" && cond.Field.Of != "" {
					name := chainName{c.Family, c.Table, cond.Set}
					wanted[name] = append(wanted[name], cond)
				}
			}
		}
	}
	return wanted
}

// readSets lists the elements of sets that rules ask for.
func (f *Facts) readSets() error {
	wanted := f.setsWanted()
	if len(wanted) == 0 {
		return nil
	}
	sets, err := nfTables(unix.NFT_MSG_GETSET, unix.NFPROTO_UNSPEC)
	if err != nil {
		return fmt.Errorf("list sets: %w", err)
	}
	for _, m := range sets {
		s, ok := decodeSet(m)
		if !ok || len(wanted[s.name]) == 0 || s.flags&unlisted != 0 || s.size > maxElements {
			continue
		}
		ranges, few, err := s.elements(m[0])
		if errors.Is(err, unix.ENOENT) {
			continue // it went meanwhile
		}
		if err != nil {
			return fmt.Errorf("list set %s %s %s: %w", s.name.family, s.name.table, s.name.name, err)
		}
		for _, c := range wanted[s.name] {
			c.Ranges, c.Listed = ranges, few
		}
	}
	return nil
}

// A namedSet is what is needed of one to read its elements.
type namedSet struct {
	name  chainName
	flags uint32
	size  uint32 // 0 if there is no limit
}

// decodeSet reads a set from NFT_MSG_NEWSET.
func decodeSet(msg []byte) (s namedSet, ok bool) {
	if len(msg) < sizeofNfgenmsg {
		return namedSet{}, false
	}
	b := msg[sizeofNfgenmsg:]
	s.name.family, ok = families[msg[0]]
	s.name.table, s.name.name = getText(b, unix.NFTA_SET_TABLE), getText(b, unix.NFTA_SET_NAME)
	s.flags, _ = getNumber(b, unix.NFTA_SET_FLAGS)
	s.size, _ = getNumber(b, unix.NFTA_SET_DESC, unix.NFTA_SET_DESC_SIZE)
	return s, ok
}

// A bound is an element as the kernel lists it: where a range begins or, in a
// set of intervals, the first that is not in it any more.
type bound struct {
	key []byte
	end bool
}

// elements are not ok if they are too many.
func (s namedSet) elements(family uint8) (ranges []Range, ok bool, err error) {
	var bounds []bound
	err = again(func() error {
		bounds = nil
		return nfTablesEach(unix.NFT_MSG_GETSETELEM, family, func(m []byte) bool {
			bounds = append(bounds, decodeElements(m)...)
			return len(bounds) <= maxElements
		}, nl.NewRtAttr(unix.NFTA_SET_ELEM_LIST_TABLE, nl.ZeroTerminated(s.name.table)),
			nl.NewRtAttr(unix.NFTA_SET_ELEM_LIST_SET, nl.ZeroTerminated(s.name.name)))
	})
	if err != nil || len(bounds) > maxElements {
		return nil, false, err
	}
	return rangesOf(bounds, s.flags&unix.NFT_SET_INTERVAL != 0), true, nil
}

// decodeElements reads NFT_MSG_NEWSETELEM.
func decodeElements(msg []byte) (all []bound) {
	if len(msg) < sizeofNfgenmsg {
		return nil
	}
	for _, e := range attributes(get(msg[sizeofNfgenmsg:], unix.NFTA_SET_ELEM_LIST_ELEMENTS)) {
		if key := get(e.data, unix.NFTA_SET_ELEM_KEY, unix.NFTA_DATA_VALUE); len(key) > 0 {
			flags, _ := getNumber(e.data, unix.NFTA_SET_ELEM_FLAGS)
			all = append(all, bound{key, flags&unix.NFT_SET_ELEM_INTERVAL_END != 0})
		}
	}
	return all
}

// rangesOf pairs bounds. The last range may have no end: it goes to the largest
// key there is.
func rangesOf(bounds []bound, intervals bool) (all []Range) {
	slices.SortFunc(bounds, func(a, b bound) int { return bytes.Compare(a.key, b.key) })
	for i, b := range bounds {
		switch {
		case b.end:
		case !intervals:
			all = append(all, Range{b.key, b.key})
		default:
			last := bytes.Repeat([]byte{0xff}, len(b.key))
			for _, next := range bounds[i+1:] {
				if len(next.key) == len(b.key) && !bytes.Equal(next.key, b.key) {
					last = before(next.key)
					break
				}
			}
			all = append(all, Range{b.key, last})
		}
	}
	return all
}

// before is the key that is one less.
func before(key []byte) []byte {
	b := bytes.Clone(key)
	for i := len(b) - 1; i >= 0; i-- {
		b[i]--
		if b[i] != 0xff {
			break
		}
	}
	return b
}
