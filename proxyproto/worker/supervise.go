package worker

import (
	"context"
	"errors"
	"time"

	"go.uber.org/zap"

	"nlb/balancer/events"
)

const (
	// The pause before a worker is started again after one that died soon.
	firstPause = 50 * time.Millisecond
	lastPause  = 5 * time.Second
	// soon is the age below which a worker that died makes the next one wait.
	soon = 10 * time.Second
)

// Run keeps a worker running as long as there is something to relay, until ctx
// ends. Then it closes its own ends and returns nil: the worker goes on.
//
// A worker that is there at the beginning is adopted. One that died is replaced
// at once, and later and later if it dies again and again. The first one of each
// other version is replaced by takeover; another of the same version stays.
func (m *Manager) Run(ctx context.Context) error {
	defer m.close()
	s := supervisor{Manager: m, tried: make(map[string]bool)}
	for ctx.Err() == nil {
		life, hello, err := s.attach(ctx)
		switch {
		case err == nil:
			s.attend(ctx, life, hello)
		case errors.Is(err, ErrNotRunning) && !m.wanted():
			s.pid, s.failures = 0, 0
			m.await(ctx, 0)
		case errors.Is(err, ErrNotRunning):
			s.revive(ctx)
		case ctx.Err() == nil:
			m.o.Log.Error("relay worker does not answer", events.RelaySilent.Field(), zap.Error(err))
			m.await(ctx, lastPause)
		}
	}
	return nil
}

// A supervisor is the state of Run.
type supervisor struct {
	*Manager
	pid   int       // of the worker that was attended last; 0: there was none
	since time.Time // when that began
	// failures is how many workers in a row had to be replaced soon.
	failures int
	// tried has the versions that a worker was to be replaced for. It is not
	// done again: the program on disk, or whoever else starts workers, may be of
	// another version than we are for good, and workers would never rest.
	tried map[string]bool
}

// attach connects to the worker for as long as it lives, and makes sure that it
// and we have the same sockets and table.
func (s *supervisor) attach(ctx context.Context) (link, Hello, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l, err := dial(ctx, s.o.Socket)
	if err != nil {
		return link{}, Hello{}, err
	}
	hello, err := l.hello(ctx, opWatch)
	if err == nil {
		err = s.agree(ctx, hello)
	}
	if err != nil {
		l.close()
		return link{}, Hello{}, err
	}
	return l, hello, nil
}

// agree gives a worker what its predecessor was given last, and learns from it
// what nobody has told us yet.
func (m *Manager) agree(ctx context.Context, hello Hello) error {
	if err := m.adopt(ctx, hello); err != nil {
		return err
	}
	if m.table == nil {
		have, err := m.observe(ctx)
		if err != nil {
			return err
		}
		if have.running {
			m.table = have.table
		}
		return nil
	}
	raw, err := encodeTable(m.table)
	if err != nil || hash(raw) == hello.Hash {
		return err
	}
	return m.give(ctx, m.table)
}

// attend waits until the worker hangs up or ctx ends.
func (s *supervisor) attend(ctx context.Context, life link, hello Hello) {
	defer life.close()
	switch {
	case s.pid == hello.PID:
	case s.pid == 0:
		s.o.Log.Info("relay worker is attended", events.RelayAttended.Field(), zap.Int("pid", hello.PID), zap.String("version", hello.Version))
	default:
		s.o.Log.Info("relay worker is attended", events.RelayAttended.Field(), zap.Int("pid", hello.PID), zap.String("version", hello.Version),
			zap.Int("after", s.pid))
	}
	if s.pid != hello.PID {
		s.pid, s.since = hello.PID, time.Now()
	}
	if hello.Version != s.o.Version && !s.tried[hello.Version] {
		s.tried[hello.Version] = true
		s.replace(ctx, hello)
	}
	stop := context.AfterFunc(ctx, life.close)
	defer stop()
	_, _ = life.receive(0) // it never says anything
}

// replace lets a worker of our version take over. A failure leaves the old one,
// which serves as well as it did.
func (s *supervisor) replace(ctx context.Context, old Hello) {
	log := s.o.Log.With(zap.Int("pid", old.PID), zap.String("version", old.Version), zap.String("wanted", s.o.Version))
	if s.o.Program == "" {
		log.Warn("relay worker is of another version, and its service's to replace: systemctl reload nlb-relay", events.RelayUpgradeFailed.Field())
		return
	}
	log.Info("relay worker is of another version: a new one takes over", events.RelayUpgradeBegan.Field())
	now, err := s.Upgrade(ctx)
	switch {
	case err != nil && ctx.Err() == nil:
		log.Error("relay worker of another version stays: no new one takes over", events.RelayUpgradeFailed.Field(), zap.Error(err))
	case err == nil && now.Version != s.o.Version:
		s.tried[now.Version] = true
		log.Error("the program on disk is of another version than the daemon: restart the daemon, or put the program back",
			events.RelayProgramDiffers.Field(), zap.String("program", s.o.Program), zap.String("on_disk", now.Version))
	}
}

// revive starts a worker in the place of one that died.
func (s *supervisor) revive(ctx context.Context) {
	if s.pid != 0 && time.Since(s.since) >= soon {
		s.failures = 0
	}
	pause := pauseAfter(s.failures)
	s.o.Log.Warn("relay worker is gone: another one is started", events.RelayGone.Field(), zap.Int("pid", s.pid), zap.Duration("after", pause))
	s.failures++
	s.pid = 0
	select {
	case <-ctx.Done():
		return
	case <-time.After(pause):
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.table == nil {
		return
	}
	if err := s.give(ctx, s.table); err != nil && ctx.Err() == nil {
		s.o.Log.Error("relay worker cannot be started", events.RelayStartFailed.Field(), zap.Error(err))
	}
}

// pauseAfter is the pause after so many workers that died soon.
func pauseAfter(failures int) time.Duration {
	if failures == 0 {
		return 0
	}
	pause := firstPause
	for range failures - 1 {
		if pause *= 2; pause >= lastPause {
			return lastPause
		}
	}
	return pause
}

// wanted reports whether there is something to relay.
func (m *Manager) wanted() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.table != nil && len(m.table.Services) > 0
}

// await waits until something changed, for at most so long if that is not 0.
func (m *Manager) await(ctx context.Context, most time.Duration) {
	var timeout <-chan time.Time
	if most > 0 {
		t := time.NewTimer(most)
		defer t.Stop()
		timeout = t.C
	}
	select {
	case <-ctx.Done():
	case <-timeout:
	case <-m.changed:
	}
}

func (m *Manager) tell() {
	select {
	case m.changed <- struct{}{}:
	default:
	}
}

// close gives up our copies of the sockets.
func (m *Manager) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.forgetAll()
	m.table = nil
}
