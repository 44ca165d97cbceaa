package nft

import (
	"context"
	"errors"
	"testing"
	"time"

	"nlb/balancer"
)

// watched runs d.Watch for the length of the test and counts what it tells.
func watched(t *testing.T, d *Dataplane) <-chan struct{} {
	t.Helper()
	told := make(chan struct{}, 1000)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Watch(ctx, func() { told <- struct{}{} }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	await(t, told) // what changed before the subscription
	return told
}

func await(t *testing.T, told <-chan struct{}) {
	t.Helper()
	select {
	case <-told:
	case <-time.After(5 * time.Second):
		t.Fatal("the watch told nothing")
	}
}

// look refreshes what d knows and reports the generation, and whether the table
// had to be read for that.
func look(t *testing.T, d *Dataplane) (generation uint32, read bool) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	before := d.have
	if err := d.refresh(); err != nil {
		t.Fatal(err)
	}
	return d.generation, d.have != before
}

func TestWatch(t *testing.T) {
	d := newDataplane(t)
	want := &balancer.Desired{Table: everything()}
	told := watched(t, d)
	converge(t, d, want) // long enough to leave the subscription for
	before, _ := look(t, d)

	nft(t, "add table inet other")
	t.Cleanup(func() { nft(t, "delete table inet other") })
	if after, read := look(t, d); after != before+1 || read {
		t.Errorf("a stranger's transaction took the generation from %d to %d, and the table was read: %v", before, after, read)
	}
	small := everything()
	small.VIPs = small.VIPs[:2:2]
	small.Services = append(small.Services[:1:1], small.Services[2:]...)
	converge(t, d, &balancer.Desired{Table: small}) // short enough to stay
	if _, read := look(t, d); read {
		t.Error("our own transaction made us read the table")
	}
	if len(told) > 0 {
		t.Errorf("told %d times of our own changes and of other tables", len(told))
	}

	nft(t, "add rule inet nlb unwanted accept")
	await(t, told)
	if p := converge(t, d, &balancer.Desired{Table: small}); p.Empty() {
		t.Error("the stranger's rule was not seen")
	}
}

// A stranger's transaction in another table overtakes nobody; one in ours makes
// the plan worthless, and it is refused whole.
func TestOvertaken(t *testing.T) {
	d := newDataplane(t)
	p, err := d.Plan(t.Context(), &balancer.Desired{Table: everything()})
	if err != nil {
		t.Fatal(err)
	}
	nft(t, "add table inet other")
	t.Cleanup(func() { nft(t, "delete table inet other") })
	if err := d.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if p, err = d.Plan(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	nft(t, "add rule inet nlb unwanted accept")
	if err := d.Apply(t.Context(), p); !errors.Is(err, balancer.ErrOvertaken) {
		t.Errorf("got %v", err)
	}
	if p := planAfresh(t, nil); p.Empty() {
		t.Error("the table is gone")
	}
}

// The kernel's refusal names the step it is about.
func TestRefusalNamesItsStep(t *testing.T) {
	d := newDataplane(t)
	p, err := d.Plan(t.Context(), &balancer.Desired{Table: everything()})
	if err != nil {
		t.Fatal(err)
	}
	plan := p.(*Plan)
	plan.steps = append(plan.steps, delChain{"nowhere"})
	err = d.Apply(t.Context(), plan)
	const text = "delete chain inet nlb nowhere: no such file or directory (a kernel part may be missing: modprobe nft_chain_nat nft_ct nft_hash nft_socket)"
	if err == nil || err.Error() != text {
		t.Errorf("got  %v\nwant %s", err, text)
	}
	if p := planAfresh(t, nil); !p.Empty() {
		t.Errorf("a refused transaction left %q", p.Lines())
	}
}
