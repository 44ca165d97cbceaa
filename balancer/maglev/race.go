package maglev

import "math"

// Contests are who won each contest, and when. They are not modified.
type Contests struct {
	key     [16]byte
	runners []runner // sorted
	owner   []uint16 // winner of each contest, as an index into runners
	best    []uint64 // its time
}

// race runs every contest. The first of all wins, and of equal times the one
// whose runner is the first in order. That does not depend on who ran earlier,
// so of what is known from before only the wins of those who left are run anew,
// and those who are new run against the winners.
func race(key [16]byte, base int, runners []runner, before *Contests) *Contests {
	c := &Contests{key: key, runners: runners, owner: make([]uint16, base), best: make([]uint64, base)}
	if before == nil || before.key != key || len(before.owner) != base {
		before = &Contests{owner: make([]uint16, base), runners: make([]runner, 1)} // somebody who left won all
	}
	here, fresh := places(before.runners, runners)
	all, open := make([]uint16, base), make([]uint16, 0, base)
	for i, o := range before.owner {
		all[i] = uint16(i)
		if at := here[o]; at >= 0 {
			c.owner[i], c.best[i] = uint16(at), before.best[i]
		} else {
			c.best[i] = math.MaxUint64
			open = append(open, uint16(i))
		}
	}
	for i, isNew := range fresh {
		if isNew {
			c.run(i, all)
		} else {
			c.run(i, open)
		}
	}
	return c
}

// places tells where in now each of before is, -1 if it left, and who of now was
// not in before. Both are sorted.
func places(before, now []runner) (here []int, fresh []bool) {
	here, fresh = make([]int, len(before)), make([]bool, len(now))
	n := 0
	for i := range before {
		for n < len(now) && now[n].compare(&before[i]) < 0 {
			fresh[n] = true
			n++
		}
		here[i] = -1
		if n < len(now) && now[n].compare(&before[i]) == 0 {
			here[i] = n
			n++
		}
	}
	for ; n < len(now); n++ {
		fresh[n] = true
	}
	return here, fresh
}

// run lets one runner run in some contests.
func (c *Contests) run(i int, contests []uint16) {
	r := &c.runners[i]
	for _, n := range contests {
		draw, best := r.draw(int(n)), c.best[n]
		if r.soonest(draw) > best {
			continue
		}
		if t := r.time(draw); t < best || t == best && i < int(c.owner[n]) {
			c.best[n], c.owner[n] = t, uint16(i)
		}
	}
}
