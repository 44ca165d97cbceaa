package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/bench/lab"
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
	*lab.Topology
	dir     string
	program string
	daemon  *daemon
}

// newScene builds the network, starts targets and nlb, and returns when nlb
// forwards and has found all targets healthy.
func newScene(ctx context.Context, program string) (s *scene, err error) {
	if program, err = filepath.Abs(program); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "nlb-demo-")
	if err != nil {
		return nil, err
	}
	s = &scene{dir: dir, program: program}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if s.Topology, err = lab.Routed(lab.Options{Targets: len(weights)}); err != nil {
		return s, fmt.Errorf("needs network namespaces and veth links: %w", err)
	}
	for _, t := range s.Targets {
		if _, err := t.Agent().Serve(ctx, lab.Serve{Ports: []uint16{targetPort}}); err != nil {
			return s, err
		}
		if _, err := t.Agent().Serve(ctx, lab.Serve{Ports: []uint16{headerPort}, Networks: []string{"tcp"}, Proxy: true}); err != nil {
			return s, err
		}
	}
	if err := os.WriteFile(s.path("nlb.yaml"), []byte(s.config()), 0o600); err != nil {
		return s, err
	}
	if err := s.start(); err != nil {
		return s, err
	}
	return s, s.wait(ctx, "nlb to find every target healthy", allHealthy)
}

func (s *scene) path(name string) string { return filepath.Join(s.dir, name) }

// close removes everything, whether or not the scene was complete.
func (s *scene) close() error {
	var errs []error
	if s.Topology != nil {
		errs = append(errs, s.Close()) // ends the daemon too
	}
	if s.daemon != nil {
		<-s.daemon.done
	}
	return errors.Join(append(errs, os.RemoveAll(s.dir))...)
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

// A daemon is one process of nlb serve.
type daemon struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	log  string        // the file that it prints to
}

// said is what the daemon printed.
func (d *daemon) said() string {
	text, err := os.ReadFile(d.log)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(text))
}

// start starts nlb serve on the balancer.
func (s *scene) start() error {
	// A file, because its relay prints there too, and lives on when it has ended.
	log, err := os.Create(s.path("nlb.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	// Its life is the scene's: close ends it.
	cmd := s.LB.Command(context.Background(), s.program,
		"serve", "-c", s.path("nlb.yaml"), "--state-dir", s.path("state"), "--socket", s.path("nlb.sock"))
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start nlb: %w", err)
	}
	s.daemon = &daemon{cmd, make(chan struct{}), log.Name()}
	go func(d *daemon) {
		_ = d.cmd.Wait() // wait reports an end that nobody wanted
		close(d.done)
	}(s.daemon)
	return nil
}

// kill ends nlb the way a crash does.
func (s *scene) kill() error {
	if err := s.daemon.cmd.Process.Kill(); err != nil {
		return fmt.Errorf("kill nlb: %w", err)
	}
	<-s.daemon.done
	return nil
}

// status asks the daemon.
func (s *scene) status(ctx context.Context) (*control.Status, error) {
	return control.NewClient(s.path("nlb.sock")).Status(ctx)
}

// wait waits until the daemon's status is as it should be.
func (s *scene) wait(ctx context.Context, what string, holds func(*control.Status) error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		status, err := s.status(ctx)
		if err == nil {
			if err = holds(status); err == nil {
				return nil
			}
		}
		select {
		case <-tick.C:
		case <-s.daemon.done:
			return fmt.Errorf("nlb serve has ended: %s", s.daemon.said())
		case <-ctx.Done():
			return fmt.Errorf("waited in vain for %s: %w\n%s", what, err, s.daemon.said())
		}
	}
}

// inForce holds when the kernel has what the file says.
func inForce(s *control.Status) error {
	if s.Apply.Error != "" {
		return errors.New(s.Apply.Error)
	}
	if s.Apply.ConvergedAt.IsZero() {
		return errors.New("the configuration is not in force yet")
	}
	return nil
}

// allHealthy holds when besides every target takes new flows.
func allHealthy(s *control.Status) error {
	for _, g := range s.TargetGroups {
		for _, t := range g.Targets {
			if t.State != balancer.Healthy || t.EffectiveWeight != t.Weight {
				return fmt.Errorf("%s %s is %s: %s", g.Name, t.AddrPort(), t.State, t.Description)
			}
		}
	}
	return inForce(s)
}

// newFlows is how many flows nlb says the targets of the weighted group ever
// had, by node.
func (s *scene) newFlows(ctx context.Context) (map[string]int, error) {
	status, err := s.status(ctx)
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
