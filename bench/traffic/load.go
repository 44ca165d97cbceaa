package traffic

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"nlb/bench/part"
)

// A load makes traffic for a time, and adds what came of it to a sample. It is
// called in the client's namespace, finds no connections and leaves none. What
// it measures begins when the traffic is under way.
type load struct {
	name   string
	yields []yield
	run    func(*site, time.Duration, *sample) error
	// packets says that only those who forward packets can take it.
	packets bool
	// turn is how long a contestant is measured before it is another's turn:
	// short, so that a disturbance meets all of them, and long against the cache
	// misses at its beginning.
	turn time.Duration
	// full and quick are a contestant's share of a round.
	full, quick time.Duration
	// lost is what so many of came to nothing, in a note.
	lost string
}

// A yield is a value that a load is for.
type yield struct {
	metric, cas string
	of          func(*sample) float64
}

var loads = []*load{
	{
		name: "connections", run: connections, turn: 25 * time.Millisecond, full: 400 * time.Millisecond, quick: 100 * time.Millisecond,
		yields: []yield{
			{connectionRate, "", func(s *sample) float64 { return s.rate() }},
			{connectionCost, "", func(s *sample) float64 { return s.cost(time.Microsecond) }},
		},
	},
	{
		name: "bulk of 1 flow", run: func(s *site, d time.Duration, to *sample) error { return bulk(s, 1, d, to) },
		turn: 100 * time.Millisecond, full: 200 * time.Millisecond, quick: 60 * time.Millisecond,
		yields: []yield{{bulkRate, oneFlow, gigabits}},
	},
	{
		name: "bulk of 8 flows", run: func(s *site, d time.Duration, to *sample) error { return bulk(s, 8, d, to) },
		turn: 100 * time.Millisecond, full: 200 * time.Millisecond, quick: 60 * time.Millisecond,
		yields: []yield{{bulkRate, eightFlows, gigabits}},
	},
	{
		name: "paced requests", run: paced, turn: 200 * time.Millisecond, full: 400 * time.Millisecond, quick: 100 * time.Millisecond,
		lost: "requests had no response",
		yields: []yield{
			{latency50, "", func(s *sample) float64 { return s.latency(500) }},
			{latency99, "", func(s *sample) float64 { return s.latency(990) }},
			{latency999, "", func(s *sample) float64 { return s.latency(999) }},
		},
	},
	{
		name: "UDP packets", run: packets, packets: true, turn: 20 * time.Millisecond, full: 300 * time.Millisecond, quick: 60 * time.Millisecond,
		lost: "packets did not arrive",
		yields: []yield{
			{packetRate, "", func(s *sample) float64 { return s.rate() }},
			{packetCost, "", func(s *sample) float64 { return s.cost(time.Nanosecond) }},
		},
	},
}

// wanted says whether a contestant is to be measured with the load.
func (l *load) wanted(o *part.Options, c *contestant) bool {
	return (c.forwards || !l.packets) && slices.ContainsFunc(l.yields, func(y yield) bool { return o.Wants(y.metric, c.name) })
}

// share is a contestant's part of a round.
func (l *load) share(quick bool) time.Duration {
	if quick {
		return l.quick
	}
	return l.full
}

// turns is how many a share has.
func (l *load) turns(share time.Duration) int { return max(1, int((share+l.turn-1)/l.turn)) }

// A sample is what came of a contestant's turns with a load in a round.
type sample struct {
	window // of connections, bytes or packets
	// latencies are nanoseconds from when a request was to be sent until its
	// response was there.
	latencies []int64
	lost      int // requests or packets that came to nothing
}

func gigabits(s *sample) float64 { return s.rate() * 8 / 1e9 }

// latency is a quantile's, in microseconds.
func (s *sample) latency(p int) float64 {
	slices.Sort(s.latencies)
	return float64(permille(s.latencies, p)) / 1e3
}

// warmUp is how long traffic goes before it is measured.
const warmUp = 10 * time.Millisecond

// measured lets traffic go for a time and says what it was: done counts it.
func (s *site) measured(d time.Duration, done *float64, to *window) error {
	forever := func() bool { return false }
	if err := s.station.turns(time.Now().Add(warmUp), forever); err != nil {
		return err
	}
	before := *done
	began, err := s.meter.read()
	if err != nil {
		return err
	}
	if err := s.station.turns(time.Now().Add(d), forever); err != nil {
		return err
	}
	// Where others had the core for all of a short turn, nothing is done yet.
	if err := s.station.turns(time.Now().Add(patience), func() bool { return *done > before }); err != nil {
		return err
	}
	now, err := s.meter.read()
	switch {
	case err != nil:
		return err
	case *done == before:
		return errSilence
	}
	to.add(*done-before, now-began)
	return nil
}

// workers make connections, each one after the other.
const workers = 32

// connections makes connections: connect, a request, a response, close. The
// first of each worker is checked to the client's port.
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
	if err := s.measured(d, &made, &to.window); err != nil {
		return err
	}
	enough = true
	if err := st.quiesce(); err != nil {
		return err
	}
	if n := st.checked - checked; n != workers {
		return fmt.Errorf("%d connections were checked to the port, not %d", n, workers)
	}
	return spread(st.arrived)
}

// spread fails if a target has had less than a tenth of its part of the round's
// connections: then the balancer is not doing what it is measured for. Of a few
// hundred, chance alone would not do that in the life of a machine.
func spread(arrived []int) error {
	const few = 300
	sum := 0
	for _, n := range arrived {
		sum += n
	}
	for i, n := range arrived {
		if sum >= few && n*len(arrived)*10 < sum {
			return fmt.Errorf("of %d connections, only %d came to target %d", sum, n, i+1)
		}
	}
	return nil
}

// bulk carries bytes from the target to the client.
func bulk(s *site, flows int, d time.Duration, to *sample) error {
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
	if err := s.measured(d, &bytes, &to.window); err != nil {
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
		to.lost += len(st.ends[fd].due)
		st.leave(&st.ends[fd])
	}
	if len(p.latencies) == 0 {
		return errSilence
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
		return nil // they are counted as lost
	}
	return err
}
