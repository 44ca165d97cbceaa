package web

import (
	"cmp"
	"math"
	"strconv"

	"nlb/balancer/control"
)

// A point is what a target, or several together, did in one step. NaN stands for
// what is not known: nobody could count, or there is nothing yet to compare with.
// In JSON a point is [active flows, new flows per second, bytes per second].
type point struct {
	active, flows, bytes float32
}

// pointSize is how many bytes a point takes in memory.
const pointSize = 12

var unknown = float32(math.NaN())

var nothingKnown = point{unknown, unknown, unknown}

// between is what a target did from one look at it to the next, some seconds later.
func between(was, is *control.Target, seconds float64) point {
	p := nothingKnown
	if is.ActiveFlows != nil {
		p.active = float32(*is.ActiveFlows)
	}
	if was != nil {
		p.flows = perSecond(was.NewFlowsTotal, is.NewFlowsTotal, seconds)
		p.bytes = perSecond(was.BytesTotal, is.BytesTotal, seconds)
	}
	return p
}

// perSecond is unknown if a total went back: whoever counts has begun anew.
func perSecond(was, is *uint64, seconds float64) float32 {
	if was == nil || is == nil || *is < *was || seconds <= 0 {
		return unknown
	}
	return float32(float64(*is-*was) / seconds)
}

// sum adds up what is known. A target that has just come must not make its group
// unknown, so only a sum of unknowns is.
func sum(points []point) point {
	total := nothingKnown
	for _, p := range points {
		total = total.plus(p)
	}
	return total
}

func (p point) plus(q point) point {
	return point{plus(p.active, q.active), plus(p.flows, q.flows), plus(p.bytes, q.bytes)}
}

func plus(a, b float32) float32 {
	switch {
	case isUnknown(a):
		return b
	case isUnknown(b):
		return a
	}
	return a + b
}

func isUnknown(x float32) bool { return x != x }

// same is == but for unknowns, which are the same as each other.
func (p point) same(q point) bool {
	// cmp.Compare takes NaN for equal to NaN.
	return cmp.Compare(p.active, q.active) == 0 && cmp.Compare(p.flows, q.flows) == 0 && cmp.Compare(p.bytes, q.bytes) == 0
}

// MarshalJSON implements json.Marshaler.
func (p point) MarshalJSON() ([]byte, error) { return appendPoint(nil, p), nil }

// points are many of them, written at one go: of ten thousand, most of the time
// would be spent on going from one to the next.
type points []point

// MarshalJSON implements json.Marshaler.
func (p points) MarshalJSON() ([]byte, error) {
	const usual = 24 // bytes that one takes
	b := append(make([]byte, 0, 2+usual*len(p)), '[')
	for i, one := range p {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendPoint(b, one)
	}
	return append(b, ']'), nil
}

func appendPoint(b []byte, p point) []byte {
	b = append(b, '[')
	b = append(appendNumber(b, p.active), ',')
	b = append(appendNumber(b, p.flows), ',')
	return append(appendNumber(b, p.bytes), ']')
}

// A number is a column's entry in a history; unknown is null.
type number float32

// MarshalJSON implements json.Marshaler.
func (n number) MarshalJSON() ([]byte, error) { return appendNumber(nil, float32(n)), nil }

// appendNumber writes two decimals at most: more of a rate is noise.
func appendNumber(b []byte, x float32) []byte {
	if isUnknown(x) {
		return append(b, "null"...)
	}
	return strconv.AppendFloat(b, math.Round(float64(x)*100)/100, 'f', -1, 64)
}
