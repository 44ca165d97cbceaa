package maglev

import (
	"net/netip"
	"testing"
)

// Each field that a hash is of changes it, and no other does.
func TestFlowHash(t *testing.T) {
	for _, f := range []Flow{
		{netip.MustParseAddrPort("203.0.113.9:40112"), netip.MustParseAddrPort("198.51.100.10:80"), 6},
		{netip.MustParseAddrPort("[2001:db8:99::9]:40112"), netip.MustParseAddrPort("[2001:db8:77::10]:80"), 6},
	} {
		port, dport, proto, to, from := f, f, f, f, f
		port.Source = netip.AddrPortFrom(f.Source.Addr(), 40113)
		dport.Destination = netip.AddrPortFrom(f.Destination.Addr(), 81)
		proto.Protocol = 17
		to.Destination = netip.AddrPortFrom(f.Destination.Addr().Next(), 80)
		from.Source = netip.AddrPortFrom(f.Source.Addr().Next(), 40112)
		for name, other := range map[string]Flow{"sport": port, "dport": dport, "l4proto": proto, "daddr": to, "saddr": from} {
			if f.Hash(false, 7) == other.Hash(false, 7) {
				t.Errorf("%v: %s is not hashed", f, name)
			}
			if same := f.Hash(true, 7) == other.Hash(true, 7); same != (name != "saddr") {
				t.Errorf("%v, sticky: %s, %v", f, name, same)
			}
		}
		if f.Hash(false, 7) == f.Hash(false, 8) {
			t.Errorf("%v: the seed is not hashed", f)
		}
	}
}

func TestFrom(t *testing.T) {
	slots := []int32{0, 1, 2, 3}
	for _, c := range []struct {
		name string
		hash uint32
		do   func(int32) bool
		want int32
	}{
		{"the hash's own", 1 << 31, func(int32) bool { return true }, 2},
		{"the next one", 1 << 31, func(e int32) bool { return e != 2 }, 3},
		{"round", 1 << 31, func(e int32) bool { return e < 2 }, 0},
		{"none", 1 << 31, func(int32) bool { return false }, -1},
		{"the last slot", 1<<32 - 1, func(int32) bool { return true }, 3},
	} {
		if got := From(slots, c.hash, c.do); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
	if got := From(nil, 7, func(int32) bool { return true }); got != -1 {
		t.Errorf("without slots: %d", got)
	}
}
