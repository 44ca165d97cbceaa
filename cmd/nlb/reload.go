package main

import (
	"github.com/spf13/cobra"

	"nlb/balancer/control"
)

func newReload() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "reload",
		Short: "Make the daemon read its file again",
		Long: `reload returns when the new configuration is in force. When it fails, it says why,
and the former configuration stays in force.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return control.NewClient(socket).Reload(cmd.Context())
		},
	}
	addSocket(cmd.Flags(), &socket)
	return cmd
}
