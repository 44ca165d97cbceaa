package traps

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"nlb/bench/lab"
)

// A Hop is a packet on one link, or within one node by its loopback.
type Hop struct {
	From string         `json:"from"` // the sending node
	To   string         `json:"to"`   // the receiving node; "" if no watched node received it
	Src  netip.AddrPort `json:"src"`
	Dst  netip.AddrPort `json:"dst"`
	What string         `json:"what"` // such as "SYN", "udp", "icmp port unreachable"
	// Times counts it and its repetitions.
	Times int `json:"times"`
	// Note is what the sending node did to the packet that it had received, or whom
	// its PROXY header names.
	Note string `json:"note,omitempty"`
}

// path reads the way of the packets from the captures: each packet once for each
// link, those that open or refuse a connection, and all of UDP and ICMP. All
// namespaces have the kernel's one clock, so its times order them.
func (s *site) path(ctx context.Context) ([]Hop, error) {
	var all []sighting
	for _, w := range s.watched {
		packets, err := s.packets(ctx, w.node)
		if err != nil {
			return nil, err
		}
		for _, p := range packets {
			if s.scenario.hideProbes && (p.Src == s.LB.Addr4 || p.Dst == s.LB.Addr4) {
				continue
			}
			if telling(p) || s.scenario.showData && p.Flags&lab.PSH != 0 {
				all = append(all, sighting{p, w.node.Name})
			}
		}
	}
	slices.SortStableFunc(all, func(a, b sighting) int { return a.Time.Compare(b.Time) })
	return hops(all), nil
}

// A sighting is a packet at a node.
type sighting struct {
	lab.Packet
	node string
}

// telling leaves out what says nothing new: data takes the way of the SYN. A PROXY
// header is what a relay adds to it.
func telling(p lab.Packet) bool {
	return p.Proto != unix.IPPROTO_TCP || p.Flags&(lab.SYN|lab.RST) != 0 || introduces(p)
}

// introduces tells the segment that has a PROXY v2 header.
func introduces(p lab.Packet) bool {
	_, ok := p.ProxySource()
	return ok
}

// mostHops bounds a path. What comes later repeats what was shown.
const mostHops = 40

// hops pairs what nodes sent with what others received.
func hops(all []sighting) []Hop {
	taken := make([]bool, len(all))
	path := []Hop{} // not nil: an array in JSON, too
	for i, p := range all {
		if taken[i] || len(path) == mostHops {
			continue
		}
		h := Hop{Src: p.From(), Dst: p.To(), What: what(p.Packet), Times: 1}
		if p.Out {
			h.From = p.node
			if j := received(all, taken, i); j >= 0 {
				taken[j] = true
				h.To = all[j].node
			}
			h.Note = rewriting(all[:i], p)
			if client, ok := p.ProxySource(); ok && !passedOn(all[:i], p) {
				h.Note = fmt.Sprintf("the header names %v", client)
			}
		} else {
			h.To = p.node
		}
		path = appendHop(path, h)
	}
	return path
}

// received finds the packet that was sent as all[i] where it arrived.
func received(all []sighting, taken []bool, i int) int {
	for j := i + 1; j < len(all); j++ {
		p, q := all[i], all[j]
		if !q.Out && !taken[j] && same(p.Packet, q.Packet) && (q.node != p.node || p.Iface == "lo" && q.Iface == "lo") {
			return j
		}
	}
	return -1
}

func same(p, q lab.Packet) bool {
	return p.Proto == q.Proto && p.From() == q.From() && p.To() == q.To() && what(p) == what(q)
}

// appendHop counts a repetition where it was first seen.
func appendHop(path []Hop, h Hop) []Hop {
	for i := range path {
		was := path[i]
		was.Times, h.Times = 1, 1
		if was == h {
			path[i].Times++
			return path
		}
	}
	return append(path, h)
}

// rewriting tells what a node changed of a packet that it passed on: the last
// one it received with the same flags, whose ends are not the same.
func rewriting(before []sighting, p sighting) string {
	for _, q := range slices.Backward(before) {
		if q.node != p.node || q.Out || q.Proto != p.Proto || what(q.Packet) != what(p.Packet) || q.Iface == "lo" {
			continue
		}
		switch src, dst := q.From() != p.From(), q.To() != p.To(); {
		case src && dst && (q.SrcPort == p.SrcPort || q.DstPort == p.DstPort):
			return p.node + " rewrote both"
		case src && !dst:
			return p.node + " rewrote the source"
		case dst && !src:
			return p.node + " rewrote the destination"
		}
		return ""
	}
	return ""
}

// passedOn tells a packet that its sender had received.
func passedOn(before []sighting, p sighting) bool {
	return slices.ContainsFunc(before, func(q sighting) bool { return q.node == p.node && !q.Out && same(q.Packet, p.Packet) })
}

// what names a packet.
func what(p lab.Packet) string {
	switch p.Proto {
	case unix.IPPROTO_TCP:
		switch {
		case p.Flags&lab.RST != 0:
			return "RST"
		case p.Flags&lab.SYN != 0 && p.Flags&lab.ACK != 0:
			return "SYN+ACK"
		case p.Flags&lab.SYN != 0:
			return "SYN"
		case introduces(p):
			return "PROXY header"
		case p.Flags&lab.PSH != 0:
			return "data"
		}
		return p.Flags.String()
	case unix.IPPROTO_UDP:
		return "udp"
	case unix.IPPROTO_ICMP:
		return icmpName(p.ICMPType, p.ICMPCode)
	case unix.IPPROTO_ICMPV6:
		return icmp6Name(p.ICMPType, p.ICMPCode)
	}
	return fmt.Sprintf("protocol %d", p.Proto)
}

// icmpName is the message's name (RFC 792; RFC 1812, 5.2.7.1).
func icmpName(kind, code uint8) string {
	if kind == 3 {
		names := []string{"net", "host", "protocol", "port"}
		if int(code) < len(names) {
			return "icmp " + names[code] + " unreachable"
		}
	}
	return fmt.Sprintf("icmp type %d code %d", kind, code)
}

// icmp6Name is the message's name (RFC 4443, 3.1).
func icmp6Name(kind, code uint8) string {
	if names := map[uint8]string{0: "net", 3: "host", 4: "port"}; kind == 1 && names[code] != "" {
		return "icmp6 " + names[code] + " unreachable"
	}
	return fmt.Sprintf("icmp6 type %d code %d", kind, code)
}
