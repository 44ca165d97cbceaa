package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"nlb/balancer/control"
	"nlb/balancer/top"
)

const (
	// shortestInterval keeps a slip of the finger from keeping the daemon busy.
	shortestInterval = 100 * time.Millisecond
	// answerWithin is how long the daemon is waited for until the screen says that it
	// does not answer, changeWithin how long a drain may take to reach the kernel.
	answerWithin = 5 * time.Second
	changeWithin = 30 * time.Second
)

func newTop() *cobra.Command {
	var (
		socket string
		once   bool
		order  sortFlag
		o      top.Options
	)
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Watch listeners, target groups and targets on a live screen, and drain targets",
		Long: `top shows what nlb status shows, with rates, on a screen that follows the daemon. It
sorts, filters and folds, and drains and undrains the selected target once that is
confirmed; ? lists the keys. NO_COLOR in the environment turns colors off. With --once
it looks twice, an interval apart, which rates need, prints everything and ends; that
alone needs no terminal.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Interval < shortestInterval {
				return usageError{fmt.Errorf("--interval %v: want at least %v", o.Interval, shortestInterval)}
			}
			o.Socket, o.Sort = socket, top.Sort(order)
			client, screen := control.NewClient(socket), top.New(o)
			if once {
				return topOnce(cmd.Context(), cmd.OutOrStdout(), client, screen)
			}
			terminal, err := terminalOf(cmd.OutOrStdout())
			if err != nil {
				return err
			}
			return watchTop(cmd.Context(), terminal, client, screen)
		},
	}
	addSocket(cmd.Flags(), &socket)
	cmd.Flags().DurationVarP(&o.Interval, "interval", "n", time.Second, "time between two looks")
	cmd.Flags().StringVarP(&o.Filter, "filter", "f", "", "show only what matches these words: parts of names and reasons, states")
	cmd.Flags().VarP(&order, "sort", "s", "order within groups, and of groups")
	cmd.Flags().BoolVar(&once, "once", false, "print everything once and end; needs no terminal")
	_ = cmd.RegisterFlagCompletionFunc("sort", cobra.FixedCompletions(top.Sorts(), cobra.ShellCompDirectiveNoFileComp)) // fails only for an unknown flag
	return cmd
}

// A sortFlag is a top.Sort on the command line.
type sortFlag top.Sort

// String, Set and Type make it a pflag.Value.
func (f *sortFlag) String() string { return top.Sort(*f).String() }
func (*sortFlag) Type() string     { return strings.Join(top.Sorts(), "|") }
func (f *sortFlag) Set(name string) error {
	by, ok := top.ParseSort(name)
	if !ok {
		return errors.New("must be one of " + strings.Join(top.Sorts(), ", "))
	}
	*f = sortFlag(by)
	return nil
}

// terminalOf is w if that is a terminal on which text can be placed.
func terminalOf(w io.Writer) (*os.File, error) {
	f, ok := w.(*os.File)
	if !ok || columnsOf(f) == 0 {
		return nil, usageError{errors.New("standard output is no terminal: nlb top --once prints one screen, nlb status -o json is for programs")}
	}
	if t := os.Getenv("TERM"); t == "" || t == "dumb" {
		return nil, usageError{fmt.Errorf("text cannot be placed on a terminal of type %q (TERM): nlb top --once prints one screen", t)}
	}
	return f, nil
}

// columnsOf is how wide a terminal is, and 0 of what is none. One that does not say
// has as many columns as they all once had.
func columnsOf(f *os.File) int {
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	switch {
	case err != nil:
		return 0
	case size.Col == 0:
		return 80
	}
	return int(size.Col)
}

// topOnce prints the whole picture once the daemon was asked twice, which rates need.
func topOnce(ctx context.Context, w io.Writer, client *control.Client, screen *top.Screen) error {
	width := 80
	if f, ok := w.(*os.File); ok {
		if n := columnsOf(f); n > 0 {
			width = n
		}
	}
	screen.Resize(width, 24)
	for again := range 2 {
		if again > 0 {
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(screen.Interval()):
			}
		}
		status, err := client.Status(ctx)
		if err != nil {
			return err
		}
		screen.Take(status, time.Now())
	}
	for _, l := range screen.Page(time.Now()) {
		if _, err := fmt.Fprintln(w, strings.TrimRight(l.String(), " ")); err != nil {
			return err
		}
	}
	return nil
}

// watchTop runs the live screen until its user or ctx ends it, which is no error,
// and leaves the terminal as it was. A terminal that hangs up ends it too.
func watchTop(ctx context.Context, terminal *os.File, client *control.Client, screen *top.Screen) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGHUP)
	defer stop()
	p := tea.NewProgram(&liveTop{ctx: ctx, client: client, screen: screen, colors: os.Getenv("NO_COLOR") == ""}, // see no-color.org
		tea.WithOutput(terminal), tea.WithoutSignalHandler())
	defer context.AfterFunc(ctx, p.Quit)()
	_, err := p.Run()
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("live screen: %w", err)
	}
	return nil
}

// liveTop connects a Screen with the daemon and the terminal, as a tea.Model.
type liveTop struct {
	ctx    context.Context // ends what the daemon is asked
	client *control.Client
	screen *top.Screen
	colors bool
	// turn numbers the looks, so that one look ahead of time makes the next one wait.
	turn int
}

// What the program is told.
type (
	answered struct {
		turn   int
		status *control.Status
		err    error
		at     time.Time
	}
	lookDue    struct{ turn int }
	changeDone struct {
		action top.Action
		err    error
	}
	secondOver struct{}
)

// Init implements tea.Model.
func (l *liveTop) Init() tea.Cmd { return tea.Batch(l.look(), second()) }

// View implements tea.Model.
func (l *liveTop) View() tea.View {
	var b strings.Builder
	for i, line := range l.screen.Lines(time.Now()) {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(line.ANSI(l.colors))
	}
	v := tea.NewView(b.String())
	v.AltScreen = true
	return v
}

// Update implements tea.Model.
func (l *liveTop) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		l.screen.Resize(msg.Width, msg.Height)
	case tea.KeyPressMsg:
		return l, l.do(l.screen.Press(msg.String(), msg.Text))
	case tea.PasteMsg:
		l.screen.Paste(msg.Content)
	case answered:
		return l, l.take(msg)
	case lookDue:
		if msg.turn == l.turn && !l.screen.Paused() {
			return l, l.look()
		}
	case changeDone:
		l.screen.Changed(msg.action, msg.err)
		return l, l.look()
	case secondOver:
		return l, second() // ages have changed
	}
	return l, nil
}

// second makes the screen be drawn at least every second.
func second() tea.Cmd {
	return tea.Tick(time.Second, func(time.Time) tea.Msg { return secondOver{} })
}

// do carries out what a key asked for.
func (l *liveTop) do(a top.Action) tea.Cmd {
	switch a.Verb {
	case top.Look:
		return l.look()
	case top.Drain:
		return l.change(a, l.client.Drain)
	case top.Undrain:
		return l.change(a, l.client.Undrain)
	case top.Redraw:
		return tea.ClearScreen
	case top.Suspend:
		return tea.Suspend
	case top.Quit:
		return tea.Quit
	}
	return nil
}

func (l *liveTop) change(a top.Action, do func(context.Context, control.TargetName) error) tea.Cmd {
	return func() tea.Msg {
		ctx, cancel := context.WithTimeout(l.ctx, changeWithin)
		defer cancel()
		return changeDone{a, do(ctx, a.Target)}
	}
}

// look asks the daemon now, and makes that the look that counts.
func (l *liveTop) look() tea.Cmd {
	l.turn++
	turn := l.turn
	return func() tea.Msg {
		ctx, cancel := context.WithTimeout(l.ctx, answerWithin)
		defer cancel()
		status, err := l.client.Status(ctx)
		return answered{turn, status, err, time.Now()}
	}
}

// take shows an answer, unless it was overtaken, and plans the next look.
func (l *liveTop) take(a answered) tea.Cmd {
	if a.turn != l.turn {
		return nil
	}
	if a.err != nil {
		l.screen.Fail(a.err)
	} else {
		l.screen.Take(a.status, a.at)
	}
	return tea.Tick(l.screen.Interval(), func(time.Time) tea.Msg { return lookDue{a.turn} })
}
