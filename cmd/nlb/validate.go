package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newValidate() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "validate -c FILE",
		Short: "Check a configuration file and touch nothing",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			path, err := configFile(cmd.Flags())
			if err != nil {
				return err
			}
			cfg, err := load(path, cmd.Flags())
			if err != nil {
				return err
			}
			targets := 0
			for _, g := range cfg.Spec.TargetGroups {
				targets += len(g.Targets)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is valid: %d VIPs, %d listeners, %d target groups, %d targets\n",
				path, len(cfg.Spec.VIPs), len(cfg.Spec.Listeners), len(cfg.Spec.TargetGroups), targets)
			return err
		},
	}
	addConfig(cmd.Flags())
	return cmd
}
