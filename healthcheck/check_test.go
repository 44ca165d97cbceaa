package healthcheck

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var target = netip.MustParseAddrPort("10.0.1.11:8080")

func TestKey(t *testing.T) {
	base := Check{Target: target, Protocol: HTTP}
	with := func(change func(*Check)) Check {
		c := base
		change(&c)
		return c
	}
	https := Check{Target: target, Protocol: HTTPS}
	withTLS := func(change func(*Check)) Check {
		c := https
		change(&c)
		return c
	}
	tests := map[string]struct {
		a, b Check
		same bool
	}{
		"the defaults spelled out": {base, Check{
			Target: target, Protocol: HTTP, Path: "/", Host: "10.0.1.11:8080", Matcher: []StatusRange{{200, 399}},
			Interval: 30 * time.Second, Timeout: 6 * time.Second, HealthyThreshold: 5, UnhealthyThreshold: 2,
		}, true},
		"a matcher in two spellings": {
			with(func(c *Check) { c.Matcher = []StatusRange{{200, 299}, {404, 404}} }),
			with(func(c *Check) { c.Matcher = []StatusRange{{404, 404}, {250, 299}, {200, 249}} }), true},
		"TCP has no path": {
			Check{Target: target, Path: "/a", Host: "a", Matcher: []StatusRange{{200, 200}}, ServerName: "a", VerifyTLS: true},
			Check{Target: target}, true},
		"HTTP has no certificate": {base, with(func(c *Check) { c.VerifyTLS, c.ServerName = true, "a" }), true},
		"HTTP has no roots":       {base, with(func(c *Check) { c.VerifyTLS, c.Roots = true, NewRoots("a") }), true},
		"nobody asks the roots":   {https, withTLS(func(c *Check) { c.Roots = NewRoots("a") }), true},
		"the same roots": {
			withTLS(func(c *Check) { c.VerifyTLS, c.Roots = true, NewRoots("a") }),
			withTLS(func(c *Check) { c.VerifyTLS, c.Roots = true, NewRoots("a") }), true},
		"other roots": {
			withTLS(func(c *Check) { c.VerifyTLS, c.Roots = true, NewRoots("a") }),
			withTLS(func(c *Check) { c.VerifyTLS, c.Roots = true, NewRoots("b") }), false},
		"no roots or roots that trust nobody": {
			withTLS(func(c *Check) { c.VerifyTLS = true }),
			withTLS(func(c *Check) { c.VerifyTLS, c.Roots = true, NewRoots("") }), false},
		"another server name": {https, withTLS(func(c *Check) { c.ServerName = "a" }), false},
		"a certificate":       {https, withTLS(func(c *Check) { c.VerifyTLS = true }), false},
		"a mapped address":    {base, with(func(c *Check) { c.Target = netip.MustParseAddrPort("[::ffff:10.0.1.11]:8080") }), true},
		"another port":        {base, with(func(c *Check) { c.Target = netip.MustParseAddrPort("10.0.1.11:8081") }), false},
		"another protocol":    {base, with(func(c *Check) { c.Protocol = HTTPS }), false},
		"another path":        {base, with(func(c *Check) { c.Path = "/health" }), false},
		"another host":        {base, with(func(c *Check) { c.Host = "a" }), false},
		"another matcher":     {base, with(func(c *Check) { c.Matcher = []StatusRange{{200, 200}} }), false},
		"another interval":    {base, with(func(c *Check) { c.Interval = time.Second }), false},
		"another timeout":     {base, with(func(c *Check) { c.Timeout = time.Second }), false},
		"another threshold":   {base, with(func(c *Check) { c.UnhealthyThreshold = 3 }), false},
		"another source":      {base, with(func(c *Check) { c.Source = netip.MustParseAddr("10.0.0.2") }), false},
		"a PROXY header":      {base, with(func(c *Check) { c.ProxyProtocolLocal = true }), false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if same := tt.a.Key() == tt.b.Key(); same != tt.same {
				t.Errorf("same key: %v, want %v\n%+v\n%+v", same, tt.same, tt.a.Key(), tt.b.Key())
			}
		})
	}
}

func TestComplete(t *testing.T) {
	addrs := cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{})
	for _, c := range []Check{{Target: target}, {Target: target, Protocol: HTTP}, {Target: target, Protocol: HTTPS}} {
		once := c.complete()
		if diff := cmp.Diff(once, once.complete(), addrs); diff != "" {
			t.Errorf("%v: completing twice (-once +twice):\n%s", c.Protocol, diff)
		}
	}
}

func TestDefaultHost(t *testing.T) {
	tests := []struct {
		protocol     Protocol
		target, want string
	}{
		{HTTP, "10.0.1.11:80", "10.0.1.11"},
		{HTTP, "10.0.1.11:443", "10.0.1.11:443"},
		{HTTPS, "10.0.1.11:443", "10.0.1.11"},
		{HTTP, "[2001:db8::11]:80", "[2001:db8::11]"},
		{HTTP, "[2001:db8::11]:8080", "[2001:db8::11]:8080"},
		{HTTP, "[fe80::11%eth0]:8080", "[fe80::11]:8080"},
	}
	for _, tt := range tests {
		c := Check{Protocol: tt.protocol, Target: netip.MustParseAddrPort(tt.target)}
		if diff := cmp.Diff(tt.want, c.complete().Host); diff != "" {
			t.Errorf("%v %v (-want +got):\n%s", tt.protocol, tt.target, diff)
		}
	}
}

func TestMatches(t *testing.T) {
	tests := []struct {
		matcher []StatusRange
		status  int
		want    bool
	}{
		{nil, 199, false}, {nil, 200, true}, {nil, 399, true}, {nil, 400, false},
		{[]StatusRange{{200, 200}}, 200, true}, {[]StatusRange{{200, 200}}, 201, false},
		{[]StatusRange{{200, 200}, {404, 499}}, 404, true}, {[]StatusRange{{200, 200}, {404, 499}}, 300, false},
	}
	for _, tt := range tests {
		if got := (Check{Matcher: tt.matcher}).Matches(tt.status); got != tt.want {
			t.Errorf("%v matches %d: %v, want %v", tt.matcher, tt.status, got, tt.want)
		}
	}
}
