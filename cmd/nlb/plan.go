package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/config"
)

func newPlan() *cobra.Command {
	var (
		socket string
		out    output
	)
	cmd := &cobra.Command{
		Use:   "plan -c FILE",
		Short: "Show what serve or a reload would change in the kernel",
		Long: `plan prints the changes as the commands of the kernel's own tools, and makes none.
When a daemon runs, its health is the one that counts.

Exit codes: 0 nothing to change, 1 failed, 2 changes.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			path, err := configFile(cmd.Flags())
			if err != nil {
				return err
			}
			cfg, err := config.Load(path, cmd.Flags())
			if err != nil {
				return err
			}
			plans, seen, inForce, err := plan(cmd.Context(), cfg, socket)
			if err != nil {
				return err
			}
			// In JSON there is no place for a remark.
			remarks := cmd.OutOrStdout()
			if out == jsonText {
				remarks = cmd.ErrOrStderr()
			}
			if err := printOverrides(remarks, seen.Drains); err != nil {
				return err
			}
			if err := printHeaderChanges(remarks, inForce, cfg.Spec); err != nil {
				return err
			}
			if err := printDataplaneNotes(remarks, inForce, cfg.Spec); err != nil {
				return err
			}
			if err := printPlans(cmd.OutOrStdout(), out, plans); err != nil {
				return err
			}
			if len(plans) > 0 {
				return exitChanges
			}
			return nil
		},
	}
	addConfig(cmd.Flags())
	addSocket(cmd.Flags(), &socket)
	addOutput(cmd, &out)
	return cmd
}

// planAttempts is how often a plan is made at most while the daemon is at work.
const planAttempts = 5

// plan lists the Parts that would change something, what was taken into account,
// and the Spec that is in force, if one is, as far as it is known. It is made again
// when the daemon wrote meanwhile: half of what was seen is from before that.
func plan(ctx context.Context, cfg *config.Config, socket string) (changes []balancer.PartPlan, seen balancer.View, inForce *balancer.Spec, err error) {
	k, err := openKernel(cfg.StateDir, socket, cfg.Log, zap.NewNop())
	if err != nil {
		return nil, seen, nil, err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	if err := k.supports(cfg.Spec); err != nil {
		return nil, seen, nil, err
	}
	client := control.NewClient(socket)
	status, err := ask(ctx, client)
	if err != nil {
		return nil, seen, nil, err
	}
	var plans []balancer.PartPlan
	for range planAttempts {
		if status != nil {
			k.nft.Know(status.Numbers())
		}
		seen, inForce, err = lookAfter(ctx, cfg, status, k.router)
		if err != nil {
			return nil, seen, nil, err
		}
		plans, err = balancer.PlanAll(ctx, k.parts, balancer.Forward(cfg.Spec, seen))
		if err != nil {
			return nil, seen, nil, err
		}
		before := status
		if status, err = ask(ctx, client); err != nil {
			return nil, seen, nil, err
		}
		if wroteNothing(before, status) {
			break
		}
	}
	for _, p := range plans {
		if !p.Plan.Empty() {
			changes = append(changes, p)
		}
	}
	return changes, seen, inForce, nil
}

// wroteNothing reports whether the kernel is as the daemon left it before, going by
// what it said then and now; nil is said where none runs.
func wroteNothing(before, now *control.Status) bool {
	if before == nil || now == nil {
		return before == now
	}
	return before.Apply.Generation == now.Apply.Generation && before.Apply.WritesTotal == now.Apply.WritesTotal
}

// printOverrides says where the plan differs from the file, because a target was
// drained at run time.
func printOverrides(w io.Writer, drains balancer.Drains) error {
	keys := slices.SortedFunc(maps.Keys(drains), balancer.TargetKey.Compare)
	for _, k := range keys {
		d := drains[k]
		if d.Removed {
			continue // follows from the file
		}
		_, err := fmt.Fprintf(w, "# override: %s %s is drained since %s, until nlb undrain %s %s\n",
			k.Group, k.AddrPort, d.Since.UTC().Format(time.RFC3339), k.Group, k.AddrPort)
		if err != nil {
			return err
		}
	}
	return nil
}

// ask is the status of the daemon, nil where none runs.
func ask(ctx context.Context, client *control.Client) (*control.Status, error) {
	status, err := client.Status(ctx)
	if errors.Is(err, control.ErrNotRunning) {
		return nil, nil
	}
	return status, err
}

// look sees what the daemon would see.
func look(ctx context.Context, cfg *config.Config, client *control.Client, router balancer.Router) (seen balancer.View, inForce *balancer.Spec, err error) {
	status, err := ask(ctx, client)
	if err != nil {
		return seen, nil, err
	}
	return lookAfter(ctx, cfg, status, router)
}

// lookAfter sees what the daemon of that status would see, or one that starts, if the
// status is nil.
func lookAfter(ctx context.Context, cfg *config.Config, status *control.Status, router balancer.Router) (seen balancer.View, inForce *balancer.Spec, err error) {
	drainsAfter := balancer.Drains.Follow
	if status != nil {
		seen, inForce = status.Seen()
	} else {
		seen.Health, seen.Holds = recallHealth(cfg.StateDir, zap.NewNop())
		if inForce = recallRegistered(cfg.StateDir, zap.NewNop()); inForce != nil {
			inForce.Dataplane = cfg.Spec.Dataplane // what it was, only the kernel knows
		}
		drainsAfter = balancer.Drains.Restart
	}
	seen.Now = time.Now()
	drains, err := balancer.LoadDrains(cfg.StateDir)
	if err != nil {
		return seen, inForce, err
	}
	seen.Drains = drainsAfter(drains, inForce, cfg.Spec, seen.Now)
	seen.Key, err = balancer.LoadKey(cfg.StateDir)
	if errors.Is(err, fs.ErrNotExist) {
		seen.Key, err = balancer.NewKey(), nil // as serve would draw one
	}
	if err != nil {
		return seen, inForce, err
	}
	seen.Routes, err = router.Routes(ctx, balancer.RoutedAddrs(cfg.Spec, seen.Drains), cfg.Spec.HasVIP)
	if err == nil && cfg.Spec.Flowtable {
		seen.Links, err = router.Links(ctx)
	}
	return seen, inForce, err
}

// A change is one Part's share of a printed plan.
type change struct {
	Part  string   `json:"part"`
	Lines []string `json:"lines"`
}

func printPlans(w io.Writer, out output, plans []balancer.PartPlan) error {
	changes := []change{}
	for _, p := range plans {
		changes = append(changes, change{Part: p.Part, Lines: p.Plan.Lines()})
	}
	if out == jsonText {
		return printJSON(w, changes)
	}
	for _, c := range changes {
		for _, line := range c.Lines {
			if _, err := fmt.Fprintln(w, abridge(line)); err != nil {
				return err
			}
		}
	}
	return nil
}

// abridge shortens a list of elements that nobody reads to the end, such as
// the thousands of slots of a group. The JSON form has all of them.
func abridge(line string) string {
	const longest = 240
	if len(line) <= longest {
		return line
	}
	cut := strings.LastIndex(line[:longest], ", ")
	if cut < 0 || !strings.HasSuffix(line, " }") {
		return line
	}
	return fmt.Sprintf("%s, … %d more }", line[:cut], strings.Count(line[cut:], ", "))
}
