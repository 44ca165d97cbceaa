package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	"nlb/balancer/control"
)

func newFlows() *cobra.Command {
	var (
		socket         string
		out            output
		filter         control.FlowFilter
		target, client string
		order          flowOrder
		limit          int
	)
	cmd := &cobra.Command{
		Use:   "flows",
		Short: "List live flows",
		Long: `flows lists what passes the balancer now: the client, the VIP, the target that has the
flow, and whom that takes for the client. What the kernel forwards comes from connection
tracking, what is relayed from the relay. A flow that begins or ends meanwhile may be
missing, and a table that grows meanwhile may show one twice.

Nobody has to hold a million flows to list them, as long as they are not sorted, or sorted
with a --limit.`,
		Example: `  nlb flows --group web --client 203.0.113.0/24
  nlb flows --target 10.0.1.11 --sort bytes --limit 20
  nlb flows -o json | jq '.[] | select(.hairpin)'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if filter.Target, filter.Client, err = parseFilter(target, client); err != nil {
				return err
			}
			if limit < 0 {
				return usageError{fmt.Errorf("--limit %d: must not be negative; 0 is no limit", limit)}
			}
			return listFlows(cmd.Context(), cmd.OutOrStdout(), control.NewClient(socket), filter, flowList{out, order, limit})
		},
	}
	addSocket(cmd.Flags(), &socket)
	addOutput(cmd, &out)
	cmd.Flags().StringVar(&filter.Group, "group", "", "of this target group only")
	cmd.Flags().StringVar(&filter.Listener, "listener", "", "of this listener only")
	cmd.Flags().StringVar(&target, "target", "", "to this target only, ADDR or ADDR:PORT")
	cmd.Flags().StringVar(&client, "client", "", "from this address or prefix only")
	cmd.Flags().Var(&order, "sort", "by what to sort; bytes and packets have the most first")
	cmd.Flags().IntVar(&limit, "limit", 0, "at most so many, the first of the order; 0 is all")
	// These fail only for unknown flags.
	_ = cmd.RegisterFlagCompletionFunc("sort", cobra.FixedCompletions(flowOrders(), cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("group", completeNames(&socket, groupNames))
	_ = cmd.RegisterFlagCompletionFunc("listener", completeNames(&socket, listenerNames))
	return cmd
}

// completeNames offers what the daemon, if there is one, says there is.
func completeNames(socket *string, names func(*control.Status) []string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		status, err := control.NewClient(*socket).Status(cmd.Context())
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return names(status), cobra.ShellCompDirectiveNoFileComp
	}
}

func groupNames(s *control.Status) (names []string) {
	for _, g := range s.TargetGroups {
		names = append(names, g.Name)
	}
	return names
}

func listenerNames(s *control.Status) (names []string) {
	for _, l := range s.Listeners {
		names = append(names, l.Name)
	}
	return names
}

func parseFilter(target, client string) (to netip.AddrPort, from netip.Prefix, err error) {
	if target != "" {
		if to, err = parseEnd(target); err != nil {
			return to, from, usageError{fmt.Errorf("--target %q: want ADDR or ADDR:PORT", target)}
		}
	}
	if client == "" {
		return to, from, nil
	}
	if a, err := netip.ParseAddr(client); err == nil {
		return to, netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()), nil
	}
	if from, err = netip.ParsePrefix(client); err != nil {
		return to, from, usageError{fmt.Errorf("--client %q: want an address or a prefix, such as 203.0.113.0/24", client)}
	}
	return to, from, nil
}

// A flowOrder is a field to sort by; empty leaves flows as they come.
type flowOrder string

var flowCompare = map[flowOrder]func(a, b *control.Flow) int{
	"client":  func(a, b *control.Flow) int { return a.Client.Compare(b.Client) },
	"vip":     func(a, b *control.Flow) int { return a.VIP.Compare(b.VIP) },
	"target":  func(a, b *control.Flow) int { return a.Target.Compare(b.Target) },
	"group":   func(a, b *control.Flow) int { return cmp.Compare(a.TargetGroup, b.TargetGroup) },
	"state":   func(a, b *control.Flow) int { return cmp.Compare(a.State, b.State) },
	"bytes":   func(a, b *control.Flow) int { return cmp.Compare(value(b.Bytes), value(a.Bytes)) },
	"packets": func(a, b *control.Flow) int { return cmp.Compare(value(b.Packets), value(a.Packets)) },
}

func value(n *uint64) uint64 {
	if n == nil {
		return 0
	}
	return *n
}

func flowOrders() (names []string) {
	for o := range flowCompare {
		names = append(names, string(o))
	}
	slices.Sort(names)
	return names
}

// String, Set and Type make flowOrder a pflag.Value.
func (o *flowOrder) String() string { return string(*o) }
func (*flowOrder) Type() string     { return "FIELD" }
func (o *flowOrder) Set(s string) error {
	if flowCompare[flowOrder(s)] == nil {
		return fmt.Errorf("must be one of %v", flowOrders())
	}
	*o = flowOrder(s)
	return nil
}

// compare orders flows, and those that are equal by who they are.
func (o flowOrder) compare(a, b *control.Flow) int {
	return cmp.Or(flowCompare[o](a, b), cmp.Compare(a.Protocol, b.Protocol), a.Client.Compare(b.Client), a.VIP.Compare(b.VIP))
}

// A flowList is how flows are listed.
type flowList struct {
	out   output
	order flowOrder
	limit int
}

// errEnough ends a list that is as long as it should be.
var errEnough = errors.New("enough")

// listFlows writes flows as they come, or when it has seen all of them if it sorts.
func listFlows(ctx context.Context, w io.Writer, client *control.Client, filter control.FlowFilter, l flowList) error {
	p := newFlowPrinter(w, l.out)
	var kept []control.Flow
	shown := 0
	err := client.Flows(ctx, filter, func(f *control.Flow) error {
		if l.order != "" {
			kept = l.keep(append(kept, *f))
			return nil
		}
		if l.limit > 0 && shown == l.limit {
			return errEnough
		}
		shown++
		return p.print(f)
	})
	if err != nil && !errors.Is(err, errEnough) {
		return err
	}
	for i := range l.first(kept) {
		if err := p.print(&kept[i]); err != nil {
			return err
		}
	}
	return p.close()
}

// keep lets a limited list grow to twice its length before it is cut.
func (l flowList) keep(flows []control.Flow) []control.Flow {
	if l.limit > 0 && len(flows) >= 2*l.limit {
		return l.first(flows)
	}
	return flows
}

// first sorts the flows, and leaves as many as there should be.
func (l flowList) first(flows []control.Flow) []control.Flow {
	slices.SortFunc(flows, func(a, b control.Flow) int { return l.order.compare(&a, &b) })
	if l.limit > 0 && len(flows) > l.limit {
		return flows[:l.limit]
	}
	return flows
}

// A flowPrinter prints one flow at a time. Its columns are as wide as addresses mostly
// are: nobody knows how wide the last one will be.
type flowPrinter struct {
	w     *bufio.Writer
	out   output
	count int
}

func newFlowPrinter(w io.Writer, out output) *flowPrinter {
	return &flowPrinter{w: bufio.NewWriter(w), out: out}
}

const flowColumns = "%-8s  %-21s  %-20s  %-12s  %-17s  %-17s  %-7s  %-21s  %-11s  %-12s  %s\n"

func (p *flowPrinter) print(f *control.Flow) error {
	first := p.count == 0
	p.count++
	if p.out == jsonText {
		return p.printJSON(f, first)
	}
	if first {
		fmt.Fprintf(p.w, flowColumns, "PROTOCOL", "CLIENT", "VIP", "TARGET GROUP", "TARGET", "CLIENT_IP", "HAIRPIN", "TARGET SEES", "STATE", "AGE", "BYTES")
	}
	hairpin := "no"
	if f.Hairpin {
		hairpin = "yes"
	}
	sees, bytes := "-", "-"
	if f.TargetSees.IsValid() {
		sees = f.TargetSees.String()
	}
	if f.Bytes != nil {
		bytes = strconv.FormatUint(*f.Bytes, 10)
	}
	_, err := fmt.Fprintf(p.w, flowColumns, f.Protocol, f.Client, f.VIP, dash(f.TargetGroup), f.Target, dash(f.ClientIP), hairpin, sees, f.State, f.Age(), bytes)
	return err
}

func (p *flowPrinter) printJSON(f *control.Flow, first bool) error {
	text, err := json.Marshal(f)
	if err != nil {
		return err
	}
	before := ",\n  "
	if first {
		before = "[\n  "
	}
	_, err = fmt.Fprintf(p.w, "%s%s", before, text)
	return err
}

// close ends the list.
func (p *flowPrinter) close() error {
	switch {
	case p.out == jsonText && p.count == 0:
		fmt.Fprintln(p.w, "[]")
	case p.out == jsonText:
		fmt.Fprintln(p.w, "\n]")
	case p.count == 0:
		fmt.Fprintln(p.w, "no flows")
	}
	if err := p.w.Flush(); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}
