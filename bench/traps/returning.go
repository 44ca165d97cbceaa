package traps

import (
	"context"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
)

const multiHomedDrawing = `
   c1 203.0.113.9 ── rt ── lb 10.0.1.1 ─────────── eth0 10.0.1.11 t1
                     │     VIP 198.51.100.10
                     └──────────────────────────── eth1 10.0.2.11 t1`

// policyTable is the routing table of the target's policy rule.
const policyTable = 100

var rpFilterStrict = Scenario{
	Name:    "rp-filter-strict",
	Title:   "a client from outside reaches a target with two interfaces and a strict rp_filter",
	Drawing: multiHomedDrawing,
	Naive:   "lb rewrites the destination (DNAT) and keeps the client's address; t1 has rp_filter=1",
	Why: "The packet arrives by eth0, but t1's route to its source is eth1. A strict reverse path filter " +
		"(RFC 3704, 2.2) drops what arrives where its answer would not leave.",
	Cure: "A policy rule on t1: what has the source 10.0.1.11 leaves by eth0, to lb. rp_filter follows it, and stays " +
		"strict. (rp_filter=2 alone lets the packet in, and the answer out past lb: see asymmetric-return.) " +
		"The script return-route of deploy/target does this.",
	build:   lab.MultiHomed,
	options: lab.Options{Targets: 1},
	naive: func(ctx context.Context, s *site) (f Finding, err error) {
		c1, t1 := s.Clients[0], s.Targets[0]
		if err := t1.Sysctl("net.ipv4.conf.all.rp_filter", "1"); err != nil { // for both stages
			return f, err
		}
		if err := s.targets(ctx, t1); err != nil {
			return f, err
		}
		if err := s.forward(s.LB, toTarget(t1)); err != nil {
			return f, err
		}
		const counter = "TcpExtIPReversePathFilter"
		before, err := netstat(t1, counter)
		if err != nil {
			return f, err
		}
		if err := s.watch(ctx, c1, s.Router, s.LB, t1); err != nil {
			return f, err
		}
		r, err := s.try(ctx, c1)
		if err != nil {
			return f, err
		}
		after, err := netstat(t1, counter)
		f.Works = r.Err == ""
		if dropped := after - before; dropped > 0 && !f.Works {
			f.Evidence = fmt.Sprintf("t1's counter %s rose by %d; the caller: %s", counter, dropped, r.Err)
		}
		return f, err
	},
	cure: func(ctx context.Context, s *site) (f Finding, err error) {
		c1, t1 := s.Clients[0], s.Targets[0]
		if s.with("policy rule", "") != "" {
			own := netip.PrefixFrom(t1.Addr4, 32)
			if err := t1.RouteFrom(own, s.LB.Addr4, "eth0", policyTable); err != nil {
				return f, err
			}
		}
		if err := s.serve(ctx, s.LB, config(s.LB.Addr4, "client_ip: preserve", at(t1)), t1); err != nil {
			return f, err
		}
		if err := s.watch(ctx, c1, s.Router, s.LB, t1); err != nil {
			return f, err
		}
		return s.ask(ctx, c1, t1, c1.Addr4)
	},
}

var asymmetricReturn = Scenario{
	Name:    "asymmetric-return",
	Title:   "the target's answer to a client from outside leaves past the balancer",
	Drawing: multiHomedDrawing,
	Naive:   "lb rewrites the destination (DNAT) and keeps the client's address",
	Why: "t1 answers by its own route to the client, eth1. Only lb could make 10.0.1.11:8080 the VIP again, and it " +
		"never sees the answer: the client hears from a stranger, and resets it.",
	Cure:    "client_ip: snat, so that t1 answers lb (or the policy rule of rp-filter-strict, to keep the client's address).",
	build:   lab.MultiHomed,
	options: lab.Options{Targets: 1},
	naive: func(ctx context.Context, s *site) (f Finding, err error) {
		c1, t1 := s.Clients[0], s.Targets[0]
		if err := s.targets(ctx, t1); err != nil {
			return f, err
		}
		if err := s.forward(s.LB, toTarget(t1)); err != nil {
			return f, err
		}
		if err := s.watch(ctx, c1, s.Router, s.LB, t1); err != nil {
			return f, err
		}
		r, err := s.try(ctx, c1)
		if err != nil {
			return f, err
		}
		return s.strangerAt(ctx, c1, target(t1), r)
	},
	cure: func(ctx context.Context, s *site) (f Finding, err error) {
		c1, t1 := s.Clients[0], s.Targets[0]
		group := "client_ip: " + s.with("snat", "preserve")
		if err := s.serve(ctx, s.LB, config(s.LB.Addr4, group, at(t1)), t1); err != nil {
			return f, err
		}
		if err := s.watch(ctx, c1, s.Router, s.LB, t1); err != nil {
			return f, err
		}
		return s.ask(ctx, c1, t1, s.LB.Addr4)
	},
}

// The cure of externalSNAT marks flows with fromLB, in the connection and then in
// the packet. It is a bit of its own, as the marks of others may be there.
const fromLB = 0x80

var externalSNAT = Scenario{
	Name:  "external-snat",
	Title: "the answers of a pod leave by a gateway that masquerades",
	Drawing: `
   c1 203.0.113.9 ── rt ──┬── lb 10.0.1.1 ──── eth0 n1 ── p1x1 10.244.1.11
                          │   VIP 198.51.100.10     │
                          └── gw 10.0.3.2 ──── eth1 n1 10.0.1.21
                              masquerades        (its way out)`,
	Naive: "lb rewrites the destination (DNAT) of a UDP flow and keeps the client's address",
	Why: "What pods send to the world leaves by eth1 and gets gw's address, and an answer to a preserved client is no " +
		"exception. gw has not seen the request, so it takes the answer for a new flow: neither lb nor the client " +
		"knows its source.",
	Cure: "n1 remembers which flows came from lb (it saves a mark with the connection, restores it to the answers) and " +
		"routes these back to lb. The script return-connmark of deploy/target does this.",
	build: lab.Egress, hideProbes: true,
	naive: func(ctx context.Context, s *site) (f Finding, err error) {
		c1, pod := s.Clients[0], s.Targets[0]
		if err := s.targets(ctx, pod); err != nil {
			return f, err
		}
		if err := masquerade(s.Gateway, "rt"); err != nil { // for both stages
			return f, err
		}
		rule := toTarget(pod)
		rule.proto = unix.IPPROTO_UDP
		if err := s.forward(s.LB, rule); err != nil {
			return f, err
		}
		if err := s.watch(ctx, c1, s.Router, s.LB, s.Hosts[0], s.Gateway, pod); err != nil {
			return f, err
		}
		r, err := s.call(ctx, c1, lab.Call{Network: "udp", Timeout: briefly})
		if err != nil {
			return f, err
		}
		stray, came, err := s.seen(ctx, c1, func(p lab.Packet) bool { return !p.Out && p.Proto == unix.IPPROTO_UDP && p.Src != lab.VIP4 })
		f.Works = r.Err == ""
		if came && !f.Works {
			f.Evidence = fmt.Sprintf("c1 called %v, the answer came from %v, an address of gw; the call: %s", vip, stray.From(), r.Err)
		}
		return f, err
	},
	cure: func(ctx context.Context, s *site) (f Finding, err error) {
		c1, n1, pod := s.Clients[0], s.Hosts[0], s.Targets[0]
		if s.with("marks", "") != "" {
			if err := restoreMark(n1, "eth0", pod.Name, fromLB); err != nil {
				return f, err
			}
			if err := n1.RouteMark(fromLB, s.LB.Addr4, "eth0", policyTable); err != nil {
				return f, err
			}
		}
		if err := s.serve(ctx, s.LB, configFor("UDP", s.LB.Addr4, "client_ip: preserve", at(pod)), pod); err != nil {
			return f, err
		}
		if err := s.watch(ctx, c1, s.Router, s.LB, n1, s.Gateway, pod); err != nil {
			return f, err
		}
		c := lab.Call{Network: "udp", Timeout: answerTime}
		if s.options.WithoutCure {
			c.Timeout = briefly
		}
		r, err := s.call(ctx, c1, c)
		return answered(r, pod, c1.Addr4), err
	},
}

var replyTupleMismatch = Scenario{
	Name:  "reply-tuple-mismatch",
	Title: "one node forwards to a pod of another node, which answers by itself",
	Drawing: `
   c1 203.0.113.9 ── lb ──┬── n1 10.0.1.21   VIP 198.51.100.10, forwards
               (a router) └── n2 10.0.1.22 ── p2x1 10.244.2.11`,
	Naive: "every node forwards the VIP to the pods, wherever they are (DNAT)",
	Why: "n1 rewrote the destination, so only n1 can undo it. The pod's node n2 knows its own way to the client, " +
		"and the answer does not pass n1: it comes from an address the client never called.",
	Cure:    "client_ip: snat on n1: the pod answers n1.",
	build:   lab.PodNode,
	options: lab.Options{Targets: 1},
	naive: func(ctx context.Context, s *site) (f Finding, err error) {
		c1, n1, n2, pod := s.Clients[0], s.Hosts[0], s.Hosts[1], s.Targets[1]
		if err := s.LB.Route(vipNet, n1.Addr4, n1.Name); err != nil { // for both stages
			return f, err
		}
		if err := s.targets(ctx, pod); err != nil {
			return f, err
		}
		if err := s.forward(n1, toTarget(pod)); err != nil {
			return f, err
		}
		if err := s.watch(ctx, c1, s.LB, n1, n2, pod); err != nil {
			return f, err
		}
		r, err := s.try(ctx, c1)
		if err != nil {
			return f, err
		}
		return s.strangerAt(ctx, c1, target(pod), r)
	},
	cure: func(ctx context.Context, s *site) (f Finding, err error) {
		c1, n1, n2, pod := s.Clients[0], s.Hosts[0], s.Hosts[1], s.Targets[1]
		group := "client_ip: " + s.with("snat", "preserve")
		if err := s.serve(ctx, n1, config(n1.Addr4, group, at(pod)), pod); err != nil {
			return f, err
		}
		if err := s.watch(ctx, c1, s.LB, n1, n2, pod); err != nil {
			return f, err
		}
		return s.ask(ctx, c1, pod, n1.Addr4)
	},
}
