package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"nlb/balancer"
	"nlb/balancer/conntrack"
	"nlb/balancer/nft"
	"nlb/balancer/prompt"
)

// flowTable puts together what three kernel interfaces know of flows: conntrack
// has their addresses and marks, the dataplane says which target a mark stands
// for, and raw sockets reach their ends.
type flowTable struct {
	dataplane *nft.Dataplane
	flows     *conntrack.Tracker
	prompter  *prompt.Prompter
}

var _ balancer.FlowTable = flowTable{}

// fewMarks is for how many targets it is cheaper to have the kernel walk all
// flows for each and show its own, than to have it show all flows once.
const fewMarks = 4

// filters choose at least all flows of the targets.
func (t flowTable) filters(targets []balancer.TargetKey) []conntrack.Filter {
	var each []conntrack.Filter
	for _, k := range targets {
		if mark, ok := t.dataplane.Number(k); ok {
			each = append(each, conntrack.Filter{Mark: uint32(mark), Mask: nft.TargetMask})
		}
	}
	if len(each) > fewMarks {
		return []conntrack.Filter{{}}
	}
	return each
}

// A flowName tells flows from each other.
type flowName struct {
	protocol    uint8
	client, vip netip.AddrPort
}

func setOf(targets []balancer.TargetKey) map[balancer.TargetKey]bool {
	set := make(map[balancer.TargetKey]bool, len(targets))
	for _, k := range targets {
		set[k] = true
	}
	return set
}

// FlowsTo implements balancer.FlowTable.
func (t flowTable) FlowsTo(ctx context.Context, targets []balancer.TargetKey) ([]balancer.Flow, error) {
	wanted := setOf(targets)
	var flows []balancer.Flow
	for _, filter := range t.filters(targets) {
		entries, err := t.flows.Flows(ctx, filter)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if f := t.flow(e); wanted[f.To] {
				flows = append(flows, f)
			}
		}
	}
	return flows, nil
}

// Forget implements balancer.FlowTable.
func (t flowTable) Forget(ctx context.Context, targets []balancer.TargetKey, over func(balancer.Flow) bool) (map[balancer.TargetKey]int, error) {
	wanted, forgotten := setOf(targets), make(map[balancer.TargetKey]int)
	for _, filter := range t.filters(targets) {
		// It may be asked twice about a flow.
		chosen := make(map[flowName]balancer.TargetKey)
		_, err := t.delete(ctx, filter, func(e conntrack.Flow) bool {
			f := t.flow(e)
			if !f.Ours || !wanted[f.To] || !over(f) {
				return false
			}
			chosen[flowName{f.Protocol, f.Client, f.VIP}] = f.To
			return true
		})
		for _, k := range chosen {
			forgotten[k]++
		}
		if err != nil {
			return forgotten, err
		}
	}
	return forgotten, nil
}

// Prune implements balancer.FlowTable.
func (t flowTable) Prune(ctx context.Context, stale func(balancer.Flow) bool) (int, error) {
	return t.delete(ctx, conntrack.Filter{}, func(f conntrack.Flow) bool { return stale(t.flow(f)) })
}

// delete ends flows, those in the flowtable too. Linux before 6.4 ends none of
// them, so that they have to leave it first, and be kept from coming back with
// their next packet.
func (t flowTable) delete(ctx context.Context, filter conntrack.Filter, doomed func(conntrack.Flow) bool) (n int, err error) {
	n, err = t.flows.DeleteFunc(ctx, filter, doomed)
	if !errors.Is(err, conntrack.ErrOffloaded) {
		return n, err
	}
	resume, err := t.dataplane.SuspendFastPath()
	if err != nil {
		return n, err
	}
	more, err := t.deleteReleased(ctx, filter, doomed)
	return n + more, errors.Join(err, resume())
}

// released bounds the wait until flows have left the flowtable: the kernel
// destroys it after a grace period of all processors.
const released = 2 * time.Second

// deleteReleased ends flows that the flowtable is about to release.
func (t flowTable) deleteReleased(ctx context.Context, filter conntrack.Filter, doomed func(conntrack.Flow) bool) (n int, err error) {
	deadline := time.Now().Add(released)
	tick := time.NewTicker(released / 100)
	defer tick.Stop()
	for {
		more, err := t.flows.DeleteFunc(ctx, filter, doomed)
		n += more
		if !errors.Is(err, conntrack.ErrOffloaded) || time.Now().After(deadline) {
			return n, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return n, err
		}
	}
}

// SetTimeouts implements balancer.FlowTimes.
func (t flowTable) SetTimeouts(ctx context.Context, timeout func(balancer.Flow) (time.Duration, bool)) (int, error) {
	return t.flows.SetTimeouts(ctx, func(f conntrack.Flow) (time.Duration, bool) {
		if f.Protocol != conntrack.TCP {
			return 0, false
		}
		return timeout(t.flow(f))
	})
}

// Prompt implements balancer.FlowTable.
func (t flowTable) Prompt(flows []balancer.Flow) error {
	prompted := make([]prompt.Flow, len(flows))
	for i, f := range flows {
		prompted[i] = prompt.Flow{Client: f.Client, VIP: f.VIP, Source: f.Source, Target: f.Target}
	}
	if err := t.prompter.Prompt(prompted); err != nil {
		return fmt.Errorf("prompt %d flows: %w", len(flows), err)
	}
	return nil
}

func (t flowTable) flow(f conntrack.Flow) balancer.Flow {
	mark := nft.Mark(f.Mark)
	ours := mark.Target() != 0
	var to balancer.TargetKey
	if ours { // most flows of a host may be others': they need no look-up under a lock
		to, _ = t.dataplane.TargetOf(mark)
	}
	by := balancer.NFTables
	if ours {
		by = dataplaneOf(&f)
	}
	return balancer.Flow{
		Protocol: uint8(f.Protocol),
		Client:   f.Original.Src, VIP: f.Original.Dst, Source: f.Reply.Dst, Target: f.Reply.Src,
		To: to, Ours: ours, By: by,
		Live:      f.TCPState >= conntrack.SynRecv && f.TCPState <= conntrack.LastAck || f.TCPState == conntrack.Close,
		Offloaded: f.Status.Offloaded(), Established: f.TCPState == conntrack.Established, Left: f.Timeout,
		Sent: f.Original.Packets, Answered: f.Reply.Packets,
	}
}
