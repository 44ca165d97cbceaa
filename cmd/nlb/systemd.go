package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"nlb/balancer"
	"nlb/balancer/events"
)

const (
	// While the kernel refuses, systemd's start timeout is pushed ahead by
	// startGrace every startNews: a restart would cure nothing.
	startNews  = 10 * time.Second
	startGrace = 30 * time.Second
	// aliveEvery is how often it is looked whether the daemon hangs where no watchdog
	// says how often.
	aliveEvery = 10 * time.Second
)

// tell sends a state to systemd; without systemd it does nothing.
func tell(log *zap.Logger, state string) {
	if _, err := sd.SdNotify(false, state); err != nil {
		log.Warn("systemd was not told", events.SystemdFailed.Field(), zap.String("state", state), zap.Error(err))
	}
}

// supervise tells systemd how the daemon fares until ctx ends (sd_notify(3)): ready
// with the first success, alive as long as alive says so.
func supervise(ctx context.Context, r *balancer.Reconciler, alive func() error, log *zap.Logger) error {
	defer tell(log, sd.SdNotifyStopping)
	interval, err := sd.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("watchdog: %w", err)
	}
	w := watchdog{alive: alive, fed: interval > 0, log: log}
	every := aliveEvery
	if w.fed {
		every = interval / 2 // as sd_watchdog_enabled(3) recommends
	}
	looks := time.NewTicker(every)
	defer looks.Stop()
	news := time.NewTicker(startNews)
	defer news.Stop()
	converged := r.Converged()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-converged:
			log.Info("the kernel holds the configuration", events.DaemonReady.Field())
			tell(log, sd.SdNotifyReady+"\n"+forwarding)
			converged = nil
			news.Stop()
		case <-news.C:
			tell(log, fmt.Sprintf("STATUS=%s\nEXTEND_TIMEOUT_USEC=%d", oneLine(lastError(r)), startGrace.Microseconds()))
		case <-looks.C:
			w.look()
		}
	}
}

// forwarding is what systemctl(1) shows of a daemon that is well.
const forwarding = "STATUS=forwarding"

// A watchdog says when the daemon hangs, and feeds systemd's as long as it does not.
type watchdog struct {
	alive func() error
	fed   bool // there is one at the other end
	log   *zap.Logger
	hangs bool
}

func (w *watchdog) look() {
	err := w.alive()
	switch {
	case err != nil && !w.hangs:
		w.log.Error("a part of the daemon stands still", events.DaemonHangs.Field(), zap.Error(err))
		tell(w.log, "STATUS=hangs: "+oneLine(err))
	case err == nil && w.hangs:
		w.log.Info("what stood still goes on", events.DaemonRecovers.Field())
		tell(w.log, forwarding)
	}
	w.hangs = err != nil
	if !w.hangs && w.fed {
		tell(w.log, sd.SdNotifyWatchdog)
	}
}

// oneLine is the error's text as sd_notify(3) takes it, where a line ends a variable.
func oneLine(err error) string {
	return strings.ReplaceAll(fmt.Sprint(err), "\n", "; ")
}

func lastError(r *balancer.Reconciler) error {
	if s := r.Snapshot(); s != nil {
		return s.Err
	}
	return nil
}

// tellReloading begins a reload for systemd (Type=notify-reload needs the time);
// tellReloaded ends it.
func tellReloading(log *zap.Logger) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		log.Warn("systemd was not told", events.SystemdFailed.Field(), zap.Error(err))
		return
	}
	tell(log, fmt.Sprintf("%s\nMONOTONIC_USEC=%d", sd.SdNotifyReloading, now.Nano()/int64(time.Microsecond)))
}

// tellReloaded ends a reload for systemd, whatever came of it. A daemon that was not
// ready before it is not for that reason: supervise says when.
func tellReloaded(log *zap.Logger, r *balancer.Reconciler) {
	select {
	case <-r.Converged():
		tell(log, sd.SdNotifyReady)
	default:
	}
}
