package measure

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/bench/lab"
)

// Forwarding is how nlb sends on what comes for the VIP: to all targets alike.
// Texts are as in the configuration.
type Forwarding struct {
	Dataplane string // empty for nlb's default
	Protocol  string // TCP_UDP if empty
	ClientIP  string
	Untracked bool // relay.conntrack: false
	Listeners int  // from Port upwards
	Flowtable bool
	// Targets are where they go; in a Site, its own if there are none here.
	Targets []netip.Addr
}

// Config is nlb's configuration in this network.
func (s *Site) Config(f Forwarding) string {
	if len(f.Targets) == 0 {
		for _, t := range s.Targets {
			f.Targets = append(f.Targets, t.Addr4)
		}
	}
	return f.Config(s.LB.Addr4)
}

// Config is nlb's configuration, for a balancer with that address. Health is found
// once, at the start.
func (f Forwarding) Config(source netip.Addr) string {
	var b strings.Builder
	if f.Dataplane != "" {
		fmt.Fprintf(&b, "dataplane: %s\n", f.Dataplane)
	}
	fmt.Fprintf(&b, "flowtable: %v\n", f.Flowtable)
	if f.Untracked {
		b.WriteString("relay: {conntrack: false}\n")
	}
	protocol := cmp.Or(f.Protocol, "TCP_UDP")
	fmt.Fprintf(&b, "source_addresses: [%s]\n", source)
	fmt.Fprintf(&b, "vips: [{address: %s, interface: lo}]\n", lab.VIP4)
	b.WriteString("metrics: {address: \"\"}\nlisteners:\n")
	for i := range f.Listeners {
		fmt.Fprintf(&b, "  - {name: bench-%d, vip: %s, protocol: %s, port: %d, forward: [{target_group: bench}]}\n", i, lab.VIP4, protocol, Port+i)
	}
	fmt.Fprintf(&b, "target_groups:\n  - name: bench\n    protocol: %s\n    port: %d\n    client_ip: %s\n", protocol, Port, f.ClientIP)
	fmt.Fprintf(&b, "    health_check: {port: %d, interval: 300s}\n    targets:\n", ProbePort)
	for _, t := range f.Targets {
		fmt.Fprintf(&b, "      - {address: %s}\n", t)
	}
	return b.String()
}

// NLB is the command that runs an nlb with a configuration on the balancer's
// node. Its life is the network's: Close ends it.
func (s *Site) NLB(program, config string) (*exec.Cmd, error) {
	program, err := filepath.Abs(program)
	if err != nil {
		return nil, err
	}
	file, err := s.Write("nlb.yaml", config)
	if err != nil {
		return nil, err
	}
	return s.LB.Command(context.Background(), program,
		"serve", "-c", file, "--state-dir", s.Path("state"), "--socket", s.socket()), nil
}

func (s *Site) socket() string { return s.Path("nlb.sock") }

// StartNLB starts nlb and returns when it forwards to all targets, as Forwards
// has it. The errors are also those of AwaitNLB.
func (s *Site) StartNLB(ctx context.Context, program, config string, limit time.Duration) error {
	cmd, err := s.NLB(program, config)
	if err != nil {
		return err
	}
	if err := s.Start(cmd); err != nil {
		return fmt.Errorf("start nlb: %w", err)
	}
	return s.AwaitNLB(ctx, limit, Forwards)
}

// Status asks nlb. The error is the client's.
func (s *Site) Status(ctx context.Context) (*control.Status, error) {
	return control.NewClient(s.socket()).Status(ctx)
}

// AwaitNLB waits until nlb's status is as it should be, which is when holds has
// no error. It is an error if that takes longer than limit or nlb ends before;
// what nlb has printed is in the error.
func (s *Site) AwaitNLB(ctx context.Context, limit time.Duration, holds func(*control.Status) error) error {
	err := s.Balancer.Await(ctx, limit, func(ctx context.Context) error {
		status, err := s.Status(ctx)
		if err != nil {
			return err
		}
		return holds(status)
	})
	switch {
	case errors.Is(err, ErrEnded):
		return fmt.Errorf("nlb serve has ended: %s", s.Balancer.Said())
	case err != nil:
		return fmt.Errorf("waited in vain for nlb: %w\n%s", err, s.Balancer.Said())
	}
	return nil
}

// InForce says what is missing until the kernel has what the configuration says.
func InForce(s *control.Status) error {
	switch {
	case s.Apply.Error != "":
		return errors.New(s.Apply.Error)
	case s.Apply.ConvergedAt.IsZero():
		return errors.New("the configuration is not in force yet")
	}
	return nil
}

// Forwards says what is missing until the kernel forwards to all targets: each
// has been found healthy, and InForce.
func Forwards(s *control.Status) error {
	for _, g := range s.TargetGroups {
		for _, t := range g.Targets {
			if t.State != balancer.Healthy || t.EffectiveWeight != t.Weight {
				return fmt.Errorf("%s %s is %s: %s", g.Name, t.AddrPort(), t.State, t.Description)
			}
		}
	}
	return InForce(s)
}
