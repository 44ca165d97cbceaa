package e2e

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/bench/lab"
	"nlb/internal/wait"
)

// TestRelayDrain takes targets of relayed groups out, by nlb drain and out of the
// file. They get no new connections. Those they have go on until the deadline, and
// after it unless the group says that they end then.
func TestRelayDrain(t *testing.T) { relayDrain(t, nil) }

func relayDrain(t *testing.T, setting map[string]any) {
	t.Helper()
	t.Parallel()
	top := routed(t, lab.Options{})
	serveHeaders(t, top.Targets, targetPort)
	client, t1, t2 := top.Clients[0], top.Targets[0], top.Targets[1]
	const removedPort = latePort
	all := []struct {
		name      string
		port      uint16
		terminate bool
	}{{"cut", cutPort, true}, {"kept", livePort, false}, {"removed", removedPort, true}}
	c := config{Sources: sources(top), Relay: setting, VIPs: both()}
	for _, g := range all {
		p := relayed(g.name, targetPort, targets(top.Targets...))
		p.Deregister = leaving(delay, g.terminate)
		c.Groups = append(c.Groups, p)
		c.Listeners = append(c.Listeners, listen(g.name, "TCP", g.port, g.name)...)
	}
	d := serving(t, top, c)
	holdings := map[string]*holding{}
	for _, g := range all {
		holdings[g.name] = hold(t, client, g.port)
	}
	w := watch(t, top)

	before := time.Now()
	d.life("drain", t1, "cut", "kept")
	c.Groups[2].Targets = targets(t2)
	if err := d.reload(c.String()); err != nil {
		t.Fatal(err)
	}
	gone := time.Now()
	for _, g := range all {
		if err := d.stands(g.name, t1, balancer.Draining, balancer.ReasonDeregistrationInProgress); err != nil {
			t.Error(err)
		}
		avoided(t, "draining", client, g.port, 20, t1.Name)
	}
	if late := time.Since(before); late < delay {
		for _, h := range holdings {
			h.alive("draining", t1.Name, t2.Name)
		}
	} else {
		t.Errorf("the machine took %v for what should come before the deadline", late)
	}

	for _, name := range []string{"cut", "removed"} {
		w.cut(name, holdings[name], t1.Name, before.Add(delay-slack), gone.Add(delay+slack))
		holdings[name].over("after the deadline", t1.Name)
	}
	d.becomes("kept", t1, balancer.Unused, balancer.ReasonNotRegistered)
	d.disappears("removed", t1)
	w.spared("kept", holdings["kept"], t1.Name)
	holdings["kept"].alive("after the deadline", t1.Name)
	for _, g := range all {
		w.spared(g.name, holdings[g.name], t2.Name)
		holdings[g.name].alive("after the deadline", t2.Name)
		avoided(t, "drained", client, g.port, 20, t1.Name)
	}
	d.life("undrain", t1, "cut", "kept")
	d.waitAllHealthy()
	reached(t, "registered again", client, cutPort, t1.Name)
	holdings["kept"].alive("registered again", t1.Name, t2.Name)
	w.leaks()
}

// TestRelayUnhealthy has a target that works and fails its health checks. Its
// connections are reset at both ends, if the group wants that.
func TestRelayUnhealthy(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{})
	serveHeaders(t, top.Targets, targetPort)
	client, t1, t2 := top.Clients[0], top.Targets[0], top.Targets[1]
	probed := map[string]*lab.Listeners{}
	for _, n := range top.Targets {
		probed[n.Name] = serveOn(t, n, lab.Serve{Ports: []uint16{healthPort}, Networks: []string{"tcp"}})
	}
	cut, kept := relayed("cut", targetPort, targets(top.Targets...)), relayed("kept", targetPort, targets(top.Targets...))
	kept.Unhealthy = map[string]any{"connection_termination": false}
	cut.HealthCheck["port"], kept.HealthCheck["port"] = healthPort, healthPort
	d := serving(t, top, config{Sources: sources(top), VIPs: both(), Groups: []group{cut, kept},
		Listeners: append(listen("cut", "TCP", cutPort, "cut"), listen("kept", "TCP", livePort, "kept")...)})
	a, b := hold(t, client, cutPort), hold(t, client, livePort)
	w := watch(t, top)
	before := time.Now()
	if err := probed[t1.Name].Close(); err != nil {
		t.Fatal(err)
	}
	d.becomes("cut", t1, balancer.Unhealthy, "")
	w.cut("unhealthy", a, t1.Name, before, time.Now().Add(slack))
	a.over("unhealthy", t1.Name)
	a.alive("the other is unhealthy", t2.Name)
	d.becomes("kept", t1, balancer.Unhealthy, "")
	b.alive("unhealthy", t1.Name, t2.Name)
	w.spared("unhealthy", b, t1.Name)
	for _, port := range []uint16{cutPort, livePort} {
		avoided(t, "unhealthy", client, port, 20, t1.Name)
	}
	serveOn(t, t1, lab.Serve{Ports: []uint16{healthPort}, Networks: []string{"tcp"}})
	d.waitAllHealthy()
	reached(t, "healthy again", client, cutPort, t1.Name)
}

// TestRelayDialFailures has targets that are healthy, and refuse connections or
// say nothing. Clients do not notice while another one answers; when none does,
// they are reset.
func TestRelayDialFailures(t *testing.T) { relayDialFailures(t, nil) }

func relayDialFailures(t *testing.T, setting map[string]any) {
	t.Helper()
	t.Parallel()
	top := routed(t, lab.Options{Clients: 2, Targets: 3})
	client, good, silent := top.Clients[0], top.Targets[0], top.Targets[2] // nothing listens on the one between
	answering := serveHeaders(t, []*lab.Node{good, silent}, targetPort)[good.Name]
	must(t, silent, "nft", fmt.Sprintf(`add table inet silent
		add chain inet silent input { type filter hook input priority 0; }
		add rule inet silent input tcp dport %d drop`, targetPort))
	probed := map[string]*lab.Listeners{}
	for _, n := range top.Targets {
		probed[n.Name] = serveOn(t, n, lab.Serve{Ports: []uint16{healthPort}, Networks: []string{"tcp"}})
	}
	g := relayed("web", targetPort, targets(top.Targets...))
	g.HealthCheck["port"] = healthPort
	g.FailOpen = map[string]any{"minimum_healthy_count": 0}
	c := relaying(top, webPort, g)
	c.Relay = setting
	d := serving(t, top, c)
	for _, f := range families {
		got := replies(t, client, lab.Call{Network: "tcp", Dst: f.at(webPort), N: 60, Parallel: 60, Timeout: 2 * patience})
		named(t, "IPv"+f.name+", one of three answers", got, f.addr(top.LB))
		if who := lab.Count(got).ByWho; len(who) != 1 || who[good.Name] == 0 {
			t.Errorf("IPv%s: who answers: %v", f.name, who)
		}
	}
	for _, n := range top.Targets {
		if err := d.stands("web", n, balancer.Healthy, ""); err != nil {
			t.Error(err)
		}
	}

	if err := answering.Close(); err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		got := call(t, client, lab.Call{Network: "tcp", Dst: f.at(webPort), N: 20, Parallel: 20, Timeout: 2 * patience})
		allFail(t, "IPv"+f.name+": nobody answers", got, lab.Reset)
	}

	// Without a target that is trusted, the kernel drops what comes. It comes from a
	// client that had no flows: a SYN from the port of one that was just reset would
	// be of that flow to conntrack, and reset by the relay.
	newcomer := top.Clients[1]
	for _, l := range probed {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	d.waitHealthy("web", 0)
	wait.For(t, limit, "the kernel to follow the verdicts", d.planned)
	for _, f := range families {
		before := d.counter("no_target_drops")
		got := call(t, newcomer, lab.Call{Network: "tcp", Dst: f.at(webPort), N: 5, Parallel: 5, Timeout: briefly})
		allFail(t, "IPv"+f.name+": nobody is healthy", got, lab.Timeout)
		if now := d.counter("no_target_drops"); now != before+5 {
			t.Errorf("IPv%s: no_target_drops rose by %d for 5 SYNs", f.name, now-before)
		}
	}

	// All return.
	serveOn(t, good, lab.Serve{Ports: []uint16{targetPort}, Networks: []string{"tcp"}, Proxy: true})
	for _, n := range top.Targets {
		serveOn(t, n, lab.Serve{Ports: []uint16{healthPort}, Networks: []string{"tcp"}})
	}
	d.waitAllHealthy()
	for _, f := range families {
		got := replies(t, client, lab.Call{Network: "tcp", Dst: f.at(webPort), N: 20, Parallel: 20, Timeout: 2 * patience})
		named(t, "IPv"+f.name+", one is back", got, f.addr(top.LB))
	}
}

// TestRelayComesAndGoes changes groups between the modes, and takes listeners
// away, while there are connections: each goes on where it is.
func TestRelayComesAndGoes(t *testing.T) { relayComesAndGoes(t, nil) }

func relayComesAndGoes(t *testing.T, setting map[string]any) {
	t.Helper()
	t.Parallel()
	top := routed(t, lab.Options{})
	serveHeaders(t, top.Targets, targetPort)
	client := top.Clients[0]
	c := relaying(top, webPort, relayed("web", targetPort, targets(top.Targets...)))
	c.Groups[0].Deregister, c.Relay = leaving(delay, false), setting
	d := serving(t, top, c)
	pid := d.relay()
	early := hold(t, client, webPort)
	d.hears("all is relayed", false)

	// Another listener for the same group, and then none but that.
	c.Listeners = append(c.Listeners, listen("extra", "TCP", extraPort, "web")...)
	if err := d.reload(c.String()); err != nil {
		t.Fatal(err)
	}
	late := hold(t, client, extraPort)
	web := c.Listeners
	c.Listeners = slices.Clone(c.Listeners[len(families):])
	if err := d.reload(c.String()); err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		got := call(t, client, lab.Call{Network: "tcp", Dst: f.at(webPort), N: 5, Parallel: 5, Timeout: briefly})
		allFail(t, "the listener is gone, IPv"+f.name, got, lab.Timeout)
	}
	early.alive("their listener is gone", "t1", "t2")
	late.alive("the other listener is gone", "t1", "t2")

	c.Listeners = web
	c.Groups[0].ClientIP = "snat"
	if err := d.reload(c.String()); err != nil {
		t.Fatal(err)
	}
	early.alive("the group is not relayed any more", "t1", "t2")
	d.hears("the kernel forwards", true)
	c.Groups[0].ClientIP = "proxy_protocol_v2"
	if err := d.reload(c.String()); err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		got := replies(t, client, lab.Call{Network: "tcp", Dst: f.at(webPort), N: 20, Parallel: 5})
		named(t, "the group is relayed again, IPv"+f.name, got, f.addr(top.LB))
	}
	early.alive("the group is relayed again", "t1", "t2")
	d.hears("all is relayed again", false)
	if now := d.relay(); now != pid {
		t.Errorf("relay %d follows %d", now, pid)
	}
	wait.For(t, limit, "nothing to change", d.planned)
}

// hears waits until the kernel tells the daemon of flows' ends, or nobody.
func (d *daemon) hears(when string, want bool) {
	d.t.Helper()
	const ends = 1 << (unix.NFNLGRP_CONNTRACK_DESTROY - 1)
	wait.For(d.t, limit, when, func() error {
		d.status() // for which it looks what flows there are
		told := false
		for line := range strings.Lines(must(d.t, d.node, "cat", "/proc/net/netlink")) {
			f := strings.Fields(line) // sk, Eth, Pid, Groups
			groups, err := strconv.ParseUint(f[3], 16, 32)
			told = told || f[1] == strconv.Itoa(unix.NETLINK_NETFILTER) && err == nil && groups&ends != 0
		}
		if told != want {
			return fmt.Errorf("somebody is told of flows' ends: %v, want %v", told, want)
		}
		return nil
	})
}
