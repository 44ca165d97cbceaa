package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

// standing are the cases that change nothing, so that several run at a time.
var standing = []conformity{
	// Ways of the client's address.
	{
		name: "preserve", shows: "a target sees the client",
		needs: offerMode("preserve"),
		run:   sees("preserve", outside, theClient),
	},
	{
		name: "hairpin-snat", shows: "a target sees the client",
		needs: offerMode("hairpin_snat"),
		run:   sees("hairpin-snat", outside, theClient),
	},
	{
		name: "snat", shows: "a target sees the balancer",
		needs: offerMode("snat"),
		run:   sees("snat", outside, theBalancer),
	},
	{
		name: "proxy-protocol", shows: "a target sees the balancer, and a header names the client", over: connections,
		needs: offerMode("proxy_protocol_v2"),
		run:   namedBy("proxy-protocol", outside),
	},

	// Hairpins.
	{
		name: "self-preserve", shows: "a client that is its own target is dropped and counted",
		needs: offerSelf("preserve"),
		run:   drops("self-preserve", target1, "hairpin_drops"),
	},
	{
		name: "self-hairpin-snat", shows: "a target that is its own client sees the balancer; others are preserved",
		needs: offerSelf("hairpin_snat"),
		run: func(x *trial) {
			x.each(func(x *trial, f flavour) {
				x.seen(x.top.Targets[0], f, "self-hairpin-snat", 10, f.addr(x.top.LB))
				x.seen(x.top.Clients[0], f, "self-hairpin-snat", 4, f.addr(x.top.Clients[0]))
			})
		},
	},
	{
		name: "self-snat", shows: "a target that is its own client sees the balancer",
		needs: offerSelf("snat"),
		run:   sees("self-snat", target1, theBalancer),
	},
	{
		name: "self-proxy-protocol", shows: "a target that is its own client sees the balancer, and a header names it", over: connections,
		needs: offerSelf("proxy_protocol_v2"),
		run:   namedBy("self-proxy-protocol", target1),
	},
	{
		name: "self-among-others", shows: "only where a client meets itself is its address replaced",
		run: func(x *trial) { x.each(meetsItself) },
	},
	{
		name: "avoid-self", shows: "a client is sent to the other targets of its group",
		needs: func(s *site, c *conformFile) {
			g := s.pool("avoid-self", "TCP_UDP", "preserve", targetPort, s.top.Targets[:2]...)
			g.AvoidSelf = true
			c.serve(s, g)
		},
		run: func(x *trial) {
			x.each(func(x *trial, f flavour) {
				t1 := x.top.Targets[0]
				if got := x.seen(t1, f, "avoid-self", 20, f.addr(t1)); got.ByWho[t1.Name] > 0 {
					x.t.Errorf("it met itself: %v", got)
				}
			})
		},
		otherwise: refused("avoid_self: true, but IPVS cannot leave the client out of its choice"),
	},
	{
		name: "colocated", shows: "a pod that is sent to a pod of its own node is a hairpin, if the node is listed",
		needs: func(s *site, c *conformFile) {
			g := s.pool("colocated", "TCP_UDP", "hairpin_snat", targetPort, s.pod)
			for i := range g.Targets {
				g.Targets[i].Colocated = []string{"10.244.1.0/24", "2001:db8:244:1::/64"}
			}
			c.serve(s, g)
			c.serve(s, s.pool("not-colocated", "TCP_UDP", "hairpin_snat", targetPort, s.pod))
		},
		run: nearby("colocated", "not-colocated", func(s *site) *lab.Node { return s.sibling }),
	},
	{
		name: "same-subnet", shows: "with `hairpin_subnet`, a neighbour of the target is a hairpin",
		needs: func(s *site, c *conformFile) {
			g := s.pool("same-subnet", "TCP_UDP", "hairpin_snat", targetPort, s.seated)
			g.HairpinSubnet = true
			c.serve(s, g)
			c.serve(s, s.pool("any-subnet", "TCP_UDP", "hairpin_snat", targetPort, s.seated))
		},
		run: nearby("same-subnet", "any-subnet", func(s *site) *lab.Node { return s.neighbour }),
	},
	{
		name: "own-client", shows: "a client on the balancer's host, whose source would be the VIP, is seen as the balancer, in every mode",
		run: func(x *trial) {
			x.each(func(x *trial, f flavour) {
				for _, listener := range []string{"preserve", "hairpin-snat", "snat"} {
					x.seen(x.top.LB, f, listener, 4, f.addr(x.top.LB))
				}
				if f.network == "udp" {
					return
				}
				for _, r := range x.ask(x.top.LB, f, "proxy-protocol", 4) {
					own := f.addr(x.top.LB)
					if r.Err != "" || r.Peer != own || r.Client != netip.AddrPortFrom(own, r.From.Port()) {
						x.t.Errorf("relayed: %+v, want peer and client %v", r, own)
					}
				}
			})
		},
	},
	{
		name: "own-target", shows: "a target on the balancer's host sees the client",
		needs: func(s *site, c *conformFile) {
			c.serve(s, s.pool("own-target", "TCP_UDP", "preserve", ownPort, s.top.LB))
		},
		run: sees("own-target", outside, theClient),
	},

	// The choice.
	{
		name: "weights", shows: "targets of weights 1, 4 and 0 have such shares",
		needs: func(s *site, c *conformFile) {
			g := s.pool("weights", "TCP_UDP", "preserve", targetPort, s.top.Targets...)
			for i := range g.Targets {
				g.Targets[i] = g.Targets[i].weighed([]int{1, 4, 0}[i%3])
			}
			c.serve(s, g)
		},
		run: shares("weights"),
	},
	{
		name: "group-weights", shows: "groups of weights 20, 80 and 0 have such shares",
		needs: func(s *site, c *conformFile) {
			third := c.have(s.pool("third", "TCP_UDP", "preserve", targetPort, s.top.Targets[2]))
			c.offer(s, "group-weights", "TCP_UDP", forward{s.self(c, "preserve"), 20}, forward{s.second(c), 80}, forward{third, 0})
		},
		run: shares("group-weights"),
	},
	{
		name: "mixed-groups", shows: "a listener with a relayed group and one of the kernel's: each sees what is its own", over: connections,
		needs: func(s *site, c *conformFile) {
			relay := c.have(s.pool("of-relay", "TCP", "proxy_protocol_v2", headedPort, s.top.Targets[2]))
			c.offer(s, "mixed-groups", "TCP", forward{s.connected(c), 1}, forward{relay, 1})
		},
		run: func(x *trial) { x.each(mixes) },
	},
	{
		name: "mixed-targets", shows: "a group with a relayed target and two of the kernel's", over: connections,
		needs: func(s *site, c *conformFile) {
			g := s.pool("mixed-targets", "TCP", "preserve", targetPort, s.top.Targets...)
			for i := range g.Targets {
				if i%3 == 2 {
					g.Targets[i].ClientIP, g.Targets[i].Port = "proxy_protocol_v2", headedPort
				}
			}
			c.serve(s, g)
		},
		run: func(x *trial) { x.each(mixes) },
	},
	{
		name: "shared-target", shows: "two groups of a listener have a target in common, which does as either says",
		needs: sharedTarget,
		run: func(x *trial) {
			x.each(func(x *trial, f flavour) {
				client := x.top.Clients[0]
				got := lab.Count(x.ask(client, f, "shared-target", 40))
				for _, a := range []netip.Addr{f.addr(client), f.addr(x.top.LB)} {
					if got.Failed > 0 || got.ByPeer[a.String()] == 0 {
						x.t.Errorf("nobody saw %v: %v", a, got)
					}
				}
			})
		},
		otherwise: func(x *trial) {
			out := x.beside(sharedTarget, "validate")
			x.refusal(out, "and IPVS has a destination once in a service")
		},
	},
	{
		name: "stickiness", shows: "all flows of a client have one target, across weighted groups; other clients have others",
		needs: func(s *site, c *conformFile) {
			for i, nodes := range [][]*lab.Node{s.top.Targets[:2], s.top.Targets[2:]} {
				g := s.pool(fmt.Sprint("sticky-", i), "TCP_UDP", "preserve", targetPort, nodes...)
				g.Stickiness = "source_ip"
				c.Groups = append(c.Groups, g)
			}
			c.offer(s, "stickiness", "TCP_UDP", forward{"sticky-0", 1}, forward{"sticky-1", 1})
		},
		run: func(x *trial) { x.each(sticks) },
	},
	{
		name: "no-stickiness", shows: "the flows of one client spread over all targets",
		run: func(x *trial) {
			x.each(func(x *trial, f flavour) {
				got := lab.Count(x.ask(x.top.Clients[0], f, "preserve", 48)) // one of three never met: 1 in 100 million
				if len(got.ByWho) != len(x.top.Targets) || got.Failed > 0 {
					x.t.Errorf("%v", got)
				}
			})
		},
	},

	// Who may, and what nobody sees.
	{
		name: "allow", shows: "clients outside a listener's `allow` are dropped silently and counted",
		needs: func(s *site, c *conformFile) {
			c.offer(s, "allow", "TCP_UDP", to(s.all(c, "preserve"))...)
			for i := range c.Listeners {
				if l := &c.Listeners[i]; strings.HasPrefix(l.Name, "allow") {
					l.Allow = []string{"203.0.113.8/31", "2001:db8:99::8/127"} // the first client
				}
			}
		},
		run: func(x *trial) {
			x.each(func(x *trial, f flavour) {
				x.seen(x.top.Clients[0], f, "allow", 4, f.addr(x.top.Clients[0]))
				x.silent(x.top.Clients[1], f, "allow", "not_allowed_drops")
			})
		},
	},
	{
		name: "guard", shows: "what the balancer's host serves never answers on a VIP, be it on a listener's port; nor does a listener's port for the other protocol; echo does",
		needs: func(s *site, c *conformFile) {
			c.offer(s, "tcp-only", "TCP", to(s.connected(c))...)
			c.offer(s, "udp-only", "UDP", to(s.unconnected(c))...)
			s.ports["ssh"] = sshPort
		},
		run: func(x *trial) { x.each(guards) },
	},
	{
		name: "no-target", shows: "a listener whose group is empty drops silently and counts",
		needs: func(s *site, c *conformFile) { c.serve(s, s.pool("no-target", "TCP_UDP", "preserve", targetPort)) },
		run:   drops("no-target", outside, "no_target_drops"),
	},
	{
		name: "counted", shows: "`nlb status` counts the flows of each target",
		needs: func(s *site, c *conformFile) {
			c.serve(s, s.pool("counted", "TCP_UDP", "hairpin_snat", targetPort, s.top.Targets[0]))
		},
		run: func(x *trial) { x.each(counts) },
	},
	{
		name: "idle-timeout", shows: "each listener has a `tcp_idle_timeout` of its own", over: connections,
		needs: shortIdle,
		run:   func(x *trial) { x.each(idle) },
		otherwise: func(x *trial) {
			out := x.beside(shortIdle, "plan", "--state-dir", x.d.state(""))
			if want := "tcp_idle_timeout is 1m0s, but IPVS has one for all"; !strings.Contains(out.stdout, want) {
				x.t.Errorf("nlb plan does not say %q: %+v", want, out)
			}
		},
	},
}

// A caller is one of the site's nodes.
type caller func(s *site) *lab.Node

func outside(s *site) *lab.Node { return s.top.Clients[0] }
func target1(s *site) *lab.Node { return s.top.Targets[0] }

// Whom a target sees.
func theClient(_ *site, n *lab.Node, f flavour) netip.Addr   { return f.addr(n) }
func theBalancer(s *site, _ *lab.Node, f flavour) netip.Addr { return f.addr(s.top.LB) }

// protocolOf is that of a group of a mode, and portOf where its targets listen.
func protocolOf(mode string) (protocol string, port uint16) {
	if mode == balancer.ProxyProtocolV2.String() {
		return "TCP", headedPort
	}
	return "TCP_UDP", targetPort
}

// nameOf is a mode as cases are named.
func nameOf(mode string) string {
	return strings.TrimSuffix(strings.ReplaceAll(mode, "_", "-"), "-v2")
}

// all is a group of all targets.
func (s *site) all(c *conformFile, mode string) string {
	protocol, port := protocolOf(mode)
	return c.have(s.pool(nameOf(mode), protocol, mode, port, s.top.Targets...))
}

// offerMode offers it.
func offerMode(mode string) func(s *site, c *conformFile) {
	return func(s *site, c *conformFile) {
		protocol, _ := protocolOf(mode)
		c.offer(s, nameOf(mode), protocol, to(s.all(c, mode))...)
	}
}

// self is a group of one target.
func (s *site) self(c *conformFile, mode string) string {
	protocol, port := protocolOf(mode)
	return c.have(s.pool("self-"+nameOf(mode), protocol, mode, port, s.top.Targets[0]))
}

// offerSelf offers it.
func offerSelf(mode string) func(s *site, c *conformFile) {
	return func(s *site, c *conformFile) {
		protocol, _ := protocolOf(mode)
		c.offer(s, "self-"+nameOf(mode), protocol, to(s.self(c, mode))...)
	}
}

// connected is a group for connections alone.
func (s *site) connected(c *conformFile) string {
	return c.have(s.pool("of-kernel", "TCP", "preserve", targetPort, s.top.Targets[:2]...))
}

// unconnected is one for datagrams.
func (s *site) unconnected(c *conformFile) string {
	return c.have(s.pool("udp-only", "UDP", "preserve", targetPort, s.top.Targets[0]))
}

// sees calls a listener: the targets see this address.
func sees(listener string, from caller, as func(*site, *lab.Node, flavour) netip.Addr) func(x *trial) {
	return func(x *trial) {
		x.each(func(x *trial, f flavour) {
			n := from(x.site)
			x.seen(n, f, listener, 10, as(x.site, n, f))
		})
	}
}

// namedBy calls a relayed listener.
func namedBy(listener string, from caller) func(x *trial) {
	return func(x *trial) {
		x.each(func(x *trial, f flavour) { x.headed(from(x.site), f, listener, 10) })
	}
}

// drops calls a listener in vain.
func drops(listener string, from caller, counter string) func(x *trial) {
	return func(x *trial) {
		x.each(func(x *trial, f flavour) { x.silent(from(x.site), f, listener, counter) })
	}
}

// nearby calls a listener whose target would answer the caller past the balancer.
func nearby(told, untold string, near caller) func(x *trial) {
	return func(x *trial) {
		x.each(func(x *trial, f flavour) {
			n := near(x.site)
			x.seen(n, f, told, 4, f.addr(x.top.LB))
			x.seen(x.top.Clients[0], f, told, 4, f.addr(x.top.Clients[0]))
			got := call(x.t, n, lab.Call{Network: f.network, Dst: f.at(x.port(untold)), N: 4, Parallel: 4, Timeout: briefly})
			if got.OK > 0 {
				x.t.Errorf("it works without being told, so this shows nothing: %v", got)
			}
		})
	}
}

// meetsItself is a target that calls a listener of several.
func meetsItself(x *trial, f flavour) {
	t1 := x.top.Targets[0]
	met := map[bool]int{}
	for _, r := range x.ask(t1, f, "hairpin-snat", 48) { // never itself, or nobody else: 1 in 100 million
		want := f.addr(t1)
		if r.Who == t1.Name {
			want = f.addr(x.top.LB)
		}
		if r.Err != "" || r.Peer != want {
			x.t.Errorf("%s saw %v, want %v: %q", r.Who, r.Peer, want, r.Err)
		}
		met[r.Who == t1.Name]++
	}
	if len(met) != 2 {
		x.t.Errorf("it did not meet both itself and others: %v", met)
	}
}

// shares expects a fifth at the first target, the rest at the second, and nothing
// at the third.
func shares(listener string) func(x *trial) {
	return func(x *trial) {
		x.each(func(x *trial, f flavour) {
			const flows = 80
			client := x.top.Clients[0]
			got := x.seen(client, f, listener, flows, f.addr(client))
			within(x.t, x.note(f, "the small share"), got.ByWho["t1"], flows, 0.2)
			within(x.t, x.note(f, "the large share"), got.ByWho["t2"], flows, 0.8)
			if got.ByWho["t1"] == 0 || got.ByWho["t3"] > 0 {
				x.t.Errorf("%s", x.note(f, got.String()))
			}
		})
	}
}

// mixes expects the third target to be relayed, and all to be met.
func mixes(x *trial, f flavour) {
	client := x.top.Clients[0]
	met := map[string]int{}
	for _, r := range x.ask(client, f, x.name, 48) {
		peer, header := f.addr(client), netip.AddrPort{}
		if r.Who == "t3" {
			peer, header = f.addr(x.top.LB), r.From
		}
		if r.Err != "" || r.Peer != peer || r.Client != header {
			x.t.Errorf("%+v, want peer %v and client %v", r, peer, header)
		}
		met[r.Who]++
	}
	if len(met) != len(x.top.Targets) {
		x.t.Errorf("not everybody was met: %v", met)
	}
}

// sharedTarget has a target in a preserved and in a SNATed group.
func sharedTarget(s *site, c *conformFile) {
	c.offer(s, "shared-target", "TCP_UDP", forward{s.self(c, "preserve"), 1}, forward{s.self(c, "snat"), 1})
}

// sticks is many addresses that call several times each.
func sticks(x *trial, f flavour) {
	met := map[string]bool{}
	for _, a := range x.extras(f.family) {
		got := call(x.t, x.top.Clients[1], lab.Call{
			Network: f.network, Dst: f.at(x.port("stickiness")), SrcAddr: a, N: 4, Parallel: 4, Timeout: limit / 2,
		})
		allSeenAs(x.t, x.note(f, a.String()), got, a)
		if len(got.ByWho) != 1 {
			x.t.Errorf("%v is not sticky: %v", a, got)
		}
		for who := range got.ByWho {
			met[who] = true
		}
	}
	if len(met) < 2 { // 1 in 14 million
		x.t.Errorf("%d clients met only %v", extras, met)
	}
}

// guards asks the VIP for what is not its own.
func guards(x *trial, f flavour) {
	client := x.top.Clients[0]
	x.silent(client, f, "ssh", "unwanted_drops")
	other := map[string]string{"tcp": "udp-only", "udp": "tcp-only"}[f.network]
	x.silent(client, f, other, "unwanted_drops")
	if got := x.seen(client, f, "preserve", 12, f.addr(client)); got.ByWho[x.top.LB.Name] > 0 {
		x.t.Errorf("the host itself answers on a listener's port: %v", got)
	}
	x.seen(client, f, f.network+"-only", 4, f.addr(client))
	own := call(x.t, client, lab.Call{Network: f.network, Dst: netip.AddrPortFrom(f.addr(x.top.LB), sshPort), Timeout: limit / 2})
	if own.ByWho[x.top.LB.Name] != 1 {
		x.t.Errorf("the balancer's own service does not answer on its own address, so this shows nothing: %v", own)
	}
	if err := ping(x.t, client, f.family); err != nil {
		x.t.Errorf("echo to %v: %v", f.vip, err)
	}
}

// counts compares what is called with what is counted.
func counts(x *trial, f flavour) {
	total := func() (n uint64) {
		for _, target := range x.d.group("counted").Targets {
			if target.Address == f.addr(x.top.Targets[0]) && target.NewFlowsTotal != nil {
				n += *target.NewFlowsTotal
			}
		}
		return n
	}
	const calls = 7
	before := total()
	x.seen(x.top.Clients[0], f, "counted", calls, f.addr(x.top.Clients[0]))
	wait.For(x.t, limit, x.note(f, "flows are counted"), func() error {
		// Both protocols of a family are counted together.
		if rose := total() - before; rose < calls || rose > 2*calls {
			return fmt.Errorf("%d for %d calls", rose, calls)
		}
		return nil
	})
}

// shortIdle has a listener with another idle timeout than the others.
func shortIdle(s *site, c *conformFile) {
	c.offer(s, "idle-timeout", "TCP", to(s.connected(c))...)
	for i := range c.Listeners {
		if l := &c.Listeners[i]; strings.HasPrefix(l.Name, "idle-timeout") {
			l.Idle = "60s"
		}
	}
}

// idle reads the timeouts of two listeners' flows from conntrack.
func idle(x *trial, f flavour) {
	for listener, want := range map[string]struct{ above, upTo int }{"idle-timeout": {0, 60}, "preserve": {310, 350}} {
		held(x.t, x.top.Clients[0], lab.Call{Network: "tcp", Dst: f.at(x.port(listener)), Timeout: limit / 2})
		wait.For(x.t, limit, x.note(f, "timeouts"), func() error {
			entries := slices.DeleteFunc(x.d.entries(f.at(x.port(listener))), func(e entry) bool { return e.state != "ESTABLISHED" })
			if len(entries) == 0 {
				return errors.New("no flow")
			}
			if slices.ContainsFunc(entries, func(e entry) bool { return e.timeout > want.above && e.timeout <= want.upTo }) {
				return nil
			}
			return fmt.Errorf("not within (%d, %d] s: %s", want.above, want.upTo, entries[0].text)
		})
	}
}

// refused says that a case's part of the file is refused, in these words.
func refused(words string) func(x *trial) {
	return func(x *trial) {
		out := x.beside(x.needs, "validate")
		x.refusal(out, words)
	}
}

func (x *trial) refusal(out output, words string) {
	x.t.Helper()
	if out.code != 1 || !strings.Contains(out.stderr, words) {
		x.t.Errorf("nlb validate does not refuse it with %q: %+v", words, out)
	}
}
