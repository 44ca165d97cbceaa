package main

import (
	"context"
	"errors"
	"sync"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/pflag"
	"go.uber.org/zap"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/config"
)

// A daemon is what runs while nlb serves; it answers on the control socket.
type daemon struct {
	path       string
	flags      *pflag.FlagSet
	log        *zap.Logger
	level      zap.AtomicLevel
	reconciler *balancer.Reconciler
	checks     *checks
	kernel     *kernel

	reloading sync.Mutex      // one reload at a time
	settings  config.Settings // reloading
}

var _ control.Daemon = (*daemon)(nil)

// Status implements control.Daemon.
func (d *daemon) Status(ctx context.Context) (*control.Status, error) {
	snapshot := d.reconciler.Snapshot()
	if snapshot == nil {
		return nil, errNoPass
	}
	counted, err := d.kernel.tally.counts(ctx)
	status := control.NewStatus(snapshot, counted, err)
	if errors.Is(err, errRelaySilent) {
		uncountRelayed(status)
	}
	d.checks.describe(status)
	return status, nil
}

// Reload implements control.Daemon. What was begun is finished even if ctx
// ends: health checks and routing must not follow different files.
func (d *daemon) Reload(ctx context.Context) error {
	d.reloading.Lock()
	defer d.reloading.Unlock()
	tellReloading(d.log)
	defer tell(d.log, sd.SdNotifyReady)
	cfg, err := config.Load(d.path, d.flags)
	if err != nil {
		return err
	}
	if err := d.kernel.supports(cfg.Spec); err != nil {
		return err
	}
	var inForce *balancer.Spec
	if s := d.reconciler.Snapshot(); s != nil {
		inForce = s.Spec
	}
	if err := d.reconciler.SetSpec(context.WithoutCancel(ctx), cfg.Spec); err != nil {
		return err
	}
	logDataplaneNotes(d.log, inForce, cfg.Spec)
	d.checks.set(cfg.Spec)
	d.adopt(cfg.Settings)
	return nil
}

// Drain implements control.Daemon.
func (d *daemon) Drain(ctx context.Context, t control.TargetName) error {
	return d.reconciler.Drain(context.WithoutCancel(ctx), t.Group, t.Address, t.Port)
}

// Undrain implements control.Daemon.
func (d *daemon) Undrain(ctx context.Context, t control.TargetName) error {
	return d.reconciler.Undrain(context.WithoutCancel(ctx), t.Group, t.Address, t.Port)
}

// adopt takes over what of the process can change while it runs, and says what
// cannot. It needs reloading.
func (d *daemon) adopt(s config.Settings) {
	if level, err := zap.ParseAtomicLevel(s.Log.Level); err == nil { // config has checked it
		d.level.SetLevel(level.Level())
	}
	was := d.settings
	for _, c := range []struct{ name, was, is string }{
		{"state_dir", was.StateDir, s.StateDir},
		{"log.format", was.Log.Format, s.Log.Format},
		{"metrics.address", was.Metrics.Address, s.Metrics.Address},
	} {
		if c.was != c.is {
			d.log.Warn("setting changes with a restart only",
				zap.String("setting", c.name), zap.String("in_force", c.was), zap.String("in_file", c.is))
		}
	}
}
