package traps

import (
	"context"
	"fmt"
	"net/netip"

	"nlb/bench/lab"
)

var proxyProtocolServerFirst = Scenario{
	Name:  "proxy-protocol-server-first",
	Title: "a client waits for the greeting of a server that waits for a PROXY header",
	Drawing: `
   c1 203.0.113.9 ──── lb 10.0.1.1 ──── t1 10.0.1.11
                       VIP              speaks first, like SMTP, SSH, MySQL
                       198.51.100.10`,
	Naive: "a relay on lb sends the PROXY header with the client's first bytes",
	Why: "The client says nothing before it is greeted, the server does not greet before it knows its client, and " +
		"the relay waits for the client to tell the server: all three wait.",
	Cure:    "client_ip: proxy_protocol_v2: nlb's relay sends the header as soon as it is connected.",
	build:   lab.Routed,
	options: lab.Options{Targets: 1}, showData: true,
	naive: naiveServerFirst,
	cure: func(ctx context.Context, s *site) (f Finding, err error) {
		if s.options.WithoutCure {
			return naiveServerFirst(ctx, s)
		}
		c1, t1 := s.Clients[0], s.Targets[0]
		if err := s.greet(ctx, t1); err != nil {
			return f, err
		}
		if err := s.nlb(ctx, s.LB, config(s.LB.Addr4, "client_ip: proxy_protocol_v2", at(t1)), settled); err != nil {
			return f, err
		}
		if err := s.watch(ctx, c1, s.LB, t1); err != nil {
			return f, err
		}
		r, err := s.call(ctx, c1, lab.Call{Silent: true, Timeout: answerTime})
		if err != nil || r.Err != "" {
			return Finding{Evidence: "the caller: " + r.Err}, err
		}
		return Finding{
			Works:    r.Client.Addr() == c1.Addr4 && r.Peer == s.LB.Addr4,
			Evidence: fmt.Sprintf("%s greeted at once; it saw %v, and %v in the header", r.Who, r.Peer, r.Client.Addr()),
		}, nil
	},
}

// greet makes a node a target that reads a PROXY header and then speaks first.
func (s *site) greet(ctx context.Context, n *lab.Node) error {
	return s.listen(ctx, n, lab.Serve{Ports: []uint16{targetPort}, Networks: []string{"tcp"}, Proxy: true, Greet: true})
}

func naiveServerFirst(ctx context.Context, s *site) (f Finding, err error) {
	c1, t1 := s.Clients[0], s.Targets[0]
	if err := s.greet(ctx, t1); err != nil {
		return f, err
	}
	if err := s.bind(s.LB); err != nil {
		return f, err
	}
	relay, err := s.LB.Agent().Relay(ctx, lab.Relay{Listen: vip, Target: netip.AddrPortFrom(t1.Addr4, targetPort)})
	if err != nil {
		return f, err
	}
	s.later(relay.Close)
	if err := s.watch(ctx, c1, s.LB, t1); err != nil {
		return f, err
	}
	r, err := s.call(ctx, c1, lab.Call{Silent: true, Timeout: briefly})
	if err != nil {
		return f, err
	}
	_, connected, err := s.seen(ctx, s.LB, func(p lab.Packet) bool {
		return !p.Out && p.From() == target(t1) && p.Flags == lab.SYN|lab.ACK
	})
	if err != nil {
		return f, err
	}
	f.Works = r.Err == ""
	_, spoke, err := s.sofar(ctx, t1, func(p lab.Packet) bool { return p.Flags&lab.PSH != 0 })
	if connected && !spoke && !f.Works {
		f.Evidence = "the relay was connected to t1, and no byte was sent in either direction; the caller: " + r.Err
	}
	return f, err
}
