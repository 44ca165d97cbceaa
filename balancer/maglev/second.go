package maglev

import "slices"

// Second returns for every slot the entry to use when the slot's own will not
// do: an entry b of the table for which differ(own, b) holds, or -1 when there
// is none.
//
// Each slot looks from a place of its own and in strides of its own, so the
// slots of one entry spread over all others in proportion to their slots, and
// a change of the table changes few second choices elsewhere. differ must be
// pure; it is called about once for each slot and each pair of entries.
func Second(slots []int32, differ func(own, candidate int) bool) []int32 {
	second := make([]int32, len(slots))
	if len(slots) == 0 {
		return second
	}
	hopeless := hopelessEntries(slots, differ)
	for s, own := range slots {
		if hopeless[own] {
			second[s] = -1
			continue
		}
		second[s] = walk(slots, s, func(b int32) bool { return b != own && differ(int(own), int(b)) })
	}
	return second
}

// hopelessEntries tells, for every entry of the table, whether it differs from
// no other. Those would walk the whole table in vain, for each of their slots.
func hopelessEntries(slots []int32, differ func(own, candidate int) bool) []bool {
	hopeless := make([]bool, slices.Max(slots)+1)
	var there []int
	for _, a := range slots {
		if !hopeless[a] {
			hopeless[a] = true
			there = append(there, int(a))
		}
	}
	for _, a := range there {
		hopeless[a] = !slices.ContainsFunc(there, func(b int) bool { return b != a && differ(a, b) })
	}
	return hopeless
}

// walk visits every slot once, in an order of slot s's own, and returns the
// first entry that will do, or -1.
func walk(slots []int32, s int, do func(int32) bool) int32 {
	r := runner{seed: secondSeed}
	at := Slot(r.draw(2*s), len(slots))
	stride := Slot(r.draw(2*s+1), len(slots)) | 1
	// An odd stride meets every slot of a power of two.
	for !powerOfTwo(len(slots)) && gcd(stride, len(slots)) != 1 {
		stride += 2
	}
	for range slots {
		if do(slots[at]) {
			return slots[at]
		}
		for at += stride; at >= len(slots); at -= len(slots) {
		}
	}
	return -1
}

// secondSeed begins a stream apart from those of the contests. It needs no key:
// what it orders is the keyed table.
const secondSeed = 0x5ec0dd

func gcd(a, b int) int {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}
