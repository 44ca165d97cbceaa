package e2e

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
)

// strays are what a host may still send for a connection that the balancer has
// forgotten, or never knew like this.
var strays = []lab.Flags{lab.ACK, lab.PSH | lab.ACK, lab.FIN | lab.ACK, lab.SYN | lab.ACK, lab.RST, lab.RST | lab.ACK}

// everywhere are sequence numbers so far apart that, wherever a connection is, one
// is beyond its window. (Conntrack lets those before it pass, as a flow's.)
var everywhere = []uint32{0x10000000, 0x50000000, 0x90000000, 0xd0000000}

// TestStraySegments sends segments that belong to no flow of the balancer's: out
// of the window of one, and of none at all. A client would take those of a target
// for a stranger's, and answer with a reset. A flow that was forgotten goes on.
func TestStraySegments(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 1})
	serveTargets(t, top, 8080)
	client, target := top.Clients[0], top.Targets[0]
	serveOn(t, client, lab.Serve{Ports: []uint16{7000}})
	d := serving(t, top, config{
		Sources: sources(top), VIPs: both(),
		Listeners: listen("web", "TCP", 80, "web"),
		Groups:    []group{pool("web", "TCP", "preserve", 8080, targets(target))},
	})
	for _, f := range families {
		t.Run("IPv"+f.name, func(t *testing.T) {
			flow := held(t, client, lab.Call{Network: "tcp", Dst: f.at(80)})
			from := flow.Opened[0].From
			answers := netip.AddrPortFrom(f.addr(target), 8080)
			atClient, atTarget := capture(t, client, "eth0"), capture(t, target, "eth0")

			invalid, unwanted := d.counter("invalid_drops"), d.counter("unwanted_drops")
			for _, seq := range everywhere {
				inject(t, target, answers, from, seq, lab.PSH|lab.ACK)
				inject(t, client, from, f.at(80), seq, lab.PSH|lab.ACK)
			}
			works := func(when string) {
				t.Helper()
				now, err := flow.Check(soon(t))
				if err != nil {
					t.Fatal(err)
				}
				if now[0].Broken() || now[0].Moved() {
					t.Errorf("%s: the flow is broken or moved: %+v", when, now[0])
				}
			}
			works("after segments out of its window")
			if now := d.counter("invalid_drops"); now == invalid {
				t.Error("segments of a target out of the window: invalid_drops stays the same")
			}
			if now := d.counter("unwanted_drops"); now == unwanted {
				t.Error("segments of a client out of the window: unwanted_drops stays the same")
			}

			// To a port without a flow: the live one's own acknowledgements could
			// bring it back in between.
			none := netip.AddrPortFrom(f.addr(client), 9)
			invalid = d.counter("invalid_drops")
			for _, flags := range strays {
				inject(t, target, answers, none, everywhere[0], flags)
			}
			// What a target begins itself is none of ours, and shows that all before
			// has passed.
			own := call(t, target, lab.Call{Network: "tcp", Dst: netip.AddrPortFrom(f.addr(client), 7000)})
			allSeenAs(t, "a connection of the target's own", own, f.addr(target))
			if now := d.counter("invalid_drops"); now != invalid+len(strays) {
				t.Errorf("invalid_drops rose by %d for %d stray segments", now-invalid, len(strays))
			}

			// The same hash leads to the same target again.
			must(t, d.node, "conntrack", "-D", "-f", "ipv"+f.name, "-p", "tcp", "--orig-port-dst", "80")
			works("forgotten")

			found := packets(t, atClient, func(p lab.Packet) bool {
				return !p.Out && p.Proto == unix.IPPROTO_TCP && p.From() == answers
			})
			if len(found) > 0 {
				t.Errorf("%d segments reached the client un-NATed, such as %v", len(found), found[0])
			}
			// Probes end in resets too, of the balancer's.
			resets := func(p lab.Packet) bool {
				return !p.Out && p.Flags&lab.RST != 0 && (p.Src == f.addr(client) || p.Dst == f.addr(client))
			}
			if found := append(packets(t, atClient, resets), packets(t, atTarget, resets)...); len(found) > 0 {
				t.Errorf("%d resets, such as %v", len(found), found[0])
			}
		})
	}
}

// TestStrayDatagrams has a target that goes on to send to a client whose flow the
// balancer has forgotten: the datagrams must not reach it un-NATed, nor keep the
// client's next ones from the target.
func TestStrayDatagrams(t *testing.T) {
	t.Parallel()
	top := routed(t, lab.Options{Targets: 1})
	serveTargets(t, top, 8080)
	client, target := top.Clients[0], top.Targets[0]
	c := config{
		Sources: sources(top), VIPs: both(),
		Listeners: listen("dns", "UDP", 53, "dns"),
		Groups:    []group{pool("dns", "UDP", "preserve", 9000, targets(target))},
	}
	c.Groups[0].HealthCheck["port"] = 8080
	d := serving(t, top, c)
	for _, f := range families {
		t.Run("IPv"+f.name, func(t *testing.T) {
			there := bindUDP(t, target, netip.AddrPortFrom(f.addr(target), 9000), mayFragment)
			here := bindUDP(t, client, netip.AddrPortFrom(f.addr(client), 0), mayFragment)
			ask := func(when string) netip.AddrPort {
				t.Helper()
				deliver(t, "question, "+when, here, there, f.at(53), []byte("question "+when))
				peer := here.LocalAddr().(*net.UDPAddr).AddrPort()
				source := deliver(t, "answer, "+when, there, here, peer, []byte("answer "+when))
				if source != f.at(53) {
					t.Errorf("the answer, %s, comes from %v", when, source)
				}
				return peer
			}
			peer := ask("at first")
			must(t, d.node, "conntrack", "-D", "-f", "ipv"+f.name, "-p", "udp", "--orig-port-dst", "53")

			seen := capture(t, client, "eth0")
			answers := netip.AddrPortFrom(f.addr(target), 9000)
			const strays = 3
			for range strays {
				if _, err := there.WriteToUDPAddrPort([]byte("late"), peer); err != nil {
					t.Fatal(err)
				}
			}
			ask("after stray answers")
			found := packets(t, seen, func(p lab.Packet) bool { return !p.Out && p.From() == answers })
			if len(found) > 0 {
				t.Errorf("%d of %d datagrams reached the client un-NATed, such as %v", len(found), strays, found[0])
			}
		})
	}
}

// inject sends a bare TCP segment past the node's own TCP.
func inject(t *testing.T, n *lab.Node, from, to netip.AddrPort, seq uint32, flags lab.Flags) {
	t.Helper()
	network := "ip4:tcp"
	if from.Addr().Is6() {
		network = "ip6:tcp"
	}
	var conn net.PacketConn
	err := n.Do(func() (err error) {
		conn, err = net.ListenPacket(network, from.Addr().String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.WriteTo(segment(from, to, seq, flags), &net.IPAddr{IP: to.Addr().AsSlice()}); err != nil {
		t.Fatal(fmt.Errorf("inject %v: %w", flags, err))
	}
}

// segment is a TCP header alone, with its checksum (RFC 9293 section 3.1): one
// with a wrong checksum would be dropped for that.
func segment(from, to netip.AddrPort, seq uint32, flags lab.Flags) []byte {
	const size = 20
	b := binary.BigEndian.AppendUint16(nil, from.Port())
	b = binary.BigEndian.AppendUint16(b, to.Port())
	b = binary.BigEndian.AppendUint32(b, seq)
	b = binary.BigEndian.AppendUint32(b, seq) // acknowledgement
	b = append(b, size/4<<4, byte(flags), 0xff, 0xff, 0, 0, 0, 0)
	pseudo := append(from.Addr().AsSlice(), to.Addr().AsSlice()...)
	pseudo = append(pseudo, 0, unix.IPPROTO_TCP, 0, size)
	var sum uint32
	for _, part := range [][]byte{pseudo, b} {
		for i := 0; i < len(part); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(part[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[16:], ^uint16(sum))
	return b
}
