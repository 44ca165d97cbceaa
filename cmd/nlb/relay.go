package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"nlb/balancer/control"
	"nlb/config"
	"nlb/proxyproto/worker"
)

// relaySocket is where the relay that belongs to a daemon is asked.
func relaySocket(daemon string) string { return strings.TrimSuffix(daemon, ".sock") + "-relay.sock" }

func newRelay() *cobra.Command {
	var (
		o   worker.WorkerOptions
		log config.LogSettings
	)
	cmd := &cobra.Command{
		Use:   "relay",
		Short: "Run the worker that relays connections with PROXY v2 headers",
		Long: `relay moves the bytes of connections to target groups with client_ip proxy_protocol_v2.
serve starts it when there is such a group, unless one runs already, such as a service of
its own. It has no configuration: serve tells it what to do, over a socket, and it goes on
when serve is gone. It gives up root once its socket is open.

Started while another one runs, it takes over that one's listening sockets without a
pause, and lets it finish its connections: that is how to upgrade it.

With --stay it is a service of its own, such as nlb-relay.service: it does not end for
want of something to do, and SIGHUP makes it start the program on disk anew, which takes
over as above.

SIGTERM stops it from accepting and lets its connections finish, up to --retire-after; a
second one, or SIGINT, ends it at once.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger, _, err := newLogger(log, cmd.ErrOrStderr())
			if err != nil {
				return usageError{err}
			}
			defer func() { _ = logger.Sync() }()
			o.Log, o.Version = logger.Named("relay"), version()
			return worker.Run(context.WithoutCancel(cmd.Context()), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Socket, "socket", relaySocket(control.DefaultSocket), "where serve tells it what to do")
	f.DurationVar(&o.RetireAfter, "retire-after", worker.DefaultRetireAfter, "how long connections may go on when it retires")
	f.StringVar(&o.User, "user", worker.DefaultUser, "whom to become when started by root; empty: nobody else")
	f.IntVar(&o.MaxConnections, "max-connections", 0, "how many connections to hold; 0: as many as open files allow")
	f.BoolVar(&o.Stay, "stay", false, "stay without anything to do, and start a successor on SIGHUP: for a service of its own")
	f.StringVar(&log.Level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&log.Format, "log-format", "console", "console or json")
	return cmd
}

// newRelayManager returns the daemon's side of the relay. Only root can start one
// that has fewer privileges than itself: for others a service must.
func newRelayManager(daemonSocket string, settings config.LogSettings, log *zap.Logger) (*worker.Manager, error) {
	program := ""
	if os.Geteuid() == 0 {
		var err error
		if program, err = os.Executable(); err != nil {
			return nil, fmt.Errorf("start a relay: %w", err)
		}
	}
	socket := relaySocket(daemonSocket)
	return worker.New(worker.ManagerOptions{
		Socket: socket, Program: program, Version: version(), Log: log.Named("relay"),
		Args: func() []string {
			return []string{"relay", "--socket", socket, "--log-level", settings.Level, "--log-format", settings.Format}
		},
	}), nil
}

// stopTimeout bounds how long nlb clear waits for a relay to end.
const stopTimeout = 10 * time.Second

// relayTotals are what the relay counted of connections that no target got, and
// other events.
func relayTotals(s worker.Stats) map[string]uint64 {
	return map[string]uint64{
		"relay_accepted":      s.Accepted,
		"relay_refused":       s.Refused,
		"relay_failed":        s.Failed,
		"relay_exhausted":     s.Exhausted,
		"relay_no_target":     s.NoTarget,
		"relay_no_port":       s.NoPort,
		"relay_idle_timeouts": s.IdleTimeouts,
	}
}
