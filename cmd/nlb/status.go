package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"nlb/balancer/control"
)

// How often --watch looks.
const watchInterval = time.Second

func newStatus() *cobra.Command {
	var (
		socket string
		out    output
		watch  bool
	)
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show listeners, target groups and targets",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client := control.NewClient(socket)
			if watch {
				return watchStatus(cmd.Context(), cmd.OutOrStdout(), client, out)
			}
			return showStatus(cmd.Context(), cmd.OutOrStdout(), client, out)
		},
	}
	addSocket(cmd.Flags(), &socket)
	addOutput(cmd, &out)
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "show it again every second until interrupted")
	return cmd
}

func showStatus(ctx context.Context, w io.Writer, client *control.Client, out output) error {
	status, err := client.Status(ctx)
	if err != nil {
		return err
	}
	if out == jsonText {
		return printJSON(w, status)
	}
	return renderStatus(w, status, time.Now())
}

// watchStatus ends without an error when it is interrupted.
func watchStatus(ctx context.Context, w io.Writer, client *control.Client, out output) error {
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		if out == table {
			// Home, and clear to the end (ECMA-48, CUP and ED).
			if _, err := fmt.Fprint(w, "\x1b[H\x1b[2J"); err != nil {
				return err
			}
		}
		err := showStatus(ctx, w, client, out)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
