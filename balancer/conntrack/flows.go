package conntrack

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// A Filter chooses flows of ours by their mark: those whose mark under Mask is
// Mark. The zero Filter chooses all.
type Filter struct{ Mark, Mask uint32 }

// Flows lists the flows of ours that filter chooses, in no order. One that
// begins or ends meanwhile may be in it or not.
func (t *Tracker) Flows(ctx context.Context, filter Filter) ([]Flow, error) {
	var pages [][]Flow
	seen := map[flowID]struct{}{}
	err := t.ours(ctx, markFilter{filter.Mark, filter.Mask}, func() {
		pages = nil
		clear(seen)
	}, func(r *record) error {
		id := r.flowID()
		if _, again := seen[id]; again {
			return nil
		}
		seen[id] = struct{}{}
		// One slice that grows would be copied several times over.
		if n := len(pages); n == 0 || len(pages[n-1]) == flowsPage {
			pages = append(pages, make([]Flow, 0, flowsPage))
		}
		last := &pages[len(pages)-1]
		*last = append(*last, r.flow())
		return nil
	})
	if err != nil {
		return nil, err
	}
	return slices.Concat(pages...), nil
}

// Each shows all flows of ours as they are read, in no order, until show fails: a
// million flows take no memory. Now and then the kernel shows one twice, and a flow
// that begins or ends meanwhile may be shown or not.
func (t *Tracker) Each(ctx context.Context, show func(Flow) error) error {
	return t.conns.use(func(c *conn) error {
		return c.dump(ctx, markFilter{}, func(r *record) error {
			if r.mark&t.mask == 0 || Status(r.status).dying() {
				return nil
			}
			return show(r.flow())
		})
	})
}

// flowsPage is how many flows are gathered at a time: some 50 KiB.
const flowsPage = 256

// ours is dump for flows of ours that do not end already. It checks the
// kernel's filter, for old kernels know none.
func (t *Tracker) ours(ctx context.Context, filter markFilter, begin func(), f func(*record) error) error {
	return t.dump(ctx, filter, begin, func(r *record) error {
		if r.mark&t.mask == 0 || r.mark&filter.mask != filter.value || Status(r.status).dying() {
			return nil
		}
		return f(r)
	})
}

// DeleteFunc ends each flow of this host that filter and doomed choose, ours or
// not, and returns how many: a flow to a VIP from before there was a mark for it
// is one that only its addresses tell.
// Flows that ended by themselves meanwhile are not counted and no error; nor is
// a new flow between the same ports ended in their place. doomed may be asked
// twice about a flow. After an error some flows may have been ended; ErrOffloaded
// says that all but some of those in a flowtable were.
func (t *Tracker) DeleteFunc(ctx context.Context, filter Filter, doomed func(Flow) bool) (n int, err error) {
	var requests []request
	err = t.dump(ctx, markFilter{filter.Mark, filter.Mask}, func() { requests = nil }, func(r *record) error {
		if r.mark&filter.Mask == filter.Mark && !Status(r.status).dying() && doomed(r.flow()) {
			requests = append(requests, request{msgDelete, r.name()})
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	if n, err = t.change(ctx, requests); err != nil {
		err = fmt.Errorf("end flows: %w", err)
	}
	return n, err
}

// SetTimeouts gives each flow of ours that timeout chooses so much time to stay
// idle, in whole seconds, rounded up, and returns to how many. timeout may be
// asked twice about a flow. A flow that ended meanwhile is no error.
func (t *Tracker) SetTimeouts(ctx context.Context, timeout func(Flow) (time.Duration, bool)) (n int, err error) {
	var requests []request
	err = t.ours(ctx, markFilter{}, func() { requests = nil }, func(r *record) error {
		if d, ok := timeout(r.flow()); ok {
			name := r.name()
			name.attrs.u32(ctaTimeout, uint32((d+time.Second-1)/time.Second))
			requests = append(requests, request{msgNew, name})
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	if n, err = t.change(ctx, requests); err != nil {
		err = fmt.Errorf("set the timeouts of flows: %w", err)
	}
	return n, err
}

// ErrOffloaded is wrapped when flows were not ended because a flowtable has them.
// Linux 6.4 and later end them all the same.
var ErrOffloaded = errors.New("a flowtable has them")

// changeBatch is how many requests one send makes: few enough that each may fail
// and the answers still fit the socket's buffer.
const changeBatch = 1000

// change makes the requests, and returns how many were carried out.
func (t *Tracker) change(ctx context.Context, requests []request) (n int, err error) {
	if len(requests) == 0 {
		return 0, nil
	}
	held := 0
	err = t.conns.use(func(c *conn) error {
		for batch := range slices.Chunk(requests, changeBatch) {
			done, busy, err := c.change(ctx, batch)
			n, held = n+done, held+busy
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return n, err
	}
	if held > 0 {
		return n, fmt.Errorf("%d of them: %w", held, ErrOffloaded)
	}
	return n, nil
}
