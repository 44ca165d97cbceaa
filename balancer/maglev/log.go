package maglev

// logBits is how many leading bits of a draw index the table of logarithms.
const logBits = 12

// negLog has -log2(i/2^logBits) in units of 2^-logScale. It is computed in
// integers, because two balancers must agree to the last bit whatever their
// compilers make of floating point. The logarithm of 0 is endless; two octaves
// below the next entry are as good as lost for any draw.
var negLog = func() (t [1<<logBits + 1]uint32) {
	t[0] = (logBits + 2) << logScale
	for i := 1; i < len(t); i++ {
		t[i] = logBits<<logScale - log2(uint32(i))
	}
	return t
}()

// logScale leaves room below 2^32 for logBits+2 octaves.
const logScale = 27

// log2 returns the binary logarithm of x, which must be in 1 to 2^logBits, in
// units of 2^-logScale. It squares the mantissa once for every binary digit.
func log2(x uint32) uint32 {
	var whole uint32
	for x>>(whole+1) != 0 {
		whole++
	}
	y := uint64(x) << (31 - whole) // 1 <= y < 2, with 31 bits behind the point
	result := whole
	for range logScale {
		y = y * y >> 31
		result <<= 1
		if y >= 2<<31 {
			result |= 1
			y >>= 1
		}
	}
	return result
}

// cost turns a draw, a fraction of 2^32, into an exponentially distributed
// cost: its negative logarithm, in units of 2^-logScale.
func cost(draw uint32) uint64 {
	i := draw >> (32 - logBits)
	low := uint64(draw & (1<<(32-logBits) - 1))
	high, next := negLog[i], negLog[i+1]
	return uint64(high) - uint64(high-next)*low>>(32-logBits)
}
