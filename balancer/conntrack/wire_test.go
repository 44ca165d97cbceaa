package conntrack

import (
	"errors"
	"slices"
	"sync"
	"testing"
)

// A connection is used by one at a time, and by the next; one that failed is not,
// and no more are kept than few need.
func TestPool(t *testing.T) {
	var p pool
	t.Cleanup(p.close)
	used := func() (c *conn) {
		t.Helper()
		if err := p.use(func(u *conn) error { c = u; return nil }); err != nil {
			t.Fatal(err)
		}
		return c
	}
	first := used()
	if again := used(); again != first {
		t.Error("a connection that is free was not used")
	}
	broken := errors.New("broken")
	if err := p.use(func(*conn) error { return broken }); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	if len(p.idle) != 0 {
		t.Error("a connection that failed is kept")
	}

	const many = 3 * poolIdle
	var all []*conn
	var mu sync.Mutex
	var together, over sync.WaitGroup
	together.Add(many)
	for range many {
		over.Go(func() {
			err := p.use(func(c *conn) error {
				mu.Lock()
				all = append(all, c)
				mu.Unlock()
				together.Done()
				together.Wait()
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	over.Wait()
	slices.SortFunc(all, func(a, b *conn) int { return a.fd - b.fd })
	if n := len(slices.Compact(all)); n != many {
		t.Errorf("%d at a time used %d connections", many, n)
	}
	if len(p.idle) != poolIdle {
		t.Errorf("%d connections are kept, not %d", len(p.idle), poolIdle)
	}
}
