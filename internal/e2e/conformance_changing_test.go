package e2e

import (
	"slices"
	"strings"
	"time"

	"nlb/balancer"
	"nlb/bench/lab"
)

// cutDelay is the deregistration delay of the group whose flows are cut.
const cutDelay = 3 * time.Second

// changing are the cases that change a group of their own, and nobody else's.
var changing = []conformity{
	{
		name: "drain", shows: "`nlb drain`: TCP and UDP flows go on, new ones go elsewhere; `nlb undrain`: they come back",
		needs: func(s *site, c *conformFile) { c.pair(s, "drain") },
		run: func(x *trial) {
			t1 := x.top.Targets[0]
			flows := x.keepAll("drain")
			x.d.life("drain", t1, "drain")
			x.each(func(x *trial, f flavour) {
				flows[f.String()].alive(x.t, "draining", "")
				x.goesTo("draining", f, "drain", "t2")
			})
			x.d.life("undrain", t1, "drain")
			for _, f := range flavours {
				flows[f.String()].alive(x.t, "back", "")
				x.goesTo("back", f, "drain", "t1", "t2")
			}
		},
	},
	{
		name: "drain-cut", shows: "at the end of a drain with `connection_termination`, connections are reset and UDP flows move",
		needs: func(s *site, c *conformFile) {
			c.pair(s, "drain-cut")
			c.group("drain-cut").Deregister = leaving(cutDelay, true)
		},
		run: func(x *trial) {
			flows := x.keepAll("drain-cut")
			x.d.life("drain", x.top.Targets[0], "drain-cut")
			x.each(func(x *trial, f flavour) {
				flows[f.String()].leave(x, "the end of a drain")
				x.goesTo("drained", f, "drain-cut", "t2")
			})
			x.d.life("undrain", x.top.Targets[0], "drain-cut")
		},
	},
	{
		name: "removal", shows: "a target leaves the file: connections go on, UDP flows move at once, new ones go elsewhere",
		needs: func(s *site, c *conformFile) { c.pair(s, "removal") },
		run: func(x *trial) {
			flows := x.keepAll("removal")
			x.change(func(c *conformFile) { c.group("removal").Targets = targets(x.top.Targets[1]) })
			x.each(func(x *trial, f flavour) {
				k := flows[f.String()]
				if f.network == "udp" {
					k.moves(x.t, "removed", "t1", "t2")
				} else {
					k.alive(x.t, "removed", "t1")
				}
				k.alive(x.t, "the other is removed", "t2")
				x.goesTo("removed", f, "removal", "t2")
			})
		},
	},
	{
		name: "addition", shows: "a target comes into the file: flows stay where they are, new ones go to both",
		needs: func(s *site, c *conformFile) {
			c.serve(s, s.pool("addition", "TCP_UDP", "preserve", targetPort, s.top.Targets[0]))
		},
		run: func(x *trial) {
			flows := x.keepAll("addition")
			x.change(func(c *conformFile) { c.group("addition").Targets = targets(x.top.Targets[:2]...) })
			x.healthy("addition", "t2")
			x.each(func(x *trial, f flavour) {
				flows[f.String()].alive(x.t, "another came", "t1")
				x.goesTo("another came", f, "addition", "t1", "t2")
			})
		},
	},
	{
		name: "reweight", shows: "a target gets weight 0: its flows go on, and new ones go elsewhere; and the other way round",
		needs: func(s *site, c *conformFile) { c.pair(s, "reweight") },
		run: func(x *trial) {
			flows := x.keepAll("reweight")
			x.change(func(c *conformFile) { c.group("reweight").weigh(0, 1) })
			x.each(func(x *trial, f flavour) {
				flows[f.String()].alive(x.t, "weight 0", "")
				x.goesTo("weight 0", f, "reweight", "t2")
			})
			x.change(func(c *conformFile) { c.group("reweight").weigh(1, 0) })
			for _, f := range flavours {
				flows[f.String()].alive(x.t, "weights swapped", "")
				x.goesTo("weights swapped", f, "reweight", "t1")
			}
		},
	},
	{
		name: "regroup", shows: "a listener's weights of groups are turned round: flows stay, new ones follow",
		needs: func(s *site, c *conformFile) {
			c.offer(s, "regroup", "TCP_UDP", forward{s.self(c, "preserve"), 1}, forward{s.second(c), 0})
		},
		run: func(x *trial) {
			flows := x.keepAll("regroup")
			x.change(func(c *conformFile) {
				for i := range c.Listeners {
					if l := &c.Listeners[i]; strings.HasPrefix(l.Name, "regroup") {
						l.Forward = []forward{{"self-preserve", 0}, {"second", 1}}
					}
				}
			})
			x.each(func(x *trial, f flavour) {
				flows[f.String()].alive(x.t, "turned round", "t1")
				x.goesTo("turned round", f, "regroup", "t2")
			})
		},
	},
	{
		name: "listeners", shows: "a listener leaves the file: its connections go on, and new flows are dropped silently; it comes back",
		needs: func(s *site, c *conformFile) { c.offer(s, "listeners", "TCP_UDP", to(s.all(c, "preserve"))...) },
		run: func(x *trial) {
			flows := x.keepAll("listeners")
			before := x.listeners("listeners")
			x.change(func(c *conformFile) { c.withdraw("listeners") })
			x.each(func(x *trial, f flavour) {
				x.silent(x.top.Clients[0], f, "listeners", "unwanted_drops")
				if f.network == "tcp" {
					flows[f.String()].alive(x.t, "without a listener", "")
				}
			})
			x.change(func(c *conformFile) { c.Listeners = append(c.Listeners, before...) })
			for _, f := range flavours {
				if f.network == "tcp" {
					flows[f.String()].alive(x.t, "with a listener again", "")
				}
				x.goesTo("with a listener again", f, "listeners", "t1", "t2", "t3")
			}
		},
	},
	{
		name: "unhealthy", shows: "a target fails its health check: connections are reset, UDP flows move, new ones go elsewhere; it recovers",
		needs: func(s *site, c *conformFile) {
			c.serve(s, s.fragile("unhealthy", cutHealth, s.top.Targets[:2]...))
			// Another group with the same checks, since they fail at the same time.
			g := s.fragile("unhealthy-kept", cutHealth, s.top.Targets[:2]...)
			g.Unhealthy = map[string]any{"connection_termination": false}
			c.serve(s, g)
		},
		run: func(x *trial) {
			flows, spared := x.keepAll("unhealthy"), x.keepAll("unhealthy-kept")
			x.site.fail(x.t, cutHealth, x.top.Targets[0])
			x.each(func(x *trial, f flavour) {
				flows[f.String()].leave(x, "unhealthy")
				x.becomes("unhealthy-kept", "t1", balancer.Unhealthy)
				spared[f.String()].alive(x.t, "unhealthy, without connection_termination", "")
				for _, listener := range []string{"unhealthy", "unhealthy-kept"} {
					x.goesTo("unhealthy", f, listener, "t2")
				}
			})
			x.site.heal(x.t, cutHealth, x.top.Targets[0])
			x.healthy("unhealthy", "t1")
			for _, f := range flavours {
				x.goesTo("healthy again", f, "unhealthy", "t1", "t2")
			}
		},
	},
	{
		name: "fail-open", shows: "all targets fail their health checks: they get flows all the same, or none with `minimum_healthy_count: 0`, which is silent and counted",
		needs: func(s *site, c *conformFile) {
			c.serve(s, s.fragile("fail-open", openHealth, s.top.Targets[:2]...))
			g := s.fragile("fail-closed", openHealth, s.top.Targets[:2]...)
			g.FailOpen = map[string]any{"minimum_healthy_count": 0}
			c.serve(s, g)
		},
		run: func(x *trial) {
			x.site.fail(x.t, openHealth, x.top.Targets...)
			for _, who := range []string{"t1", "t2"} {
				x.becomes("fail-open", who, balancer.Unhealthy)
				x.becomes("fail-closed", who, balancer.Unhealthy)
			}
			x.each(func(x *trial, f flavour) {
				x.goesTo("failed open", f, "fail-open", "t1", "t2")
				x.silent(x.top.Clients[0], f, "fail-closed", "no_target_drops")
			})
			x.site.heal(x.t, openHealth, x.top.Targets...)
			x.healthy("fail-closed", "t1", "t2")
			for _, f := range flavours {
				x.goesTo("healthy again", f, "fail-closed", "t1", "t2")
			}
		},
	},
	{
		name: "dead-groups-share", shows: "a group of a listener has no target left: its share of the flows is dropped silently",
		needs: deadGroup, taken: true,
		run: func(x *trial) {
			x.dies()
			x.each(func(x *trial, f flavour) {
				got := call(x.t, x.top.Clients[0], lab.Call{
					Network: f.network, Dst: f.at(x.port("dead-groups-share")), N: 40, Parallel: 40, Timeout: limit / 10,
				})
				if got.OK != got.ByWho["t2"] || got.OK == 0 || got.ByErr[lab.Timeout] == 0 {
					x.t.Errorf("%s", x.note(f, got.String()))
				}
			})
			x.revives()
		},
		otherwise: func(x *trial) {
			x.dies()
			x.each(func(x *trial, f flavour) { x.goesTo("the other group is dead", f, "dead-groups-share", "t2") })
			x.revives()
		},
	},
	{
		name: "udp-follows", shows: "a UDP client that never pauses reaches the first target of an empty group, and a new listener", over: flavoursOf("udp"),
		needs: func(s *site, c *conformFile) {
			c.serve(s, s.pool("udp-follows", "UDP", "preserve", targetPort))
			c.offer(s, "udp-only", "UDP", to(s.unconnected(c))...) // or it would have no health
		},
		run: follows,
	},
}

// pair serves a group of two targets.
func (c *conformFile) pair(s *site, name string) {
	c.serve(s, s.pool(name, "TCP_UDP", "preserve", targetPort, s.top.Targets[:2]...))
}

// weigh gives the nodes of a group their weights.
func (g *group) weigh(weights ...int) {
	g.Targets = slices.Clone(g.Targets)
	for i := range g.Targets {
		g.Targets[i] = g.Targets[i].weighed(weights[i%len(weights)])
	}
}

// deadGroup has two groups, of which one is going to have nobody.
func deadGroup(s *site, c *conformFile) {
	g := s.fragile("dead", deadHealth, s.top.Targets[0])
	g.FailOpen = map[string]any{"minimum_healthy_count": 0}
	c.Groups = append(c.Groups, g)
	c.offer(s, "dead-groups-share", "TCP_UDP", forward{"dead", 1}, forward{s.second(c), 1})
}

// dies makes the group of deadGroup fail.
func (x *trial) dies() {
	x.t.Helper()
	x.site.fail(x.t, deadHealth, x.top.Targets[0])
	x.becomes("dead", "t1", balancer.Unhealthy)
}

// revives makes it work again.
func (x *trial) revives() {
	x.t.Helper()
	x.site.heal(x.t, deadHealth, x.top.Targets[0])
	x.healthy("dead", "t1")
}

// leave expects what becomes of the first target's flows when they are cut.
func (k *kept) leave(x *trial, when string) {
	x.t.Helper()
	if k.f.network == "tcp" {
		k.ends(x.t, when, "t1")
	} else {
		k.moves(x.t, when, "t1", "t2")
	}
	k.alive(x.t, when+" of the other", "t2")
}

// becomes waits until a target has a state, by both of its addresses.
func (x *trial) becomes(group, who string, state balancer.State) {
	x.t.Helper()
	x.d.becomes(group, node(x.t, x.top, who), state, "")
}

// healthy waits until targets are.
func (x *trial) healthy(group string, who ...string) {
	x.t.Helper()
	for _, name := range who {
		x.becomes(group, name, balancer.Healthy)
	}
}

// listeners are those of the file that a case has.
func (x *trial) listeners(name string) []listener {
	x.mu.Lock()
	defer x.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(x.written.Listeners), func(l listener) bool {
		return l.Name != name+"4" && l.Name != name+"6"
	})
}

// follows has clients that asked in vain. They keep their port, so that conntrack
// may know where it did not send them.
func follows(x *trial) {
	flows := map[string]*lab.Flows{}
	for _, name := range []string{"udp-follows", "udp-unheard"} {
		for _, f := range x.over {
			k, err := x.top.Clients[0].Agent().Hold(soon(x.t), lab.Call{
				Network: "udp", Dst: f.at(x.port(name)), N: 4, Parallel: 4, Timeout: f.patience(),
			})
			done(x.t, err)
			allFail(x.t, x.note(f, name+" before"), lab.Count(k.Opened), lab.Timeout)
			flows[name+f.String()] = k
		}
	}
	x.change(func(c *conformFile) {
		c.group("udp-follows").Targets = targets(x.top.Targets[0])
		c.offer(x.site, "udp-unheard", "UDP", to("udp-only")...)
	})
	x.each(func(x *trial, f flavour) {
		for _, name := range []string{"udp-follows", "udp-unheard"} {
			k := &kept{x, f, flows[name+f.String()]}
			k.moves(x.t, name, "", "t1")
			done(x.t, k.flows.Close())
		}
	})
}
