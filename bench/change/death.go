package change

import (
	"context"
	"net/netip"
	"time"
)

// Flows of one contestant while targets die: all contestants are watched at the
// same time, so that their rates add up on the one core. Where that is busy, the
// wait for it comes on top of what is measured.
const deathRate = 8 * time.Millisecond

const (
	// deathTargets share the flows, and deaths of them die in each case, one after
	// the other in equal parts of a check's interval, since it is chance how long
	// after a probe a target dies.
	deathTargets = 8
	deaths       = 3
	// window is how long a dead target is watched after the last death: the
	// longest time to the probe that finds out, the longest that this one takes,
	// and a second for what follows.
	window = interval + timeout + time.Second
)

// A passing is what came of the deaths of a case.
type passing struct {
	last   time.Duration // to the last flow sent to a dead target, on average
	failed int           // connections of clients
	// reasons are those of failures.
	reasons string
	// still says that a dead target got flows until it was watched no more.
	still bool
}

// A manner is a way to die, and the way back.
type manner struct {
	name    string
	victims []netip.Addr // not those of others: nginx remembers them
	die     func(*site, netip.Addr) error
	revive  func(*site, netip.Addr) error
}

var manners = []manner{
	{refused, targets()[:deaths], (*site).refuse, (*site).serve},
	{silent, targets()[deaths : 2*deaths], (*site).vanish, (*site).bind},
}

// die lets targets of a running contestant die and come back.
func (s *site) die(ctx context.Context, m manner, by service) (passing, error) {
	l := load{to: by.at(), every: deathRate}
	if err := s.settle(ctx, l, m.victims); err != nil {
		return passing{}, err
	}
	s.count()
	died := make([]time.Time, len(m.victims))
	for i, v := range m.victims {
		s.wire.forget(v)
		died[i] = time.Now()
		if err := m.die(s, v); err != nil {
			return passing{}, err
		}
		if err := s.pass(ctx, l, interval/deaths); err != nil {
			return passing{}, s.explain(err)
		}
	}
	if err := s.pass(ctx, l, window); err != nil {
		return passing{}, s.explain(err)
	}
	ended := time.Now()
	if err := s.drain(ctx); err != nil {
		return passing{}, s.explain(err)
	}
	p := passing{failed: s.failed, reasons: s.why()}
	for i, v := range m.victims {
		a := s.wire.of(v)
		if a.n > 0 {
			p.last += a.last.Sub(died[i]) / deaths
			p.still = p.still || ended.Sub(a.last) < time.Second/2
		}
		if err := m.revive(s, v); err != nil {
			return p, err
		}
	}
	return p, nil
}
