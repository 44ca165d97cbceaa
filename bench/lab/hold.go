package lab

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

// Flows are long-lived: opened once, then asked again and again.
type Flows struct {
	opened
	// Opened are the first replies, one for each flow, in the flows' order.
	Opened []Reply
}

// A Flow is one of Flows at one moment.
type Flow struct {
	First Reply // when it was opened
	Now   Reply
}

// Broken says that the flow works no more; Now.Err says how.
func (f Flow) Broken() bool { return f.Now.Err != "" }

// Moved says that another target answers than at first.
func (f Flow) Moved() bool { return f.First.Err == "" && !f.Broken() && f.First.Who != f.Now.Who }

// Hold opens c.N flows, c.Parallel at a time, and keeps them until they are
// closed. With a source port, the flows take it and the following ones. A flow
// that cannot be opened has an error among Opened and is broken from then on.
func (a *Agent) Hold(ctx context.Context, c Call) (*Flows, error) {
	var replies []Reply
	id, err := a.ask(ctx, "hold", c, &replies)
	if err != nil {
		return nil, err
	}
	return &Flows{opened{a, id}, replies}, nil
}

// Check asks on every flow at the same time and returns them in their order. Each
// answer has the time of the Call.
func (f *Flows) Check(ctx context.Context) ([]Flow, error) { return f.CheckWithin(ctx, 0) }

// CheckWithin is Check with another time for each answer, for callers that expect
// none and would wait for all of it. 0 is the Call's.
func (f *Flows) CheckWithin(ctx context.Context, timeout time.Duration) ([]Flow, error) {
	var now []Reply
	if _, err := f.agent.ask(ctx, "check", checking{f.id, timeout}, &now); err != nil {
		return nil, err
	}
	flows := make([]Flow, len(now))
	for i := range now {
		flows[i] = Flow{First: f.Opened[i], Now: now[i]}
	}
	return flows, nil
}

// Broken are the flows that Broken or Moved holds for.
func Broken(flows []Flow) []Flow {
	return slices.DeleteFunc(slices.Clone(flows), func(f Flow) bool { return !f.Broken() && !f.Moved() })
}

// checking asks for a check of the flows with that id.
type checking struct {
	ID      uint64        `json:"id"`
	Timeout time.Duration `json:"timeout,omitempty"` // default: as they were opened with
}

// held is the flows of one Hold.
type held struct {
	Call
	mu    sync.Mutex
	flows []*flow // guarded by mu; nil for one that could not be opened
	last  []Reply // guarded by mu
}

func (s *server) hold(ctx context.Context, id uint64, c Call) ([]Reply, error) {
	if err := c.complete(); err != nil {
		return nil, err
	}
	h := &held{Call: c, flows: make([]*flow, c.N), last: make([]Reply, c.N)}
	inParallel(c.Parallel, c.N, func(i int) {
		one := c.nth(i)
		f, err := one.dial(ctx)
		if err != nil {
			h.last[i] = Reply{Err: failure(err)}
			return
		}
		h.flows[i], h.last[i] = f, f.exchange(!c.Silent, c.Timeout)
	})
	if err := ctx.Err(); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	s.keep(id, h)
	return h.last, nil
}

func (s *server) check(_ context.Context, _ uint64, o checking) ([]Reply, error) {
	h, err := kept[*held](s, o.ID)
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	timeout := h.Timeout
	if o.Timeout > 0 {
		timeout = o.Timeout
	}
	// A new slice: the last answer may still be on its way out.
	now := slices.Clone(h.last)
	inParallel(len(now), len(now), func(i int) {
		if f := h.flows[i]; f != nil {
			now[i] = f.exchange(true, timeout)
		}
	})
	h.last = now
	return now, nil
}

func (h *held) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var errs []error
	for i, f := range h.flows {
		if f != nil {
			errs = append(errs, f.Close())
			h.flows[i] = nil
		}
	}
	return errors.Join(errs...)
}
