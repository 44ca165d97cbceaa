package maglev

import (
	"encoding/binary"
	"math"
	"testing"
)

func TestJHash(t *testing.T) {
	// The answers that lookup3.c gives in its own self-test (driver5).
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Log("big-endian machine: only the kernel comparison says something")
		return
	}
	const text = "Four score and seven years ago"
	tests := []struct {
		key     string
		initval uint32
		want    uint32
	}{
		{"", 0, 0xdeadbeef},
		{"", 0xdeadbeef, 0xbd5b7dde},
		{text, 0, 0x17770551},
		{text, 1, 0xcd628161},
	}
	for _, tt := range tests {
		if got := JHash([]byte(tt.key), tt.initval); got != tt.want {
			t.Errorf("JHash(%q, %#x) = %#x, want %#x", tt.key, tt.initval, got, tt.want)
		}
	}
}

func TestSlot(t *testing.T) {
	tests := []struct {
		hash       uint32
		size, want int
	}{{0, 4096, 0}, {math.MaxUint32, 4096, 4095}, {1 << 31, 4096, 2048}, {1<<20 - 1, 4096, 0}, {1 << 20, 4096, 1}, {math.MaxUint32, 1, 0}, {math.MaxUint32, 1021, 1020}}
	for _, tt := range tests {
		if got := Slot(tt.hash, tt.size); got != tt.want {
			t.Errorf("Slot(%#x, %d) = %d, want %d", tt.hash, tt.size, got, tt.want)
		}
	}
}

func TestSeeds(t *testing.T) {
	seen := map[uint32]string{}
	for _, purpose := range []string{"", "group", "target", "target ", "group web"} {
		for k := range 2 {
			s := Seed(testKey(k), purpose)
			if other, ok := seen[s]; ok || s == 0 {
				t.Errorf("seed %#x of %q is 0 or that of %q", s, purpose, other)
			}
			seen[s] = purpose
		}
	}
}

func TestCost(t *testing.T) {
	for i, got := range negLog[1:] {
		want := -math.Log2(float64(i+1)/(1<<logBits)) * (1 << logScale)
		if math.Abs(float64(got)-want) > 16 {
			t.Errorf("negLog[%d] = %d, want %.1f", i+1, got, want)
		}
	}
	last := cost(0)
	for draw := uint64(0); draw < 1<<32; draw += 65521 {
		c := cost(uint32(draw))
		if c > last {
			t.Fatalf("cost(%#x) = %d, more than that of a smaller draw, %d", draw, c, last)
		}
		last = c
	}
	if c := cost(math.MaxUint32); c > 16 {
		t.Errorf("cost of the luckiest draw is %d, want about 0", c)
	}
}
