package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"

	"nlb/balancer/control"
	"nlb/bench/lab"
	"nlb/bench/measure"
)

// The ports of the VIPs. All but the last have a target group each, by mode.
const (
	portPreserve uint16 = 81 + iota
	portHairpin
	portSNAT
	portRelayed
	portWeighted
)

// clientIPs are the modes by port.
var clientIPs = []struct {
	port uint16
	name string
}{{portPreserve, "preserve"}, {portHairpin, "hairpin_snat"}, {portSNAT, "snat"}, {portRelayed, "proxy_protocol_v2"}}

// weighted is the target group behind portWeighted.
const weighted = "weighted"

// weights are those of the targets t1, t2 … behind portWeighted.
var weights = []int{1, 2, 3, 4}

// Targets read PROXY headers on the second port only.
const (
	targetPort = 8080
	headerPort = 8081
)

// A scene is the network with nlb in it.
type scene struct {
	measure.Site
	program string
}

// newScene builds the network, starts targets and nlb, and returns when nlb
// forwards and has found all targets healthy.
func newScene(ctx context.Context, program string) (*scene, error) {
	s := &scene{program: program}
	if err := s.build(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *scene) build(ctx context.Context) error {
	if err := s.Build(lab.Options{Targets: len(weights)}); err != nil {
		return err
	}
	for _, t := range s.Targets {
		if _, err := t.Agent().Serve(ctx, lab.Serve{Ports: []uint16{targetPort}}); err != nil {
			return err
		}
		if _, err := t.Agent().Serve(ctx, lab.Serve{Ports: []uint16{headerPort}, Networks: []string{"tcp"}, Proxy: true}); err != nil {
			return err
		}
	}
	return s.serve(ctx, measure.Forwards)
}

// serve starts nlb and returns when its status is as it should be.
func (s *scene) serve(ctx context.Context, holds func(*control.Status) error) error {
	cmd, err := s.NLB(s.program, s.config())
	if err != nil {
		return err
	}
	if err := s.Start(cmd); err != nil {
		return fmt.Errorf("start nlb: %w", err)
	}
	return s.AwaitNLB(ctx, timeout, holds)
}

// config is nlb's configuration file.
func (s *scene) config() string {
	var b strings.Builder
	fmt.Fprintf(&b, "source_addresses: [%s, %q]\n", s.LB.Addr4, s.LB.Addr6)
	fmt.Fprintf(&b, "vips: [{address: %s, interface: lo}, {address: %q, interface: lo}]\n", lab.VIP4, lab.VIP6)
	b.WriteString("metrics: {address: \"\"}\nlisteners:\n")
	listener := func(port uint16, group string) {
		for i, vip := range []netip.Addr{lab.VIP4, lab.VIP6} {
			fmt.Fprintf(&b, "  - {name: p%d-%d, vip: %q, protocol: %s, port: %d, forward: [{target_group: %s}]}\n",
				port, i, vip, protocol(port), port, group)
		}
	}
	for _, m := range clientIPs {
		listener(m.port, groupName(m.name))
	}
	listener(portWeighted, weighted)
	b.WriteString("target_groups:\n")
	group := func(port uint16, name, clientIP string, targets []*lab.Node, weight func(int) int) {
		at := targetPort
		if port == portRelayed {
			at = headerPort
		}
		fmt.Fprintf(&b, "  - name: %s\n    protocol: %s\n    port: %d\n    client_ip: %s\n", name, protocol(port), at, clientIP)
		b.WriteString("    health_check: {interval: 1s, timeout: 1s}\n    targets:\n")
		for i, t := range targets {
			for _, a := range []netip.Addr{t.Addr4, t.Addr6} {
				fmt.Fprintf(&b, "      - {address: %q, weight: %d}\n", a, weight(i))
			}
		}
	}
	for _, m := range clientIPs {
		group(m.port, groupName(m.name), m.name, s.Targets[:1], func(int) int { return 1 })
	}
	group(portWeighted, weighted, "preserve", s.Targets, func(i int) int { return weights[i] })
	return b.String()
}

// protocol is what a port of the VIPs takes: there are no relays for UDP.
func protocol(port uint16) string {
	if port == portRelayed {
		return "TCP"
	}
	return "TCP_UDP"
}

// groupName is a mode as a target group's name, which has no underscores.
func groupName(clientIP string) string { return strings.ReplaceAll(clientIP, "_", "-") }

// kill ends nlb the way a crash does.
func (s *scene) kill() error {
	if err := s.Balancer.Signal(os.Kill); err != nil {
		return fmt.Errorf("kill nlb: %w", err)
	}
	s.Balancer.Join()
	return nil
}

// newFlows is how many flows nlb says the targets of the weighted group ever
// had, by node.
func (s *scene) newFlows(ctx context.Context) (map[string]int, error) {
	status, err := s.Status(ctx)
	if err != nil {
		return nil, err
	}
	flows := make(map[string]int)
	for _, g := range status.TargetGroups {
		if g.Name != weighted {
			continue
		}
		for _, t := range g.Targets {
			if t.NewFlowsTotal == nil {
				return nil, fmt.Errorf("nlb does not count: %s", status.Apply.CountersError)
			}
			for _, n := range s.Targets {
				if t.Address == n.Addr4 || t.Address == n.Addr6 {
					flows[n.Name] += int(*t.NewFlowsTotal)
				}
			}
		}
	}
	return flows, nil
}

// counter matches an entry of nft list counters.
var counter = regexp.MustCompile(`counter (\S+) \{\s+(?:comment "[^"]*"\s+)?packets (\d+) bytes \d+`)

// counters reads how many packets nlb's rules counted, by the counter's name.
func (s *scene) counters(ctx context.Context) (map[string]int, error) {
	cmd := s.LB.Command(ctx, "nft", "list", "counters", "table", "inet", "nlb")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	text, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("nft list counters: %w: %s", err, &stderr)
	}
	return parseCounters(string(text)), nil
}

func parseCounters(text string) map[string]int {
	counts := make(map[string]int)
	for _, m := range counter.FindAllStringSubmatch(text, -1) {
		counts[m[1]], _ = strconv.Atoi(m[2]) // digits
	}
	return counts
}
