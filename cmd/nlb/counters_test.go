package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"nlb/balancer"
	"nlb/balancer/conntrack"
	"nlb/balancer/control"
	"nlb/balancer/nft"
	"nlb/proxyproto/relay"
	"nlb/proxyproto/worker"
)

var (
	inKernel = balancer.TargetKey{Group: "web", AddrPort: netip.MustParseAddrPort("10.0.1.11:8080")}
	atRelay  = balancer.TargetKey{Group: "mail", AddrPort: netip.MustParseAddrPort("10.0.1.12:25")}
)

// fakeKernel has a target that the mark of number 1 stands for.
type fakeKernel struct{ err error }

func (k fakeKernel) Events(context.Context) (nft.Events, error) {
	return nft.Events{
		NewFlows: map[balancer.TargetKey]uint64{inKernel: 7},
		Totals:   map[string]uint64{"unwanted_drops": 3},
	}, k.err
}

func (k fakeKernel) Outcomes(context.Context) (map[balancer.TargetKey]balancer.Outcomes, error) {
	return map[balancer.TargetKey]balancer.Outcomes{inKernel: {Failed: 1, Answered: 6}}, k.err
}

func (fakeKernel) TargetOf(m nft.Mark) (balancer.TargetKey, bool) { return inKernel, m.Target() == 1 }

func (fakeKernel) Counts(context.Context) (map[uint32]conntrack.Counts, error) {
	return map[uint32]conntrack.Counts{1 << 14: {Active: 2, Bytes: 900, Packets: 9, Resets: 1}, 2 << 14: {Active: 1}}, nil
}

// A fakeRelay fails, or is stopped and never answers.
type fakeRelay struct {
	err     error
	stopped bool
}

func (r fakeRelay) Stats(ctx context.Context) (worker.Stats, error) {
	if r.stopped {
		<-ctx.Done()
		return worker.Stats{}, fmt.Errorf("stats: %w", ctx.Err())
	}
	return worker.Stats{
		Targets:  map[balancer.TargetKey]relay.TargetStats{atRelay: {Active: 1, New: 5, Failed: 2, Answered: 3, Bytes: 100}},
		Accepted: 5, Failed: 2,
	}, r.err
}

// Whatever becomes of the relay's process, what the kernel counted is there, and soon.
func TestCountsDoNotDependOnTheRelay(t *testing.T) {
	gone := errors.New("no buffer space available")
	web := balancer.Counters{ActiveFlows: 2, NewFlows: 7, Bytes: 900, Packets: 9, Resets: 1}
	for _, c := range []struct {
		name   string
		kernel fakeKernel
		relay  fakeRelay
		want   map[balancer.TargetKey]balancer.Counters
		// failed is what the relay's total of that name is, nil if it is not there.
		failed   any
		outcomes map[balancer.TargetKey]balancer.Outcomes
		err      error
	}{
		{
			name:   "both count",
			want:   map[balancer.TargetKey]balancer.Counters{inKernel: web, atRelay: {ActiveFlows: 1, NewFlows: 5, Bytes: 100}},
			failed: uint64(2), outcomes: map[balancer.TargetKey]balancer.Outcomes{inKernel: {Failed: 1, Answered: 6}, atRelay: {Failed: 2, Answered: 3}},
		},
		{
			name: "no relay runs", relay: fakeRelay{err: worker.ErrNotRunning},
			want: map[balancer.TargetKey]balancer.Counters{inKernel: web}, failed: uint64(0),
			outcomes: map[balancer.TargetKey]balancer.Outcomes{inKernel: {Failed: 1, Answered: 6}},
		},
		{
			name: "the relay is stopped", relay: fakeRelay{stopped: true}, err: context.DeadlineExceeded,
			want:     map[balancer.TargetKey]balancer.Counters{inKernel: web},
			outcomes: map[balancer.TargetKey]balancer.Outcomes{inKernel: {Failed: 1, Answered: 6}},
		},
		{
			name: "the relay fails", relay: fakeRelay{err: gone}, err: gone,
			want:     map[balancer.TargetKey]balancer.Counters{inKernel: web},
			outcomes: map[balancer.TargetKey]balancer.Outcomes{inKernel: {Failed: 1, Answered: 6}},
		},
		{name: "the kernel fails", kernel: fakeKernel{err: gone}, err: gone},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				counter := tally{c.kernel, c.kernel, c.relay}
				begun := time.Now()
				counted, err := counter.counts(t.Context())
				if !errors.Is(err, c.err) || errors.Is(err, errRelaySilent) != (err != nil && c.want != nil) {
					t.Errorf("error %v, want %v", err, c.err)
				}
				same := cmpopts.EquateComparable(netip.AddrPort{})
				if diff := cmp.Diff(c.want, counted.Targets, same); diff != "" {
					t.Errorf("counters: %s", diff)
				}
				var failed any
				if n, ok := counted.Totals["relay_failed"]; ok {
					failed = n
				}
				if failed != c.failed || c.want != nil && counted.Totals["unwanted_drops"] != 3 {
					t.Errorf("totals: %v", counted.Totals)
				}
				outcomes, err := counter.Outcomes(t.Context())
				if (err != nil) != (c.kernel.err != nil) {
					t.Errorf("outcomes: %v", err)
				}
				if diff := cmp.Diff(c.outcomes, outcomes, same); diff != "" {
					t.Errorf("outcomes: %s", diff)
				}
				if took, most := time.Since(begun), relayCountsWithin+relayOutcomesWithin; took > most {
					t.Errorf("took %v, want at most %v", took, most)
				}
			})
		})
	}
}

func TestRelayedTargetsAreNotSaidToBeIdle(t *testing.T) {
	n := uint64(0)
	target := func(address string, own balancer.ClientIP) control.Target {
		return control.Target{Address: netip.MustParseAddr(address), ClientIP: own, ActiveFlows: &n, NewFlowsTotal: &n, BytesTotal: &n}
	}
	status := &control.Status{TargetGroups: []control.TargetGroup{
		{Name: "web", ClientIP: balancer.SNAT, Targets: []control.Target{target("10.0.1.11", 0), target("10.0.1.12", balancer.ProxyProtocolV2)}},
		{Name: "mail", ClientIP: balancer.ProxyProtocolV2, Targets: []control.Target{target("10.0.1.13", 0), target("10.0.1.14", balancer.Preserve)}},
	}}
	uncountRelayed(status)
	var counted []string
	for _, g := range status.TargetGroups {
		for _, x := range g.Targets {
			if x.ActiveFlows != nil && x.NewFlowsTotal != nil && x.BytesTotal != nil {
				counted = append(counted, x.Address.String())
			}
		}
	}
	if diff := cmp.Diff([]string{"10.0.1.11", "10.0.1.14"}, counted); diff != "" {
		t.Error(diff)
	}
}
