package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"nlb/balancer/conntrack"
	"nlb/balancer/doctor"
	"nlb/balancer/nft"
	"nlb/config"
)

// arpWait is how long doctor waits for answers to ARP on one interface. A host
// that has the address answers at once; RFC 5227 waits 1 to 2 s between probes.
const arpWait = time.Second

// doctorFlags are the arguments of doctor beside the file.
type doctorFlags struct {
	out                              output
	fix, apply, arp, facts, onTarget bool
	lb, vips, clients                []string
	port                             uint16
}

func newDoctor() *cobra.Command {
	var flags doctorFlags
	cmd := &cobra.Command{
		Use:   "doctor [-c FILE]",
		Short: "Find what is wrong with this host, and say what cures it",
		Long: `doctor looks at a host that balances, or with --target at one that serves behind a
balancer: settings of the kernel, addresses, routes, foreign rules, flows. Each finding
says what was measured, what follows from it, and which command cures it. docs/doctor.md
lists all checks. It changes nothing, unless --fix comes with --apply.

Without a file, only what does not depend on one is looked at.

  --fix          print the cures as a script, and the rest as its comments
  --fix --apply  run the cures, look again, and print what is left
  --arp          also ask by ARP, for a second on each link, whether another host has a VIP
  -o json --facts  also print all that was read, for a report of a bug

Exit codes: 0 no finding is an error, 1 one is, or the command failed, 2 usage error.`,
		Example: `  nlb doctor -c /etc/nlb/nlb.yaml
  nlb doctor --target --lb 10.0.0.2 --vip 198.51.100.10 --port 8080`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := flags.check(); err != nil {
				return err
			}
			q, err := flags.question(cmd)
			if err != nil {
				return err
			}
			return flags.run(cmd, q)
		},
	}
	addConfig(cmd.Flags())
	addOutput(cmd, &flags.out)
	flags.add(cmd.Flags())
	return cmd
}

func (d *doctorFlags) add(fs *pflag.FlagSet) {
	fs.BoolVar(&d.fix, "fix", false, "print the cures as a script")
	fs.BoolVar(&d.apply, "apply", false, "with --fix: run them and look again")
	fs.BoolVar(&d.arp, "arp", false, "ask by ARP whether another host has a VIP")
	fs.BoolVar(&d.facts, "facts", false, "with -o json: print all that was read")
	fs.BoolVar(&d.onTarget, "target", false, "this host is a target")
	fs.StringSliceVar(&d.lb, "lb", nil, "with --target: the balancer's addresses towards this host")
	fs.StringSliceVar(&d.vips, "vip", nil, "with --target: the VIPs, if there is no file")
	fs.StringSliceVar(&d.clients, "client", nil, "with --target: addresses of clients (default: somebody outside)")
	fs.Uint16Var(&d.port, "port", 0, "with --target: where this host serves")
}

// check finds flags that do not go together.
func (d *doctorFlags) check() error {
	ofTarget := len(d.lb)+len(d.vips)+len(d.clients) > 0 || d.port != 0
	for _, c := range []struct {
		wrong bool
		why   string
	}{
		{d.apply && !d.fix, "--apply belongs to --fix"},
		{d.facts && d.out != jsonText, "--facts needs -o json"},
		{d.fix && !d.apply && d.out == jsonText, "--fix prints a script; the cures are in -o json anyway"},
		{d.onTarget && len(d.lb) == 0, "--target needs --lb ADDRESS, the balancer's address towards this host"},
		{!d.onTarget && ofTarget, "--lb, --vip, --client and --port belong to --target"},
		{d.onTarget && d.arp, "--arp is for the balancer"},
	} {
		if c.wrong {
			return usageError{errors.New(c.why)}
		}
	}
	return nil
}

// question puts together what is asked.
func (d *doctorFlags) question(cmd *cobra.Command) (doctor.Question, error) {
	q := doctor.Question{Role: doctor.Balancer, Clients: doctor.DefaultClients(), Port: d.port}
	if d.onTarget {
		q.Role = doctor.Target
	}
	for _, list := range []struct {
		flag  string
		texts []string
		to    *[]netip.Addr
	}{{"lb", d.lb, &q.Balancers}, {"vip", d.vips, &q.VIPs}} {
		addrs, err := addresses(list.flag, list.texts)
		if err != nil {
			return q, err
		}
		*list.to = addrs
	}
	clients, err := addresses("client", d.clients)
	if err != nil {
		return q, err
	}
	q.Clients = append(clients, q.Clients...) // the first of a family counts
	path, err := configFile(cmd.Flags())
	if err != nil { // none is named
		if _, err := os.Stat(config.DefaultFile); err != nil || d.onTarget {
			return q, noteNoFile(cmd.ErrOrStderr(), d.onTarget)
		}
		path = config.DefaultFile
	}
	cfg, err := config.Load(path, cmd.Flags())
	if err != nil {
		return q, err
	}
	q.Spec = cfg.Spec
	return q, nil
}

func noteNoFile(w io.Writer, target bool) error {
	note := "no configuration file: only the host itself is looked at; name one with -c FILE"
	if target {
		note = "no configuration file: clients' addresses are taken to be kept (preserve, hairpin_snat)"
	}
	_, err := fmt.Fprintln(w, "nlb:", note)
	return err
}

func addresses(flag string, texts []string) (all []netip.Addr, err error) {
	for _, text := range texts {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return nil, usageError{fmt.Errorf("--%s %s is not an IP address", flag, text)}
		}
		all = append(all, a.Unmap())
	}
	return all, nil
}

func (d *doctorFlags) run(cmd *cobra.Command, q doctor.Question) error {
	facts, err := d.look(cmd.Context(), q)
	if err != nil {
		return err
	}
	findings := doctor.Diagnose(facts)
	if d.fix && !d.apply {
		if _, err := io.WriteString(cmd.OutOrStdout(), doctor.Script(findings)); err != nil {
			return err
		}
		return verdictOn(findings)
	}
	if d.apply {
		failed := cure(cmd.Context(), cmd.ErrOrStderr(), findings)
		if facts, err = d.look(cmd.Context(), q); err != nil {
			return errors.Join(failed, err)
		}
		findings = doctor.Diagnose(facts)
		if err := d.print(cmd.OutOrStdout(), facts, findings); err != nil || failed != nil {
			return errors.Join(failed, err)
		}
		return verdictOn(findings)
	}
	if err := d.print(cmd.OutOrStdout(), facts, findings); err != nil {
		return err
	}
	return verdictOn(findings)
}

// look reads all that the findings depend on.
func (d *doctorFlags) look(ctx context.Context, q doctor.Question) (*doctor.Facts, error) {
	facts, err := doctor.Read(ctx, q, nft.TableName)
	if err != nil {
		return nil, err
	}
	if q.Role == doctor.Balancer && facts.Conntrack {
		if facts.Flows, err = flowSums(ctx); err != nil {
			return nil, err
		}
	}
	if d.arp {
		err = doctor.Probe(ctx, facts, arpWait)
	}
	return facts, err
}

// flowSums counts the TCP flows of ours between each client and target. Those of
// UDP need no answer.
func flowSums(ctx context.Context) ([]doctor.FlowSum, error) {
	tracker, err := conntrack.New(conntrack.Options{Mask: nft.TargetMask})
	if err != nil {
		return nil, err
	}
	defer tracker.Close()
	flows, err := tracker.Flows(ctx, conntrack.Filter{})
	if err != nil {
		return nil, err
	}
	return sumFlows(flows), nil
}

func sumFlows(flows []conntrack.Flow) []doctor.FlowSum {
	type ends struct{ client, target netip.Addr }
	sums := map[ends]doctor.FlowSum{}
	for _, f := range flows {
		e := ends{f.Original.Src.Addr(), f.Reply.Src.Addr()}
		if f.Protocol != conntrack.TCP || f.Reply.Dst.Addr() != e.client {
			continue // or sourced from here: its answer finds the way
		}
		s := sums[e]
		s.Client, s.Target = e.client, e.target
		if f.Status.SeenReply() {
			s.Answered++
		} else {
			s.Unanswered++
		}
		sums[e] = s
	}
	var all []doctor.FlowSum
	for _, s := range sums {
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b doctor.FlowSum) int {
		return cmp.Or(a.Target.Compare(b.Target), a.Client.Compare(b.Client))
	})
	return all
}

// cure runs the commands of all findings, and goes on after one that fails.
func cure(ctx context.Context, log io.Writer, findings []doctor.Finding) error {
	var errs []error
	for _, c := range doctor.Cures(findings) {
		if _, err := fmt.Fprintln(log, "+", c); err != nil {
			return err
		}
		errs = append(errs, c.Run(ctx))
	}
	return errors.Join(errs...)
}

// verdictOn is the exit code.
func verdictOn(findings []doctor.Finding) error {
	if slices.ContainsFunc(findings, func(f doctor.Finding) bool { return f.Severity == doctor.Error }) {
		return exitStatus(exitFailed)
	}
	return nil
}

// A doctorReport is what doctor says in JSON.
type doctorReport struct {
	Findings []doctor.Finding `json:"findings"`
	Facts    *doctor.Facts    `json:"facts,omitempty"`
}

func (d *doctorFlags) print(w io.Writer, facts *doctor.Facts, findings []doctor.Finding) error {
	if d.out == jsonText {
		report := doctorReport{Findings: append([]doctor.Finding{}, findings...)}
		if d.facts {
			report.Facts = facts
		}
		return printJSON(w, report)
	}
	var b bytes.Buffer
	renderFindings(&b, findings)
	_, err := b.WriteTo(w)
	return err
}

func renderFindings(b *bytes.Buffer, findings []doctor.Finding) {
	if len(findings) == 0 {
		b.WriteString("nothing found\n")
		return
	}
	rows := [][]string{{"SEVERITY", "CHECK", "FOUND, CONSEQUENCE, CURE"}}
	for _, f := range findings {
		rows = append(rows, []string{string(f.Severity), f.Check, f.What}, []string{"", "", f.Consequence})
		for _, c := range f.Cure {
			rows = append(rows, []string{"", "", "# " + c.String()})
		}
		if f.Advice != "" {
			rows = append(rows, []string{"", "", "by hand: " + f.Advice})
		}
		if len(f.Recipe) > 0 {
			rows = append(rows, []string{"", "", "recipe of deploy/target: " + f.Recipe.String()})
		}
	}
	renderRows(b, rows)
	fmt.Fprintf(b, "\n%s; nlb doctor --fix prints the cures as a script\n", tallyOf(findings))
}

// tallyOf says how many findings there are of each severity.
func tallyOf(findings []doctor.Finding) string {
	var words []string
	for _, s := range doctor.Severities {
		n := 0
		for _, f := range findings {
			if f.Severity == s {
				n++
			}
		}
		if n > 0 {
			words = append(words, several(n, string(s)))
		}
	}
	return strings.Join(words, ", ")
}
