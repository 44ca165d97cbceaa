package e2e

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"nlb/balancer"
	"nlb/bench/lab"
)

// notTracked is the setting that keeps relayed connections out of conntrack.
func notTracked() map[string]any { return map[string]any{"conntrack": false} }

func TestRelayUntrackedDrain(t *testing.T)        { relayDrain(t, notTracked()) }
func TestRelayUntrackedDialFailures(t *testing.T) { relayDialFailures(t, notTracked()) }
func TestRelayUntrackedComesAndGoes(t *testing.T) { relayComesAndGoes(t, notTracked()) }

// known are the connections to a port, of anybody, that conntrack knows.
func (d *daemon) known(port uint16) []entry {
	d.t.Helper()
	return d.tracked(func(e entry) bool { return e.protocol == "tcp" && e.to.Port() == port })
}

// TestRelayUntracked has relayed listeners beside one of a kernel mode, for other
// targets and for the same one. None of the relay's connections is tracked but
// those to the target that both have.
func TestRelayUntracked(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Clients: 2, Targets: 2})
	one, other, lb := top.Clients[0], top.Clients[1], top.LB
	const sharedPort, closedPort, bothPort, kernelPort = 9000, 81, 82, 83
	serveHeaders(t, top.Targets, targetPort)
	for _, n := range top.Targets {
		answerEither(t, n, sharedPort)
	}
	c := config{Sources: sources(top), Relay: notTracked(), VIPs: both()}
	for _, g := range []group{
		relayed("web", targetPort, targets(top.Targets...)),
		relayed("both", sharedPort, targets(top.Targets...)),
		pool("kernel", "TCP", "snat", sharedPort, targets(top.Targets...)),
	} {
		g.Passive = map[string]any{"enabled": true}
		c.Groups = append(c.Groups, g)
	}
	c.Listeners = append(listen("web", "TCP", webPort, "web"), listen("closed", "TCP", closedPort, "web")...)
	c.Listeners = append(c.Listeners, append(listen("both", "TCP", bothPort, "both"), listen("kernel", "TCP", kernelPort, "kernel")...)...)
	for i := range c.Listeners {
		if strings.HasPrefix(c.Listeners[i].Name, "closed") {
			c.Listeners[i].Allow = []string{families[i%2].addr(one).String()}
		}
	}
	d := serving(t, top, c)
	for _, f := range families {
		for _, n := range []*lab.Node{one, other, lb, top.Targets[0]} {
			got := replies(t, n, lab.Call{Network: "tcp", Dst: f.at(webPort), N: 10, Parallel: 5})
			named(t, fmt.Sprintf("IPv%s from %s", f.name, n.Name), got, f.addr(lb))
		}
		got := replies(t, lb, lab.Call{Network: "tcp", Dst: f.at(webPort), SrcAddr: f.addr(lb), N: 10, Parallel: 5})
		named(t, fmt.Sprintf("IPv%s from another address of the balancer", f.name), got, f.addr(lb))
		got = replies(t, one, lab.Call{Network: "tcp", Dst: f.at(closedPort), N: 10, Parallel: 5})
		named(t, fmt.Sprintf("IPv%s, allowed", f.name), got, f.addr(lb))

		before := d.counter("not_allowed_drops")
		refused := call(t, other, lab.Call{Network: "tcp", Dst: f.at(closedPort), N: 5, Parallel: 5, Timeout: briefly})
		allFail(t, fmt.Sprintf("IPv%s, not allowed", f.name), refused, lab.Timeout)
		if n := d.counter("not_allowed_drops") - before; n != 5 {
			t.Errorf("IPv%s: not_allowed_drops rose by %d for 5 SYNs", f.name, n)
		}
	}
	for _, port := range []uint16{webPort, closedPort, bothPort, targetPort} {
		if known := d.known(port); len(known) > 0 {
			t.Errorf("port %d is tracked: %d, such as %s", port, len(known), known[0].text)
		}
	}

	// The same target, in both ways at the same time.
	for _, f := range families {
		for range 20 {
			for _, port := range []uint16{bothPort, kernelPort} {
				conn := connect(t, one, f, port)
				want := "nobody"
				if port == bothPort {
					want = local(conn).String()
				}
				if _, err := io.WriteString(conn, "question\n"); err != nil {
					t.Fatal(err)
				}
				got, err := bufio.NewReader(conn).ReadString('\n')
				if err != nil || got != want+" question\n" {
					t.Fatalf("IPv%s, port %d: got %q, want %q: %v", f.name, port, got, want, err)
				}
				_ = conn.Close()
			}
		}
	}
	if d.known(kernelPort) == nil || d.known(sharedPort) == nil || d.known(bothPort) != nil {
		t.Errorf("tracked of the kernel's listener %d, of the target that both have %d, of the relayed listener %d",
			len(d.known(kernelPort)), len(d.known(sharedPort)), len(d.known(bothPort)))
	}
	for _, g := range c.Groups {
		for _, n := range top.Targets {
			if err := d.stands(g.Name, n, balancer.Healthy, ""); err != nil {
				t.Error(err)
			}
		}
	}
	if err := d.planned(); err != nil {
		t.Error(err)
	}
}

// answerEither answers a line on a node: with whom a header named, if there was
// one, and with the line.
func answerEither(t *testing.T, n *lab.Node, port uint16) {
	t.Helper()
	var l net.Listener
	err := n.Do(func() (err error) {
		l, err = new(net.ListenConfig).Listen(context.Background(), "tcp", fmt.Sprint(":", port))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	answer := func(c *net.TCPConn) {
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(limit))
		in := bufio.NewReader(c)
		who := "nobody"
		first, err := in.Peek(2)
		if err != nil {
			return // a health check
		}
		if bytes.Equal(first, []byte("\r\n")) {
			h, err := readHeaded(c, in)
			if err != nil {
				t.Errorf("%s got a wrong header: %v", n.Name, err)
				return
			}
			who, in = h.from.String(), h.in
		}
		line, _ := in.ReadString('\n') // the client sees what is missing
		_, _ = io.WriteString(c, who+" "+line)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed, by the test's end
			}
			go answer(c.(*net.TCPConn))
		}
	}()
}

// TestRelayUntrackedHairpin has a target on the client's own node.
func TestRelayUntrackedHairpin(t *testing.T) {
	t.Parallel()
	top := made(t, lab.PodNode, lab.Options{})
	serveHeaders(t, top.Targets, 8080)
	self, neighbour, node, stranger := top.Targets[0], top.Targets[1], top.Hosts[0], top.Targets[2]
	c := relaying(top, 80, relayed("self", 8080, targets(self)))
	c.Relay = notTracked()
	serving(t, top, c)
	for _, f := range families {
		for _, from := range []*lab.Node{self, neighbour, node, stranger, top.Clients[0]} {
			got := replies(t, from, lab.Call{Network: "tcp", Dst: f.at(80), N: 10, Parallel: 5})
			named(t, fmt.Sprint("IPv", f.name, " from ", from.Name), got, f.addr(top.LB))
		}
	}
}

// TestRelayUntrackedTargetHere has a target on the balancer itself, and no source
// addresses in the file.
func TestRelayUntrackedTargetHere(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 1})
	serveHeaders(t, []*lab.Node{top.LB, top.Targets[0]}, 8080)
	c := relaying(top, 80, relayed("web", 8080, targets(top.LB, top.Targets[0])))
	c.Relay, c.Sources = notTracked(), nil
	d := serving(t, top, c)
	for _, f := range families {
		for _, from := range []*lab.Node{top.Clients[0], top.LB, top.Targets[0]} {
			got := replies(t, from, lab.Call{Network: "tcp", Dst: f.at(80), N: 20, Parallel: 5})
			named(t, fmt.Sprint("IPv", f.name, " from ", from.Name), got, f.addr(top.LB))
			if who := lab.Count(got).ByWho; len(who) != 2 {
				t.Errorf("IPv%s: who answers: %v", f.name, who)
			}
		}
	}
	for _, port := range []uint16{80, 8080} {
		if known := d.known(port); len(known) > 0 {
			t.Errorf("port %d is tracked: %d, such as %s", port, len(known), known[0].text)
		}
	}
}

// TestRelayUntrackedSwitch changes the setting by reload under load, both ways, and
// kills the daemon meanwhile. No connection fails and no flow breaks.
func TestRelayUntrackedSwitch(t *testing.T) {
	t.Parallel()
	top, c := relayedServices(t)
	d := serving(t, top, c)
	p := press(t, top)
	const changes = 12
	for n := range changes {
		when := "tracked again"
		if c.Relay = nil; n%2 == 0 {
			when = "not tracked"
			c.Relay = notTracked()
		}
		if err := d.reload(c.String()); err != nil {
			t.Fatal(err)
		}
		p.check(fmt.Sprint(when, ", change ", n))
		if n%4 == 2 {
			d.kill()
			p.check(when + ", serve was killed")
			s := listenForSilence(t, top.LB)
			d.start()
			d.waitAllHealthy()
			if heard := s.heard(); heard != "" {
				t.Errorf("%s: a restart writes:\n%s", when, heard)
			}
			p.check(when + ", serve is back")
		}
		if err := d.planned(); err != nil {
			t.Errorf("%s: %v", when, err)
		}
	}
	t.Logf("%d new connections", p.end())
}

// TestRelayUntrackedPathMTU narrows links beyond the balancer's own: the errors of
// those who cannot forward get to the relay's sockets.
func TestRelayUntrackedPathMTU(t *testing.T) {
	t.Parallel()
	top := newChain(t)
	client, target := top.Clients[0], top.Targets[0]
	const size = 1 << 20
	answerHeaded(t, target, 8080, func(h *headed) {
		if _, err := io.CopyN(io.Discard, h.in, size); err != nil {
			t.Errorf("the target: %v", err)
			return
		}
		_, _ = h.Write(make([]byte, size)) // the client counts
	})
	c := config{VIPs: both(), Sources: []netip.Addr{netip.MustParseAddr("10.1.3.1"), netip.MustParseAddr("2001:db8:1:3::1")}}
	c.Listeners, c.Groups, c.Relay = listen("web", "TCP", 80, "web"), []group{relayed("web", 8080, targets(target))}, notTracked()
	serving(t, top.Topology, c)
	for link, where := range map[int]string{1: "between the client's routers", 4: "between the target's routers"} {
		top.mtu(t, link, narrow)
		for _, f := range families {
			for _, n := range top.Nodes() {
				must(t, n, "ip", "-"+f.name, "route", "flush", "cache")
			}
			conn := connect(t, client, f, 80)
			if _, err := conn.Write(make([]byte, size)); err != nil {
				t.Fatalf("IPv%s, %s: %v", f.name, where, err)
			}
			if n, err := io.CopyN(io.Discard, conn, size); err != nil {
				t.Errorf("IPv%s, %s: %d bytes came back: %v", f.name, where, n, err)
			}
			_ = conn.Close()
		}
		top.mtu(t, link, usual)
	}
}
