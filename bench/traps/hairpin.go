package traps

import (
	"context"
	"fmt"

	"nlb/bench/lab"
)

const routedDrawing = `
   c1 203.0.113.9 ──── lb 10.0.1.1 ──┬── t1 10.0.1.11
                       VIP           └── t2 10.0.1.12
                       198.51.100.10`

var hairpinSelf = Scenario{
	Name:    "hairpin-self",
	Title:   "t1 calls the VIP, and is its target",
	Drawing: routedDrawing,
	Naive:   "lb rewrites the destination (DNAT) and keeps the client's address",
	Why: "The packet comes back to t1 with t1's own address as its source. No host believes " +
		"that its own address comes from outside: the kernel drops it as a martian, and accept_local does not help.",
	Cure:  "client_ip: hairpin_snat gives exactly these flows an address of lb as their source.",
	build: lab.Routed,
	naive: func(ctx context.Context, s *site) (f Finding, err error) {
		t1 := s.Targets[0]
		if err := s.targets(ctx, t1); err != nil {
			return f, err
		}
		if err := s.forward(s.LB, toTarget(t1)); err != nil {
			return f, err
		}
		log, err := s.kernelLog(t1)
		if err != nil {
			return f, err
		}
		if err := s.watch(ctx, t1, s.LB); err != nil {
			return f, err
		}
		r, err := s.try(ctx, t1)
		if err != nil {
			return f, err
		}
		return s.martianAt(ctx, t1, t1.Addr4, r, log)
	},
	cure: func(ctx context.Context, s *site) (f Finding, err error) {
		t1 := s.Targets[0]
		group := "client_ip: " + s.with("hairpin_snat", "preserve")
		if err := s.serve(ctx, s.LB, config(s.LB.Addr4, group, at(t1)), t1); err != nil {
			return f, err
		}
		if err := s.watch(ctx, t1, s.LB); err != nil {
			return f, err
		}
		return s.ask(ctx, t1, t1, s.LB.Addr4)
	},
}

var hairpinSameNode = Scenario{
	Name:  "hairpin-same-node",
	Title: "a pod calls the VIP, and the target is another pod of its node",
	Drawing: `
   lb 10.0.1.1 ───── n1 10.0.1.21 ──┬── p1x1 10.244.1.11  (the caller)
   VIP                              └── p1x2 10.244.1.12  (the target)
   198.51.100.10`,
	Naive: "lb rewrites the destination (DNAT) and keeps the client's address",
	Why: "Client and target have different addresses, so nothing looks like a hairpin. But n1 has a direct way " +
		"between them: the answer never passes lb, nobody makes it the VIP's again, and the caller resets it.",
	Cure:    "client_ip: hairpin_snat with colocated: the operator says which addresses share the target's host.",
	build:   lab.PodNode,
	options: lab.Options{Nodes: 1},
	naive: func(ctx context.Context, s *site) (f Finding, err error) {
		caller, node, pod := s.Targets[0], s.Hosts[0], s.Targets[1]
		if err := s.targets(ctx, pod); err != nil {
			return f, err
		}
		if err := s.forward(s.LB, toTarget(pod)); err != nil {
			return f, err
		}
		if err := s.watch(ctx, caller, node, s.LB, pod); err != nil {
			return f, err
		}
		r, err := s.try(ctx, caller)
		if err != nil {
			return f, err
		}
		return s.strangerAt(ctx, caller, target(pod), r)
	},
	cure: func(ctx context.Context, s *site) (f Finding, err error) {
		caller, node, pod := s.Targets[0], s.Hosts[0], s.Targets[1]
		colocated := s.with(`colocated: ["10.244.1.0/24"]`, "colocated: []")
		if err := s.serve(ctx, s.LB, config(s.LB.Addr4, "client_ip: hairpin_snat", at(pod, colocated)), pod); err != nil {
			return f, err
		}
		if err := s.watch(ctx, caller, node, s.LB, pod); err != nil {
			return f, err
		}
		return s.ask(ctx, caller, pod, s.LB.Addr4)
	},
}

var hairpinSameSubnet = Scenario{
	Name:  "hairpin-same-subnet",
	Title: "a client in the target's own subnet calls the VIP",
	Drawing: `
   c1 203.0.113.9 ── rt ──┬── lb 10.0.1.1      VIP 198.51.100.10
                          ├── t1 10.0.1.11     (the target)
     one segment:         └── i1 10.0.1.101    (the caller)
     10.0.1.0/24`,
	Naive: "lb has one arm, rewrites the destination (DNAT) and keeps the client's address",
	Why: "The request goes by lb, the answer does not: t1 sees a neighbour's address, and answers it directly over " +
		"the segment. i1 had called the VIP, does not know 10.0.1.11, and resets it.",
	Cure:    "client_ip: hairpin_snat with hairpin_subnet: clients of the targets' subnet get lb's address.",
	build:   lab.OneArm,
	options: lab.Options{Targets: 1},
	naive: func(ctx context.Context, s *site) (f Finding, err error) {
		caller, t1 := s.Inside[0], s.Targets[0]
		if err := s.targets(ctx, t1); err != nil {
			return f, err
		}
		if err := s.forward(s.LB, toTarget(t1)); err != nil {
			return f, err
		}
		if err := s.watch(ctx, caller, s.LB, t1); err != nil {
			return f, err
		}
		r, err := s.try(ctx, caller)
		if err != nil {
			return f, err
		}
		return s.strangerAt(ctx, caller, target(t1), r)
	},
	cure: func(ctx context.Context, s *site) (f Finding, err error) {
		caller, t1 := s.Inside[0], s.Targets[0]
		group := "client_ip: hairpin_snat, hairpin_subnet: " + s.with("true", "false")
		if err := s.serve(ctx, s.LB, config(s.LB.Addr4, group, at(t1)), t1); err != nil {
			return f, err
		}
		if err := s.watch(ctx, caller, s.LB, t1); err != nil {
			return f, err
		}
		return s.ask(ctx, caller, t1, s.LB.Addr4)
	},
}

var hairpinAvoidSelf = Scenario{
	Name:    "hairpin-avoid-self",
	Title:   "t1 calls the VIP, and the balancer never sends a caller to itself",
	Drawing: routedDrawing,
	Naive:   "a rule of lb skips the target that equals the source",
	Why: "That works while another target is left. When t2 leaves, no rule is left for t1: its packet has no way to " +
		"go. (Of pods, whose node is the target, the rule never knew: their address is not the target's.)",
	Cure:  "client_ip: preserve with avoid_self: another target if there is one, else lb's address as the source.",
	build: lab.Routed,
	naive: func(ctx context.Context, s *site) (f Finding, err error) {
		t1, t2 := s.Targets[0], s.Targets[1]
		if err := s.targets(ctx, t1, t2); err != nil {
			return f, err
		}
		others := toTarget(t1)
		others.notSaddr = t1.Addr4
		if err := s.forward(s.LB, others, toTarget(t2)); err != nil {
			return f, err
		}
		both, err := s.call(ctx, t1, lab.Call{Timeout: answerTime})
		if err != nil {
			return f, err
		}
		if err := dnat(s.LB, others); err != nil {
			return f, err
		}
		if err := s.watch(ctx, t1, s.LB); err != nil {
			return f, err
		}
		alone, err := s.try(ctx, t1)
		if err != nil {
			return f, err
		}
		refusal, refused, err := s.seen(ctx, t1, func(p lab.Packet) bool {
			return !p.Out && p.Src == s.LB.Addr4 && p.ICMPType == 3
		})
		f.Works = alone.Err == ""
		if refused && both.Who == t2.Name {
			f.Evidence = fmt.Sprintf("with t2 there, %s answered; without, lb says %q; the caller: %s", both.Who, what(refusal), alone.Err)
		}
		return f, err
	},
	cure: func(ctx context.Context, s *site) (f Finding, err error) {
		t1, t2 := s.Targets[0], s.Targets[1]
		group := "client_ip: preserve, avoid_self: " + s.with("true", "false")
		if err := s.serve(ctx, s.LB, config(s.LB.Addr4, group, at(t1), at(t2)), t1, t2); err != nil {
			return f, err
		}
		if !s.options.WithoutCure { // or else it depends on the source port
			if f, err = s.ask(ctx, t1, t2, t1.Addr4); err != nil || !f.Works {
				return f, err
			}
		}
		if err := s.reload(ctx, config(s.LB.Addr4, group, at(t1)), settled); err != nil {
			return f, err
		}
		if err := s.watch(ctx, t1, s.LB); err != nil {
			return f, err
		}
		alone, err := s.ask(ctx, t1, t1, s.LB.Addr4)
		alone.Evidence = fmt.Sprintf("with t2 there, %s; without, %s", f.Evidence, alone.Evidence)
		return alone, err
	},
}
