package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"nlb/config"
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
			cfg, err := config.Load(path, cmd.Flags())
			if err != nil {
				return err
			}
			targets := 0
			for _, g := range cfg.Spec.TargetGroups {
				targets += len(g.Targets)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is valid: %s, %s, %s, %s\n", path,
				several(len(cfg.Spec.VIPs), "VIP"), several(len(cfg.Spec.Listeners), "listener"),
				several(len(cfg.Spec.TargetGroups), "target group"), several(targets, "target"))
			return err
		},
	}
	addConfig(cmd.Flags())
	return cmd
}

func several(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
