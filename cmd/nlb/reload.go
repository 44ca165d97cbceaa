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
		Long: `reload returns when the new configuration is in force. A file with mistakes is refused
before anything is touched, and each mistake is told with its place in the file. Whatever
the failure is, the former configuration stays in force. nlb plan shows before what a
reload will change in the kernel.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return control.NewClient(socket).Reload(cmd.Context())
		},
	}
	addSocket(cmd.Flags(), &socket)
	return cmd
}
