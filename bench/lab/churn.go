package lab

import (
	"context"
	"errors"
	"fmt"
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
}

// Churning is a Churn that goes on until it is closed.
type Churning struct{ opened }

// Churn starts making calls. With a source port, each worker has its own, from
// that one on.
func (a *Agent) Churn(ctx context.Context, c Churn) (*Churning, error) {
	id, err := a.ask(ctx, "churn", c, nil)
	if err != nil {
		return nil, err
	}
	return &Churning{opened{a, id}}, nil
}

// Load returns the counts up to now. The calls go on.
func (c *Churning) Load(ctx context.Context) (Load, error) {
	var l Load
	_, err := c.agent.ask(ctx, "load", handle{ID: c.id}, &l)
	return l, err
}

// Stop ends the calls, waits for the last ones and returns all counts.
func (c *Churning) Stop(ctx context.Context) (Load, error) {
	var l Load
	_, err := c.agent.ask(ctx, "load", handle{ID: c.id, From: stopChurn}, &l)
	return l, errors.Join(err, c.Close())
}

// stopChurn in a handle asks for the load after the end.
const stopChurn = -1

// churning is the state of a Churn.
type churning struct {
	Churn
	stop context.CancelFunc
	wg   sync.WaitGroup

	mu      sync.Mutex
	load    Load      // guarded by mu
	begin   time.Time // guarded by mu
	success time.Time // guarded by mu; the last one, or the beginning
	end     time.Time // guarded by mu; zero while it goes on
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
	ctx, cancel := context.WithCancel(context.Background())
	run.stop = cancel
	for i := range c.Parallel {
		one := c.Call
		if c.SrcPort != 0 {
			one.SrcPort += uint16(i)
		}
		run.wg.Go(func() { run.work(ctx, one) })
	}
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
		r := once()
		if ctx.Err() != nil && r.Err != "" {
			return // it was interrupted
		}
		c.count(r, who != "" && r.Err == "" && r.Who != who)
		if r.Err == "" {
			who = r.Who
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

func (c *churning) count(r Reply, moved bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.load.add(r)
	if moved {
		c.load.Moves++
	}
	if r.Err == "" {
		now := time.Now()
		c.load.Gap = max(c.load.Gap, now.Sub(c.success))
		c.success = now
	}
}

func (s *server) load(_ context.Context, _ uint64, h handle) (Load, error) {
	c, err := kept[*churning](s, h.ID)
	if err != nil {
		return Load{}, err
	}
	if h.From == stopChurn {
		_ = c.Close()
	}
	return c.report(), nil
}

func (c *churning) report() Load {
	c.mu.Lock()
	defer c.mu.Unlock()
	until := c.end
	if until.IsZero() {
		until = time.Now()
	}
	l := c.load
	l.Gap = max(l.Gap, until.Sub(c.success))
	l.Elapsed = until.Sub(c.begin)
	l.Tally = l.clone()
	return l
}

// Close ends the calls and waits for the last ones.
func (c *churning) Close() error {
	c.stop()
	c.wg.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.end.IsZero() {
		c.end = time.Now()
	}
	return nil
}

// String is the counts and the longest gap.
func (l Load) String() string {
	return fmt.Sprintf("%v in %v, %d moves, longest gap %v", l.Tally, l.Elapsed.Round(time.Millisecond), l.Moves, l.Gap.Round(time.Millisecond))
}
