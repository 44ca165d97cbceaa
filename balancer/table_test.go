package balancer

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestUsableDestinations(t *testing.T) {
	four, six := Destination{Address: addr("10.0.1.11")}, Destination{Address: addr("2001:db8:1::11")}
	relayed4, preserved6 := four, six
	relayed4.ClientIP, preserved6.ClientIP = ProxyProtocolV2, Preserve
	for _, c := range []struct {
		name string
		mode ClientIP
		of   []Destination
		four []int
		six  []int
	}{
		{"of both families", SNAT, []Destination{four, six}, []int{0}, []int{1}},
		{"of one family", SNAT, []Destination{four}, []int{0}, nil},
		{"relayed, of both families", ProxyProtocolV2, []Destination{six, four}, []int{1}, []int{0}},
		{"relayed, of one family", ProxyProtocolV2, []Destination{six}, []int{0}, []int{0}},
		{"relayed in part", SNAT, []Destination{four, relayed4}, []int{0, 1}, []int{1}},
		{"preserved in part", ProxyProtocolV2, []Destination{preserved6, six}, []int{1}, []int{0, 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := Pool{ClientIP: c.mode, Destinations: c.of}
			if diff := cmp.Diff([][]int{c.four, c.six}, [][]int{p.Usable(32), p.Usable(128)}); diff != "" {
				t.Error(diff)
			}
		})
	}
}
