package maglev

import "net/netip"

// The purposes of Seed. What chooses the group says nothing about the target.
const (
	SeedGroup  = "group"  // chooses among the groups of a listener
	SeedTarget = "target" // chooses among the targets of a group
	SeedSpare  = "spare"  // chooses again, among those that take new flows
	SeedSource = "source" // chooses among the source addresses
)

// A Flow is what identifies a flow at one point of its way: who sends its packets
// to whom. Both addresses are of one family.
type Flow struct {
	Source, Destination netip.AddrPort
	Protocol            uint8 // IP protocol number
}

// Hash is nft's jhash of saddr . daddr . sport . dport . l4proto, or, if it is
// sticky, of saddr alone. Each field begins a register of 4 bytes and is padded
// with zeros. Flow and seed decide it, and it is the kernel's own: whoever uses
// the same Slots makes the same choice as the rules.
func (f Flow) Hash(sticky bool, seed uint32) uint32 {
	const register = 4
	var buf [2*16 + 3*register]byte
	key := appendAddr(buf[:0], f.Source.Addr())
	if !sticky {
		key = appendAddr(key, f.Destination.Addr())
		key = append(key, byte(f.Source.Port()>>8), byte(f.Source.Port()), 0, 0)
		key = append(key, byte(f.Destination.Port()>>8), byte(f.Destination.Port()), 0, 0)
		key = append(key, f.Protocol, 0, 0, 0)
	}
	return JHash(key, seed)
}

func appendAddr(b []byte, a netip.Addr) []byte {
	if a.Is4() {
		four := a.As4()
		return append(b, four[:]...)
	}
	sixteen := a.As16()
	return append(b, sixteen[:]...)
}

// From returns the first entry, looking from the hash's own slot on, that will do,
// or -1 when none does. Every slot is visited once.
func From(slots []int32, hash uint32, do func(entry int32) bool) int32 {
	if len(slots) == 0 {
		return -1
	}
	at := Slot(hash, len(slots))
	for range slots {
		if do(slots[at]) {
			return slots[at]
		}
		if at++; at == len(slots) {
			at = 0
		}
	}
	return -1
}
