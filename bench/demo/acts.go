package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"sync"
	"time"

	"nlb/bench/lab"
	"nlb/bench/measure"
)

// A way is a protocol over a family.
type way struct {
	network, title string
	vip            netip.Addr
}

var ways = []way{
	{"tcp", "TCP, IPv4", lab.VIP4}, {"udp", "UDP, IPv4", lab.VIP4},
	{"tcp", "TCP, IPv6", lab.VIP6}, {"udp", "UDP, IPv6", lab.VIP6},
}

// The widths of a table's columns.
const wideMode, wideCell = 19, 15

// header prints the head of a table of modes and ways.
func header(out *screen, last string) {
	text := fmt.Sprintf("   %-*s", wideMode, "client_ip")
	for _, w := range ways {
		text += fmt.Sprintf("%-*s", wideCell, w.title)
	}
	out.line("%s", out.dim(strings.TrimRight(text+last, " ")))
}

// none is said of UDP where there is none.
const none = "-"

// ask makes one call to a port of the VIPs in every way at once, and returns
// whom the target took for its client, or why there was no answer.
func ask(ctx context.Context, from *lab.Node, port uint16) ([]string, error) {
	seen, errs := make([]string, len(ways)), make([]error, len(ways))
	var wg sync.WaitGroup
	for i, w := range ways {
		if port == portRelayed && w.network != "tcp" {
			seen[i] = none
			continue
		}
		wg.Go(func() {
			replies, err := from.Agent().Call(ctx, lab.Call{Network: w.network, Dst: netip.AddrPortFrom(w.vip, port)})
			if err != nil {
				errs[i] = err
			} else {
				seen[i] = who(replies[0])
			}
		})
	}
	wg.Wait()
	return seen, errors.Join(errs...)
}

// who is the client that a PROXY header names, or the one that the target sees.
func who(r lab.Reply) string {
	switch {
	case r.Err != "":
		return r.Err
	case r.Client.IsValid():
		return r.Client.Addr().String()
	}
	return r.Peer.String()
}

// onlyTCP is what is expected of a relayed port.
func onlyTCP(want []string) []string {
	for i, w := range ways {
		if w.network != "tcp" {
			want[i] = none
		}
	}
	return want
}

// expect is what every way should give: the node's address of its family, or
// the text if there is no node.
func expect(n *lab.Node, text string) []string {
	want := make([]string, len(ways))
	for i, w := range ways {
		switch {
		case n == nil:
			want[i] = text
		case w.vip.Is4():
			want[i] = n.Addr4.String()
		default:
			want[i] = n.Addr6.String()
		}
	}
	return want
}

// row prints a mode's line and returns what is not as it should be.
func row(out *screen, act, mode string, got, want []string, last string) (failed []string) {
	text := fmt.Sprintf("   %-*s", wideMode, mode)
	for i := range ways {
		ok := got[i] == want[i]
		text += out.cell(wideCell, got[i], ok)
		if !ok {
			failed = append(failed, fmt.Sprintf("%s, %s, %s: %s instead of %s", act, mode, ways[i].title, got[i], want[i]))
		}
	}
	out.line("%s", strings.TrimRight(text+last, " "))
	return failed
}

// modes is what the target sees of an outside client.
func modes(ctx context.Context, s *scene, out *screen) (failed []string, err error) {
	out.heading("1. Whom does a target see?", "c1 calls the VIPs. The one target of each group, t1, says who called:")
	header(out, "which is")
	for _, m := range clientIPs {
		got, err := ask(ctx, s.Clients[0], m.port)
		if err != nil {
			return nil, err
		}
		want, is := expect(s.Clients[0], ""), "the client"
		switch m.port {
		case portSNAT:
			want, is = expect(s.LB, ""), "lb"
		case portRelayed:
			want, is = onlyTCP(want), "in lb's header"
		}
		failed = append(failed, row(out, "outside client", m.name, got, want, is)...)
	}
	out.line("   The first three rewrite the destination, from the VIP to t1. snat rewrites the source as well, so")
	out.line("   t1 answers lb wherever its routes lead, but no longer knows its client. With proxy_protocol_v2 lb")
	out.line("   connects to t1 itself, and tells it in a header who the client is. Each group has its mode.")
	return failed, nil
}

// hairpin is a target that calls its own VIP.
func hairpin(ctx context.Context, s *scene, out *screen) (failed []string, err error) {
	out.heading("2. A target calls its own VIP", "t1 calls the VIPs and is itself the target, the \"hairpin\". It sees:")
	header(out, "nlb counted")
	for _, m := range clientIPs {
		before, err := s.counters(ctx)
		if err != nil {
			return nil, err
		}
		got, err := ask(ctx, s.Targets[0], m.port)
		if err != nil {
			return nil, err
		}
		after, err := s.counters(ctx)
		if err != nil {
			return nil, err
		}
		want, evidence := expect(s.LB, ""), ""
		added := func(name string) int { return after[name] - before[name] }
		switch m.port {
		case portPreserve:
			want, evidence = expect(nil, lab.Timeout), fmt.Sprint("hairpin_drops ", added("hairpin_drops"))
			// A SYN is repeated, so there may be more.
			if n := added("hairpin_drops"); n < len(ways) {
				failed = append(failed, fmt.Sprintf("preserve: hairpin_drops grew by %d for %d calls", n, len(ways)))
			}
		case portHairpin:
			evidence = fmt.Sprint("hairpins ", added("hairpins"))
			if n := added("hairpins"); n != len(ways) {
				failed = append(failed, fmt.Sprintf("hairpin_snat: hairpins grew by %d for %d calls", n, len(ways)))
			}
		case portRelayed:
			want, evidence = onlyTCP(expect(s.Targets[0], "")), "in lb's header"
		}
		failed = append(failed, row(out, "hairpin", m.name, got, want, evidence)...)
	}
	out.line("   With its source preserved, t1's packet would return to t1 with t1's own address as the source.")
	out.line("   Hosts take that for a forgery (Linux: a \"martian source\") and drop it without a word, so the")
	out.line("   caller times out. nlb drops it first, and counts. hairpin_snat gives just these flows lb's")
	out.line("   address: t1 answers lb, which passes it on. (Counted by: nft list counters table inet nlb)")
	return failed, nil
}

const manyFlows = 3000

// spread is how flows divide among weighted targets.
func spread(ctx context.Context, s *scene, out *screen) (failed []string, err error) {
	out.heading("3. Weights", fmt.Sprintf("%d connections to targets that weigh %v, chosen by a consistent hash:", manyFlows, weights))
	before, err := s.newFlows(ctx)
	if err != nil {
		return nil, err
	}
	tally := lab.Tally{}
	for _, vip := range []netip.Addr{lab.VIP4, lab.VIP6} {
		replies, err := s.Clients[0].Agent().Call(ctx, lab.Call{
			Network: "tcp", Dst: netip.AddrPortFrom(vip, portWeighted), N: manyFlows / 2, Parallel: 32, Timeout: 5 * time.Second,
		})
		if err != nil {
			return nil, err
		}
		tally = sum(tally, lab.Count(replies))
	}
	if tally.Failed > 0 {
		failed = append(failed, fmt.Sprintf("weights: %d connections failed: %v", tally.Failed, tally.ByErr))
	}
	after, err := s.newFlows(ctx)
	if err != nil {
		return nil, err
	}
	total := 0
	for _, w := range weights {
		total += w
	}
	for i, t := range s.Targets {
		share := float64(weights[i]) / float64(total)
		n, counted := tally.ByWho[t.Name], after[t.Name]-before[t.Name]
		if counted != n {
			failed = append(failed, fmt.Sprintf("weights: nlb counted %d new flows of %s, which had %d", counted, t.Name, n))
		}
		ok := math.Abs(float64(n)-share*manyFlows) <= tolerance(share, manyFlows)
		if !ok {
			failed = append(failed, fmt.Sprintf("weights: %s got %d of %d connections, not about %.0f", t.Name, n, manyFlows, share*manyFlows))
		}
		out.line("   %s  weight %d  %s%5d = %4.1f %%, expected %2.0f %%, nlb status says %4d", t.Name, weights[i],
			out.cell(30, bar(n, manyFlows*2/5, 28), ok), n, 100*float64(n)/manyFlows, 100*share, counted)
	}
	return failed, nil
}

// sum adds two tallies' counts of targets and failures.
func sum(a, b lab.Tally) lab.Tally {
	all := lab.Tally{OK: a.OK + b.OK, Failed: a.Failed + b.Failed, ByWho: map[string]int{}, ByErr: map[string]int{}}
	for _, t := range []lab.Tally{a, b} {
		for k, n := range t.ByWho {
			all.ByWho[k] += n
		}
		for k, n := range t.ByErr {
			all.ByErr[k] += n
		}
	}
	return all
}

// tolerance is how far a count of n flows may be from its share: 5 standard
// deviations of independent draws, a chance of 1 in 1.7 million, and 1 % that a
// target's part of the hash table may be off.
func tolerance(share float64, n int) float64 {
	return 5*math.Sqrt(float64(n)*share*(1-share)) + 0.01*share*float64(n)
}

const (
	heldEach = 50 // flows held in each way
	dead     = time.Second
)

// restart is what flows notice of a daemon that is killed and started again.
func restart(ctx context.Context, s *scene, out *screen) (failed []string, err error) {
	out.heading("4. The daemon crashes", "kill -9 under traffic, a second without any nlb, then nlb serve again:")
	client := s.Clients[0].Agent()
	held, err := hold(ctx, client)
	if err != nil {
		return nil, err
	}
	churns, err := churn(ctx, client)
	if err != nil {
		return nil, err
	}
	before, err := loads(ctx, churns, (*lab.Churning).Load)
	if err != nil {
		return nil, err
	}
	if err := s.kill(); err != nil {
		return nil, err
	}
	pause(ctx, dead)
	without, err := check(ctx, held)
	if err != nil {
		return nil, err
	}
	begun := time.Now()
	if err := s.serve(ctx, measure.InForce); err != nil {
		return nil, err
	}
	back := time.Since(begun)
	first, err := s.Status(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.AwaitNLB(ctx, timeout, measure.Forwards); err != nil {
		return nil, err
	}
	again, err := check(ctx, held)
	if err != nil {
		return nil, err
	}
	after, err := loads(ctx, churns, (*lab.Churning).Stop)
	if err != nil {
		return nil, err
	}
	made, lost := after.OK-before.OK, after.Failed-before.Failed

	report := func(ok bool, what, format string, args ...any) {
		text := fmt.Sprintf(format, args...)
		if !ok {
			failed = append(failed, "crash: "+what+": "+text)
		}
		out.line("   %-30s %s", what, out.cell(0, text, ok))
	}
	all := heldEach * len(ways)
	report(without.alive == all && again.alive == all && again.moved == 0, fmt.Sprintf("%d open TCP and UDP flows", all),
		"%d of %d answer while it is dead, %d of %d afterwards, %d moved", without.alive, all, again.alive, all, again.moved)
	report(lost == 0 && made > 0, "new connections meanwhile", "%d made, %d failed, longest pause %s", made, lost, after.Gap.Round(time.Millisecond))
	report(first.Apply.WritesTotal == 0, "the new daemon", "ready in %d ms, %d kernel changes: it adopts what it finds",
		back.Milliseconds(), first.Apply.WritesTotal)
	out.line("   nlb is not in the packets' way: it programs the kernel, and the kernel forwards by itself.")
	return failed, nil
}

// hold opens flows in every way.
func hold(ctx context.Context, client *lab.Agent) ([]*lab.Flows, error) {
	var held []*lab.Flows
	for _, w := range ways {
		f, err := client.Hold(ctx, lab.Call{Network: w.network, Dst: netip.AddrPortFrom(w.vip, portWeighted), N: heldEach, Parallel: heldEach})
		if err != nil {
			return nil, err
		}
		held = append(held, f)
	}
	return held, nil
}

// churn makes new connections without end, in both families.
func churn(ctx context.Context, client *lab.Agent) ([]*lab.Churning, error) {
	var churns []*lab.Churning
	for _, vip := range []netip.Addr{lab.VIP4, lab.VIP6} {
		c, err := client.Churn(ctx, lab.Churn{Call: lab.Call{Network: "tcp", Dst: netip.AddrPortFrom(vip, portWeighted), Parallel: 2}})
		if err != nil {
			return nil, err
		}
		churns = append(churns, c)
	}
	return churns, nil
}

// loads adds up the loads of churns.
func loads(ctx context.Context, churns []*lab.Churning, ask func(*lab.Churning, context.Context) (lab.Load, error)) (all lab.Load, err error) {
	for _, c := range churns {
		l, err := ask(c, ctx)
		if err != nil {
			return all, err
		}
		all.Tally = sum(all.Tally, l.Tally)
		all.Gap = max(all.Gap, l.Gap)
	}
	return all, nil
}

// A survey is how held flows fare.
type survey struct{ alive, moved int }

func check(ctx context.Context, held []*lab.Flows) (found survey, err error) {
	for _, h := range held {
		flows, err := h.Check(ctx)
		if err != nil {
			return found, err
		}
		for _, f := range flows {
			if !f.Broken() {
				found.alive++
			}
			if f.Moved() {
				found.moved++
			}
		}
	}
	return found, nil
}

// pause waits, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
