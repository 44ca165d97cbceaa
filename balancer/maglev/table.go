package maglev

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"
)

const (
	// FinestBase and CoarsestBase bound what BaseFor chooses.
	FinestBase   = 1 << 14
	CoarsestBase = 1 << 10

	// slotBudget is how many slots BaseFor lets all tables have together. At
	// about 104 bytes of kernel memory for a slot that is 52 MiB.
	slotBudget = 1 << 19

	// MaxBase is the largest number of contests.
	MaxBase = 1 << 16

	// MaxSize is the largest table, in slots.
	MaxSize = 1 << 22

	// MaxWeight is the largest weight of an Entry.
	MaxWeight = 256

	// MaxEntries is how many entries one table may have.
	MaxEntries = 1<<16 - 1

	// perTarget is the least number of slots for each target: it makes one
	// slot at most 1 % of an equal share.
	perTarget = 100

	// sparePerTarget is that of a spare table. Its flows are those of targets
	// that fail, so that a slot's worth of them, at most 6 % of an equal share,
	// is little of the whole. And each verdict changes two targets' worth of its
	// slots: with 100 the kernel had several hundred elements to change, which
	// took it longer than all else.
	sparePerTarget = 16
)

// An Entry is a target that takes slots.
type Entry struct {
	// Name is the target's identity, such as "10.0.1.11:8080", and unique in
	// its table. The target keeps its slots for as long as it keeps its name.
	Name string
	// Weight is the relative share of slots, 0 to MaxWeight; 0 takes none.
	Weight int
}

// BaseFor returns the number of contests for each of so many tables: the finest
// that the memory for all of them allows, since more contests move fewer flows.
// It is FinestBase up to 32 tables, and depends on nothing else, so that
// balancers with the same configuration agree. Another base deals every table
// anew.
func BaseFor(tables int) int {
	base := FinestBase
	for base > CoarsestBase && base*tables > slotBudget {
		base /= 4
	}
	return base
}

// Size returns the number of slots for n targets: base, doubled until each
// target has 100 slots or the table is MaxSize. Targets of weight 0 should be
// counted, so that a drain or a failed health check does not resize the table.
func Size(base, n int) int { return grown(base, perTarget*n) }

// SpareSize is Size for a table whose base is Spare, with 16 slots for each target.
func SpareSize(base, n int) int { return grown(base, sparePerTarget*n) }

// grown is base, doubled until it is as large as wanted, or MaxSize.
func grown(base, wanted int) int {
	size := base
	for size < wanted && size < MaxSize {
		size *= 2
	}
	return size
}

// Build assigns every slot to an entry and returns the entries' indexes by
// slot; nil when no entry has a weight. The result depends on the key, the base,
// the size, and the names and weights, not on the order of the entries.
//
// It panics when base or size is not a power of two with 1 <= base <= MaxBase
// and base <= size <= MaxSize, when a weight is out of range, or when there are
// more than MaxEntries entries: the caller has validated all of them.
func Build(key [16]byte, base, size int, entries []Entry) []int32 {
	slots, _ := Rebuild(key, base, size, entries, nil)
	return slots
}

// Rebuild is Build, for less where before says how the contests between mostly
// the same entries ended. It does not change before, which may be nil or of
// another key, base or size, and the result does not depend on it.
func Rebuild(key [16]byte, base, size int, entries []Entry, before *Contests) ([]int32, *Contests) {
	if !powerOfTwo(base) || !powerOfTwo(size) || base > MaxBase || size < base || size > MaxSize {
		panic(fmt.Sprintf("maglev: base %d and size %d are not powers of two up to %d and %d, base first", base, size, MaxBase, MaxSize))
	}
	if len(entries) > MaxEntries {
		panic(fmt.Sprintf("maglev: %d entries: more than %d", len(entries), MaxEntries))
	}
	runners := enter(key, entries)
	if len(runners) == 0 {
		return nil, nil
	}
	contests := race(key, base, runners, before)
	d := newDeal(size, contests)
	d.settle()
	return d.table(), contests
}

// Spare is the base of the table that is dealt among the targets of a group which
// take new flows, when its other table, with a base of its own, is dealt among all
// that are there: it serves those flows alone whose slot is that of a target which
// takes none, and is dealt anew with each verdict.
func Spare(base int) int { return base / 16 }

func powerOfTwo(n int) bool { return n > 0 && n&(n-1) == 0 }

// A runner is an entry that runs in every contest.
type runner struct {
	index   int32 // into the caller's entries
	weight  int
	digest  [sha256.Size]byte
	name    string
	seed    uint64 // of its draws
	inverse uint64 // 2^32 / weight
}

// enter makes the runners, in an order that the key decides.
func enter(key [16]byte, entries []Entry) []runner {
	runners := make([]runner, 0, len(entries))
	for i, e := range entries {
		if e.Weight < 0 || e.Weight > MaxWeight {
			panic(fmt.Sprintf("maglev: entry %q: weight %d is not in 0 to %d", e.Name, e.Weight, MaxWeight))
		}
		if e.Weight == 0 {
			continue
		}
		sum := derive(key, "target", e.Name)
		runners = append(runners, runner{
			index: int32(i), weight: e.Weight, digest: sum, name: e.Name,
			seed:    binary.BigEndian.Uint64(sum[:]),
			inverse: (1 << 32) / uint64(e.Weight),
		})
	}
	slices.SortFunc(runners, func(a, b runner) int { return cmp.Or(a.compare(&b), cmp.Compare(a.index, b.index)) })
	return runners
}

// compare orders runners by all that decides how they run.
func (r *runner) compare(o *runner) int {
	return cmp.Or(bytes.Compare(r.digest[:], o.digest[:]), strings.Compare(r.name, o.name), cmp.Compare(r.weight, o.weight))
}

// draw is the runner's luck in a contest, uniform in 32 bits: SplitMix64
// (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014)
// at step contest of the stream that the seed begins.
func (r *runner) draw(contest int) uint32 {
	z := r.seed + uint64(contest)*0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return uint32(z >> 32)
}

// time is when a runner with that draw finishes: an exponential variate whose
// rate is the weight, so that the runner is the first of all with probability
// weight/sum(weights). It is below 2^63.
func (r *runner) time(draw uint32) uint64 { return cost(draw) * r.inverse }

// soonest is a lower bound of time, for a third of the price. Most runners can
// be ruled out by it.
func (r *runner) soonest(draw uint32) uint64 {
	return uint64(negLog[draw>>(32-logBits)+1]) * r.inverse
}

// A deal is a table in the making.
type deal struct {
	*Contests
	size int
	each int     // slots that a contest decides
	kept []int32 // slots of each contest that are still the winner's
	// surplus is by how many slots a runner has won more than it should have.
	surplus []int
	moves   []move
	// contests and latest are room for openContests, finishes for closeFinishes.
	contests []uint16
	latest   []uint64
	finishes []finish
}

// A move hands slots of a contest to another runner.
type move struct {
	contest uint16
	to      uint16
	slots   int32
}

func newDeal(size int, c *Contests) *deal {
	d := &deal{
		Contests: c, size: size, each: size / len(c.owner),
		kept:    make([]int32, len(c.owner)),
		surplus: make([]int, len(c.runners)),

		contests: make([]uint16, 0, len(c.owner)),
		latest:   make([]uint64, 0, len(c.owner)),
	}
	for i := range d.kept {
		d.kept[i] = int32(d.each)
	}
	return d
}

// settle takes slots from runners that won too many and hands them to those
// that won too few, the closest finishes first.
//
// A closeness is tried only after all below it. That is the order in which one
// sorted list of all pairs would be walked, since the runners that give and
// those that take only ever become fewer; it just sorts much less.
func (d *deal) settle() {
	won := make([]int, len(d.runners))
	for _, o := range d.owner {
		won[o] += d.each
	}
	for i, want := range d.quotas(won) {
		d.surplus[i] = won[i] - want
	}
	for limit := uint64(1) << (marginScale - 5); ; limit *= 4 {
		if limit > 1<<marginScale {
			limit = math.MaxUint32
		}
		finishes := d.closeFinishes(limit)
		slices.Sort(finishes)
		if d.hand(finishes) {
			return
		}
	}
}

// A finish packs how closely a runner lost a contest: margin, contest, runner.
type finish uint64

// marginScale is the binary point of a margin, the time lost relative to the
// winner's time. The largest 32-bit margin stands for all that is beyond.
const marginScale = 16

// closeFinishes lists those contests, won by somebody with a surplus, that a
// runner with a deficit lost by no more than the limit.
func (d *deal) closeFinishes(limit uint64) []finish {
	contests, latest := d.openContests(limit)
	list := d.finishes[:0]
	for i := range d.runners {
		if d.surplus[i] >= 0 {
			continue
		}
		r := &d.runners[i]
		for k, c := range contests {
			draw := r.draw(int(c))
			if r.soonest(draw) > latest[k] {
				continue
			}
			if t := r.time(draw); t <= latest[k] {
				margin := min((t-d.best[c])/(d.best[c]>>marginScale+1), math.MaxUint32)
				list = append(list, finish(margin<<32|uint64(c)<<16|uint64(i)))
			}
		}
	}
	d.finishes = list
	return list
}

// openContests lists the contests whose winner still has a surplus and slots of
// it to give, and the latest time that is within the limit. Times are below
// 2^63, so a limit of twice the winner's time, the largest but one, fits.
func (d *deal) openContests(limit uint64) (contests []uint16, latest []uint64) {
	contests, latest = d.contests[:0], d.latest[:0]
	for c, o := range d.owner {
		if d.surplus[o] <= 0 || d.kept[c] == 0 {
			continue
		}
		last := uint64(math.MaxUint64)
		if limit < math.MaxUint32 {
			last = d.best[c] + d.best[c]>>marginScale*limit
		}
		contests, latest = append(contests, uint16(c)), append(latest, last)
	}
	return contests, latest
}

// hand moves slots along the list and reports whether every surplus is gone.
func (d *deal) hand(list []finish) bool {
	for _, f := range list {
		c, to := uint16(f>>16), uint16(f)
		from := d.owner[c]
		n := min(d.surplus[from], -d.surplus[to], int(d.kept[c]))
		if n <= 0 {
			continue
		}
		d.surplus[from] -= n
		d.surplus[to] += n
		d.kept[c] -= int32(n)
		d.moves = append(d.moves, move{contest: c, to: to, slots: int32(n)})
	}
	return !slices.ContainsFunc(d.surplus, func(n int) bool { return n != 0 })
}

func fill(slots []int32, index int32) {
	for i := range slots {
		slots[i] = index
	}
}

// table writes the result down.
func (d *deal) table() []int32 {
	slots := make([]int32, d.size)
	for c, o := range d.owner {
		fill(slots[c*d.each:(c+1)*d.each], d.runners[o].index)
	}
	// The winner keeps the first slots of its contest; kept, which counts
	// them, now points behind them.
	for _, m := range d.moves {
		at := int(m.contest)*d.each + int(d.kept[m.contest])
		fill(slots[at:at+int(m.slots)], d.runners[m.to].index)
		d.kept[m.contest] += m.slots
	}
	return slots
}
