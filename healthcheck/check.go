package healthcheck

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// A Protocol is what a probe speaks.
type Protocol uint8

const (
	// TCP asks for a completed handshake and nothing more.
	TCP Protocol = iota
	// HTTP asks for a status code in the Matcher.
	HTTP
	// HTTPS is HTTP in TLS.
	HTTPS
)

func (p Protocol) String() string {
	switch p {
	case TCP:
		return "TCP"
	case HTTP:
		return "HTTP"
	case HTTPS:
		return "HTTPS"
	}
	return fmt.Sprintf("Protocol(%d)", uint8(p))
}

// A StatusRange is an inclusive range of HTTP status codes.
type StatusRange struct{ First, Last int }

func (r StatusRange) String() string {
	if r.First == r.Last {
		return fmt.Sprintf("%d", r.First)
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// A Check is one question to ask of one address and port, again and again.
// Zero values stand for ELBv2's defaults (CreateTargetGroup, Network Load
// Balancer).
type Check struct {
	// Target is the address and port that is probed.
	Target   netip.AddrPort
	Protocol Protocol
	// Path is the request target of HTTP and HTTPS, "/" when empty.
	Path string
	// Host is the Host header; empty: the target's address, with the port
	// unless it is the scheme's own.
	Host string
	// Matcher lists the status codes that mean healthy, 200-399 when empty.
	Matcher []StatusRange
	// Interval is from one probe's start to the next one's, 30s when zero.
	Interval time.Duration
	// Timeout bounds a whole probe, from the first packet to the end of the
	// response's header: 10s when zero, 6s for HTTP.
	Timeout time.Duration
	// HealthyThreshold is how many successes in a row bring an unhealthy
	// target back, 5 when zero.
	HealthyThreshold int
	// UnhealthyThreshold is how many failures in a row take a target out, 2
	// when zero.
	UnhealthyThreshold int
	// Source is the local address of the probe; zero: the kernel chooses by
	// the route.
	Source netip.Addr
	// ProxyProtocolLocal sends a PROXY v2 LOCAL header first, for targets
	// that accept nothing without one.
	ProxyProtocolLocal bool
	// ServerName goes into SNI, and is what VerifyTLS compares with; empty:
	// no SNI, and VerifyTLS compares with the address.
	ServerName string
	// VerifyTLS demands a certificate that is valid now, for that name and
	// from a trusted root. A Network Load Balancer does not verify its
	// targets' certificates.
	VerifyTLS bool
	// Roots is what VerifyTLS trusts; nil: those of the Prober.
	Roots *Roots
}

// A Key identifies a Check: two checks with the same Key send the same packets
// at the same pace and judge the answers alike. It is comparable.
type Key struct {
	target             netip.AddrPort
	source             netip.Addr
	protocol           Protocol
	path, host         string
	matcher            string
	interval, timeout  time.Duration
	healthy, unhealthy int
	local              bool
	serverName         string
	verify             bool
	roots              digest
}

// Key returns what identifies the check. Fields that the protocol does not use
// do not count, defaults are the same as their values spelled out, and so are
// two spellings of a Matcher.
func (c Check) Key() Key { return c.complete().key() }

// key needs a completed check.
func (c Check) key() Key {
	return Key{
		target: c.Target, source: c.Source, protocol: c.Protocol,
		path: c.Path, host: c.Host, matcher: matcherString(c.Matcher),
		interval: c.Interval, timeout: c.Timeout,
		healthy: c.HealthyThreshold, unhealthy: c.UnhealthyThreshold,
		local: c.ProxyProtocolLocal, serverName: c.ServerName, verify: c.VerifyTLS,
		roots: c.Roots.digest(),
	}
}

// complete fills in the defaults, clears what the protocol does not use and
// brings the rest to one form.
func (c Check) complete() Check {
	c.Target = netip.AddrPortFrom(c.Target.Addr().Unmap(), c.Target.Port())
	c.Source = c.Source.Unmap()
	c.Interval = positive(c.Interval, 30*time.Second)
	c.HealthyThreshold = positive(c.HealthyThreshold, 5)
	c.UnhealthyThreshold = positive(c.UnhealthyThreshold, 2)
	if c.Protocol == HTTP {
		c.Timeout = positive(c.Timeout, 6*time.Second)
	}
	c.Timeout = positive(c.Timeout, 10*time.Second)
	if c.Protocol == TCP {
		c.Path, c.Host, c.Matcher = "", "", nil
	} else {
		if c.Path == "" {
			c.Path = "/"
		}
		if c.Host == "" {
			c.Host = c.defaultHost()
		}
		c.Matcher = mergeRanges(c.Matcher)
	}
	if c.Protocol != HTTPS {
		c.ServerName, c.VerifyTLS = "", false
	}
	if !c.VerifyTLS {
		c.Roots = nil
	}
	return c
}

// defaultHost is the target as a Host header: without the scheme's own port
// (RFC 9110, 7.2) and without a zone, which means nothing to the peer.
func (c Check) defaultHost() string {
	addr := c.Target.Addr().WithZone("")
	if c.Protocol == HTTP && c.Target.Port() == 80 || c.Protocol == HTTPS && c.Target.Port() == 443 {
		if addr.Is6() {
			return "[" + addr.String() + "]"
		}
		return addr.String()
	}
	return netip.AddrPortFrom(addr, c.Target.Port()).String()
}

// Matches reports whether an HTTP status code means healthy.
func (c Check) Matches(status int) bool {
	if len(c.Matcher) == 0 {
		return status >= 200 && status <= 399
	}
	for _, r := range c.Matcher {
		if status >= r.First && status <= r.Last {
			return true
		}
	}
	return false
}

// mergeRanges returns the ranges sorted, and joined where they touch. No
// ranges are the default.
func mergeRanges(ranges []StatusRange) []StatusRange {
	if len(ranges) == 0 {
		return []StatusRange{{200, 399}}
	}
	sorted := slices.SortedFunc(slices.Values(ranges), func(a, b StatusRange) int { return a.First - b.First })
	merged := sorted[:1]
	for _, r := range sorted[1:] {
		if last := &merged[len(merged)-1]; r.First <= last.Last+1 {
			last.Last = max(last.Last, r.Last)
		} else {
			merged = append(merged, r)
		}
	}
	return merged
}

func matcherString(ranges []StatusRange) string {
	words := make([]string, len(ranges))
	for i, r := range ranges {
		words[i] = r.String()
	}
	return strings.Join(words, ",")
}

func positive[N int | time.Duration](n, otherwise N) N {
	if n > 0 {
		return n
	}
	return otherwise
}
