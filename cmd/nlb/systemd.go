package main

import (
	"context"
	"fmt"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"nlb/balancer"
)

const (
	// While the kernel refuses, systemd's start timeout is pushed ahead by
	// startGrace every startNews: a restart would cure nothing.
	startNews  = 10 * time.Second
	startGrace = 30 * time.Second
	// A reconciler without a pass for so many resyncs hangs.
	hungResyncs = 6
)

// tell sends a state to systemd; without systemd it does nothing.
func tell(log *zap.Logger, state string) {
	if _, err := sd.SdNotify(false, state); err != nil {
		log.Warn("systemd was not told", zap.String("state", state), zap.Error(err))
	}
}

// supervise tells systemd how the Reconciler fares until ctx ends (sd_notify(3)):
// ready with the first success, alive as long as it makes passes.
func supervise(ctx context.Context, r *balancer.Reconciler, log *zap.Logger) error {
	defer tell(log, sd.SdNotifyStopping)
	interval, err := sd.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("watchdog: %w", err)
	}
	var alive <-chan time.Time
	if interval > 0 {
		t := time.NewTicker(interval / 2)
		defer t.Stop()
		alive = t.C
	}
	news := time.NewTicker(startNews)
	defer news.Stop()
	converged := r.Converged()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-converged:
			tell(log, sd.SdNotifyReady+"\nSTATUS=forwarding")
			converged = nil
			news.Stop()
		case <-news.C:
			tell(log, fmt.Sprintf("STATUS=%v\nEXTEND_TIMEOUT_USEC=%d", lastError(r), startGrace.Microseconds()))
		case <-alive:
			if s := r.Snapshot(); s == nil || time.Since(s.Passed) < hungResyncs*balancer.DefaultResync {
				tell(log, sd.SdNotifyWatchdog)
			}
		}
	}
}

func lastError(r *balancer.Reconciler) error {
	if s := r.Snapshot(); s != nil {
		return s.Err
	}
	return nil
}

// tellReloading begins a reload for systemd (Type=notify-reload needs the time);
// sd.SdNotifyReady ends it.
func tellReloading(log *zap.Logger) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		log.Warn("systemd was not told", zap.Error(err))
		return
	}
	tell(log, fmt.Sprintf("%s\nMONOTONIC_USEC=%d", sd.SdNotifyReloading, now.Nano()/int64(time.Microsecond)))
}
