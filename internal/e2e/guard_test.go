package e2e

import (
	"fmt"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"

	"nlb/bench/lab"
)

// TestGuard has services of the balancer's own on every address, and the VIPs on
// its loopback. Of all ports of the VIPs, only the listeners' answer.
func TestGuard(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Clients: 2, Targets: 1})
	serveTargets(t, top, 8080)
	// 80 and 53 are listeners too, and 8080 is where the targets listen.
	own := []uint16{22, 53, 80, 443, 3306, 8080, 60000}
	serveOn(t, top.LB, lab.Serve{Ports: own})
	c := config{
		Sources: sources(top), VIPs: both(),
		Listeners: append(listen("web", "TCP", 80, "web"), listen("dns", "UDP", 53, "dns")...),
		Groups: []group{
			pool("web", "TCP", "preserve", 8080, targets(top.Targets...)),
			pool("dns", "UDP", "preserve", 8080, targets(top.Targets...)),
		},
	}
	d := serving(t, top, c)

	listeners := map[string][]uint16{"tcp": {80}, "udp": {53}}
	for i, f := range families {
		client := top.Clients[i]
		t.Run("IPv"+f.name, func(t *testing.T) {
			t.Parallel()
			for _, network := range networks {
				begin := time.Now()
				dropped := d.counter("unwanted_drops")
				ports, err := client.Agent().Scan(t.Context(), lab.Scan{Network: network, Dst: f.vip})
				if err != nil {
					t.Fatal(err)
				}
				t.Logf("%s scan took %v", network, time.Since(begin).Round(time.Millisecond))
				if diff := cmp.Diff(listeners[network], ports.Open); diff != "" {
					t.Errorf("open %s ports of %v (-want +got):\n%s", network, f.vip, diff)
				}
				if len(ports.Refused)+len(ports.Unreachable) > 0 {
					t.Errorf("%s ports of %v are not silent: %d refused, %d unreachable", network, f.vip, len(ports.Refused), len(ports.Unreachable))
				}
				if now := d.counter("unwanted_drops"); now < dropped+65534 {
					t.Errorf("unwanted_drops rose by %d for 65534 %s ports", now-dropped, network)
				}
				for _, port := range own {
					ports, err := client.Agent().Scan(t.Context(), lab.Scan{Network: network, Dst: f.addr(top.LB), First: port, Last: port})
					if err != nil {
						t.Fatal(err)
					}
					if !slices.Equal(ports.Open, []uint16{port}) {
						t.Errorf("%s port %d of the balancer's own %v does not answer, so this test shows nothing", network, port, f.addr(top.LB))
					}
				}
			}
			if err := ping(t, client, f); err != nil {
				t.Errorf("ping %v: %v", f.vip, err)
			}
		})
	}
}

// ping sends the VIP an echo request and waits for the reply.
func ping(t *testing.T, n *lab.Node, f family) error {
	t.Helper()
	var conn net.PacketConn
	network, protocol := "ip4:icmp", 1
	var request, reply icmp.Type = ipv4.ICMPTypeEcho, ipv4.ICMPTypeEchoReply
	if f.vip.Is6() {
		network, protocol = "ip6:ipv6-icmp", 58
		request, reply = ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply
	}
	err := n.Do(func() (err error) {
		conn, err = net.ListenPacket(network, f.addr(n).String())
		return err
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	message, err := (&icmp.Message{Type: request, Body: &icmp.Echo{ID: 1, Seq: 1, Data: []byte("nlb")}}).Marshal(nil)
	if err != nil {
		return err
	}
	if err := conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	if _, err := conn.WriteTo(message, &net.IPAddr{IP: f.vip.AsSlice()}); err != nil {
		return err
	}
	for b := make([]byte, 1500); ; {
		size, from, err := conn.ReadFrom(b)
		if err != nil {
			return err
		}
		m, err := icmp.ParseMessage(protocol, b[:size])
		if err != nil {
			return fmt.Errorf("from %v: %w", from, err)
		}
		if m.Type == reply && from.String() == f.vip.String() {
			return nil
		}
	}
}

// TestGuardEndsOldFlows has connections to a service of the host itself on the
// VIPs, from a time when they were no VIPs yet. They are cut off with the rest.
func TestGuardEndsOldFlows(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 1})
	serveTargets(t, top, 8080)
	serveOn(t, top.LB, lab.Serve{Ports: []uint16{22}})
	// A firewall of the host's own, without which conntrack would not know them.
	must(t, top.LB, "nft", "table inet other { chain input { type filter hook input priority 0; ct state invalid drop; }; }")
	var old []*lab.Flows
	for _, f := range families {
		must(t, top.LB, "ip", "address", "add", f.vip.String(), "dev", "lo")
		old = append(old, held(t, top.Clients[0], lab.Call{Network: "tcp", Dst: f.at(22), Timeout: 2 * time.Second}))
	}
	serving(t, top, config{
		Sources: sources(top), VIPs: both(),
		Listeners: listen("web", "TCP", 80, "web"),
		Groups:    []group{pool("web", "TCP", "preserve", 8080, targets(top.Targets...))},
	})
	for i, f := range families {
		flows, err := old[i].Check(soon(t))
		if err != nil {
			t.Fatal(err)
		}
		if flows[0].Now.Err != lab.Timeout {
			t.Errorf("IPv%s: the host's own service still answers on the VIP: %+v", f.name, flows[0])
		}
	}
}
