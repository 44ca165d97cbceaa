// Command nlb is a Linux load balancer for TCP and UDP with the model of the AWS
// Network Load Balancer.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"nlb/bench/lab"
	"nlb/config"
)

// Exit codes.
const (
	exitFine   = 0
	exitFailed = 1
	exitUsage  = 2
)

// exitChanges is the exit code of plan when there is something to change.
const exitChanges = exitStatus(2)

// An exitStatus is an error that says nothing: the output has said it all.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// A usageError is a command line that makes no sense.
type usageError struct{ error }

func main() {
	lab.MaybeRunAgent()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	// A second signal kills: whoever asks twice does not want to wait.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	understood := false
	root.PersistentPreRun = func(*cobra.Command, []string) { understood = true }
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)

	var (
		status   exitStatus
		usage    usageError
		problems config.Problems
	)
	switch {
	case err == nil:
		return exitFine
	case errors.As(err, &status):
		return int(status)
	case errors.As(err, &usage), !understood:
		fmt.Fprintf(stderr, "nlb: %v\nSee nlb help.\n", err)
		return exitUsage
	case errors.As(err, &problems):
		fmt.Fprintln(stderr, err) // begins with file:line:column, which editors understand
	default:
		fmt.Fprintf(stderr, "nlb: %v\n", err)
	}
	return exitFailed
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "nlb",
		Short: "A Linux load balancer with the model of the AWS Network Load Balancer",
		Long: `nlb balances TCP and UDP by programming the kernel, and lets each target group
choose how the client's address travels to its targets.

Exit codes: 0 fine, 1 failed, 2 usage error; plan: 0 nothing to change, 2 changes;
doctor: 1 if a finding is an error.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(*cobra.Command, []string) error {
			return usageError{errors.New("a command is missing")}
		},
	}
	root.AddCommand(
		newServe(), newValidate(), newPlan(), newReload(), newStatus(), newTop(), newEvents(), newDrain(), newUndrain(), newFlows(), newExplain(),
		newVerify(), newDoctor(), newLab(), newRelay(), newSchema(), newClear(), newVersion(), newMan(),
	)
	return root
}
