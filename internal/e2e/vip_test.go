package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
	"nlb/internal/wait"
)

// TestVIPOnInterface binds the VIPs on the segment that they share with a client
// which has no route to them but the link: the VIPs answer for themselves, and
// are announced.
func TestVIPOnInterface(t *testing.T) {
	t.Parallel()
	top := made(t, lab.OneArm, lab.Options{})
	serveTargets(t, top, 8080)
	neighbour := top.Inside[0]
	for _, f := range families {
		must(t, neighbour, "ip", "-"+f.name, "route", "add", f.vip.String(), "dev", "eth0")
	}
	seen := capture(t, neighbour, "eth0") // of IP packets alone
	arp := sniff(t, neighbour, "-i", "eth0", "arp", "and", "src", "host", lab.VIP4.String())
	near := pool("web", "TCP_UDP", "hairpin_snat", 8080, targets(top.Targets...))
	near.HairpinSubnet = true
	serving(t, top, config{
		Sources: sources(top), VIPs: []vip{{lab.VIP4, "eth0"}, {lab.VIP6, "eth0"}},
		Listeners: listen("web", "TCP_UDP", 80, "web"),
		Groups:    []group{near},
	})
	wait.For(t, limit, "gratuitous ARP", func() error {
		text := arp.String()
		// An announcement has the VIP as both ends (RFC 5227 section 3), in either form.
		for _, want := range []string{"Request who-has 198.51.100.10", "Reply 198.51.100.10 is-at"} {
			if !strings.Contains(strings.ReplaceAll(text, "Announcement", "Request who-has"), want) {
				return fmt.Errorf("no %q in %q", want, text)
			}
		}
		return nil
	})
	_, err := seen.Wait(soon(t), func(p lab.Packet) bool {
		return p.Proto == unix.IPPROTO_ICMPV6 && p.ICMPType == 136 && p.Src == lab.VIP6 && p.Dst.IsMulticast()
	})
	if err != nil {
		t.Errorf("unsolicited neighbour advertisement: %v", err)
	}
	for _, f := range families {
		for _, network := range networks {
			ask := lab.Call{Network: network, Dst: f.at(80), N: 10}
			allSeenAs(t, network+f.name+" from the segment", call(t, neighbour, ask), f.addr(top.LB))
			allSeenAs(t, network+f.name+" from outside", call(t, top.Clients[0], ask), f.addr(top.Clients[0]))
		}
	}
}

// sniff runs tcpdump on a node until the test ends, and returns when it listens.
func sniff(t *testing.T, n *lab.Node, args ...string) *logBuffer {
	t.Helper()
	var out logBuffer
	ctx, stop := context.WithCancel(context.Background())
	cmd := n.Command(ctx, "tcpdump", append([]string{"-lnn"}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		stop()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stop()
		_ = cmd.Wait() // it was killed
	})
	wait.For(t, limit, "tcpdump", func() error {
		if !strings.Contains(out.String(), "listening on") {
			return errors.New(out.String())
		}
		return nil
	})
	return &out
}

// TestVIPNotBound has VIPs that are routed to the balancer and are on none of
// its interfaces.
func TestVIPNotBound(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{})
	serveTargets(t, top, 8080)
	d := serving(t, top, config{
		Sources: sources(top), VIPs: []vip{{Address: lab.VIP4}, {Address: lab.VIP6}},
		Listeners: append(listen("web", "TCP_UDP", 80, "web"), listen("snat", "TCP_UDP", 81, "snat")...),
		Groups: []group{
			pool("web", "TCP_UDP", "hairpin_snat", 8080, targets(top.Targets...)),
			pool("snat", "TCP_UDP", "snat", 8080, targets(top.Targets...)),
		},
	})
	// Without a route, a program of the balancer's own does not get as far as the rules.
	for _, f := range families {
		must(t, top.LB, "ip", "-"+f.name, "route", "add", "default", "dev", top.Clients[0].Name)
	}
	if text := must(t, top.LB, "ip", "address"); strings.Contains(text, lab.VIP4.String()) || strings.Contains(text, lab.VIP6.String()) {
		t.Errorf("a VIP was bound:\n%s", text)
	}
	for _, f := range families {
		for _, network := range networks {
			what := network + f.name
			allSeenAs(t, what, call(t, top.Clients[0], lab.Call{Network: network, Dst: f.at(80), N: 10}), f.addr(top.Clients[0]))
			allSeenAs(t, what+", snat", call(t, top.Clients[0], lab.Call{Network: network, Dst: f.at(81), N: 10}), f.addr(top.LB))
			allSeenAs(t, what+" from the balancer", call(t, top.LB, lab.Call{Network: network, Dst: f.at(81), N: 10}), f.addr(top.LB))
			// Nobody's port: dropped, and not sent back to where the route leads.
			unwanted := d.counter("unwanted_drops")
			allFail(t, what+", no listener", call(t, top.Clients[0], lab.Call{Network: network, Dst: f.at(99), Timeout: briefly}), lab.Timeout)
			if now := d.counter("unwanted_drops"); now != unwanted+1 {
				t.Errorf("%s: unwanted_drops rose by %d for one packet", what, now-unwanted)
			}
		}
	}
}
