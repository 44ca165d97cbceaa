package main

// percentile is the nearest-rank one of sorted values: the smallest that at
// least p percent of them do not exceed. It is 0 of nothing.
func percentile(sorted []int64, p int) int64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[max(0, (len(sorted)*p+99)/100-1)]
}
