package balancer

import (
	"net/netip"
	"reflect"
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

// TestSameSeesEveryField changes each field of a pool and of a destination, also
// those that somebody will add.
func TestSameSeesEveryField(t *testing.T) {
	whole := func() Pool { return Pool{Name: "web", Destinations: []Destination{{Address: addr("10.0.1.11")}}} }
	if a, b := whole(), whole(); !a.Same(&b) {
		t.Error("a pool differs from its like")
	}
	for _, of := range []struct {
		kind reflect.Type
		in   func(*Pool) reflect.Value
	}{
		{reflect.TypeFor[Pool](), func(p *Pool) reflect.Value { return reflect.ValueOf(p).Elem() }},
		{reflect.TypeFor[Destination](), func(p *Pool) reflect.Value { return reflect.ValueOf(&p.Destinations[0]).Elem() }},
		{reflect.TypeFor[ProxyProtocol](), func(p *Pool) reflect.Value { return reflect.ValueOf(&p.ProxyProtocol).Elem() }},
	} {
		for i := range of.kind.NumField() {
			a, b := whole(), whole()
			field := of.in(&b).Field(i)
			switch {
			case field.Kind() == reflect.Slice:
				field.Set(reflect.MakeSlice(field.Type(), field.Len()+1, field.Len()+1))
			case field.Type() == reflect.TypeFor[netip.Addr]():
				field.Set(reflect.ValueOf(addr("10.0.1.12")))
			case field.Kind() == reflect.Bool:
				field.SetBool(true)
			case field.Kind() == reflect.String:
				field.SetString("other")
			case field.CanInt():
				field.SetInt(field.Int() + 1)
			case field.CanUint():
				field.SetUint(field.Uint() + 1)
			case field.Kind() == reflect.Struct:
				continue // by its own fields
			default:
				t.Fatalf("%v.%s: how does one change a %v?", of.kind, of.kind.Field(i).Name, field.Type())
			}
			if a.Same(&b) {
				t.Errorf("%v.%s makes no difference", of.kind, of.kind.Field(i).Name)
			}
		}
	}
}

// BenchmarkSame compares a pool of 1,000 destinations with its like, and does the
// same by reflection.
func BenchmarkSame(b *testing.B) {
	pool := func() Pool {
		p := Pool{Name: "web", Protocols: []uint8{ProtoTCP}}
		for i := range 1000 {
			a := netip.AddrFrom4([4]byte{10, 0, byte(i / 250), byte(i%250 + 1)})
			p.Destinations = append(p.Destinations, Destination{Address: a, Port: 80, Weight: 1, Domain: []netip.Prefix{netip.PrefixFrom(a, 32)}})
		}
		return p
	}
	one, other := pool(), pool()
	for name, same := range map[string]func() bool{
		"Same":       func() bool { return one.Same(&other) },
		"reflection": func() bool { return reflect.DeepEqual(one, other) },
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if !same() {
					b.Fatal("they differ")
				}
			}
		})
	}
}
