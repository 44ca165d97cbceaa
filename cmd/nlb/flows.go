package main

import (
	"context"
	"fmt"

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

// FlowsTo implements balancer.FlowTable.
func (t flowTable) FlowsTo(ctx context.Context, target balancer.TargetKey) ([]balancer.Flow, error) {
	mark, ok := t.dataplane.Number(target)
	if !ok {
		return nil, nil // it has left
	}
	entries, err := t.flows.Flows(ctx, conntrack.Filter{Mark: uint32(mark), Mask: nft.TargetMask})
	if err != nil {
		return nil, err
	}
	flows := make([]balancer.Flow, len(entries))
	for i, e := range entries {
		flows[i] = t.flow(e)
	}
	return flows, nil
}

// Forget implements balancer.FlowTable.
func (t flowTable) Forget(ctx context.Context, target balancer.TargetKey, over func(balancer.Flow) bool) (int, error) {
	mark, ok := t.dataplane.Number(target)
	if !ok {
		return 0, nil
	}
	return t.flows.DeleteFunc(ctx, conntrack.Filter{Mark: uint32(mark), Mask: nft.TargetMask},
		func(f conntrack.Flow) bool { return over(t.flow(f)) })
}

// Prune implements balancer.FlowTable.
func (t flowTable) Prune(ctx context.Context, stale func(balancer.Flow) bool) (int, error) {
	return t.flows.DeleteFunc(ctx, conntrack.Filter{}, func(f conntrack.Flow) bool { return stale(t.flow(f)) })
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
	to, _ := t.dataplane.TargetOf(mark)
	return balancer.Flow{
		Protocol: uint8(f.Protocol),
		Client:   f.Original.Src, VIP: f.Original.Dst, Source: f.Reply.Dst, Target: f.Reply.Src,
		To: to, Ours: mark.Target() != 0,
		Live: f.TCPState >= conntrack.SynRecv && f.TCPState <= conntrack.LastAck || f.TCPState == conntrack.Close,
		Sent: f.Original.Packets, Answered: f.Reply.Packets,
	}
}
