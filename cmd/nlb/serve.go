package main

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sync/errgroup"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/balancer/events"
	"nlb/balancer/ready"
	"nlb/balancer/web"
	"nlb/config"
)

func newServe() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "serve -c FILE",
		Short: "Run the load balancer",
		Long: `serve makes the kernel forward as the file says, keeps it so and checks the targets.
SIGHUP reloads the file. SIGTERM and SIGINT stop the daemon and leave the kernel
forwarding; nlb clear ends that too.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			path, err := configFile(cmd.Flags())
			if err != nil {
				return err
			}
			return serve(cmd.Context(), path, cmd.Flags(), socket, cmd.ErrOrStderr())
		},
	}
	addConfig(cmd.Flags())
	addSocket(cmd.Flags(), &socket)
	cmd.Flags().String("log-level", "", "overrides log.level of the file")
	cmd.Flags().String("log-format", "", "overrides log.format of the file")
	cmd.Flags().String("metrics-address", "", "overrides metrics.address of the file")
	return cmd
}

// serve runs the daemon until ctx ends.
func serve(ctx context.Context, path string, flags *pflag.FlagSet, socket string, stderr io.Writer) (err error) {
	// From the start: it would kill a daemon that begins.
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	// It outlives the reader of its log: Go ends who writes to a stderr that nobody
	// can read any more, unless it asks to be told.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	cfg, err := config.Load(path, flags)
	if err != nil {
		return err
	}
	log, level, err := newLogger(cfg.Log, stderr)
	if err != nil {
		return err
	}
	defer func() { _ = log.Sync() }()
	ring := events.NewRing(events.DefaultSize, time.Now())
	log = log.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core { return zapcore.NewTee(c, ring.Core(logEncoding())) }))
	held, err := control.Acquire(stateLock(cfg.StateDir))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, held.Release()) }()
	key, err := balancer.LoadOrCreateKey(cfg.StateDir)
	if err != nil {
		return err
	}
	drains, err := balancer.LoadDrains(cfg.StateDir)
	if err != nil {
		return err
	}
	k, err := openKernel(cfg.StateDir, socket, cfg.Log, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	if err := k.supports(cfg.Spec); err != nil {
		return err
	}
	if !cfg.Spec.Forwards() {
		k.flows.flows.ExpectNone()
	}
	if cfg.Dataplane == "auto" {
		log.Info("dataplane nftables was chosen: it does all that a file can ask for", events.DataplaneWasChosen.Field(), zap.NamedError("ipvs", k.ipvs.Probe()))
	}
	logDataplaneNotes(log, nil, cfg.Spec)
	door, err := control.Listen(ctx, socket)
	if err != nil {
		return err
	}
	health, holds := recallHealth(cfg.StateDir, log)
	reconciler := balancer.NewReconciler(balancer.Options{
		Parts: k.parts, Router: k.router, Log: log, Key: key, Spec: cfg.Spec,
		Health: health, Holds: holds, Drains: drains,
		KeepDrains:     func(d balancer.Drains) error { return d.Save(cfg.StateDir) },
		Registered:     recallRegistered(cfg.StateDir, log),
		KeepRegistered: func(spec *balancer.Spec) error { return balancer.SaveRegistered(cfg.StateDir, spec) },
	})
	d := &daemon{
		path: path, flags: flags, log: log, level: level, settings: cfg.Settings,
		reconciler: reconciler, checks: newChecks(reconciler.SetHealth, reconciler.SourceFor), kernel: k,
		events: ring, reloads: reloadRecord{loaded: time.Now()},
		gauge: newGauge(k.flows.flows.Usage, log.Named("conntrack")),
	}
	alive := d.checkHealth()
	d.checks.set(cfg.Spec)
	d.http = web.NewServer(cfg.Metrics.Address, newMux(d), log.Named("http"))
	log.Info("nlb starts", events.DaemonStarted.Field(), zap.String("version", version()), zap.String("config", path), zap.String("socket", socket))
	ctx, stop := announceStop(ctx, log)
	defer stop()
	err = d.run(ctx, door, hangups, alive)
	log.Info("nlb stops, the kernel goes on forwarding", events.DaemonStopped.Field())
	return err
}

// announceStop returns a context that ends once ctx has and that was said: who follows
// the events hears of it.
func announceStop(ctx context.Context, log *zap.Logger) (inner context.Context, stop func()) {
	inner, cancel := context.WithCancel(context.WithoutCancel(ctx))
	forget := context.AfterFunc(ctx, func() {
		log.Info("nlb is asked to stop", events.DaemonStopping.Field())
		cancel()
	})
	return inner, func() {
		forget()
		cancel()
	}
}

// run joins all that runs: the first to fail ends the others.
func (d *daemon) run(ctx context.Context, door *control.Socket, hangups <-chan os.Signal, alive ready.Checks) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.reconciler.Run(ctx) })
	g.Go(func() error {
		// Which source a probe takes where the kernel's is a VIP follows from the
		// routes, which the first pass finds.
		if d.attempted(ctx) {
			return d.checks.run(ctx)
		}
		return nil
	})
	g.Go(func() error { return d.kernel.relay.Run(ctx) })
	g.Go(func() error { return d.kernel.flows.flows.Run(ctx) })
	g.Go(func() error { return d.gauge.Run(ctx) })
	g.Go(func() error { return balancer.NewSweeper(d.reconciler, d.kernel.flows, d.log).Run(ctx) })
	g.Go(func() error { return balancer.NewIdleKeeper(d.reconciler, d.kernel.flows, d.log).Run(ctx) })
	g.Go(func() error { return balancer.NewObserver(d.reconciler, d.kernel.tally, d.log).Run(ctx) })
	g.Go(func() error { return rememberHealth(ctx, d.settings.StateDir, d.reconciler.Snapshot, d.log) })
	g.Go(func() error { return supervise(ctx, d.reconciler, alive.Err, d.log) })
	g.Go(func() error { return d.reloadOn(ctx, hangups) })
	g.Go(func() error { return d.http.Run(ctx) })
	g.Go(func() error {
		// Those who ask earlier wait: there is nothing to say before the first pass.
		d.attempted(ctx)
		return control.Serve(ctx, door, d, d.log)
	})
	return g.Wait()
}

// attempted waits for the first pass, and reports whether there was one.
func (d *daemon) attempted(ctx context.Context) bool {
	select {
	case <-d.reconciler.Attempted():
		return true
	case <-ctx.Done():
		return false
	}
}

func (d *daemon) reloadOn(ctx context.Context, hangups <-chan os.Signal) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hangups:
			_ = d.Reload(ctx) // it has logged what came of it
		}
	}
}
