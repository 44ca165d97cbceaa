package maglev

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write testdata/golden.json anew: a BREAKING change, see TestGolden")

type golden struct {
	Key     string
	Base    int
	Entries []Entry
	Size    int
	// Table is the SHA-256 of the names of all slots, each with a line break.
	Table string
	// Slots has the names of a few of them.
	Slots map[int]string
	// Seconds is the SHA-256 of the decimal second choices, likewise.
	Seconds string
	Seed    uint32 // for the purpose "target"
}

// TestGolden freezes the function from key, entries and size to the table.
// Balancers of different versions that share a key send a flow to the same
// target only while these vectors hold, so changing them is a BREAKING change:
// it deals every flow anew wherever old and new run side by side.
func TestGolden(t *testing.T) {
	const file = "testdata/golden.json"
	cases := []golden{
		{Key: "000102030405060708090a0b0c0d0e0f", Base: Base, Entries: targets(1, 1)},
		{Key: "000102030405060708090a0b0c0d0e0f", Base: Base, Entries: targets(2, 1)},
		{Key: "000102030405060708090a0b0c0d0e0f", Base: Base, Entries: targets(10, 1)},
		{Key: "ffffffffffffffffffffffffffffffff", Base: Base, Entries: targets(10, 1)},
		{Key: "ffffffffffffffffffffffffffffffff", Base: Base, Entries: targets(7, 0, 1, 256, 10)},
		{Key: "ffffffffffffffffffffffffffffffff", Base: 1024, Entries: targets(10, 1, 3)},
		{Key: "00112233445566778899aabbccddeeff", Base: Base, Entries: targets(50, 1, 1, 5)},
		{Key: "00112233445566778899aabbccddeeff", Base: 4 * Base, Entries: targets(5, 1)},
	}
	for i := range cases {
		fillGolden(t, &cases[i])
	}
	if *update {
		text, err := json.MarshalIndent(cases, "", " ")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, append(text, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var want []golden
	if err := json.Unmarshal(text, &want); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, cases); diff != "" {
		t.Errorf("the tables changed, which breaks balancers that run side by side (-want +got):\n%s", diff)
	}
}

func fillGolden(t *testing.T, g *golden) {
	t.Helper()
	raw, err := hex.DecodeString(g.Key)
	if err != nil {
		t.Fatal(err)
	}
	key := [16]byte(raw)
	g.Size = Size(g.Base, len(g.Entries))
	slots := Build(key, g.Base, g.Size, g.Entries)
	names, seconds := sha256.New(), sha256.New()
	for _, i := range slots {
		fmt.Fprintln(names, g.Entries[i].Name)
	}
	for _, i := range Second(slots, notSelf) {
		fmt.Fprintln(seconds, i)
	}
	g.Table, g.Seconds = hex.EncodeToString(names.Sum(nil)), hex.EncodeToString(seconds.Sum(nil))
	g.Slots = map[int]string{}
	for _, s := range []int{0, 1, g.Size / 3, g.Size / 2, g.Size - 1} {
		g.Slots[s] = g.Entries[slots[s]].Name
	}
	g.Seed = Seed(key, "target")
}
