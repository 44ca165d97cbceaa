package traffic

import "testing"

func TestPermille(t *testing.T) {
	hundred := make([]int64, 100)
	for i := range hundred {
		hundred[i] = int64(i + 1)
	}
	for _, c := range []struct {
		name   string
		sorted []int64
		p      int
		want   int64
	}{
		{"nothing", nil, 500, 0},
		{"one", []int64{7}, 990, 7},
		{"lowest", hundred, 0, 1},
		{"p50 of 100", hundred, 500, 50},
		{"p99 of 100", hundred, 990, 99},
		{"p99 of 99 is the last", hundred[:99], 990, 99},
		{"p50 of 3", []int64{1, 2, 3}, 500, 2},
		{"p50 of 4 is one that was measured", []int64{1, 2, 3, 4}, 500, 2},
		{"p99.9 of 100 is the last", hundred, 999, 100},
		{"highest", hundred, 1000, 100},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := permille(c.sorted, c.p); got != c.want {
				t.Errorf("%d, want %d", got, c.want)
			}
		})
	}
}
