package traps

import (
	"context"
	"fmt"
	"net/netip"

	"nlb/bench/lab"
)

// martianAt judges a call that came to nothing because the packet reached node
// with one of node's own addresses as its source.
func (s *site) martianAt(ctx context.Context, node *lab.Node, source netip.Addr, r lab.Reply, log kernelLog) (Finding, error) {
	came, arrived, err := s.seen(ctx, node, func(p lab.Packet) bool {
		return !p.Out && p.Iface != "lo" && p.Src == source && p.Flags == lab.SYN
	})
	if err != nil {
		return Finding{}, err
	}
	_, replied, err := s.sofar(ctx, node, func(p lab.Packet) bool {
		return p.Out && p.From() == came.To() && p.To() == came.From() && p.Flags&(lab.ACK|lab.RST) != 0
	})
	if err != nil {
		return Finding{}, err
	}
	f := Finding{Works: r.Err == ""}
	if !arrived || replied || f.Works {
		return f, nil
	}
	f.Evidence = fmt.Sprintf("%s; the caller: %s", martianWords(came.From(), came.To(), node.Name), r.Err)
	if line := log.martian(came.Dst, came.Src); line != "" {
		f.Evidence = fmt.Sprintf("the kernel of %s: %q; the caller: %s", node.Name, line, r.Err)
	}
	return f, nil
}

// martianWords tells of a martian without the kernel's log.
func martianWords(from, to netip.AddrPort, node string) string {
	return fmt.Sprintf("%v > %v arrived at %s, which has %v itself: %s, no answer", from, to, node, from.Addr(), martian)
}

// strangerAt judges a call that came to nothing because the answer came from
// somebody the caller had never called: it resets what it did not ask for
// (RFC 9293, 3.5.2).
func (s *site) strangerAt(ctx context.Context, caller *lab.Node, stranger netip.AddrPort, r lab.Reply) (Finding, error) {
	_, came, err := s.seen(ctx, caller, func(p lab.Packet) bool {
		return !p.Out && p.From() == stranger && p.Flags == lab.SYN|lab.ACK
	})
	if err != nil {
		return Finding{}, err
	}
	_, reset, err := s.seen(ctx, caller, func(p lab.Packet) bool {
		return p.Out && p.To() == stranger && p.Flags&lab.RST != 0
	})
	if err != nil {
		return Finding{}, err
	}
	f := Finding{Works: r.Err == ""}
	if came && reset && !f.Works {
		f.Evidence = fmt.Sprintf("%s called %v, was answered by %v and sent it a RST; the call: %s", caller.Name, vip, stranger, r.Err)
	}
	return f, nil
}

// target is a node's end of a conversation.
func target(n *lab.Node) netip.AddrPort { return netip.AddrPortFrom(n.Addr4, targetPort) }
