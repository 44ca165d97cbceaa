package vip

import (
	"sync"
	"time"
)

// A lost announcement leaves a neighbour with a dead entry for minutes, so each
// is sent three times, a second apart: MAX_NEIGHBOR_ADVERTISEMENT and
// RETRANS_TIMER of RFC 4861 section 10. RFC 5227 asks for two ARP announcements
// two seconds apart; one rhythm for both families does.
const (
	transmissions = 3
	interval      = time.Second
)

// A schedule says which addresses are to be announced when.
type schedule struct {
	// wake has a value when something was added.
	wake chan struct{}

	mu  sync.Mutex
	due map[Address]repeats
}

// repeats is what is left to send, and when the next one is due.
type repeats struct {
	left int
	at   time.Time
}

func newSchedule() *schedule {
	return &schedule{wake: make(chan struct{}, 1), due: map[Address]repeats{}}
}

// add plans n announcements of each address, the first at the given time. What
// was planned for them before is forgotten.
func (s *schedule) add(as []Address, n int, at time.Time) {
	if len(as) == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range as {
		s.due[a] = repeats{left: n, at: at}
	}
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// take returns what is due now and plans its next announcement an interval
// later.
func (s *schedule) take(now time.Time) []Address {
	s.mu.Lock()
	defer s.mu.Unlock()
	var as []Address
	for a, r := range s.due {
		if r.at.After(now) {
			continue
		}
		as = append(as, a)
		if r.left == 1 {
			delete(s.due, a)
		} else {
			s.due[a] = repeats{left: r.left - 1, at: now.Add(interval)}
		}
	}
	return as
}

// next is how long to wait for the next announcement; false when there is none.
func (s *schedule) next(now time.Time) (time.Duration, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var soonest time.Time
	for _, r := range s.due {
		if soonest.IsZero() || r.at.Before(soonest) {
			soonest = r.at
		}
	}
	return max(0, soonest.Sub(now)), !soonest.IsZero()
}
