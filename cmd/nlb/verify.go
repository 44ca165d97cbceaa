package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/config"
	"nlb/proxyproto/verify"
)

func newVerify() *cobra.Command {
	var (
		out     output
		timeout time.Duration
	)
	cmd := &cobra.Command{
		Use:   "verify GROUP -c FILE",
		Short: "Ask the targets of a group whether they take PROXY v2 headers",
		Long: `verify opens two connections to each target of a group, one with a PROXY v2 LOCAL header
and one without, and says what came back. What follows the header is what the group's
health check speaks. The group may have any client_ip: ask before it is changed to
proxy_protocol_v2, and after its targets were.

  required     connections with a header are served, others are not
  accepted     both kinds of connections are served
  refused      connections without a header are served, others are not
  undecided    several kinds of servers answer like this; only HTTP and HTTPS tell for sure
  unreachable  there was no connection

Exit codes: 0 no target refuses or is unreachable, 1 one does, 2 usage error.`,
		Example: "  nlb verify web -c /etc/nlb/nlb.yaml",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError{fmt.Errorf("verify wants one target group, such as: nlb verify web -c FILE")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			path, err := configFile(cmd.Flags())
			if err != nil {
				return err
			}
			cfg, err := config.Load(path, cmd.Flags())
			if err != nil {
				return err
			}
			g := cfg.Spec.Group(args[0])
			if g == nil {
				return fmt.Errorf("%s has no target group %q", path, args[0])
			}
			answers := verifyTargets(cmd.Context(), cfg.Spec, g, timeout)
			if err := printAnswers(cmd.OutOrStdout(), out, answers); err != nil {
				return err
			}
			for _, a := range answers {
				if a.Verdict == verify.Refused || a.Verdict == verify.Unreachable {
					return exitStatus(exitFailed)
				}
			}
			return nil
		},
	}
	addConfig(cmd.Flags())
	addOutput(cmd, &out)
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Second, "how long to wait for a target")
	return cmd
}

// An answer is what one target does with a header.
type answer struct {
	Address netip.Addr  `json:"address"`
	Port    uint16      `json:"port"`
	Verdict verify.Kind `json:"verdict"`
	Detail  string      `json:"detail"`
}

// verifyTargets asks all targets of a group side by side: silent ones take their
// time.
func verifyTargets(ctx context.Context, spec *balancer.Spec, g *balancer.TargetGroup, timeout time.Duration) []answer {
	const atOnce = 64
	answers := make([]answer, len(g.Targets))
	var all errgroup.Group // of which none fails
	all.SetLimit(atOnce)
	for i, t := range g.Targets {
		all.Go(func() error {
			v := verify.Target(ctx, dialFrom(spec.ProbeSource(g, t.Address)), t.AddrPort(), verify.Options{
				Check: verifyChecks[g.HealthCheck.Protocol],
				Path:  g.HealthCheck.Path, Host: g.HealthCheck.Host, Timeout: timeout,
			})
			answers[i] = answer{t.Address, t.Port, v.Kind, v.Detail}
			return nil
		})
	}
	_ = all.Wait()
	return answers
}

var verifyChecks = map[balancer.CheckProtocol]verify.Check{
	balancer.CheckTCP: verify.TCP, balancer.CheckHTTP: verify.HTTP, balancer.CheckHTTPS: verify.HTTPS,
}

// dialFrom connects as a health check does: from its source, and so that no rule
// of ours takes it for a client.
func dialFrom(source netip.Addr) verify.Dial {
	d := net.Dialer{KeepAlive: -1, Control: func(_, _ string, raw syscall.RawConn) error {
		var marked error
		err := raw.Control(func(fd uintptr) {
			marked = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(balancer.ProbeMark))
		})
		if err == nil && marked != nil {
			err = fmt.Errorf("set SO_MARK (needs CAP_NET_ADMIN): %w", marked)
		}
		return err
	}}
	d.SetMultipathTCP(false)
	if source.IsValid() {
		d.LocalAddr = &net.TCPAddr{IP: source.AsSlice()}
	}
	return func(ctx context.Context, target netip.AddrPort) (net.Conn, error) {
		return d.DialContext(ctx, "tcp", target.String())
	}
}

func printAnswers(w io.Writer, out output, answers []answer) error {
	if out == jsonText {
		return printJSON(w, answers)
	}
	rows := [][]string{{"TARGET", "PROXY V2", "DETAIL"}}
	for _, a := range answers {
		rows = append(rows, []string{netip.AddrPortFrom(a.Address, a.Port).String(), string(a.Verdict), a.Detail})
	}
	var b bytes.Buffer
	renderRows(&b, rows)
	_, err := w.Write(b.Bytes())
	return err
}
