package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/config"
	"nlb/proxyproto/worker"
)

// standardStateDir is the default of state_dir in the file, which clear does
// not read.
const standardStateDir = "/var/lib/nlb"

func newClear() *cobra.Command {
	var (
		socket, stateDir string
		force            bool
		out              output
	)
	cmd := &cobra.Command{
		Use:   "clear",
		Short: "Remove everything of ours from the kernel",
		Long: `clear removes our rules, virtual services and VIPs, gives back the sysctls we set, and prints what it
did. Flows through the balancer end, so that the state folder's list of registered
targets, targets.json, goes too: a later start has none to drain. The rest of the
folder stays, and so does what others installed.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			release, alone, err := keepDaemonsOut(socket, stateDir, force)
			if err != nil {
				return err
			}
			plans, err := clearKernel(cmd.Context(), stateDir, socket)
			// A daemon that goes on puts back what its list says, and no flow of a
			// half-cleared kernel is known to have ended.
			if alone && err == nil {
				err = balancer.ForgetRegistered(stateDir)
			}
			return errors.Join(err, printPlans(cmd.OutOrStdout(), out, plans), release())
		},
	}
	addSocket(cmd.Flags(), &socket)
	addOutput(cmd, &out)
	cmd.Flags().StringVar(&stateDir, "state-dir", defaultStateDir(), "the daemon's state folder")
	cmd.Flags().BoolVar(&force, "force", false, "clear although a daemon runs, which will put everything back")
	return cmd
}

func defaultStateDir() string {
	if dir := os.Getenv("NLB_STATE_DIR"); dir != "" {
		return dir
	}
	return standardStateDir
}

// keepDaemonsOut takes the locks of a daemon, so that none starts meanwhile.
// Alone is false if one runs and is to be ignored.
func keepDaemonsOut(socket, stateDir string, force bool) (release func() error, alone bool, err error) {
	alone = true
	var held []*control.Lock
	release = func() error {
		var errs []error
		for _, l := range held {
			errs = append(errs, l.Release())
		}
		return errors.Join(errs...)
	}
	for _, path := range []string{control.SocketLock(socket), stateLock(stateDir)} {
		if _, err := os.Stat(filepath.Dir(path)); errors.Is(err, os.ErrNotExist) {
			continue // no daemon was ever here
		}
		l, err := control.Acquire(path)
		switch {
		case err == nil:
			held = append(held, l)
		case force && errors.Is(err, control.ErrHeld):
			alone = false
		case errors.Is(err, control.ErrHeld):
			return nil, false, errors.Join(fmt.Errorf(
				"a daemon runs and would put everything back: stop it first, or use --force: %w", err), release())
		default:
			return nil, false, errors.Join(err, release())
		}
	}
	return release, alone, nil
}

func stateLock(dir string) string { return filepath.Join(dir, "nlb.lock") }

// clearKernel empties every Part, also when another one fails, and lists what
// was done.
func clearKernel(ctx context.Context, stateDir, socket string) ([]balancer.PartPlan, error) {
	k, err := openKernel(stateDir, socket, config.LogSettings{}, zap.NewNop())
	if err != nil {
		return nil, err
	}
	var (
		done []balancer.PartPlan
		errs []error
	)
	for _, p := range k.parts {
		errs = append(errs, balancer.Converge(ctx, []balancer.Part{p}, nil, func(p balancer.PartPlan) {
			done = append(done, p)
		}))
	}
	stopping, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	if err := worker.Stop(stopping, relaySocket(socket)); err != nil && !errors.Is(err, worker.ErrNotRunning) {
		errs = append(errs, fmt.Errorf("stop the relay: %w", err))
	}
	return done, errors.Join(append(errs, k.close())...)
}
