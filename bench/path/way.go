package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"nlb/bench/lab"
	"nlb/bench/measure"
)

const targets = 3

// A way is one way from a client to a target.
type way struct {
	name string
	// against is the way that this one is compared with; empty for none.
	against string
	// nft is a ruleset for nft -f, with VIP and T0 … for the addresses.
	nft string
	// clientIP is nlb's mode. Without it and without a ruleset the balancer is
	// only a router and clients know the targets.
	clientIP string
}

// The smallest rulesets that do the job.
const (
	minimalDNAT = `table ip minimal {
	chain prerouting {
		type nat hook prerouting priority dstnat
		ip daddr VIP tcp dport 80 dnat to jhash ip saddr . tcp sport mod 3 map { 0 : T0, 1 : T1, 2 : T2 }
		ip daddr VIP udp dport 80 dnat to jhash ip saddr . udp sport mod 3 map { 0 : T0, 1 : T1, 2 : T2 }
	}
}
`
	minimalSNAT = minimalDNAT + `table ip minimal {
	chain postrouting {
		type nat hook postrouting priority srcnat
		ct status dnat masquerade
	}
}
`
)

const (
	direct      = "no balancer, a router"
	minimal     = "minimal DNAT"
	masquerade  = "minimal DNAT + masquerade"
	secondTime  = "minimal DNAT, a second time"
	nlbPreserve = "nlb preserve"
	nlbHairpin  = "nlb hairpin_snat"
	nlbSNAT     = "nlb snat"
)

var ways = []way{
	{name: direct},
	{name: minimal, nft: minimalDNAT},
	{name: secondTime, against: minimal, nft: minimalDNAT},
	{name: nlbPreserve, against: minimal, clientIP: "preserve"},
	{name: nlbHairpin, against: minimal, clientIP: "hairpin_snat"},
	{name: masquerade, nft: minimalSNAT},
	{name: nlbSNAT, against: masquerade, clientIP: "snat"},
}

// A site is a way made real: a network and what is in it.
type site struct {
	way
	measure.Site
	sockets measure.Sockets
}

// newSite builds the network of a way, which is ready for traffic then.
func newSite(ctx context.Context, w way, program string) (*site, error) {
	s := &site{way: w}
	if err := s.build(ctx, program); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *site) build(ctx context.Context, program string) error {
	if err := s.Build(lab.Options{Targets: targets, Offload: true}); err != nil {
		return err
	}
	for _, t := range s.Targets {
		if err := t.Do(func() error { return s.sockets.Listen(t.Addr4) }); err != nil {
			return fmt.Errorf("%s: %w", t.Name, err)
		}
	}
	switch {
	case s.clientIP != "":
		return s.StartNLB(ctx, program, s.Config(measure.Forwarding{ClientIP: s.clientIP, Listeners: 1}), 15*time.Second)
	case s.nft != "":
		return s.load(ctx)
	}
	return nil
}

// close removes the network and all in it, complete or not.
func (s *site) close() error {
	s.sockets.Close()
	return s.Close()
}

// load gives the way's ruleset to nft.
func (s *site) load(ctx context.Context) error {
	cmd := s.LB.Command(ctx, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(s.Expand(s.nft))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft -f: %w: %s", err, out)
	}
	return nil
}
