package maglev

import (
	"crypto/sha256"
	"encoding/binary"
	"math/bits"
)

// derive returns a digest of the key for one purpose. No two pairs of a label,
// which has no space, and a text give the same input.
func derive(key [16]byte, label, text string) [sha256.Size]byte {
	var buf [96]byte
	in := append(append(append(buf[:0], key[:]...), label...), ' ')
	return sha256.Sum256(append(in, text...))
}

// Seed derives a seed for JHash from the key. Different purposes give
// independent seeds, so that the choice of a target group, for instance, says
// nothing about the choice of the target. It is never 0, which some tools take
// for "no seed".
func Seed(key [16]byte, purpose string) uint32 {
	sum := derive(key, "seed", purpose)
	return max(1, binary.BigEndian.Uint32(sum[:]))
}

// JHash is the kernel's jhash() (include/linux/jhash.h, Bob Jenkins' lookup3)
// of a key with an initial value. Whole words are read in the byte order of the
// machine, as the kernel does. nft's "jhash ... seed" hashes its registers with
// it, in which every field of a concatenation is padded with zeros to a
// multiple of 4 bytes. On little-endian machines, and for such lengths, it is
// also jhash2() of the same words, on all machines.
func JHash(key []byte, initval uint32) uint32 {
	a := 0xdeadbeef + uint32(len(key)) + initval
	b, c := a, a
	for ; len(key) > 12; key = key[12:] {
		a += binary.NativeEndian.Uint32(key)
		b += binary.NativeEndian.Uint32(key[4:])
		c += binary.NativeEndian.Uint32(key[8:])
		a, b, c = jhashMix(a, b, c)
	}
	if len(key) == 0 {
		return c
	}
	// The tail is always read in little-endian order.
	var tail [12]byte
	copy(tail[:], key)
	a += binary.LittleEndian.Uint32(tail[0:])
	b += binary.LittleEndian.Uint32(tail[4:])
	c += binary.LittleEndian.Uint32(tail[8:])
	return jhashFinal(a, b, c)
}

func jhashMix(a, b, c uint32) (uint32, uint32, uint32) {
	a = (a - c) ^ bits.RotateLeft32(c, 4)
	c += b
	b = (b - a) ^ bits.RotateLeft32(a, 6)
	a += c
	c = (c - b) ^ bits.RotateLeft32(b, 8)
	b += a
	a = (a - c) ^ bits.RotateLeft32(c, 16)
	c += b
	b = (b - a) ^ bits.RotateLeft32(a, 19)
	a += c
	c = (c - b) ^ bits.RotateLeft32(b, 4)
	b += a
	return a, b, c
}

func jhashFinal(a, b, c uint32) uint32 {
	c = (c ^ b) - bits.RotateLeft32(b, 14)
	a = (a ^ c) - bits.RotateLeft32(c, 11)
	b = (b ^ a) - bits.RotateLeft32(a, 25)
	c = (c ^ b) - bits.RotateLeft32(b, 16)
	a = (a ^ c) - bits.RotateLeft32(c, 4)
	b = (b ^ a) - bits.RotateLeft32(a, 14)
	return (c ^ b) - bits.RotateLeft32(b, 24)
}

// Slot maps a hash to one of size slots as the kernel's reciprocal_scale()
// does, which nft uses for "mod" (net/netfilter/nft_hash.c): each slot is a
// contiguous range of hashes, and halving every slot keeps the ranges nested.
func Slot(hash uint32, size int) int {
	return int(uint64(hash) * uint64(size) >> 32)
}
