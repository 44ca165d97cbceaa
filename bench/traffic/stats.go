package traffic

// permille is the nearest-rank quantile of sorted values: the smallest that at
// least p in a thousand of them do not exceed. It is 0 of nothing.
func permille(sorted []int64, p int) int64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[max(0, (len(sorted)*p+999)/1000-1)]
}
