package lab

import (
	"context"
	"errors"
	"io"
	"sync"
)

// A Going is what an agent does over and over until it is closed, and what it has
// counted meanwhile.
type Going[T any] struct{ opened }

// begin has the agent start something that goes on.
func begin[T any](ctx context.Context, a *Agent, op string, args any) (*Going[T], error) {
	id, err := a.ask(ctx, op, args, nil)
	if err != nil {
		return nil, err
	}
	return &Going[T]{opened{a, id}}, nil
}

// Load returns the counts up to now. It goes on.
func (g *Going[T]) Load(ctx context.Context) (T, error) { return g.load(ctx, 0) }

// Stop ends it, waits for what is on its way, and returns all counts.
func (g *Going[T]) Stop(ctx context.Context) (T, error) {
	counts, err := g.load(ctx, stopFirst)
	return counts, errors.Join(err, g.Close())
}

func (g *Going[T]) load(ctx context.Context, from int) (counts T, err error) {
	_, err = g.agent.ask(ctx, "load", handle{ID: g.id, From: from}, &counts)
	return counts, err
}

// stopFirst in a handle asks for the counts after the end.
const stopFirst = -1

// A counter is the agent's side of a Going.
type counter interface {
	io.Closer
	counts() any
}

func (s *server) load(_ context.Context, _ uint64, h handle) (any, error) {
	c, err := kept[counter](s, h.ID)
	if err != nil {
		return nil, err
	}
	if h.From == stopFirst {
		_ = c.Close()
	}
	return c.counts(), nil
}

// Workers do something side by side until they are stopped.
type workers struct {
	stop context.CancelFunc
	wg   sync.WaitGroup
}

func (w *workers) start(n int, call Call, work func(context.Context, Call)) {
	ctx, cancel := context.WithCancel(context.Background())
	w.stop = cancel
	for i := range n {
		w.wg.Go(func() { work(ctx, call.nth(i)) })
	}
}

// nth is the call from a source port of its own, where there is a first one.
func (c Call) nth(i int) Call {
	if c.SrcPort != 0 {
		c.SrcPort += uint16(i)
	}
	return c
}

// end stops them and waits for what they have begun.
func (w *workers) end() {
	w.stop()
	w.wg.Wait()
}
