package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/balancer/explain"
	"nlb/balancer/host"
	"nlb/config"
)

func newExplain() *cobra.Command {
	var (
		socket   string
		out      output
		protocol = ipProtocol(balancer.ProtoTCP)
	)
	cmd := &cobra.Command{
		Use:   "explain SRC[:PORT] DST:PORT",
		Short: "Say which way a flow would take, without sending a packet",
		Long: `explain says what would become of a new flow from SRC to DST: the listener, whether its
allow list lets the client in, target group, target, what is rewritten on the way, whether
client and target share a host, and whom the target takes for the client; or why the flow
is dropped. A flow that exists stays with its target, which nlb flows shows.

The daemon answers, by the configuration and the health that are in force. Where none runs,
-c FILE says what to go by; the hash key and the last known health come from the state folder.
The answer is exact: the kernel's rules choose by the same hash of the same fields. IPVS
has a hash of its own, so that with dataplane: ipvs the answer has the targets it may choose.

Without PORT the answer has each possible outcome, and the part of all source ports that
leads to it; where stickiness leaves nothing to the port, it is one.

Chains of others that the flow meets are named if they drop or change it, or if they may:
not all that nftables can match is known beforehand. What iptables-legacy and eBPF programs
do is not looked at.

Verdicts: forward, drop, none (not to a VIP). Exit codes: 0 whatever the verdict, 1 failed,
2 usage error.`,
		Example: `  nlb explain 203.0.113.9:40112 198.51.100.10:80
  nlb explain 10.0.1.11 198.51.100.10:53 --protocol udp
  nlb explain '[2001:db8:99::9]:40112' '[2001:db8:77::10]:80' -o json`,
		Args: func(_ *cobra.Command, args []string) error {
			_, err := parseQuestion(args, protocol)
			return err
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			q, err := parseQuestion(args, protocol)
			if err != nil {
				return err
			}
			a, err := control.NewClient(socket).Explain(cmd.Context(), q)
			if errors.Is(err, control.ErrNotRunning) {
				a, err = explainFile(cmd.Context(), cmd.Flags(), socket, q, err)
			}
			if err != nil {
				return err
			}
			if out == jsonText {
				return printJSON(cmd.OutOrStdout(), a)
			}
			return renderAnswer(cmd.OutOrStdout(), a)
		},
	}
	addConfig(cmd.Flags())
	addSocket(cmd.Flags(), &socket)
	addOutput(cmd, &out)
	cmd.Flags().Var(&protocol, "protocol", "the flow's protocol")
	_ = cmd.RegisterFlagCompletionFunc("protocol", cobra.FixedCompletions(
		[]cobra.Completion{"tcp", "udp"}, cobra.ShellCompDirectiveNoFileComp)) // fails only for an unknown flag
	return cmd
}

// An ipProtocol is a flag that says tcp or udp.
type ipProtocol uint8

// String, Set and Type make ipProtocol a pflag.Value.
func (p *ipProtocol) String() string {
	if uint8(*p) == balancer.ProtoUDP {
		return "udp"
	}
	return "tcp"
}
func (*ipProtocol) Type() string { return "tcp|udp" }
func (p *ipProtocol) Set(s string) error {
	switch strings.ToLower(s) {
	case "tcp":
		*p = ipProtocol(balancer.ProtoTCP)
	case "udp":
		*p = ipProtocol(balancer.ProtoUDP)
	default:
		return errors.New("must be tcp or udp")
	}
	return nil
}

func parseQuestion(args []string, protocol ipProtocol) (q explain.Question, err error) {
	if len(args) != 2 {
		return q, usageError{errors.New("explain wants a client and a destination, such as: nlb explain 203.0.113.9:40112 198.51.100.10:80")}
	}
	q.Protocol = uint8(protocol)
	if q.Client, err = parseEnd(args[0]); err != nil {
		return q, usageError{fmt.Errorf("%q is no client: want ADDR or ADDR:PORT, such as 203.0.113.9:40112 or [2001:db8::9]:40112", args[0])}
	}
	if q.Destination, err = parseEnd(args[1]); err != nil || q.Destination.Port() == 0 {
		return q, usageError{fmt.Errorf("%q is no destination: want ADDR:PORT, such as 198.51.100.10:80 or [2001:db8::10]:80", args[1])}
	}
	if err := q.Check(); err != nil {
		return q, usageError{err}
	}
	return q, nil
}

// parseEnd reads ADDR or ADDR:PORT; without a port that is 0.
func parseEnd(text string) (netip.AddrPort, error) {
	if addr, err := netip.ParseAddr(text); err == nil {
		return netip.AddrPortFrom(addr.Unmap(), 0), nil
	}
	ap, err := netip.ParseAddrPort(text)
	if err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()), nil
}

// explainFile answers by the file that the flags name, as the daemon would that is not
// there. Without a file that is the error.
func explainFile(ctx context.Context, flags *pflag.FlagSet, socket string, q explain.Question, notRunning error) (*explain.Answer, error) {
	path, err := configFile(flags)
	if err != nil {
		return nil, fmt.Errorf("%w, or name a file with -c", notRunning)
	}
	cfg, err := config.Load(path, flags)
	if err != nil {
		return nil, err
	}
	// look would draw a key, as serve does, and the answer would be one of many.
	if _, err := balancer.LoadKey(cfg.StateDir); err != nil {
		return nil, fmt.Errorf("%w: the choice of a target depends on it, and the first nlb serve makes it", err)
	}
	seen, _, err := look(ctx, cfg, control.NewClient(socket), host.NewRouter())
	if err != nil {
		return nil, err
	}
	a := answerFor(ctx, cfg.Spec, balancer.Forward(cfg.Spec, seen).Table, q)
	a.Notes = append(a.Notes, "no daemon runs: this is what "+path+" comes to, and not what the kernel holds")
	return a, nil
}

// answerFor is what becomes of the flow by a Table and by the chains of others, as far
// as those can be read.
func answerFor(ctx context.Context, spec *balancer.Spec, table *balancer.Table, q explain.Question) *explain.Answer {
	a := explain.New(spec, table).Explain(q)
	if a.Verdict != explain.Forward {
		return &a
	}
	found, err := meetForeign(ctx, table.Dataplane, q, &a)
	if err != nil {
		a.Notes = append(a.Notes, "what chains of others do is not known: "+err.Error())
	}
	a.Meets(found)
	return &a
}

// Explain implements control.Daemon.
func (d *daemon) Explain(ctx context.Context, q explain.Question) (*explain.Answer, error) {
	s := d.reconciler.Snapshot()
	if s == nil {
		return nil, errNoPass
	}
	a := answerFor(ctx, s.Spec, s.Desired.Table, q)
	if !s.Held {
		a.Notes = append(a.Notes, "the kernel does not hold the configuration now (nlb status): this is what it should do")
	}
	return a, nil
}

// --- for people ----------------------------------------------------------------------

// renderAnswer writes an answer for people.
func renderAnswer(w io.Writer, a *explain.Answer) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %s to %s: %s\n\n", a.Protocol, a.Client, a.VIP, verdictWords(&a.Outcome))
	if a.DependsOn == "" {
		renderRows(&b, outcomeRows(&a.Outcome))
	} else {
		renderPossible(&b, a)
	}
	for _, f := range a.Foreign {
		fmt.Fprintf(&b, "\n%s\n", foreignWords(f))
	}
	for _, n := range a.Notes {
		fmt.Fprintf(&b, "\nnote: %s\n", n)
	}
	_, err := b.WriteTo(w)
	return err
}

func verdictWords(o *explain.Outcome) string {
	switch o.Verdict {
	case explain.Forward:
		return "forward to " + o.Target.AddrPort().String()
	case explain.Drop:
		return "drop, " + o.Reason
	}
	return "none, the address is no VIP"
}

func outcomeRows(o *explain.Outcome) (rows [][]string) {
	row := func(name, value string) {
		if value != "" {
			rows = append(rows, []string{name, value})
		}
	}
	row("listener", o.Listener)
	if o.Listener != "" {
		row("allow list", map[bool]string{true: "lets the client in", false: "does not have the client"}[o.Reason != explain.ReasonNotAllowed])
	}
	if o.SYNProxy {
		row("syn proxy", "a client from outside returns a cookie first")
	}
	if o.Limit != nil {
		row("source limit", fmt.Sprintf("%d flows at a time of %s; those that there are were not counted", o.Limit.Flows, o.Limit.Client))
	}
	row("target group", o.TargetGroup)
	if o.Target != nil {
		row("target", o.Target.AddrPort().String())
	}
	row("client_ip", o.ClientIP)
	if o.Avoided != nil {
		row("avoided", o.Avoided.AddrPort().String()+", on the client's own host")
	}
	if o.Target != nil {
		row("hairpin", hairpinWords(o))
	}
	for _, r := range o.Rewrites {
		row(r.By, fmt.Sprintf("%s > %s becomes %s > %s",
			portWords(r.SourceBefore), portWords(r.DestinationBefore), portWords(r.SourceAfter), portWords(r.DestinationAfter)))
	}
	row("target sees", seenWords(o))
	row("header", o.HeaderClient)
	return rows
}

func hairpinWords(o *explain.Outcome) string {
	switch {
	case !o.Hairpin:
		return "no"
	case o.HairpinKind == explain.Self:
		return "yes, the client is the target"
	case o.HairpinKind == explain.Subnet:
		return "yes, the client is in the target's subnet"
	}
	return "yes, the client is on the target's host"
}

// portWords has a star for what is not known beforehand.
func portWords(a netip.AddrPort) string {
	switch {
	case !a.IsValid():
		return "*"
	case a.Port() == 0 && a.Addr().Is6():
		return "[" + a.Addr().String() + "]:*"
	case a.Port() == 0:
		return a.Addr().String() + ":*"
	}
	return a.String()
}

func seenWords(o *explain.Outcome) string {
	if len(o.TargetSeesOneOf) > 0 {
		return "one of " + strings.Join(o.TargetSeesOneOf, ", ")
	}
	return o.TargetSees
}

// renderPossible lists what may become of the flow.
func renderPossible(b *bytes.Buffer, a *explain.Answer) {
	fmt.Fprintf(b, "this is the likeliest of %d outcomes: it depends on %s\n\n", len(a.Possible), a.DependsOn)
	rows := [][]string{{"SHARE", "VERDICT", "TARGET GROUP", "TARGET", "HAIRPIN", "TARGET SEES"}}
	for i := range a.Possible {
		o := &a.Possible[i].Outcome
		target, hairpin := "-", "no"
		if o.Target != nil {
			target = o.Target.AddrPort().String()
		}
		if o.Hairpin {
			hairpin = o.HairpinKind
		}
		rows = append(rows, []string{
			fmt.Sprintf("%.2f%%", 100*a.Possible[i].Share), strings.TrimSuffix(string(o.Verdict)+", "+o.Reason, ", "),
			dash(o.TargetGroup), target, hairpin, dash(seenWords(o)),
		})
	}
	renderRows(b, rows)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func foreignWords(f explain.Foreign) string {
	if f.Certain {
		return fmt.Sprintf("%s: %s", f.Where, f.Does)
	}
	return fmt.Sprintf("%s: may %s, if it matches, which cannot be told", f.Where, f.Does)
}
