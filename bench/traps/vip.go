package traps

import (
	"context"
	"fmt"
	"net/netip"

	"nlb/balancer/control"
	"nlb/bench/lab"
)

var vipOnDummyRefused = Scenario{
	Name:  "vip-on-dummy-refused",
	Title: "a node that has the VIP itself calls it",
	Drawing: `
   c1 203.0.113.9 ──── lb 10.0.1.1 ──┬── t1 10.0.1.11  (the target)
                       VIP           └── t2 10.0.1.12  (the caller, which has
                       198.51.100.10                    the VIP, too)`,
	Naive: "t2 has the VIP on lo or on a dummy interface, and no rule for its port",
	Why: "An address of one's own is reached over one's own loopback: the packet never leaves t2, whose kernel finds " +
		"nobody listening, and refuses. lb does not even hear of it.",
	Cure:  "Do not bind the VIP on nodes that do not balance: lb is reached by its route. nlb's VIP is on lb alone.",
	build: lab.Routed,
	naive: func(ctx context.Context, s *site) (f Finding, err error) {
		t1, t2 := s.Targets[0], s.Targets[1]
		if err := s.targets(ctx, t1); err != nil {
			return f, err
		}
		iface, err := bindBeside(t2)
		if err != nil {
			return f, err
		}
		if !s.options.WithoutCure {
			s.later(func() error { return t2.Unaddress(iface, vipNet) })
		}
		if err := s.forward(s.LB, toTarget(t1)); err != nil {
			return f, err
		}
		if err := s.watch(ctx, t2, s.LB); err != nil {
			return f, err
		}
		r, err := s.try(ctx, t2)
		if err != nil {
			return f, err
		}
		_, reset, err := s.seen(ctx, t2, func(p lab.Packet) bool {
			return p.Iface == "lo" && p.From() == vip && p.Flags&lab.RST != 0
		})
		if err != nil {
			return f, err
		}
		passed, err := s.packets(ctx, s.LB)
		f.Works = r.Err == ""
		if reset && len(passed) == 0 {
			f.Evidence = fmt.Sprintf("t2, which has the VIP on %s, sent itself a RST from %v over lo, lb saw no packet; the caller: %s", iface, vip, r.Err)
		}
		return f, err
	},
	cure: func(ctx context.Context, s *site) (f Finding, err error) {
		t1, t2 := s.Targets[0], s.Targets[1]
		if err := s.serve(ctx, s.LB, config(s.LB.Addr4, "client_ip: hairpin_snat", at(t1)), t1); err != nil {
			return f, err
		}
		if err := s.watch(ctx, t2, s.LB, t1); err != nil {
			return f, err
		}
		return s.ask(ctx, t2, t1, t2.Addr4)
	},
}

// hostPort is where lb's own service listens, which the VIP must not show.
const hostPort = 22

var vipExposesHost = Scenario{
	Name:  "vip-exposes-host",
	Title: "a stranger calls a port of the VIP that no listener has",
	Drawing: `
   c1 203.0.113.9 ──── lb 10.0.1.1 ──── t1 10.0.1.11
                       VIP 198.51.100.10:80
                       its own sshd on 0.0.0.0:22`,
	Naive: "lb has the VIP on an interface and forwards port 80 (DNAT)",
	Why: "The VIP is an address of lb like any other: whatever listens on 0.0.0.0 listens on the VIP. Publishing port " +
		"80 has published port 22.",
	Cure:    "nlb's guard drops and counts what is sent to a VIP and belongs to no listener.",
	build:   lab.Routed,
	options: lab.Options{Targets: 1},
	naive:   exposed,
	cure: func(ctx context.Context, s *site) (f Finding, err error) {
		if s.options.WithoutCure {
			return exposed(ctx, s)
		}
		c1, t1 := s.Clients[0], s.Targets[0]
		if err := s.sshd(ctx); err != nil {
			return f, err
		}
		if err := s.serve(ctx, s.LB, config(s.LB.Addr4, "client_ip: preserve", at(t1)), t1); err != nil {
			return f, err
		}
		if err := s.watch(ctx, c1, s.LB, t1); err != nil {
			return f, err
		}
		r, err := s.call(ctx, c1, lab.Call{Dst: netip.AddrPortFrom(lab.VIP4, hostPort), Timeout: briefly})
		if err != nil {
			return f, err
		}
		if r.Err != lab.Timeout {
			return Finding{Evidence: fmt.Sprintf("port %d of the VIP: %q, answered by %q", hostPort, r.Err, r.Who)}, nil
		}
		dropped := uint64(0)
		if err := s.wait(ctx, func(st *control.Status) error {
			if dropped = st.Totals["unwanted_drops"]; dropped == 0 {
				return fmt.Errorf("unwanted_drops is 0")
			}
			return nil
		}); err != nil {
			return f, err
		}
		f, err = s.ask(ctx, c1, t1, c1.Addr4)
		f.Evidence = fmt.Sprintf("port %d: dropped, unwanted_drops is %d; port %d: %s", hostPort, dropped, vipPort, f.Evidence)
		return f, err
	},
}

// sshd makes lb listen on a port of its own, on all addresses.
func (s *site) sshd(ctx context.Context) error {
	return s.listen(ctx, s.LB, lab.Serve{Who: "lb's own sshd", Ports: []uint16{hostPort}, Networks: []string{"tcp"}})
}

// exposed works if the host's service is out of reach.
func exposed(ctx context.Context, s *site) (f Finding, err error) {
	c1, t1 := s.Clients[0], s.Targets[0]
	if err := s.sshd(ctx); err != nil {
		return f, err
	}
	if err := s.targets(ctx, t1); err != nil {
		return f, err
	}
	if err := s.bind(s.LB); err != nil {
		return f, err
	}
	if err := s.forward(s.LB, toTarget(t1)); err != nil {
		return f, err
	}
	if err := s.watch(ctx, c1, s.LB, t1); err != nil {
		return f, err
	}
	r, err := s.call(ctx, c1, lab.Call{Dst: netip.AddrPortFrom(lab.VIP4, hostPort), Timeout: answerTime})
	f.Works = r.Err != ""
	if !f.Works {
		f.Evidence = fmt.Sprintf("%v answered c1: %s", r.Local, r.Who)
	}
	return f, err
}

var healthCheckVIPSource = Scenario{
	Name:  "health-check-vip-source",
	Title: "health checks are sent from the VIP, which the target has as well",
	Drawing: `
   c1 203.0.113.9 ──── lb 10.0.1.1 ──── t1 10.0.1.11
                       VIP              the VIP, too
                       198.51.100.10`,
	Naive: "lb probes t1 from the VIP; t1 has the VIP on lo or on a dummy interface",
	Why: "To t1 the probe comes from itself: it drops it as a martian. All checks fail, of a target that works; a " +
		"balancer that then sends to all of them hides it.",
	Cure:    "nlb probes from source_addresses, asserts the address on the socket, and refuses a VIP for it.",
	build:   lab.Routed,
	options: lab.Options{Targets: 1},
	naive: func(ctx context.Context, s *site) (f Finding, err error) {
		t1 := s.Targets[0]
		if err := s.targets(ctx, t1); err != nil {
			return f, err
		}
		if err := s.reachable(ctx, t1); err != nil {
			return f, err
		}
		iface, err := bindBeside(t1) // for both stages
		if err != nil {
			return f, err
		}
		if err := s.bind(s.LB); err != nil {
			return f, err
		}
		log, err := s.kernelLog(t1)
		if err != nil {
			return f, err
		}
		if err := s.watch(ctx, s.LB, t1); err != nil {
			return f, err
		}
		r, err := s.call(ctx, s.LB, lab.Call{SrcAddr: lab.VIP4, Dst: target(t1), Timeout: briefly})
		if err != nil {
			return f, err
		}
		f, err = s.martianAt(ctx, t1, lab.VIP4, r, log)
		if f.Evidence != "" {
			f.Evidence += "; t1 has the VIP on " + iface
		}
		return f, err
	},
	cure: func(ctx context.Context, s *site) (f Finding, err error) {
		c1, t1 := s.Clients[0], s.Targets[0]
		if err := s.targets(ctx, t1); err != nil {
			return f, err
		}
		if err := s.watch(ctx, c1, s.LB, t1); err != nil {
			return f, err
		}
		source := s.LB.Addr4
		if s.options.WithoutCure {
			source = lab.VIP4
		}
		if err := s.nlb(ctx, s.LB, config(source, "client_ip: preserve", at(t1)), settled); err != nil {
			if s.options.WithoutCure {
				return Finding{Evidence: err.Error()}, nil
			}
			return f, err
		}
		p, probed, err := s.seen(ctx, t1, func(p lab.Packet) bool { return !p.Out && p.To() == target(t1) && p.Flags == lab.SYN })
		if err != nil {
			return f, err
		}
		f, err = s.ask(ctx, c1, t1, c1.Addr4)
		f.Works = f.Works && probed && p.Src == s.LB.Addr4
		f.Evidence = fmt.Sprintf("t1 is healthy, probed from %v; %s", p.Src, f.Evidence)
		return f, err
	},
}

var nodeToOwnVIP = Scenario{
	Name:  "node-to-own-vip",
	Title: "a program on lb, which owns the VIP, calls the VIP",
	Drawing: `
   lb 10.0.1.1 ──── t1 10.0.1.11
   VIP              the VIP on lo, too
   198.51.100.10`,
	Naive: "lb rewrites the destination of its own packets, too (DNAT in output)",
	Why: "The kernel chose the source before the destination was rewritten, and for one's own address that is the " +
		"address itself: the packet leaves lb with the VIP as its source. t1 has the VIP, too, and drops a martian.",
	Cure:    "nlb gives flows of lb itself one of its source_addresses, in every mode.",
	build:   lab.Routed,
	options: lab.Options{Targets: 1},
	naive:   fromOwnVIP,
	cure: func(ctx context.Context, s *site) (f Finding, err error) {
		if s.options.WithoutCure {
			return fromOwnVIP(ctx, s)
		}
		t1 := s.Targets[0]
		if err := s.bind(t1); err != nil {
			return f, err
		}
		if err := s.serve(ctx, s.LB, config(s.LB.Addr4, "client_ip: preserve", at(t1)), t1); err != nil {
			return f, err
		}
		if err := s.watch(ctx, s.LB, t1); err != nil {
			return f, err
		}
		return s.ask(ctx, s.LB, t1, s.LB.Addr4)
	},
}

func fromOwnVIP(ctx context.Context, s *site) (f Finding, err error) {
	t1 := s.Targets[0]
	if err := s.targets(ctx, t1); err != nil {
		return f, err
	}
	if err := s.reachable(ctx, t1); err != nil {
		return f, err
	}
	for _, n := range []*lab.Node{s.LB, t1} {
		if err := s.bind(n); err != nil {
			return f, err
		}
	}
	if err := s.forward(s.LB, toTarget(t1)); err != nil {
		return f, err
	}
	log, err := s.kernelLog(t1)
	if err != nil {
		return f, err
	}
	if err := s.watch(ctx, s.LB, t1); err != nil {
		return f, err
	}
	r, err := s.try(ctx, s.LB)
	if err != nil {
		return f, err
	}
	return s.martianAt(ctx, t1, lab.VIP4, r, log)
}

// reachable has lb call a target by its own address, so that it knows its
// neighbour: an ARP request that names the VIP as its sender is a martian, too.
func (s *site) reachable(ctx context.Context, n *lab.Node) error {
	r, err := s.call(ctx, s.LB, lab.Call{Dst: target(n), Timeout: answerTime})
	if err == nil && r.Err != "" {
		err = fmt.Errorf("%s does not answer lb: %s", n.Name, r.Err)
	}
	return err
}
