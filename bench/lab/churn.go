package lab

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// A Churn makes calls without end.
type Churn struct {
	Call // Parallel is the number of workers; N is not used
	// Interval is the time from one call of a worker to its next, if the call
	// takes no longer; default 10 ms.
	Interval time.Duration
	// Keep makes each worker use one UDP socket all the time: a client with a
	// fixed port, which the balancer takes for one flow.
	Keep bool
}

// A Load is what a Churn has met so far.
type Load struct {
	Tally
	// Moves counts the answers that came from another target than the same
	// worker's one before. It tells something with Keep only.
	Moves int `json:"moves"`
	// Gap is the longest time between two successes of any worker, or between
	// one and the start or the present.
	Gap     time.Duration `json:"gap"`
	Elapsed time.Duration `json:"elapsed"`
	// Failures are those of the Tally, the first ones if there are many.
	Failures []Failure `json:"failures,omitempty"`
}

// A Failure is an exchange that went wrong, and when. All nodes have one clock.
type Failure struct {
	Began time.Time `json:"began"`
	Ended time.Time `json:"ended"`
	Err   string    `json:"err"` // Timeout, Refused …
	// Who is the target that answered last on the same flow; empty if none did.
	Who string `json:"who,omitempty"`
}

// mostFailures bounds what is remembered of each single failure: an outage that
// lasts is told by its first ones.
const mostFailures = 5000

// Churning is a Churn that goes on until it is closed.
type Churning = Going[Load]

// Churn starts making calls. With a source port, each worker has its own, from
// that one on.
func (a *Agent) Churn(ctx context.Context, c Churn) (*Churning, error) {
	return begin[Load](ctx, a, "churn", c)
}

// churning is the state of a Churn.
type churning struct {
	Churn
	workers

	mu      sync.Mutex
	load    Load      // guarded by mu
	begin   time.Time // guarded by mu
	success time.Time // guarded by mu; the last one, or the beginning
	ended   time.Time // guarded by mu; zero while it goes on
}

func (s *server) churn(_ context.Context, id uint64, c Churn) (none, error) {
	if err := c.complete(); err != nil {
		return none{}, err
	}
	if c.Keep && c.Network != "udp" {
		return none{}, errors.New("to keep a socket is for udp")
	}
	if c.Interval == 0 {
		c.Interval = 10 * time.Millisecond
	}
	now := time.Now()
	run := &churning{Churn: c, begin: now, success: now}
	run.start(c.Parallel, c.Call, run.work)
	s.keep(id, run)
	return none{}, nil
}

func (c *churning) work(ctx context.Context, call Call) {
	tick := time.NewTicker(c.Interval)
	defer tick.Stop()
	once := func() Reply { return call.once(ctx) }
	if c.Keep {
		f, err := call.dial(ctx)
		if err != nil {
			once = func() Reply { return Reply{Err: failure(err)} }
		} else {
			defer f.Close()
			once = func() Reply { return f.exchange(true, c.Timeout) }
		}
	}
	who := ""
	for ctx.Err() == nil {
		begun := time.Now()
		r := once()
		if ctx.Err() != nil && r.Err != "" {
			return // it was interrupted
		}
		c.count(r, begun, who)
		if r.Err == "" {
			who = r.Who
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

// count notes what came of a call that began then. Who answered the same worker
// before, if anybody did.
func (c *churning) count(r Reply, begun time.Time, who string) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.load.add(r)
	if r.Err != "" {
		if !c.Keep {
			who = "" // that was another flow
		}
		c.load.Failures = note(c.load.Failures, Failure{begun, now, r.Err, who})
		return
	}
	if who != "" && r.Who != who {
		c.load.Moves++
	}
	c.load.Gap = max(c.load.Gap, now.Sub(c.success))
	c.success = now
}

// note appends a failure if there is room.
func note(list []Failure, f Failure) []Failure {
	if len(list) == mostFailures {
		return list
	}
	return append(list, f)
}

func (c *churning) counts() any {
	c.mu.Lock()
	defer c.mu.Unlock()
	until := c.ended
	if until.IsZero() {
		until = time.Now()
	}
	l := c.load
	l.Gap = max(l.Gap, until.Sub(c.success))
	l.Elapsed = until.Sub(c.begin)
	l.Tally = l.clone()
	l.Failures = slices.Clone(l.Failures) // the answer is on its way without the lock
	return l
}

// Close ends the calls and waits for the last ones.
func (c *churning) Close() error {
	c.end()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended.IsZero() {
		c.ended = time.Now()
	}
	return nil
}

// String is the counts and the longest gap.
func (l Load) String() string {
	return fmt.Sprintf("%v in %v, %d moves, longest gap %v", l.Tally, l.Elapsed.Round(time.Millisecond), l.Moves, l.Gap.Round(time.Millisecond))
}
