package maglev

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func testKey(n int) [16]byte { return [16]byte{0: byte(n), 1: byte(n >> 8), 15: 0x5a} }

// targets makes n entries with the given weights, over and over.
func targets(n int, weights ...int) []Entry {
	entries := make([]Entry, n)
	for i := range entries {
		entries[i] = Entry{Name: fmt.Sprintf("10.0.%d.%d:8080", i/250, i%250+1), Weight: weights[i%len(weights)]}
	}
	return entries
}

func without(entries []Entry, i int) []Entry { return slices.Delete(slices.Clone(entries), i, i+1) }

func build(k, base int, entries []Entry) []int32 {
	return Build(testKey(k), base, Size(base, len(entries)), entries)
}

func counts(slots []int32, n int) []int {
	c := make([]int, n)
	for _, i := range slots {
		c[i]++
	}
	return c
}

// movedBetween compares two tables in hash space, whatever their sizes, and
// returns the fraction of hashes that go to another name.
func movedBetween(a []int32, namesA []Entry, b []int32, namesB []Entry) float64 {
	n := max(len(a), len(b)) // both are powers of two, so this is exact
	moved := 0
	for i := range n {
		if namesA[a[i*len(a)/n]].Name != namesB[b[i*len(b)/n]].Name {
			moved++
		}
	}
	return float64(moved) / float64(n)
}

func checkShares(t *testing.T, slots []int32, entries []Entry) {
	t.Helper()
	sum := 0
	for _, e := range entries {
		sum += e.Weight
	}
	for i, got := range counts(slots, len(entries)) {
		ideal := float64(len(slots)) * float64(entries[i].Weight) / float64(sum)
		allowed := 1.0
		if ideal >= 100 {
			allowed = ideal / 100
		}
		if diff := float64(got) - ideal; diff > allowed || diff < -allowed {
			t.Errorf("%d entries, %d slots: %s of weight %d has %d slots, want %.2f ± %.2f",
				len(entries), len(slots), entries[i].Name, entries[i].Weight, got, ideal, allowed)
		}
	}
}

// Base is a middle one, quick to build.
const Base = 1 << 12

func TestBaseFor(t *testing.T) {
	for tables, want := range map[int]int{0: FinestBase, 32: FinestBase, 33: 1 << 12, 128: 1 << 12, 129: CoarsestBase, 10000: CoarsestBase} {
		if got := BaseFor(tables); got != want {
			t.Errorf("%d tables: base %d, want %d", tables, got, want)
		}
	}
}

func TestShares(t *testing.T) {
	for n := 2; n <= 200; n += 1 + n/5 {
		random := rand.New(rand.NewPCG(1, uint64(n)))
		mixed := targets(n, 1)
		for i := range mixed {
			mixed[i].Weight = 1 + random.IntN(MaxWeight)
		}
		for k := range 2 {
			for _, entries := range [][]Entry{targets(n, 1), targets(n, 1, 2), targets(n, 0, 256, 1), mixed} {
				checkShares(t, build(k, Base, entries), entries)
			}
		}
	}
}

// A spare table has fewer slots, and shares those as evenly.
func TestSpareShares(t *testing.T) {
	for _, finest := range []int{FinestBase, CoarsestBase} {
		base := Spare(finest)
		for n := 2; n <= 200; n += 1 + n/5 {
			for _, entries := range [][]Entry{targets(n, 1), targets(n, 100), targets(n, 1, 2), targets(n, 0, 256, 1)} {
				checkShares(t, Build(testKey(n), base, SpareSize(base, n), entries), entries)
			}
			table := Build(testKey(n), base, SpareSize(base, n), targets(n, 1))
			if least := slices.Min(counts(table, n)); least < sparePerTarget-1 {
				t.Errorf("%d targets in %d slots: one has %d", n, len(table), least)
			}
		}
	}
}

// TestOneTargetMore removes one target, or adds it, read the other way round.
// Ideally no hash moves that the target did not have; few do. Wherever the
// smaller group has a smaller table, this measures the step between sizes too.
func TestOneTargetMore(t *testing.T) {
	tests := []struct {
		base             int
		groups           []int
		largest, average float64 // of all hashes, beyond the target's own share
	}{
		{Base, []int{2, 3, 5, 7, 10, 11, 20}, 0.015, 0.0105},
		{Base, []int{40, 41, 100, 160, 200}, 0.025, 0.0175},
		{FinestBase, []int{2, 3, 5, 10, 11, 40, 41, 100, 163, 164, 200}, 0.01, 0.01},
	}
	for _, tt := range tests {
		for _, n := range tt.groups {
			entries := targets(n, 1)
			sum, largest, runs := 0.0, 0.0, 0
			for k := range 2 {
				more := build(k, tt.base, entries)
				share := counts(more, n)
				for i := 0; i < n; i += 1 + n/3 {
					less := without(entries, i)
					moved := movedBetween(more, entries, build(k, tt.base, less), less)
					beyond := moved - float64(share[i])/float64(len(more))
					sum, largest, runs = sum+beyond, max(largest, beyond), runs+1
				}
			}
			t.Logf("base %5d, %3d targets, %5d slots: moved beyond the share: average %.2f %%, largest %.2f %%",
				tt.base, n, Size(tt.base, n), 100*sum/float64(runs), 100*largest)
			if average := sum / float64(runs); average > tt.average || largest > tt.largest {
				t.Errorf("base %d, %d targets: moved beyond the share: average %.4f, largest %.4f, want at most %.4f and %.4f",
					tt.base, n, average, largest, tt.average, tt.largest)
			}
		}
	}
}

// TestEverySize takes every number of targets from 200 down by one, at the base
// that installations of up to 32 groups have. Each table is dealt from the contests
// of the one before, as a daemon does it, and is the one that Build deals
// (TestRebuildIsBuild).
func TestEverySize(t *testing.T) {
	const base = FinestBase
	entries := targets(200, 1)
	rebuild := func(entries []Entry, before *Contests) ([]int32, *Contests) {
		return Rebuild(testKey(1), base, Size(base, len(entries)), entries, before)
	}
	more, contests := rebuild(entries, nil)
	for n := len(entries); n >= 2; n-- {
		less := entries[:n-1]
		var next []int32
		next, contests = rebuild(less, contests)
		moved := movedBetween(more, entries[:n], next, less)
		if limit := 1/float64(n) + 0.01; moved > limit {
			t.Errorf("%d to %d targets: %.4f of the hashes moved, want at most %.4f", n, n-1, moved, limit)
		}
		checkShares(t, next, less)
		if n%50 == 1 && !slices.Equal(next, build(1, base, less)) {
			t.Errorf("%d targets: %d rebuilds end at another table than Build", n-1, len(entries)-n+1)
		}
		more = next
	}
}

func TestReweight(t *testing.T) {
	for _, n := range []int{2, 5, 10, 40} {
		for _, weight := range []int{0, 25, 90, 200} {
			entries := targets(n, 100)
			changed := slices.Clone(entries)
			changed[n/2].Weight = weight
			before, after := build(3, Base, entries), build(3, Base, changed)
			difference := float64(counts(after, n)[n/2]-counts(before, n)[n/2]) / float64(len(after))
			moved := movedBetween(before, entries, after, changed)
			if limit := max(difference, -difference) + 0.02; moved > limit {
				t.Errorf("%d targets, one from weight 100 to %d: %.4f of the slots moved, want at most %.4f", n, weight, moved, limit)
			}
		}
	}
}

func TestSize(t *testing.T) {
	got := map[int]int{}
	for _, n := range []int{0, 1, 10, 40, 41, 81, 82, 200, 650, 1 << 20} {
		got[n] = Size(Base, n)
	}
	want := map[int]int{0: 4096, 1: 4096, 10: 4096, 40: 4096, 41: 8192, 81: 8192, 82: 16384, 200: 32768, 650: 65536, 1 << 20: MaxSize}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Size (-want +got):\n%s", diff)
	}
}

func TestSpareSize(t *testing.T) {
	got := map[int]int{}
	for _, n := range []int{0, 1, 64, 65, 128, 129, 1000, 1 << 20} {
		got[n] = SpareSize(Spare(FinestBase), n)
	}
	want := map[int]int{0: 1024, 1: 1024, 64: 1024, 65: 2048, 128: 2048, 129: 4096, 1000: 16384, 1 << 20: MaxSize}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("SpareSize (-want +got):\n%s", diff)
	}
}

func TestNothingToChoose(t *testing.T) {
	for _, entries := range [][]Entry{nil, {}, targets(3, 0)} {
		if got := Build(testKey(1), Base, Base, entries); got != nil {
			t.Errorf("Build(%v) has %d slots, want nil", entries, len(got))
		}
	}
}

func TestKeysDiffer(t *testing.T) {
	entries := targets(10, 1)
	if moved := movedBetween(build(1, Base, entries), entries, build(2, Base, entries), entries); moved < 0.85 {
		t.Errorf("another key moves %.2f of the slots, want about 0.90", moved)
	}
}

func TestBrokenCallers(t *testing.T) {
	tests := map[string]func(){
		"size":    func() { Build(testKey(1), 1024, 1021, targets(2, 1)) },
		"base":    func() { Build(testKey(1), 0, 1024, targets(2, 1)) },
		"smaller": func() { Build(testKey(1), 2048, 1024, targets(2, 1)) },
		"weight":  func() { Build(testKey(1), Base, Base, targets(2, 257)) },
		"entries": func() { Build(testKey(1), Base, Base, make([]Entry, MaxEntries+1)) },
	}
	for name, call := range tests {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			call()
		})
	}
}

func TestTableProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		key := [16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "key"))
		base := 1 << rapid.IntRange(0, 11).Draw(t, "base")
		size := base << rapid.IntRange(0, 3).Draw(t, "doubled")
		entries := rapid.SliceOfNDistinct(rapid.Custom(func(t *rapid.T) Entry {
			return Entry{Name: rapid.String().Draw(t, "name"), Weight: rapid.IntRange(0, MaxWeight).Draw(t, "weight")}
		}), 1, 40, func(e Entry) string { return e.Name }).Draw(t, "entries")
		slots := Build(key, base, size, entries)
		if !slices.ContainsFunc(entries, func(e Entry) bool { return e.Weight > 0 }) {
			if slots != nil {
				t.Fatal("slots without weights")
			}
			return
		}
		if len(slots) != size {
			t.Fatalf("%d slots, want %d", len(slots), size)
		}
		for s, i := range slots {
			if entries[i].Weight == 0 {
				t.Fatalf("slot %d goes to %q of weight 0", s, entries[i].Name)
			}
		}
		shuffled := rapid.Permutation(entries).Draw(t, "shuffled")
		if moved := movedBetween(slots, entries, Build(key, base, size, shuffled), shuffled); moved != 0 {
			t.Fatalf("the order of the entries moves %.4f of the slots", moved)
		}
		idle := append(shuffled, Entry{Name: "idle\xff"})
		if moved := movedBetween(slots, entries, Build(key, base, size, idle), idle); moved != 0 {
			t.Fatalf("an entry of weight 0 moves %.4f of the slots", moved)
		}
	})
}

func BenchmarkBuild(b *testing.B) {
	for _, n := range []int{2, 10, 40, 200} {
		entries := targets(n, 1)
		b.Run(fmt.Sprintf("targets=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				build(1, Base, entries)
			}
		})
	}
}
