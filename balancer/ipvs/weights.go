package ipvs

import "math"

const (
	// slots is the size of mh's table (CONFIG_IP_VS_MH_TAB_INDEX=12).
	slots = 4093
	// mostWeight is the largest weight that mh takes as it is. After a division
	// by the common divisor it cuts weights to 6 bits, CONFIG_IP_VS_MH_TAB_INDEX/2,
	// by shifting all of them (ip_vs_mh_shift_weight, linux net/netfilter/ipvs/ip_vs_mh.c):
	// 64 and 127 would be 32 and 63.
	mostWeight = 63
)

// weights turns shares of new flows, positive and of any sum, into the integer
// weights from which mh's table comes closest to them.
//
// Larger weights say the shares better, and fill the table worse: mh deals the
// slots in rounds, in which each destination takes as many as it weighs, and the
// table ends in the middle of a round. 4,093 slots are 40 rounds for a sum of 100,
// and not one for a sum of 5,000, which would leave some without any. So the
// smallest weights that say the shares exactly are taken if the table gives nobody 5 %
// more or less than that, and otherwise, of all scales up to mostWeight, the one
// that errs least in both ways together. Every destination weighs 1 at least.
func weights(shares []float64) []int {
	if len(shares) == 0 {
		return nil
	}
	var total, most float64
	for _, s := range shares {
		total += s
		most = max(most, s)
	}
	// Sums of fractions differ in their last bits for what is equal.
	const equal, good = 1e-9, 0.05
	var best []int
	least := math.Inf(1)
	for scale := 1; scale <= mostWeight; scale++ {
		scaled := make([]int, len(shares))
		for i, s := range shares {
			scaled[i] = max(1, int(math.Round(s/most*float64(scale))))
		}
		rounded, cut := deviation(scaled, shares, total)
		if rounded < equal && cut <= good {
			return scaled
		}
		if rounded+cut < least-equal {
			best, least = scaled, rounded+cut
		}
	}
	return best
}

// deviation is how far the weights are from the shares: rounded is the part of all
// new flows that goes elsewhere because weights are integers, cut is the part of
// its own flows that a destination gets too many or too few, at worst, because the
// last round of dealing ends with the table.
func deviation(weights []int, shares []float64, total float64) (rounded, cut float64) {
	var sum int
	for _, w := range weights {
		sum += w
	}
	for i, w := range weights {
		rounded += math.Abs(float64(w)/float64(sum)-shares[i]/total) / 2
	}
	// The slots of the last round are missing to some, and the others have what
	// would be needed to complete it.
	rest := slots % sum
	return rounded, float64(max(rest, sum-rest)) / slots
}
