package control

import (
	"net/netip"
	"time"

	"nlb/balancer"
)

func mustAddrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// webSnapshot has one target per state that a target in use may have.
func webSnapshot() *balancer.Snapshot {
	target := func(addr string) balancer.Target {
		ap := mustAddrPort(addr)
		return balancer.Target{Address: ap.Addr(), Port: ap.Port(), Weight: 1}
	}
	one, two, three := target("10.0.1.11:8080"), target("10.0.1.12:8080"), target("10.0.1.13:8080")
	return &balancer.Snapshot{
		Spec: &balancer.Spec{
			Listeners: []balancer.Listener{{
				Name: "web", VIP: netip.MustParseAddr("198.51.100.10"), Port: 80, Protocol: balancer.TCP,
				Forward: []balancer.WeightedGroup{{TargetGroup: "web", Weight: 1}},
			}},
			TargetGroups: []balancer.TargetGroup{{
				Name: "web", Protocol: balancer.TCP, ClientIP: balancer.HairpinSNAT,
				DeregistrationDelay: balancer.DeregistrationDelay{Timeout: time.Minute},
				Targets:             []balancer.Target{one, two, three},
			}},
		},
		Groups: []balancer.TargetGroupStatus{{
			Name: "web", Protocol: balancer.TCP, ClientIP: balancer.HairpinSNAT,
			Targets: []balancer.TargetStatus{
				{Target: one, Health: balancer.Health{State: balancer.Healthy, Since: since}, Share: 1},
				{Target: two, Health: balancer.Health{State: balancer.Unhealthy, Reason: balancer.ReasonTimeout,
					Description: "no answer within 10s", Since: since}},
				{Target: three, Health: balancer.Health{State: balancer.Draining,
					Reason: balancer.ReasonDeregistrationInProgress, Since: since}, Until: since.Add(time.Minute)},
			},
		}},
		Generation: 2,
		Converged:  since,
		Took:       1500 * time.Microsecond,
		Writes:     4,
		Repairs:    1,
		Failures:   2,
		Latency: balancer.Latency{
			Buckets: [len(balancer.LatencyBounds) + 1]uint64{0: 2, 4: 1, len(balancer.LatencyBounds): 1},
			Count:   4, Sum: 6250 * time.Millisecond,
		},
	}
}
