package maglev

import (
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// What is known from before makes a table cheaper and never another one,
// whatever changed meanwhile.
func TestRebuildIsBuild(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		entries := rapid.Custom(func(t *rapid.T) []Entry {
			drawn := targets(rapid.IntRange(1, 12).Draw(t, "targets"), 1)
			for i := range drawn {
				drawn[i].Weight = rapid.SampledFrom([]int{0, 1, 1, 2, MaxWeight}).Draw(t, "weight")
			}
			return rapid.Permutation(drawn).Draw(t, "order")
		})
		var before *Contests
		for range 4 {
			key, base := testKey(rapid.IntRange(0, 1).Draw(t, "key")), 1<<rapid.IntRange(7, 8).Draw(t, "base")
			now := entries.Draw(t, "entries")
			slots, contests := Rebuild(key, base, 4*base, now, before)
			if !slices.Equal(slots, Build(key, base, 4*base, now)) {
				t.Fatalf("%v differ from what they are alone", now)
			}
			if again, _ := Rebuild(key, base, 4*base, now, contests); !slices.Equal(slots, again) {
				t.Fatalf("%v differ when nothing changed", now)
			}
			before = contests
		}
	})
}

// Entries of one name and weight finish at the same time in every contest: the
// first wins, also against those that ran before it.
func TestRebuildOfEqualTimes(t *testing.T) {
	one, twins := targets(2, 1), append(targets(2, 1), targets(2, 1)...)
	_, before := Rebuild(testKey(1), Base, Base, one, nil)
	for _, now := range [][]Entry{twins, one} {
		var slots []int32
		slots, before = Rebuild(testKey(1), Base, Base, now, before)
		if !slices.Equal(slots, Build(testKey(1), Base, Base, now)) {
			t.Errorf("%d entries differ from what they are alone", len(now))
		}
	}
}

func BenchmarkRebuild(b *testing.B) {
	all, less := targets(50, 1), targets(50, 1)
	less[17].Weight = 0
	_, contests := Rebuild(testKey(1), FinestBase, FinestBase, all, nil)
	for name, before := range map[string]*Contests{"alone": nil, "one_left": contests} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				Rebuild(testKey(1), FinestBase, FinestBase, less, before)
			}
		})
	}
}
