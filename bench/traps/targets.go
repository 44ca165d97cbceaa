package traps

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/bench/lab"
)

// brokenCheck asks a port where no target listens, as often as it may.
const brokenCheck = "health_check: {port: 9, interval: 1s, timeout: 1s, unhealthy_threshold: 2}"

var failOpen = Scenario{
	Name:    "fail-open",
	Title:   "every health check fails, of targets that work",
	Drawing: routedDrawing,
	Naive:   "a target that fails its check takes no flows, even the last",
	Why: "One mistake, here a check of the wrong port, is the end of a service that works. A balancer that sends to " +
		"all of them instead, and does not say so, hides that there are no checks any more.",
	Cure:  "fail_open (the default): new flows go to all targets, and status and the log say so.",
	build: lab.Routed, hideProbes: true,
	naive: failClosed,
	cure: func(ctx context.Context, s *site) (f Finding, err error) {
		if s.options.WithoutCure {
			return failClosed(ctx, s)
		}
		c1, t1, t2 := s.Clients[0], s.Targets[0], s.Targets[1]
		if err := s.targets(ctx, t1, t2); err != nil {
			return f, err
		}
		group := "client_ip: preserve, " + brokenCheck
		if err := s.nlb(ctx, s.LB, config(s.LB.Addr4, group, at(t1), at(t2)), failsOpen); err != nil {
			return f, err
		}
		if err := s.watch(ctx, c1, s.LB, t1, t2); err != nil {
			return f, err
		}
		r, err := s.call(ctx, c1, lab.Call{Timeout: answerTime})
		if err != nil || r.Err != "" {
			return Finding{Evidence: "the caller: " + r.Err}, err
		}
		return Finding{
			Works:    r.Peer == c1.Addr4,
			Evidence: fmt.Sprintf("%s answered, and saw %v; status: unhealthy targets, fail_open true", r.Who, r.Peer),
		}, nil
	},
}

// failsOpen holds when no target is healthy, all are used, and the status says it.
func failsOpen(s *control.Status) error {
	for _, g := range s.TargetGroups {
		if !g.FailOpen {
			return fmt.Errorf("%s does not fail open", g.Name)
		}
	}
	return errors.Join(allUnhealthy(s), inForce(s))
}

func allUnhealthy(s *control.Status) error {
	for _, g := range s.TargetGroups {
		for _, t := range g.Targets {
			if t.State != balancer.Unhealthy {
				return fmt.Errorf("%s is %s", t.AddrPort(), t.State)
			}
		}
	}
	return nil
}

func failClosed(ctx context.Context, s *site) (f Finding, err error) {
	c1, t1, t2 := s.Clients[0], s.Targets[0], s.Targets[1]
	if err := s.targets(ctx, t1, t2); err != nil {
		return f, err
	}
	group := "client_ip: preserve, fail_open: {minimum_healthy_count: 0, minimum_healthy_percentage: 0}, " + brokenCheck
	if err := s.nlb(ctx, s.LB, config(s.LB.Addr4, group, at(t1), at(t2)), allUnhealthy); err != nil {
		return f, err
	}
	if err := s.wait(ctx, inForce); err != nil {
		return f, err
	}
	if err := s.watch(ctx, c1, s.LB, t1, t2); err != nil {
		return f, err
	}
	r, err := s.try(ctx, c1)
	if err != nil {
		return f, err
	}
	direct, err := s.call(ctx, s.LB, lab.Call{Dst: target(t1), Timeout: answerTime})
	f.Works = r.Err == ""
	if direct.Err == "" && !f.Works {
		f.Evidence = fmt.Sprintf("both targets are unhealthy, no packet went to them, yet %s answers on %v; the caller: %s", direct.Who, direct.Local, r.Err)
	}
	return f, err
}

var emptyBackends = Scenario{
	Name:    "empty-backends",
	Title:   "a client calls a service that has no targets at the moment",
	Drawing: routedDrawing,
	Naive:   "the VIP is on lb, which has no rule for a service without targets",
	Why: "lb's own kernel answers for the VIP, and refuses. The client is told that there is no such service, and " +
		"gives up, though it is only between two targets.",
	Cure: "nlb drops and counts (no_target_drops), as NLB does: the client repeats its SYN, and the first target to " +
		"come has it.",
	build: lab.Routed, hideProbes: true,
	naive: refused,
	cure: func(ctx context.Context, s *site) (f Finding, err error) {
		if s.options.WithoutCure {
			return refused(ctx, s)
		}
		c1, t1 := s.Clients[0], s.Targets[0]
		if err := s.targets(ctx, t1); err != nil {
			return f, err
		}
		if err := s.nlb(ctx, s.LB, config(s.LB.Addr4, "client_ip: preserve"), inForce); err != nil {
			return f, err
		}
		if err := s.watch(ctx, c1, s.LB, t1); err != nil {
			return f, err
		}
		type outcome struct {
			reply lab.Reply
			err   error
		}
		called := make(chan outcome, 1)
		go func() {
			r, err := s.call(ctx, c1, lab.Call{Timeout: patience})
			called <- outcome{r, err}
		}()
		dropped := uint64(0)
		arrived := s.wait(ctx, func(st *control.Status) error {
			if dropped = st.Totals["no_target_drops"]; dropped == 0 {
				return errors.New("no_target_drops is 0")
			}
			return nil
		})
		if arrived == nil {
			arrived = s.reload(ctx, config(s.LB.Addr4, "client_ip: preserve", at(t1)), settled)
		}
		o := <-called
		if err := errors.Join(arrived, o.err); err != nil {
			return f, err
		}
		f = answered(o.reply, t1, c1.Addr4)
		f.Evidence = fmt.Sprintf("no_target_drops was %d when t1 came; the same call: %s", dropped, f.Evidence)
		return f, nil
	},
}

func refused(ctx context.Context, s *site) (f Finding, err error) {
	c1 := s.Clients[0]
	if err := s.bind(s.LB); err != nil {
		return f, err
	}
	if err := s.watch(ctx, c1, s.LB); err != nil {
		return f, err
	}
	r, err := s.try(ctx, c1)
	if err != nil {
		return f, err
	}
	_, reset, err := s.seen(ctx, s.LB, func(p lab.Packet) bool { return p.Out && p.From() == vip && p.Flags&lab.RST != 0 })
	f.Works = r.Err == ""
	if reset && r.Err == lab.Refused {
		f.Evidence = fmt.Sprintf("lb itself sent a RST from %v; the caller: %s", vip, r.Err)
	}
	return f, err
}

var staleUDP = Scenario{
	Name:    "stale-udp",
	Title:   "a UDP target leaves, and a client goes on from the same port",
	Drawing: routedDrawing,
	Naive:   "the rule is changed from t1 to t2 (DNAT), and t1 is stopped",
	Why: "Rules are asked for the first packet of a flow only; then connection tracking decides, for as long as " +
		"packets keep coming. A UDP flow has no end, so a client that keeps its port keeps the dead target.",
	Cure:  "After each change nlb goes through the tracked flows and removes those whose target has left.",
	build: lab.Routed, hideProbes: true,
	naive: keepsStale,
	cure: func(ctx context.Context, s *site) (f Finding, err error) {
		if s.options.WithoutCure {
			return keepsStale(ctx, s)
		}
		c1, t1, t2 := s.Clients[0], s.Targets[0], s.Targets[1]
		group := "client_ip: preserve, deregistration_delay: {timeout: 0s}, health_check: {port: 8081}"
		for _, n := range []*lab.Node{t1, t2} { // what is probed stays, so that nothing but the change decides
			if err := s.listen(ctx, n, lab.Serve{Ports: []uint16{8081}, Networks: []string{"tcp"}}); err != nil {
				return f, err
			}
		}
		if err := s.targets(ctx, t2); err != nil {
			return f, err
		}
		if err := s.nlb(ctx, s.LB, configFor("UDP", s.LB.Addr4, group, at(t1)), settled); err != nil {
			return f, err
		}
		if err := s.watch(ctx, c1, s.LB, t1, t2); err != nil {
			return f, err
		}
		flow, err := s.leave(ctx, t1, func() error {
			return s.reload(ctx, configFor("UDP", s.LB.Addr4, group, at(t2)), settled)
		})
		if err != nil {
			return f, err
		}
		now, err := s.again(ctx, flow, answerTime)
		f = answered(now, t2, c1.Addr4)
		f.Evidence = fmt.Sprintf("%s, the same flow from %v", f.Evidence, now.From)
		return f, err
	},
}

func keepsStale(ctx context.Context, s *site) (f Finding, err error) {
	c1, t1, t2 := s.Clients[0], s.Targets[0], s.Targets[1]
	// A client keeps its flow tracked by sending. This one must not lose it to a
	// pause of the machine that is longer than the kernel's 30 s.
	if err := s.LB.Sysctl("net.netfilter.nf_conntrack_udp_timeout", "600"); err != nil {
		return f, err
	}
	if err := s.targets(ctx, t2); err != nil {
		return f, err
	}
	first, second := toTarget(t1), toTarget(t2)
	first.proto, second.proto = unix.IPPROTO_UDP, unix.IPPROTO_UDP
	if err := s.forward(s.LB, first); err != nil {
		return f, err
	}
	if err := s.watch(ctx, c1, s.LB, t1, t2); err != nil {
		return f, err
	}
	flow, err := s.leave(ctx, t1, func() error { return dnat(s.LB, second) })
	if err != nil {
		return f, err
	}
	now, err := s.again(ctx, flow, briefly)
	if err != nil {
		return f, err
	}
	fresh, err := s.call(ctx, c1, lab.Call{Network: "udp", Dst: vip, Timeout: answerTime})
	if err != nil {
		return f, err
	}
	unreachable, stale, err := s.seen(ctx, s.LB, func(p lab.Packet) bool { return !p.Out && p.Src == t1.Addr4 && p.ICMPType == 3 })
	f.Works = now.Err == ""
	if stale && fresh.Who == t2.Name && !f.Works {
		f.Evidence = fmt.Sprintf("t1, which left, got the packet: %q; the caller: %s; from a new port %s answers", what(unreachable), now.Err, fresh.Who)
	}
	return f, err
}

// leave opens a UDP flow to t1, has it leave, and stops it.
func (s *site) leave(ctx context.Context, t1 *lab.Node, change func() error) (*lab.Flows, error) {
	old, err := t1.Agent().Serve(ctx, lab.Serve{Ports: []uint16{targetPort}})
	if err != nil {
		return nil, err
	}
	flow, err := s.Clients[0].Agent().Hold(ctx, lab.Call{Network: "udp", Dst: vip, Timeout: briefly})
	if err != nil {
		return nil, err
	}
	s.later(flow.Close)
	if first := flow.Opened[0]; first.Who != t1.Name {
		return nil, fmt.Errorf("the flow began with %q, not with t1: %s", first.Who, first.Err)
	}
	return flow, errors.Join(change(), old.Close())
}

// again asks on a flow until there is an answer, or has been none for a while.
// Refusals come at once; what removes the flow may need a moment.
func (s *site) again(ctx context.Context, flow *lab.Flows, wait time.Duration) (lab.Reply, error) {
	end := time.NewTimer(wait)
	defer end.Stop()
	tick := time.NewTicker(briefly / 5)
	defer tick.Stop()
	for {
		now, err := flow.Check(ctx)
		if err != nil {
			return lab.Reply{}, err
		}
		if now[0].Now.Err == "" {
			return now[0].Now, nil
		}
		select {
		case <-tick.C:
		case <-end.C:
			return now[0].Now, nil
		case <-ctx.Done():
			return now[0].Now, ctx.Err()
		}
	}
}
