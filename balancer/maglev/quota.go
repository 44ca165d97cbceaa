package maglev

import (
	"cmp"
	"slices"
)

// quotaScale is the binary point of a share that is not a whole slot.
const quotaScale = 16

// quotas returns how many slots each runner should end up with, given how many
// it won. The sum is the size of the table.
//
// A share that is 100 slots or more is met within 1 %, a smaller one within one
// slot. What tolerance that leaves is spent on luck: a runner that won more
// than its share keeps a part of the surplus, because each slot that need not
// be taken away is one that need not move when the targets change.
func (d *deal) quotas(won []int) []int {
	aims := d.shares()
	luck := make([]int64, len(aims))
	var gains, losses int64
	for i, share := range aims {
		// One slot is left for rounding to whole slots.
		limit := max(0, share/100-1<<quotaScale)
		luck[i] = min(max((int64(won[i])<<quotaScale-share)*2/5, -limit), limit)
		gains += max(0, luck[i])
		losses += max(0, -luck[i])
	}
	// What some keep others must go without: the larger side shrinks.
	for i, l := range luck {
		switch {
		case l > 0 && gains > losses:
			l = l * losses / gains
		case l < 0 && losses > gains:
			l = l * gains / losses
		}
		aims[i] += l
	}
	return round(aims, d.size)
}

// shares returns the exact shares, in units of 2^-quotaScale slots.
func (d *deal) shares() []int64 {
	var sum int64
	for i := range d.runners {
		sum += int64(d.runners[i].weight)
	}
	shares := make([]int64, len(d.runners))
	for i := range shares {
		shares[i] = int64(d.size) << quotaScale * int64(d.runners[i].weight) / sum
	}
	return shares
}

// round makes whole slots of the aims, by largest remainder: each becomes the
// whole number below or above, and the sum becomes size.
func round(aims []int64, size int) []int {
	whole := make([]int, len(aims))
	order := make([]int, len(aims))
	left := size
	for i, a := range aims {
		order[i] = i
		whole[i] = int(a >> quotaScale)
		left -= whole[i]
	}
	const fraction = 1<<quotaScale - 1
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(aims[b]&fraction, aims[a]&fraction) })
	for _, i := range order[:left] {
		whole[i]++
	}
	return whole
}
