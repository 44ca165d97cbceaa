package main

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"

	"github.com/spf13/pflag"
	"go.uber.org/zap"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/balancer/events"
	"nlb/balancer/metrics"
	"nlb/balancer/ready"
	"nlb/balancer/web"
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
	gauge      *gauge
	http       *web.Server

	events *events.Ring
	health http.Handler // of /livez and /readyz

	reloading sync.Mutex      // one reload at a time
	settings  config.Settings // reloading
	reloads   reloadRecord
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
	status.SetNumbers(d.kernel.nft.Numbers())
	status.Reload = d.reloads.status()
	d.gauge.describe(ctx, status)
	return status, nil
}

// Events implements control.Daemon.
func (d *daemon) Events() *events.Ring { return d.events }

// Health implements control.Daemon.
func (d *daemon) Health() http.Handler { return d.health }

// checkHealth makes the handler of /livez and /readyz, and returns what has to be so
// for a daemon that is alive.
func (d *daemon) checkHealth() (alive ready.Checks) {
	alive = ready.Checks{
		ready.Loop(d.reconciler.Turned, ready.AliveWithin),
		ready.Probes("scheduler", d.checks.overdue, ready.AliveWithin),
	}
	d.health = ready.Handler(alive, ready.Checks{
		ready.Kernel(d.reconciler.Snapshot, ready.FreshWithin),
		ready.Probes("probes", d.checks.overdue, ready.ProbedWithin),
	})
	return alive
}

// Reload implements control.Daemon. What came of it is logged, whoever asked.
func (d *daemon) Reload(ctx context.Context) error {
	d.reloading.Lock()
	defer d.reloading.Unlock()
	begun := time.Now()
	tellReloading(d.log)
	defer tellReloaded(d.log, d.reconciler)
	err := d.reload(ctx)
	d.reloads.note(begun, err)
	if err != nil {
		d.log.Error("reload failed, the former configuration stays in force", events.ConfigReloadFailed.Field(), zap.Error(err))
	}
	return err
}

// reload needs reloading. It finds all that it can find wrong before it touches
// anything. What was begun is finished even if ctx ends: health checks and routing
// must not follow different files.
func (d *daemon) reload(ctx context.Context) error {
	cfg, err := config.Load(d.path, d.flags)
	if err != nil {
		return err
	}
	if err := d.kernel.supports(cfg.Spec); err != nil {
		return err
	}
	if cfg.Spec.Forwards() {
		if err := d.kernel.flows.flows.Expect(); err != nil {
			return err
		}
	}
	// The loop is to tell the relay of it. Asked here, one that hangs keeps no verdict
	// waiting.
	if err := d.kernel.relay.Answers(ctx); err != nil {
		return err
	}
	var inForce *balancer.Spec
	if s := d.reconciler.Snapshot(); s != nil {
		inForce = s.Spec
	}
	if err := d.reconciler.SetSpec(context.WithoutCancel(ctx), cfg.Spec); err != nil {
		return err
	}
	if !cfg.Spec.Forwards() {
		d.kernel.flows.flows.ExpectNone()
	}
	logDataplaneNotes(d.log, inForce, cfg.Spec)
	d.checks.set(cfg.Spec)
	d.adopt(cfg.Settings)
	return nil
}

// A reloadRecord remembers what came of reloads. It has a lock of its own: a status
// does not wait for a reload.
type reloadRecord struct {
	loaded               time.Time // when the file was first
	mu                   sync.Mutex
	attempted, succeeded time.Time // mu
	err                  error     // mu; of the last one
	attempts, failures   uint64    // mu
}

// note takes in a reload that began at a time and is over.
func (r *reloadRecord) note(begun time.Time, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.attempted, r.err = begun, err
	r.attempts++
	if err != nil {
		r.failures++
		return
	}
	r.succeeded = time.Now()
}

func (r *reloadRecord) status() control.Reload {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := control.Reload{
		LastAttemptAt: r.attempted.UTC(), LastSuccessAt: r.succeeded.UTC(), Success: r.err == nil,
		AttemptsTotal: r.attempts, FailuresTotal: r.failures,
	}
	if r.err != nil {
		s.Error = r.err.Error()
	}
	return s
}

// reading counts the first load as a success, too.
func (r *reloadRecord) reading() metrics.Reload {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := metrics.Reload{OK: r.err == nil, Succeeded: r.loaded}
	if r.succeeded.After(r.loaded) {
		out.Succeeded = r.succeeded
	}
	return out
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
				events.ConfigNeedsRestart.Field(), zap.String("setting", c.name), zap.String("in_force", c.was), zap.String("in_file", c.is))
		}
	}
}
