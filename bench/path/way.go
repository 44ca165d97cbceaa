package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"nlb/bench/lab"
	"nlb/bench/measure"
)

const (
	targets   = 3
	port      = 80   // of the VIP and of the targets
	probePort = 8080 // of the targets, for health checks
)

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
	*lab.Topology
	dir     string
	daemon  measure.Daemon // nlb, where it runs
	sockets sockets
}

// newSite builds the network of a way, which is ready for traffic then.
func newSite(ctx context.Context, w way, program string) (*site, error) {
	s := &site{way: w}
	if err := s.build(ctx, program); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *site) build(ctx context.Context, program string) (err error) {
	if s.Topology, err = lab.Routed(lab.Options{Targets: targets, Offload: true}); err != nil {
		return fmt.Errorf("needs network namespaces and veth links: %w", err)
	}
	if err := s.listen(); err != nil {
		return err
	}
	switch {
	case s.clientIP != "":
		return s.serve(ctx, program)
	case s.nft != "":
		return s.load(ctx)
	}
	return nil
}

// close removes the network and all in it, complete or not.
func (s *site) close() error {
	s.sockets.close()
	var errs []error
	if s.Topology != nil {
		errs = append(errs, s.Topology.Close()) // ends the daemon too
	}
	s.daemon.Join()
	if s.dir != "" {
		errs = append(errs, os.RemoveAll(s.dir))
	}
	return errors.Join(errs...)
}

// load gives the way's ruleset to nft.
func (s *site) load(ctx context.Context) error {
	cmd := s.LB.Command(ctx, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(s.ruleset())
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft -f: %w: %s", err, out)
	}
	return nil
}

// ruleset is the way's with this network's addresses.
func (s *site) ruleset() string {
	names := []string{"VIP", lab.VIP4.String()}
	for i, t := range s.Targets {
		names = append(names, fmt.Sprint("T", i), t.Addr4.String())
	}
	return strings.NewReplacer(names...).Replace(s.nft)
}

// config is nlb's configuration. Health is found once, at the start.
func (s *site) config() string {
	var b strings.Builder
	fmt.Fprintf(&b, "source_addresses: [%s]\n", s.LB.Addr4)
	fmt.Fprintf(&b, "vips: [{address: %s, interface: lo}]\n", lab.VIP4)
	b.WriteString("metrics: {address: \"\"}\nlisteners:\n")
	fmt.Fprintf(&b, "  - {name: bench, vip: %s, protocol: TCP_UDP, port: %d, forward: [{target_group: bench}]}\n", lab.VIP4, port)
	fmt.Fprintf(&b, "target_groups:\n  - name: bench\n    protocol: TCP_UDP\n    port: %d\n    client_ip: %s\n", port, s.clientIP)
	fmt.Fprintf(&b, "    health_check: {port: %d, interval: 300s}\n    targets:\n", probePort)
	for _, t := range s.Targets {
		fmt.Fprintf(&b, "      - {address: %s}\n", t.Addr4)
	}
	return b.String()
}

// serve starts nlb and returns when it forwards to all targets.
func (s *site) serve(ctx context.Context, program string) error {
	program, err := filepath.Abs(program)
	if err != nil {
		return err
	}
	if s.dir, err = os.MkdirTemp("", "nlb-bench-"); err != nil {
		return err
	}
	if err := os.WriteFile(s.path("nlb.yaml"), []byte(s.config()), 0o600); err != nil {
		return err
	}
	// Its life is the network's: close ends it.
	cmd := s.LB.Command(context.Background(), program,
		"serve", "-c", s.path("nlb.yaml"), "--state-dir", s.path("state"), "--socket", s.path("nlb.sock"))
	if err := s.daemon.Start(cmd); err != nil {
		return fmt.Errorf("start nlb: %w", err)
	}
	return s.awaitHealthy(ctx)
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }
