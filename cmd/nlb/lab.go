package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/bench/traps"
)

func newLab() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "lab",
		Short: "Show the traps of load balancing, and their cures, with real packets",
		Long: `lab builds networks out of namespaces, falls into a trap with a naive set-up, and runs
nlb in the same network. It needs root and no other program, touches nothing outside
its namespaces, and removes them; run --keep leaves them, run --pcap DIR keeps
the packets, --svg DIR draws them, run and compare --dataplane ipvs have nlb run with
IPVS, -o json prints for machines.`,
		RunE: func(*cobra.Command, []string) error {
			return usageError{errors.New("lab wants list, run, compare or remove")}
		},
	}
	cmd.AddCommand(newLabList(), newLabRun(), newLabCompare(), newLabRemove())
	return cmd
}

func newLabList() *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the scenarios",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if out == jsonText {
				return printJSON(cmd.OutOrStdout(), describeScenarios(traps.All()))
			}
			_, err := fmt.Fprint(cmd.OutOrStdout(), traps.List(traps.All(), columns(cmd.OutOrStdout())))
			return err
		},
	}
	addOutput(cmd, &out)
	return cmd
}

// A description is a scenario in JSON.
type description struct {
	Scenario string `json:"scenario"`
	Title    string `json:"title"`
	Naive    string `json:"naive"`
	Why      string `json:"why"`
	Cure     string `json:"cure"`
}

func describeScenarios(all []traps.Scenario) []description {
	list := make([]description, len(all))
	for i, sc := range all {
		list[i] = description{sc.Name, sc.Title, sc.Naive, sc.Why, sc.Cure}
	}
	return list
}

func newLabRun() *cobra.Command {
	var (
		out      output
		options  traps.Options
		drawings string
	)
	cmd := &cobra.Command{
		Use:   "run NAME...|all",
		Short: "Run scenarios: the naive set-up, why it fails, nlb with the cure",
		Long: `run shows each scenario's network, what became of the naive set-up and of nlb with the
cure, and the way of the packets in both, hop by hop, read from captures. What does not
apply to the dataplane says so, and does not count.

Exit codes: 0 every naive set-up failed as described and every cure works, 1 otherwise.`,
		Example: "  nlb lab run hairpin-self\n  nlb lab run all -o json\n  nlb lab run all --dataplane ipvs\n" +
			"  nlb lab run rp-filter-strict --pcap /tmp/packets --keep\n  nlb lab run all --svg /tmp/walks",
		ValidArgsFunction: completeScenarios,
		Args: func(_ *cobra.Command, args []string) error {
			_, err := chosenScenarios(args)
			return err
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			chosen, err := chosenScenarios(args)
			if err != nil {
				return err
			}
			if err := needRoot(); err != nil {
				return err
			}
			if err := traps.Probe(options.Dataplane); err != nil {
				return err
			}
			if options.Program, err = os.Executable(); err != nil {
				return err
			}
			if err := makeFolders(options.Captures, drawings); err != nil {
				return err
			}
			ctx, stop := untilHangup(cmd.Context())
			defer stop()
			return runScenarios(ctx, cmd.OutOrStdout(), cmd.ErrOrStderr(), chosen, options, drawings, out)
		},
	}
	addOutput(cmd, &out)
	addDataplane(cmd, &options.Dataplane)
	cmd.Flags().BoolVar(&options.Keep, "keep", false, "leave the namespaces, with nlb running in them")
	cmd.Flags().StringVar(&options.Captures, "pcap", "", "a folder for the packets, a file for each node")
	cmd.Flags().StringVar(&drawings, "svg", "", "a folder for drawings of the packets' way, NAME.svg")
	return cmd
}

// makeFolders makes those that are wanted, before there is anything to lose.
func makeFolders(names ...string) error {
	for _, name := range names {
		if name == "" {
			continue
		}
		if err := os.MkdirAll(name, 0o755); err != nil {
			return err
		}
	}
	return nil
}

func newLabCompare() *cobra.Command {
	var (
		out      output
		options  traps.Options
		rates    bool
		drawings string
	)
	cmd := &cobra.Command{
		Use:   "compare",
		Short: "Compare the modes: who works where, and what the target sees",
		Long: `compare tries every client_ip mode in the same cases, and prints what the target saw
of its caller, or why the call failed. It measures how fast connections are made, too.
With --svg it draws the packets' way of each call, and makes one call at a time.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			err := needRoot()
			if err != nil {
				return err
			}
			if err := traps.Probe(options.Dataplane); err != nil {
				return err
			}
			if options.Program, err = os.Executable(); err != nil {
				return err
			}
			options.Walks = drawings != ""
			if err := makeFolders(drawings); err != nil {
				return err
			}
			ctx, stop := untilHangup(cmd.Context())
			defer stop()
			progress := newProgress(cmd.ErrOrStderr(), "comparing")
			c, err := compareModes(ctx, options, rates, progress)
			progress.end()
			if err != nil {
				return err
			}
			if err := draw(drawings, c.Walks()...); err != nil {
				return err
			}
			if out == jsonText {
				return printJSON(cmd.OutOrStdout(), c)
			}
			_, err = fmt.Fprint(cmd.OutOrStdout(), traps.ComparisonText(c))
			return err
		},
	}
	addOutput(cmd, &out)
	addDataplane(cmd, &options.Dataplane)
	cmd.Flags().BoolVar(&rates, "rates", true, "measure rates of connections")
	cmd.Flags().StringVar(&drawings, "svg", "", "a folder for drawings of the packets' way, CASE-MODE.svg")
	return cmd
}

// draw writes drawings into a folder; "" for none.
func draw(dir string, walks ...traps.Walk) error {
	if dir == "" {
		return nil
	}
	for _, w := range walks {
		if err := w.Save(dir); err != nil {
			return fmt.Errorf("draw %s: %w", w.Name, err)
		}
	}
	return nil
}

// A dataplaneFlag is a flag that names a dataplane.
type dataplaneFlag struct{ *balancer.Dataplane }

// Set and Type make dataplaneFlag a pflag.Value, with String of the Dataplane.
func (f dataplaneFlag) Set(s string) error { return f.UnmarshalText([]byte(s)) }
func (dataplaneFlag) Type() string         { return "nftables|ipvs" }

// addDataplane adds the flag for the labs' own nlb, which has no file to overrule.
func addDataplane(cmd *cobra.Command, d *balancer.Dataplane) {
	cmd.Flags().Var(dataplaneFlag{d}, "dataplane", "what nlb runs with")
	_ = cmd.RegisterFlagCompletionFunc("dataplane", cobra.FixedCompletions(
		[]cobra.Completion{balancer.NFTables.String(), balancer.IPVS.String()}, cobra.ShellCompDirectiveNoFileComp)) // fails only for an unknown flag
}

func compareModes(ctx context.Context, o traps.Options, rates bool, p *progress) (c traps.Comparison, err error) {
	p.say("every mode in every case")
	if c, err = traps.Compare(ctx, o); err != nil || !rates {
		return c, err
	}
	p.say("rates of connections")
	c.Rates, err = traps.MeasureRates(ctx, o, traps.RateRounds)
	return c, err
}

func newLabRemove() *cobra.Command {
	return &cobra.Command{
		Use:   "remove",
		Short: "Remove the namespaces that run --keep left, and what runs in them",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			removed, err := traps.RemoveKept()
			for _, name := range removed {
				fmt.Fprintln(cmd.OutOrStdout(), name)
			}
			return err
		},
	}
}

// untilHangup ends with the terminal, too, and lets a reader that leaves (| head)
// be an error of writing, not our end: there are namespaces to remove.
func untilHangup(ctx context.Context) (context.Context, context.CancelFunc) {
	pipes := make(chan os.Signal, 1)
	signal.Notify(pipes, unix.SIGPIPE)
	ctx, stop := signal.NotifyContext(ctx, unix.SIGHUP)
	return ctx, func() {
		stop()
		signal.Stop(pipes)
	}
}

func needRoot() error {
	if os.Geteuid() != 0 {
		return errors.New("the lab needs root, because it makes network namespaces")
	}
	return nil
}

func completeScenarios(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	names := []cobra.Completion{"all"}
	for _, sc := range traps.All() {
		names = append(names, cobra.CompletionWithDesc(sc.Name, sc.Title))
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// chosenScenarios are those that are named, in the order of the list.
func chosenScenarios(args []string) ([]traps.Scenario, error) {
	all := traps.All()
	if len(args) == 0 {
		return nil, usageError{errors.New("lab run wants the names of scenarios, or all: see nlb lab list")}
	}
	if slices.Contains(args, "all") && len(args) == 1 {
		return all, nil
	}
	for _, name := range args {
		if !slices.ContainsFunc(all, func(sc traps.Scenario) bool { return sc.Name == name }) {
			return nil, usageError{fmt.Errorf("no scenario is called %q; near are %s (nlb lab list has all)", name, strings.Join(nearScenarios(name, all), ", "))}
		}
	}
	return slices.DeleteFunc(all, func(sc traps.Scenario) bool { return !slices.Contains(args, sc.Name) }), nil
}

// nearScenarios are the names that share most with a word: their common pairs of
// letters, as a part of both (Dice's coefficient).
func nearScenarios(word string, all []traps.Scenario) []string {
	const most = 3
	near := slices.SortedStableFunc(slices.Values(all), func(a, b traps.Scenario) int {
		return cmp.Compare(likeness(word, b.Name), likeness(word, a.Name))
	})
	var names []string
	for _, sc := range near[:most] {
		names = append(names, sc.Name)
	}
	return names
}

func likeness(a, b string) float64 {
	pairs := make(map[string]int)
	for i := range max(0, len(a)-1) {
		pairs[a[i:i+2]]++
	}
	common := 0
	for i := range max(0, len(b)-1) {
		if pairs[b[i:i+2]] > 0 {
			pairs[b[i:i+2]]--
			common++
		}
	}
	return 2 * float64(common) / float64(len(a)+len(b))
}

// runScenarios runs one after the other, prints each as soon as it is done, and
// goes on after one that is broken or could not be run.
func runScenarios(ctx context.Context, stdout, stderr io.Writer, chosen []traps.Scenario, o traps.Options, drawings string, out output) error {
	results := []traps.Result{}
	failed, inapplicable := 0, 0
	for i, sc := range chosen {
		progress := newProgress(stderr, fmt.Sprintf("[%d/%d] %s", i+1, len(chosen), sc.Name))
		o.Progress = progress.say
		r, err := traps.Run(ctx, sc, o)
		progress.end()
		if ctx.Err() != nil {
			if errors.Is(err, traps.ErrLeft) {
				return fmt.Errorf("interrupted: %w", err)
			}
			return errors.New("interrupted; everything was removed")
		}
		if err != nil {
			fmt.Fprintf(stderr, "nlb: %v\n", err)
			failed++
			continue
		}
		switch r.Verdict {
		case traps.Pass:
		case traps.Inapplicable:
			inapplicable++
		default:
			failed++
		}
		results = append(results, r)
		if out == table {
			if err := printScenario(stdout, sc, r, i > 0); err != nil {
				return err
			}
		}
		if r.Verdict != traps.Unsupported {
			if err := draw(drawings, traps.NewWalk(sc, r)); err != nil {
				return err
			}
		}
	}
	if out == jsonText {
		if err := printJSON(stdout, results); err != nil {
			return err
		}
	} else if len(chosen) > 1 {
		applicable := len(chosen) - inapplicable
		fmt.Fprintf(stdout, "\n%d of %d pass", applicable-failed, applicable)
		if inapplicable > 0 {
			fmt.Fprintf(stdout, ", %d does not apply to dataplane %v", inapplicable, o.Dataplane)
		}
		fmt.Fprintln(stdout)
	}
	if failed > 0 {
		return exitStatus(exitFailed)
	}
	return nil
}

func printScenario(w io.Writer, sc traps.Scenario, r traps.Result, another bool) error {
	if another {
		fmt.Fprintf(w, "\n%s\n\n", strings.Repeat("─", columns(w)))
	}
	if _, err := fmt.Fprint(w, traps.Text(sc, r, columns(w))); err != nil {
		return err
	}
	if len(r.Namespaces) == 0 {
		return nil
	}
	_, err := fmt.Fprintf(w, `
kept, with nlb running (the targets have ended): %s
  enter   nsenter --net=/run/netns/%s sh
  remove  nlb lab remove
`, strings.Join(r.Namespaces, " "), r.Namespaces[0])
	return err
}

// widest is how wide text is still easy to read, in columns.
const widest = 120

// columns is how wide to print: as wide as the terminal, within limits.
func columns(w io.Writer) int {
	if f, ok := w.(*os.File); ok {
		if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil {
			return min(max(int(size.Col), traps.MinWidth), widest)
		}
	}
	return traps.MinWidth
}

// A progress is a line about what is being done, on a terminal only: elsewhere
// nobody watches.
type progress struct {
	w     io.Writer // nil: no terminal
	label string
}

func newProgress(w io.Writer, label string) *progress {
	if f, ok := w.(*os.File); ok {
		if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err == nil {
			return &progress{w, label}
		}
	}
	return &progress{nil, label}
}

// eraseLine returns to the line's beginning and clears it (ECMA-48, EL).
const eraseLine = "\r\x1b[K"

func (p *progress) say(stage string) {
	if p.w != nil {
		fmt.Fprintf(p.w, "%s%s: %s …", eraseLine, p.label, stage)
	}
}

func (p *progress) end() {
	if p.w != nil {
		fmt.Fprint(p.w, eraseLine)
	}
}
