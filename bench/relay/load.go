package main

import (
	"errors"
	"fmt"
	"slices"
	"time"
)

// A load makes traffic for a time, and adds what came of it to a sample. It is
// called in the client's namespace, finds no connections and leaves none. What
// it measures begins when the traffic is under way.
type load struct {
	name string
	run  func(*site, time.Duration, *sample) error
	// turn is how long a contestant is measured before it is another's turn:
	// short, so that a disturbance meets all of them, and long against the cache
	// misses at its beginning.
	turn time.Duration
}

var loads = []load{
	{"connections", connections, 100 * time.Millisecond},
	{"bulk, 1 flow", func(s *site, d time.Duration, to *sample) error { return bulk(s, 1, d, &to.bulk[0]) }, 150 * time.Millisecond},
	{"bulk, 8 flows", func(s *site, d time.Duration, to *sample) error { return bulk(s, 8, d, &to.bulk[1]) }, 150 * time.Millisecond},
	{"paced requests", paced, 250 * time.Millisecond},
}

// A sample is a contestant's share of one round.
type sample struct {
	connections window
	bulk        [2]window // bytes: of one flow, of eight
	// latencies are nanoseconds from when a request was to be sent until its
	// response was there; late is how many came to nothing in time.
	latencies []int64
	late      int
}

// warmUp is how long traffic goes before it is measured.
const warmUp = 20 * time.Millisecond

// measured lets traffic go for a time and says what it was: done counts it.
func (s *site) measured(d time.Duration, done *float64, to *window) error {
	forever := func() bool { return false }
	if err := s.station.turns(time.Now().Add(warmUp), forever); err != nil {
		return err
	}
	before, began := *done, time.Now()
	r, err := s.meter.read()
	if err != nil {
		return err
	}
	if err := s.station.turns(began.Add(d), forever); err != nil {
		return err
	}
	now, err := s.meter.read()
	switch {
	case err != nil:
		return err
	case *done == before:
		return errSilence
	}
	to.add(r.until(now, *done-before))
	return nil
}

// workers make connections, each one after the other.
const workers = 32

// connections makes connections: connect, a request, a response, close. The
// first of each worker has its header checked to the port.
func connections(s *site, d time.Duration, to *sample) error {
	st := s.station
	defer st.drop()
	checked, made, enough := st.checked, 0.0, false
	next := func(check bool) error {
		e, err := st.dial()
		if err == nil {
			e.check = check
		}
		return err
	}
	st.ready = func(e *end, events uint32) error {
		what := byte(askEcho)
		if e.check {
			what = askCheck
		}
		if asked, err := st.begin(e, events, what); err != nil || !asked {
			return err
		}
		n, err := st.hear(e)
		if err != nil || n == 0 {
			return err
		}
		st.leave(e)
		made++
		if enough {
			return nil
		}
		return next(false)
	}
	for range workers {
		if err := next(true); err != nil {
			return err
		}
	}
	if err := s.measured(d, &made, &to.connections); err != nil {
		return err
	}
	enough = true
	if err := st.quiesce(); err != nil {
		return err
	}
	if n := st.checked - checked; n != workers {
		return fmt.Errorf("%d headers were checked, not %d", n, workers)
	}
	return nil
}

// bulk carries bytes from the target to the client.
func bulk(s *site, flows int, d time.Duration, to *window) error {
	st := s.station
	defer st.drop()
	bytes := 0.0
	st.ready = func(e *end, events uint32) error {
		if asked, err := st.begin(e, events, askBulk); err != nil || !asked {
			return err
		}
		n, err := drain(e.fd, st.buf)
		bytes += float64(n)
		return err
	}
	clients := make([]int32, flows)
	for i := range clients {
		e, err := st.dial()
		if err != nil {
			return err
		}
		clients[i] = e.fd
	}
	if err := s.measured(d, &bytes, to); err != nil {
		return err
	}
	for _, fd := range clients {
		st.leave(&st.ends[fd])
	}
	return st.quiesce()
}

const (
	// pace is requests a second, and kept the connections that they take turns on.
	pace = 4000
	kept = 16
)

// paced sends requests at fixed times, whatever becomes of earlier ones: who
// waits for a response before the next request does not see how long that one
// would have waited.
func paced(s *site, d time.Duration, to *sample) error {
	st := s.station
	defer st.drop()
	p := pacer{station: st}
	if err := p.connect(); err != nil {
		return err
	}
	if err := p.send(d); err != nil {
		return err
	}
	for _, fd := range p.clients {
		to.late += len(st.ends[fd].due)
		st.leave(&st.ends[fd])
	}
	to.latencies = append(to.latencies, p.latencies...)
	return st.quiesce()
}

type pacer struct {
	station   *station
	clients   []int32
	met       int // connections with their first response
	latencies []int64
}

// connect opens the connections and has one response on each.
func (p *pacer) connect() error {
	st := p.station
	st.ready = func(e *end, events uint32) error {
		asked, err := st.begin(e, events, askCheck)
		if err != nil || !asked {
			return err
		}
		n, err := st.hear(e)
		p.met += n
		return err
	}
	for range kept {
		e, err := st.dial()
		if err != nil {
			return err
		}
		if err := undelayed(e.fd); err != nil {
			return err
		}
		p.clients = append(p.clients, e.fd)
	}
	if err := st.turns(time.Now().Add(patience), func() bool { return p.met == kept }); err != nil {
		return err
	}
	if p.met < kept {
		return errSilence
	}
	return nil
}

// send keeps the pace for warmUp and then d, and waits for the responses.
func (p *pacer) send(d time.Duration) error {
	st := p.station
	began := time.Now()
	from := began.Add(warmUp)
	waiting := 0
	st.ready = func(e *end, events uint32) error {
		if err := failed(e, events); err != nil {
			return err
		}
		n, err := st.hear(e)
		now := time.Now()
		for _, due := range e.due[:n] {
			if !due.Before(from) {
				p.latencies = append(p.latencies, now.Sub(due).Nanoseconds())
			}
		}
		e.due = slices.Delete(e.due, 0, n)
		waiting -= n
		return err
	}
	for i := range int(pace * (warmUp + d) / time.Second) {
		due := began.Add(time.Duration(i) * (time.Second / pace))
		if err := st.turns(due, func() bool { return false }); err != nil {
			return err
		}
		e := &st.ends[p.clients[i%kept]]
		e.due = append(e.due, due)
		waiting++
		if err := st.ask(e, askEcho); err != nil {
			return err
		}
	}
	err := st.turns(time.Now().Add(patience), func() bool { return waiting == 0 })
	if errors.Is(err, errSilence) {
		return nil // they are counted as late
	}
	return err
}
